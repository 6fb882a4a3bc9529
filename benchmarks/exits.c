/*
 * exits: the floor of benchmarks/exits.py. Serves port and MMIO exits with the least that is possible:
 * a write sets a value, a read returns it.
 *
 * Started as `exits CODE BX MEMORY_SIZE`: the guest's code in hex, what BX holds, bytes of memory. For
 * each line of standard input, a number, it runs the guest with that number in ECX until HLT and prints
 * the nanoseconds of CPU time it took and how many accesses were served.
 */
#include "floor.h"

static uint64_t served, latch;

static void serve(struct kvm_run *run)
{
    void *data;
    uint32_t size;
    int is_write;

    if (run->exit_reason == KVM_EXIT_IO) {
        data = (uint8_t *)run + run->io.data_offset;
        size = run->io.size;
        is_write = run->io.direction == KVM_EXIT_IO_OUT;
    } else if (run->exit_reason == KVM_EXIT_MMIO) {
        data = run->mmio.data;
        size = run->mmio.len;
        is_write = run->mmio.is_write;
    } else {
        errx(1, "unexpected exit %u", run->exit_reason);
    }
    served++;
    if (is_write) {
        latch = 0;
        memcpy(&latch, data, size);
    } else {
        memcpy(data, &latch, size);
    }
}

static void run_until_halt(struct machine *m)
{
    for (;;) {
        if (ioctl(m->vcpu, KVM_RUN, 0) < 0) {
            if (errno == EINTR)
                continue;
            err(1, "KVM_RUN");
        }
        if (m->run->exit_reason == KVM_EXIT_HLT)
            return;
        serve(m->run);
    }
}

int main(int argc, char **argv)
{
    struct host host = open_host();
    struct machine machine;
    char line[64];

    if (argc != 4)
        errx(2, "usage: exits CODE BX MEMORY_SIZE");
    machine = create_machine(&host, strtoul(argv[3], NULL, 0));
    for (size_t i = 0; argv[1][2 * i]; i++)
        if (sscanf(argv[1] + 2 * i, "%2hhx", machine.memory + CODE + i) != 1)
            errx(2, "the code must be in hex");
    while (fgets(line, sizeof(line), stdin)) {
        uint64_t start;

        served = 0;
        start_at_code(&machine, strtoul(argv[2], NULL, 0), strtoul(line, NULL, 0));
        start = now_ns(CLOCK_THREAD_CPUTIME_ID);
        run_until_halt(&machine);
        printf("%llu %llu\n", (unsigned long long)(now_ns(CLOCK_THREAD_CPUTIME_ID) - start), (unsigned long long)served);
        fflush(stdout);
    }
    return 0;
}
