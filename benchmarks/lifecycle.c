/*
 * lifecycle: the floor of benchmarks/lifecycle.py. A whole life of a machine: made, run to its first
 * exit, closed.
 *
 * For each line of standard input, a number, it does that many and prints the nanoseconds they took.
 */
#include "floor.h"

enum { HLT = 0xf4 };
#define MEMORY_SIZE (64ul << 20)

static void live(const struct host *host)
{
    struct machine m = create_machine(host, MEMORY_SIZE);

    m.memory[CODE] = HLT;
    start_at_code(&m, 0, 0);
    check(ioctl(m.vcpu, KVM_RUN, 0), "KVM_RUN");
    if (m.run->exit_reason != KVM_EXIT_HLT)
        errx(1, "unexpected exit %u", m.run->exit_reason);
    close_machine(host, &m);
}

int main(void)
{
    struct host host = open_host();
    char line[64];

    while (fgets(line, sizeof(line), stdin)) {
        unsigned long lives = strtoul(line, NULL, 0);
        uint64_t start = now_ns(CLOCK_MONOTONIC);

        for (unsigned long i = 0; i < lives; i++)
            live(&host);
        printf("%llu\n", (unsigned long long)(now_ns(CLOCK_MONOTONIC) - start));
        fflush(stdout);
    }
    return 0;
}
