/*
 * floor.h: a minimal virtual machine on /dev/kvm, the floor that the benchmarks compare with.
 *
 * One vCPU in real mode, memory from address 0, code at 0x8000, registers exchanged through the
 * shared page. Compile as C: as C++ the size of struct kvm_cpuid2 is another. Source: Linux
 * Documentation/virt/kvm/api.rst.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { CODE = 0x8000, CPUID_ENTRIES = 256 };
#define KVM_IDENTITY_MAP 0xfffbc000ull
#define KVM_TSS 0xfffbd000ul

struct host {
    int kvm;
    size_t run_size;
    struct kvm_cpuid2 *cpuid;
};

struct machine {
    int vm, vcpu, memory_fd;
    struct kvm_run *run;
    uint8_t *memory;
    size_t memory_size;
};

static inline long check(long rc, const char *what)
{
    if (rc < 0)
        err(1, "%s", what);
    return rc;
}

static inline void *map(int fd, size_t size)
{
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED)
        err(1, "mmap");
    return p;
}

static inline uint64_t now_ns(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

/* What a process needs once, however many machines it makes. */
static inline struct host open_host(void)
{
    struct host host = {.kvm = check(open("/dev/kvm", O_RDWR | O_CLOEXEC), "open /dev/kvm")};

    host.run_size = check(ioctl(host.kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
    host.cpuid = calloc(1, sizeof(*host.cpuid) + CPUID_ENTRIES * sizeof(struct kvm_cpuid_entry2));
    host.cpuid->nent = CPUID_ENTRIES;
    check(ioctl(host.kvm, KVM_GET_SUPPORTED_CPUID, host.cpuid), "KVM_GET_SUPPORTED_CPUID");
    if (ioctl(host.kvm, KVM_CHECK_EXTENSION, KVM_CAP_SYNC_REGS) <= 0)
        errx(1, "this KVM lacks KVM_CAP_SYNC_REGS");
    return host;
}

static inline struct machine create_machine(const struct host *host, size_t memory_size)
{
    struct machine m = {.memory_size = memory_size};
    struct kvm_userspace_memory_region region = {.memory_size = memory_size};
    uint64_t identity_map = KVM_IDENTITY_MAP;

    m.vm = check(ioctl(host->kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
    check(ioctl(m.vm, KVM_SET_IDENTITY_MAP_ADDR, &identity_map), "KVM_SET_IDENTITY_MAP_ADDR");
    check(ioctl(m.vm, KVM_SET_TSS_ADDR, KVM_TSS), "KVM_SET_TSS_ADDR");
    m.memory_fd = check(memfd_create("floor", MFD_CLOEXEC), "memfd_create");
    check(ftruncate(m.memory_fd, memory_size), "ftruncate");
    m.memory = map(m.memory_fd, memory_size);
    region.userspace_addr = (uintptr_t)m.memory;
    check(ioctl(m.vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
    m.vcpu = check(ioctl(m.vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
    m.run = map(m.vcpu, host->run_size);
    check(ioctl(m.vcpu, KVM_SET_CPUID2, host->cpuid), "KVM_SET_CPUID2");
    return m;
}

static inline void close_machine(const struct host *host, struct machine *m)
{
    close(m->vcpu);
    munmap(m->run, host->run_size);
    close(m->vm);
    munmap(m->memory, m->memory_size);
    close(m->memory_fd);
}

static inline struct kvm_segment real_mode_segment(uint8_t type)
{
    return (struct kvm_segment){.limit = 0xffff, .type = type, .present = 1, .s = 1};
}

/* Sets the state in which the code starts. KVM_RUN takes it from the shared page. */
static inline void start_at_code(struct machine *m, uint64_t rbx, uint64_t rcx)
{
    struct kvm_segment data = real_mode_segment(3);

    m->run->s.regs.regs = (struct kvm_regs){.rip = CODE, .rflags = 2, .rsp = 0x7c00, .rbx = rbx, .rcx = rcx};
    m->run->s.regs.sregs = (struct kvm_sregs){
        .cs = real_mode_segment(11), .ds = data, .es = data, .fs = data, .gs = data, .ss = data,
        .ldt = {.limit = 0xffff, .type = 2, .present = 1},
        .tr = {.limit = 0xffff, .type = 11, .present = 1},
        .gdt = {.limit = 0xffff}, .idt = {.limit = 0x3ff},
        .cr0 = 0x10, .apic_base = 0xfee00900,
    };
    m->run->kvm_dirty_regs = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS;
}
