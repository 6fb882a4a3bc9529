# The run loop: into the guest and back, with the GIL held only to call Python.
#
# Who may touch what while a vCPU runs: its own thread everything; other threads only `kick`, `close` and
# the counters. `lock` orders `running` against kick, so that no kick is lost (see Vcpu.kick).

cdef extern from "<signal.h>" nogil:
    int SIGRTMIN
    struct sigaction_t "sigaction":
        void (*sa_handler)(int) noexcept nogil
    int sigaction(int, const sigaction_t *, sigaction_t *)

cdef extern from * nogil:
    """
    #include <errno.h>
    #include <signal.h>
    #include <sys/syscall.h>
    #include <time.h>
    #include <unistd.h>
    #ifndef sigev_notify_thread_id
    #define sigev_notify_thread_id _sigev_un._tid
    #endif

    /* A timer that signals one thread, since the handler's EINTR has to reach the thread in KVM_RUN. */
    static int pykvm_timer_create(timer_t *timer, int signal_number)
    {
        struct sigevent event = {0};
        event.sigev_notify = SIGEV_THREAD_ID;
        event.sigev_signo = signal_number;
        event.sigev_notify_thread_id = (pid_t)syscall(SYS_gettid);
        return timer_create(CLOCK_MONOTONIC, &event, timer);
    }
    static int pykvm_timer_set(timer_t timer, long ns)
    {
        struct itimerspec spec = {{ns / 1000000000L, ns % 1000000000L}, {ns / 1000000000L, ns % 1000000000L}};
        return timer_settime(timer, 0, &spec, NULL);
    }
    static unsigned long long pykvm_now_ns(void)
    {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (unsigned long long)t.tv_sec * 1000000000ULL + t.tv_nsec;
    }
    /* Entries of the dirty ring change hands between KVM and us (KVM API 8.29). */
    #define pykvm_load_acquire(p) __atomic_load_n(p, __ATOMIC_ACQUIRE)
    #define pykvm_store_release(p, v) __atomic_store_n(p, v, __ATOMIC_RELEASE)
    """
    ctypedef void *timer_t
    int pykvm_timer_create(timer_t *timer, int signal_number)
    int pykvm_timer_set(timer_t timer, long ns)
    int timer_delete(timer_t timer)
    uint64_t pykvm_now_ns()
    uint32_t pykvm_load_acquire(uint32_t *p)
    void pykvm_store_release(uint32_t *p, uint32_t value)

cdef enum:
    FIRST_TICK_NS = 1_000_000
    LAST_TICK_NS = 64_000_000
    FORGET_SYNC_AFTER = 64  # exits without a look at the registers, after which KVM stops storing them

DR6_BS = 1 << 14


cdef void ignore(int signal_number) noexcept nogil:
    """The kick signal's handler: that KVM_RUN returns EINTR is all it is for."""


cdef int kick_signal = SIGRTMIN + 8


cdef int install_kick_handler() except -1:
    cdef sigaction_t action
    memset(&action, 0, sizeof(action))
    action.sa_handler = ignore
    return check(sigaction(kick_signal, &action, NULL), "sigaction")


install_kick_handler()


cdef class Ticker:
    """Interrupts a thread in KVM_RUN now and then, ever more rarely, so that a final halt is noticed.

    With the local APIC in KVM a HLT does not return to us, and one with interrupts off never would.
    """

    cdef timer_t timer
    cdef pthread_t thread
    cdef long interval

    def __cinit__(self):
        check(pykvm_timer_create(&self.timer, kick_signal), "timer_create")
        self.thread = pthread_self()

    def __dealloc__(self):
        timer_delete(self.timer)

    cdef void start(self) noexcept:
        self.interval = FIRST_TICK_NS
        pykvm_timer_set(self.timer, self.interval)

    cdef void slow_down(self) noexcept:
        if self.interval < LAST_TICK_NS:
            self.interval *= 2
            pykvm_timer_set(self.timer, self.interval)

    cdef void stop(self) noexcept:
        pykvm_timer_set(self.timer, 0)


cdef enum:
    RING_SIZE = 32  # how many recent exits are remembered, for explanations
    KINDS = 64  # exit reasons that are counted one by one


cdef struct Recent:
    uint64_t address
    uint64_t value
    uint32_t reason
    uint32_t size
    uint32_t count
    uint8_t write


cdef class Vcpu(VcpuState):
    """A vCPU descriptor, and the loop that runs it. Made by `Vm.create_vcpu`.

    State may be read and set between runs, or by a device that its run has called; from another thread
    while it runs, those calls raise ConfigurationError (KVM would block them until the guest exits).
    """

    # Running: guarded by `lock`, which kick takes without the GIL
    cdef pthread_mutex_t lock
    cdef bint closing  # close() came while running; the runner completes it
    cdef Ticker ticker
    cdef bint confirming
    cdef volatile bint parked  # halted with interrupts off, or waiting for INIT: only others can wake it
    # An access that a Python device has not finished: replayed by the next run
    cdef bint pending
    cdef uint32_t pending_index
    # Counters
    cdef bint timing
    cdef uint64_t guest_ns
    cdef uint64_t started_ns
    cdef uint64_t counts[KINDS]
    cdef uint64_t served_count
    cdef Recent recent[RING_SIZE]
    cdef uint64_t recent_count
    cdef kvm_dirty_gfn *ring
    cdef size_t ring_bytes
    cdef uint32_t ring_next

    def __init__(self) -> None:
        raise TypeError("a Vcpu is made by Vm.create_vcpu()")

    def __cinit__(self):
        pthread_mutex_init(&self.lock, NULL)

    def __dealloc__(self):
        self.unmap_run_page()
        pthread_mutex_destroy(&self.lock)

    cdef int map_run_page(self) except -1:
        cdef void *page = mmap(NULL, self.vm.mmap_size, PROT_READ | PROT_WRITE, MAP_SHARED, self.fd, 0)
        if page == MAP_FAILED:
            fail("mmap of a vCPU", errno)
        self.page = <kvm_run *>page  # SAFETY: unmapped only by the release of a vCPU that is not running
        self.page_size = self.vm.mmap_size
        return 0

    cdef void unmap_run_page(self) noexcept:
        cdef void *page = self.page
        pthread_mutex_lock(&self.lock)
        self.page = NULL
        pthread_mutex_unlock(&self.lock)
        if page != NULL:
            munmap(page, self.page_size)
        if self.ring != NULL:
            munmap(self.ring, self.ring_bytes)
            self.ring = NULL

    def close(self) -> None:
        """Close the vCPU. While it runs on another thread: makes it stop, and it is closed as it leaves."""
        if self.fd < 0:
            return
        if self.running:
            self.closing = True
            self.interrupt_run()
            return
        self.release()

    cdef void release(self):
        Fd.close(self)
        self.closing = False
        self.ticker = None
        self.unmap_run_page()
        self.vm.open_vcpus -= 1
        if self in self.vm.vcpus:
            self.vm.vcpus.remove(self)
        self.vm.unpin()

    def run(self, io):
        """Execute the guest until something ends it; returns an `Exit`.

        Accesses that memory does not answer go to `io` (`pykvm.interfaces.IO`), called on this thread. What
        it raises leaves `run` as it is, and the next run offers the same access again; setting registers
        in between abandons it. Raises KeyboardInterrupt and what other Python signal handlers raise.
        """
        self.begin()
        try:
            return self.loop(io)
        finally:
            self.finish()

    cdef int begin(self) except -1:
        if self.page == NULL:
            fail("KVM_RUN", EBADF, "the vCPU is closed")
        if self.running:
            raise ConfigurationError(f"vCPU {self.index} is already running")
        if self.vm.halts_in_kernel:
            if self.ticker is None or not pthread_equal(self.ticker.thread, pthread_self()):
                self.ticker = Ticker()
            self.ticker.start()
        self.parked = False
        self.confirming = False
        pthread_mutex_lock(&self.lock)
        self.thread = pthread_self()
        self.running = True
        pthread_mutex_unlock(&self.lock)
        return 0

    cdef void finish(self):
        pthread_mutex_lock(&self.lock)
        self.running = False
        pthread_mutex_unlock(&self.lock)
        if self.ticker is not None:
            self.ticker.stop()
        if self.closing:
            self.release()

    cdef object loop(self, io):
        cdef ServedRanges served
        cdef int rc
        if self.pending:
            self.dispatch(io)
        while True:
            if self.closing:
                return Interrupted(self.index, "close")
            served = self.vm.served
            with nogil:
                rc = self.enter(served)
            # gil: everything from here on is for Python's eyes
            if self.vm.coalescing:
                self.deliver_coalesced(io)
            if rc == 0 and (self.page.exit_reason == KVM_EXIT_IO or self.page.exit_reason == KVM_EXIT_MMIO):
                self.dispatch(io)
            elif rc == 0:
                return self.exit_value()
            elif rc == -EINTR:
                result = self.interrupted()
                if result is not None:
                    return result
            elif rc != -EAGAIN:  # EAGAIN: an AP got its INIT or SIPI and is ready to go on
                return self.run_failed(-rc)

    cdef int enter(self, ServedRanges served) noexcept nogil:
        """KVM_RUN until an exit that Python has to see: 0, or -errno."""
        cdef kvm_run *page = self.page
        cdef uint64_t before = 0
        cdef int rc
        while True:
            if self.timing:
                before = pykvm_now_ns()
            rc = ioctl(self.fd, KVM_RUN, 0)
            if rc < 0:
                rc = -errno
            if self.timing:
                self.guest_ns += pykvm_now_ns() - before
            self.fresh = page.kvm_valid_regs
            self.unread += 1
            if self.unread > FORGET_SYNC_AFTER:
                page.kvm_valid_regs = 0
                self.unread = 0
            if rc < 0:
                self.counts[KVM_EXIT_INTR] += rc == -EINTR
                return rc
            self.count()
            self.pending_index = 0
            if page.exit_reason == KVM_EXIT_IO:
                if served.port_count == 0 or not self.serve_io(served):
                    return 0
            elif page.exit_reason == KVM_EXIT_MMIO:
                if served.mmio_count == 0 or not self.serve_mmio(served):
                    return 0
            else:
                return 0
            self.served_count += 1

    cdef void count(self) noexcept nogil:
        """Remember this exit, for statistics and explanations."""
        cdef kvm_run *page = self.page
        cdef Recent *recent = &self.recent[self.recent_count % RING_SIZE]
        self.recent_count += 1
        self.counts[page.exit_reason if page.exit_reason < KINDS else 0] += 1
        recent.reason = page.exit_reason
        recent.count = 1
        recent.value = 0
        if page.exit_reason == KVM_EXIT_IO:
            recent.address = page.io.port
            recent.size = page.io.size
            recent.count = page.io.count
            recent.write = page.io.direction == KVM_EXIT_IO_OUT
            memcpy(&recent.value, <char *>page + page.io.data_offset, page.io.size)
        elif page.exit_reason == KVM_EXIT_MMIO:
            recent.address = page.mmio.phys_addr
            recent.size = page.mmio.len
            recent.write = page.mmio.is_write
            memcpy(&recent.value, page.mmio.data, 8)

    cdef bint serve_io(self, ServedRanges served) noexcept nogil:
        """Have a C device do this port access. String I/O may stop midway: pending_index says where."""
        cdef kvm_run *page = self.page
        cdef uint32_t size = page.io.size
        cdef uint64_t value
        cdef char *data
        cdef Range *found = find_range(served.ports, served.port_count, page.io.port, size)
        if found == NULL:
            return False
        while self.pending_index < page.io.count:
            data = <char *>page + page.io.data_offset + self.pending_index * size
            value = 0
            # SAFETY: `served` is held by the caller and keeps the device alive.
            if page.io.direction == KVM_EXIT_IO_OUT:
                memcpy(&value, data, size)
                if (<CDevice>found.device).c_write(page.io.port - found.first, size, value) != 0:
                    return False
            else:
                if (<CDevice>found.device).c_read(page.io.port - found.first, size, &value) != 0:
                    return False
                memcpy(data, &value, size)
            self.pending_index += 1
        return True

    cdef bint serve_mmio(self, ServedRanges served) noexcept nogil:
        """Have a C device do this MMIO access."""
        cdef kvm_run *page = self.page
        cdef uint64_t value = 0
        cdef Range *found = find_range(served.mmio, served.mmio_count, page.mmio.phys_addr, page.mmio.len)
        if found == NULL:
            return False
        # SAFETY: `served` is held by the caller and keeps the device alive.
        if page.mmio.is_write:
            memcpy(&value, page.mmio.data, page.mmio.len)
            return (<CDevice>found.device).c_write(page.mmio.phys_addr - found.first, page.mmio.len, value) == 0
        if (<CDevice>found.device).c_read(page.mmio.phys_addr - found.first, page.mmio.len, &value) != 0:
            return False
        memcpy(page.mmio.data, &value, 8)
        return True

    cdef int dispatch(self, io) except -1:
        """Have Python do the access of this exit; if it raises, the access stays pending."""
        cdef kvm_run *page = self.page
        cdef uint32_t size
        cdef uint64_t value = 0
        cdef char *data
        self.pending = True
        if page.exit_reason == KVM_EXIT_MMIO:
            if page.mmio.is_write:
                memcpy(&value, page.mmio.data, page.mmio.len)
                io.mmio_write(page.mmio.phys_addr, page.mmio.len, value)
            else:
                value = io.mmio_read(page.mmio.phys_addr, page.mmio.len)
                memcpy(page.mmio.data, &value, 8)
            self.pending = False
            return 0
        size = page.io.size
        while self.pending_index < page.io.count:
            data = <char *>page + page.io.data_offset + self.pending_index * size
            if page.io.direction == KVM_EXIT_IO_OUT:
                memcpy(&value, data, size)
                io.port_write(page.io.port, size, value)
            else:
                value = io.port_read(page.io.port, size)
                memcpy(data, &value, size)
            self.pending_index += 1
        self.pending = False
        return 0

    cdef int abandon(self) except -1:
        """Have KVM complete an access that Python gave up, before registers are set anew."""
        if not self.pending or self.running or self.page == NULL:
            return 0
        self.pending = False
        if self.page.exit_reason == KVM_EXIT_IO and self.page.io.direction == KVM_EXIT_IO_IN:
            memset(<char *>self.page + self.page.io.data_offset, 0xFF, self.page.io.size * self.page.io.count)
        elif self.page.exit_reason == KVM_EXIT_MMIO and not self.page.mmio.is_write:
            memset(self.page.mmio.data, 0xFF, 8)
        kicked = self.page.immediate_exit
        self.page.immediate_exit = 1  # completes the access and enters no guest (KVM API 5, "immediate_exit")
        ioctl(self.fd, KVM_RUN, 0)
        self.page.immediate_exit = kicked
        self.fresh = 0
        return 0

    cdef object interrupted(self):
        """After EINTR: a kick, a final halt, or a signal of Python's (None: go on)."""
        cdef bint kicked
        pthread_mutex_lock(&self.lock)
        kicked = self.page.immediate_exit
        self.page.immediate_exit = 0
        pthread_mutex_unlock(&self.lock)
        PyErr_CheckSignals()
        if kicked:
            return Interrupted(self.index, "kick")
        if self.ticker is not None:
            self.ticker.slow_down()
        return Halt(self.index) if self.finally_halted() else None

    cdef bint finally_halted(self) except *:
        """Whether nothing inside the machine can wake any of its vCPUs again.

        Found in two rounds when there are several: this one finds itself parked, asks the others to look
        at themselves, and at its next tick they must all have found the same.
        """
        cdef Vcpu other
        cdef bint all_parked = True
        if not self.vm.halts_in_kernel:
            return False
        self.parked = self.is_parked()
        if not self.parked:
            self.confirming = False
            return False
        for other in self.vm.vcpus:
            if other is not self and other.running:
                all_parked = all_parked and other.parked and self.confirming
                other.parked = False
                other.interrupt_run()
        self.confirming = True
        return all_parked

    cdef bint is_parked(self) noexcept:
        cdef kvm_mp_state mp
        if ioctl(self.fd, KVM_GET_MP_STATE, &mp) < 0:
            return False
        if mp.mp_state == KVM_MP_STATE_HALTED:
            return not self.page.if_flag
        return mp.mp_state == KVM_MP_STATE_UNINITIALIZED

    cdef void interrupt_run(self) noexcept:
        """Make a KVM_RUN in progress return EINTR. It may be lost just before entry: only for polling."""
        pthread_mutex_lock(&self.lock)
        if self.running:
            if self.closing:
                self.page.immediate_exit = 1
            pthread_kill(self.thread, kick_signal)
        pthread_mutex_unlock(&self.lock)

    def kick(self) -> None:
        """Make the current or else the next run return Interrupted; from any thread, never lost.

        immediate_exit is set before the signal is sent: a thread that has not yet entered KVM_RUN finds
        the flag, one that is inside gets the signal. The flag stays until a run has returned for it.
        """
        self.kick_nogil()

    cdef void kick_nogil(self) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        if self.page != NULL:
            self.page.immediate_exit = 1
            if self.running:
                pthread_kill(self.thread, kick_signal)
        pthread_mutex_unlock(&self.lock)

    def clear_kick(self) -> None:
        """Forget a kick that no run has returned for; only while no run is in progress."""
        if self.page != NULL and not self.running:
            self.page.immediate_exit = 0

    # What came out

    cdef object exit_value(self):
        """The exit that ends a run, as a value."""
        cdef kvm_run *page = self.page
        cdef uint32_t reason = page.exit_reason
        if reason == KVM_EXIT_HLT:
            return Halt(self.index)
        if reason == KVM_EXIT_SHUTDOWN:
            return Shutdown(self.index)
        if reason == KVM_EXIT_DEBUG:
            kind = "step" if page.debug.arch.dr6 & DR6_BS else "breakpoint"
            return Debug(self.index, kind, page.debug.arch.pc, page.debug.arch.dr6, page.debug.arch.dr7)
        if reason == KVM_EXIT_INTERNAL_ERROR:
            return self.internal_error()
        if reason == KVM_EXIT_INTR:
            return Interrupted(self.index, "kick")
        return unhandled(self.index, page)

    cdef object internal_error(self):
        cdef kvm_run *page = self.page
        code = b""
        if page.internal.suberror == KVM_INTERNAL_ERROR_EMULATION and page.internal.ndata >= 1:
            if page.emulation_failure.flags & KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES:
                code = raw(page.emulation_failure.insn_bytes, min(page.emulation_failure.insn_size, 15))
        from pykvm.kvm.abi import INTERNAL_ERRORS
        detail = INTERNAL_ERRORS.get(page.internal.suberror, f"suberror {page.internal.suberror}")
        return EmulationFailure(self.index, code, page.internal.suberror, detail)

    cdef object run_failed(self, int error):
        """KVM_RUN itself said no."""
        if error == EFAULT and self.page.exit_reason == KVM_EXIT_MEMORY_FAULT:
            return unhandled(self.index, self.page)
        if self.page.kvm_dirty_regs & KVM_SYNC_X86_SREGS:
            self.page.kvm_dirty_regs = 0
            fail("KVM_SET_SREGS", error, "KVM refused the system registers when it was about to run with them")
        if error == EFAULT:
            return Unhandled(self.index, "KVM_RUN: Bad address", (("errno", error),))
        fail("KVM_RUN", error)

    def complete_msr(self, uint64_t value=0, bint error=False) -> None:
        """Answer a KVM_EXIT_X86_RDMSR or _WRMSR exit: with a value, or with #GP in the guest."""
        self.prepare()
        if self.page != NULL:
            self.page.msr.data = value
            self.page.msr.error = error

    def exit_counts(self) -> dict:
        """How many exits of each KVM_EXIT_* number there were."""
        return {reason: self.counts[reason] for reason in range(KINDS) if self.counts[reason]}

    def times(self) -> tuple:
        """(ns in KVM_RUN since `measure_time`, ns on the clock since then, accesses served by C devices)."""
        elapsed = pykvm_now_ns() - self.started_ns if self.timing else 0
        return self.guest_ns, elapsed, self.served_count

    def measure_time(self) -> None:
        """Start to measure the time in the guest; two clock readings an exit from now on."""
        self.guest_ns = 0
        self.started_ns = pykvm_now_ns()
        self.timing = True

    def recent_exits(self) -> list:
        """The last exits, oldest first: (KVM_EXIT_* number, write, address, size, count, value)."""
        cdef uint64_t i
        cdef Recent *r
        result = []
        for i in range(max(0, <int64_t>self.recent_count - RING_SIZE), self.recent_count):
            r = &self.recent[i % RING_SIZE]
            result.append((r.reason, bool(r.write), r.address, r.size, r.count, r.value))
        return result

    # Rings that KVM fills

    def drain_coalesced(self) -> list:
        """The writes that KVM has collected (see Vm.register_coalesced_mmio), oldest first."""
        cdef kvm_coalesced_mmio_ring *ring
        cdef kvm_coalesced_mmio *entry
        cdef uint32_t room
        cdef Py_ssize_t offset = ioctl(self.vm.fd, KVM_CHECK_EXTENSION, KVM_CAP_COALESCED_MMIO)  # in pages
        self.prepare()
        result = []
        if self.page == NULL or offset <= 0:
            fail("KVM_REGISTER_COALESCED_MMIO", EBADF if self.page == NULL else ENOTTY)
        ring = <kvm_coalesced_mmio_ring *>(<char *>self.page + offset * <Py_ssize_t>sysconf(_SC_PAGESIZE))
        room = (sysconf(_SC_PAGESIZE) - sizeof(kvm_coalesced_mmio_ring)) // sizeof(kvm_coalesced_mmio)
        access = structs().CoalescedAccess
        while ring.first != pykvm_load_acquire(&ring.last):
            entry = &ring.coalesced_mmio[ring.first % room]
            result.append(access(entry.phys_addr, raw(entry.data, min(entry.len, 8)), bool(entry.pio)))
            pykvm_store_release(&ring.first, (ring.first + 1) % room)
        return result

    cdef int deliver_coalesced(self, io) except -1:
        for access in self.drain_coalesced():
            value = int.from_bytes(access.data, "little")
            (io.port_write if access.pio else io.mmio_write)(access.address, len(access.data), value)
        return 0

    def collect_dirty(self) -> list:
        """The pages this vCPU has written, from its dirty ring, as DirtyGfn (KVM API 8.29).

        Needs Vm.enable_cap(KVM_CAP_DIRTY_LOG_RING, bytes) before the vCPU was made, and
        Vm.reset_dirty_rings afterwards.
        """
        cdef kvm_dirty_gfn *gfn
        cdef uint32_t entries = self.vm.dirty_ring_bytes // sizeof(kvm_dirty_gfn)
        cdef void *ring
        result = []
        if entries == 0:
            raise ConfigurationError("this VM has no dirty ring: enable KVM_CAP_DIRTY_LOG_RING before its first vCPU")
        if self.ring == NULL:
            ring = mmap(NULL, self.vm.dirty_ring_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, self.fd,
                        KVM_DIRTY_LOG_PAGE_OFFSET * sysconf(_SC_PAGESIZE))
            if ring == MAP_FAILED:
                fail("mmap of a dirty ring", errno)
            self.ring = <kvm_dirty_gfn *>ring
            self.ring_bytes = self.vm.dirty_ring_bytes
        gfn = &self.ring[self.ring_next % entries]
        while pykvm_load_acquire(&gfn.flags) & KVM_DIRTY_GFN_F_DIRTY:
            result.append(structs().DirtyGfn(gfn.slot, gfn.offset, gfn.flags))
            pykvm_store_release(&gfn.flags, KVM_DIRTY_GFN_F_RESET)
            self.ring_next += 1
            gfn = &self.ring[self.ring_next % entries]
        return result


cdef Range *find_range(Range *ranges, int count, uint64_t address, uint32_t size) noexcept nogil:
    """The range that holds all of the access, or NULL."""
    cdef int i
    for i in range(count):
        if ranges[i].first <= address and address <= ranges[i].last and size - 1 <= ranges[i].last - address:
            return &ranges[i]
    return NULL


cdef object unhandled(unsigned int index, kvm_run *page):
    """An exit that this machine has no answer to, with its payload by name."""
    from pykvm.kvm.abi import EXIT_REASONS
    reason = page.exit_reason
    name = EXIT_REASONS.get(reason, f"KVM_EXIT_{reason}")
    if reason == KVM_EXIT_X86_RDMSR or reason == KVM_EXIT_X86_WRMSR:
        return Unhandled(index, name, (("index", page.msr.index), ("data", page.msr.data), ("reason", page.msr.reason)))
    if name == "KVM_EXIT_FAIL_ENTRY":
        return Unhandled(index, name, (
            ("hardware_entry_failure_reason", page.fail_entry.hardware_entry_failure_reason),
            ("cpu", page.fail_entry.cpu)))
    if name == "KVM_EXIT_IOAPIC_EOI":
        return Unhandled(index, name, (("vector", page.eoi.vector),))
    words = <uint64_t *>&page.hw
    return Unhandled(index, name, (("data0", words[0]), ("data1", words[1]), ("data2", words[2])))
