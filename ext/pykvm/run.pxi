# The run loop: into the guest and back, with the GIL held only to call Python.
#
# Who may touch what while a vCPU runs: its own thread everything; other threads only `kick`, `close` and
# the counters. The GIL orders `running` against kick, so that no kick is lost (see Vcpu.kick).

cdef extern from "<signal.h>" nogil:
    int SIGRTMIN, SA_RESTART
    struct sigaction_t "sigaction":
        void (*sa_handler)(int) noexcept nogil
        int sa_flags
    int sigaction(int, const sigaction_t *, sigaction_t *)

cdef extern from * nogil:
    """
    #include <errno.h>
    #include <signal.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/syscall.h>
    #include <time.h>
    #include <unistd.h>
    #ifndef sigev_notify_thread_id
    #define sigev_notify_thread_id _sigev_un._tid
    #endif

    /* The kick signal's handler. That KVM_RUN returns EINTR is what the signal is for; the flag is for the case
       that the thread was not in KVM_RUN but in a C device. */
    #define PYKVM_THREAD_LOCAL static __thread __attribute__((tls_model("initial-exec")))  /* found without a call */
    PYKVM_THREAD_LOCAL volatile sig_atomic_t pykvm_signalled;
    static void pykvm_handler(int signal_number) { (void)signal_number; pykvm_signalled = 1; }

    /* A number for this thread that no other ever gets, unlike pthread_t. Call with the GIL. */
    static inline unsigned long pykvm_this_thread(void)
    {
        static unsigned long last;
        PYKVM_THREAD_LOCAL unsigned long number;
        if (number == 0)
            number = ++last;
        return number;
    }
    /* Python runs signal handlers on this thread alone. */
    static int pykvm_in_main_thread(void) { return getpid() == (pid_t)syscall(SYS_gettid); }

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
    /* Values of 1 to 8 bytes, little-endian. Each exit moves one or two: the usual sizes without a call. */
    static inline uint64_t pykvm_get(const void *data, uint32_t size)
    {
        uint64_t value = 0;
        switch (size) {
        case 1: return *(const uint8_t *)data;
        case 2: { uint16_t v; memcpy(&v, data, 2); return v; }
        case 4: { uint32_t v; memcpy(&v, data, 4); return v; }
        default: memcpy(&value, data, size <= 8 ? size : 8); return value;
        }
    }
    static inline void pykvm_put(void *data, uint32_t size, uint64_t value)
    {
        switch (size) {
        case 1: memcpy(data, &value, 1); break;
        case 2: memcpy(data, &value, 2); break;
        case 4: memcpy(data, &value, 4); break;
        default: memcpy(data, &value, size <= 8 ? size : 8);
        }
    }
    /* Entries of the dirty ring change hands between KVM and us (KVM API 8.29). */
    #define pykvm_load_acquire(p) __atomic_load_n(p, __ATOMIC_ACQUIRE)
    #define pykvm_store_release(p, v) __atomic_store_n(p, v, __ATOMIC_RELEASE)
    """
    ctypedef void *timer_t
    int pykvm_signalled
    void pykvm_handler(int)
    unsigned long pykvm_this_thread()
    bint pykvm_in_main_thread()
    int pykvm_timer_create(timer_t *timer, int signal_number)
    int pykvm_timer_set(timer_t timer, long ns)
    int timer_delete(timer_t timer)
    uint64_t pykvm_now_ns()
    uint64_t pykvm_get(const void *data, uint32_t size)
    void pykvm_put(void *data, uint32_t size, uint64_t value)
    uint32_t pykvm_load_acquire(uint32_t *p)
    void pykvm_store_release(uint32_t *p, uint32_t value)

cdef enum:
    FIRST_TICK_NS = 1_000_000
    LAST_TICK_NS = 32_000_000
    DR6_BS = 1 << 14  # a single step was done (SDM volume 3, 17.2.3)
    MAX_PARTS = 1024  # of an access that is abandoned: a guest may ask for a string of 2**64 elements
    FORGET_SYNC_AFTER = 64  # exits without a look at the registers, after which KVM stops storing them


cdef int kick_signal = SIGRTMIN + 8


cdef int install_kick_handler() except -1:
    cdef sigaction_t action
    memset(&action, 0, sizeof(action))
    action.sa_handler = pykvm_handler
    action.sa_flags = SA_RESTART  # KVM_RUN returns EINTR all the same; what devices do is not disturbed
    return check(sigaction(kick_signal, &action, NULL), "sigaction")


install_kick_handler()


@cython.internal
cdef class Ticker:
    """Interrupts a thread in KVM_RUN now and then, for what would not end it by itself:

    - With the local APIC in KVM a HLT does not return to us, and one with interrupts off never would: soon, then
      ever more rarely.
    - A signal for Python (Ctrl-C) that arrives just before KVM_RUN has been handled in C by then, and Python's
      share of it would wait for the next exit.
    """

    cdef timer_t timer
    cdef unsigned long thread
    cdef long interval

    def __cinit__(self):
        check(pykvm_timer_create(&self.timer, kick_signal), "timer_create")
        self.thread = pykvm_this_thread()

    def __dealloc__(self):
        if self.thread != 0:
            timer_delete(self.timer)

    cdef void start(self, long interval) noexcept:
        self.interval = interval
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


@cython.final
cdef class Vcpu(VcpuState):
    """A vCPU descriptor, and the loop that runs it. Made by `Vm.create_vcpu`.

    State may be read and set between runs, or by a device that its run has called; from another thread
    while it runs, those calls raise ConfigurationError (KVM would block them until the guest exits).
    """

    cdef bint kicked  # kick() came, and no run has returned for it yet
    cdef bint closing  # close() came while running; the runner completes it
    cdef Ticker ticker  # None: this run needs no ticks, or there is no run
    cdef Ticker spare_ticker  # of the last run that needed one
    # When it was found parked without a break: halted with interrupts off, or waiting for INIT, so that only
    # other vCPUs can wake it. Nanoseconds; parked_since is 0 if it was not.
    cdef uint64_t parked_since
    cdef uint64_t parked_until
    # The exit in the page is not dealt with yet, and the next run starts with it; of string I/O, from this element
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

    cdef int map_run_page(self) except -1:
        cdef void *page = mmap(NULL, self.vm.mmap_size, PROT_READ | PROT_WRITE, MAP_SHARED, self.fd, 0)
        if page == MAP_FAILED:
            fail("mmap of a vCPU", errno)
        self.page = <kvm_run *>page  # SAFETY: unmapped only by the release of a vCPU that is not running
        self.page_size = self.vm.mmap_size
        return 0

    cdef void unmap_run_page(self) noexcept:
        if self.page != NULL:
            munmap(self.page, self.page_size)
            self.page = NULL
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
        self.closing = False
        self.spare_ticker = None
        self.unmap_run_page()
        Fd.close(self)
        self.vm.vcpus.pop(self.index, None)
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
        if self.page.kvm_dirty_regs and self.vm.halts_in_kernel and self.index != 0:
            self.prepare()  # a vCPU that waits for INIT would overwrite the page and not look at it
        if self.vm.halts_in_kernel or pykvm_in_main_thread():
            if self.spare_ticker is None or self.spare_ticker.thread != pykvm_this_thread():
                self.spare_ticker = Ticker()
            self.ticker = self.spare_ticker
            self.ticker.start(FIRST_TICK_NS if self.vm.halts_in_kernel else LAST_TICK_NS)
        self.parked_since = 0
        self.thread = pthread_self()
        self.running = True
        return 0

    cdef int finish(self) except -1:
        self.running = False
        if self.ticker is not None:
            self.ticker.stop()
            self.ticker = None
        if self.closing:
            self.release()
        return 0

    cdef object loop(self, io):
        """Enter the guest and answer its accesses, until there is something to return."""
        cdef Ranges ports, mmio
        cdef int rc = 0
        while True:
            if not self.pending:  # else a device raised in the last run
                ports, mmio = self.vm.ports, self.vm.mmio
                with nogil:
                    rc = self.enter(ports, mmio)
                # gil: everything from here on is for Python's eyes
                self.pending = rc == 0
            if self.vm.coalesced_offset != 0:
                self.deliver_coalesced(io)
            result = None
            if self.pending:
                result = self.answer(io)
                self.pending = False
            elif rc == -EINTR:
                result = self.interrupted()
            elif rc != -EAGAIN:  # EAGAIN: an AP got its INIT or SIPI and is ready to go on
                result = self.run_failed(-rc)
            if result is not None:
                return result

    cdef int enter(self, Ranges ports, Ranges mmio) noexcept nogil:
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
            self.fresh = page.kvm_valid_regs if rc == 0 or rc == -EINTR or rc == -EAGAIN else 0
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
                if not self.serve_io(ports):
                    return 0
            elif page.exit_reason == KVM_EXIT_MMIO:
                if not self.serve_mmio(mmio):
                    return 0
            else:
                return 0
            self.served_count += 1
            if pykvm_signalled:  # it arrived while the device was at work: have KVM_RUN complete and come back
                page.immediate_exit = 1

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
            if recent.write:
                recent.value = pykvm_get(<char *>page + page.io.data_offset, page.io.size)
        elif page.exit_reason == KVM_EXIT_MMIO:
            recent.address = page.mmio.phys_addr
            recent.size = page.mmio.len
            recent.write = page.mmio.is_write
            if recent.write:
                recent.value = pykvm_get(page.mmio.data, page.mmio.len)

    cdef bint serve_io(self, Ranges ports) noexcept nogil:
        """Have a C device do this port access. String I/O may stop midway: pending_index says where."""
        cdef kvm_run *page = self.page
        cdef uint32_t size = page.io.size
        cdef uint64_t value
        cdef char *data
        cdef Range *found = ports.find(page.io.port, size)
        if found == NULL or found.device == NULL:
            return False
        while self.pending_index < page.io.count:
            data = <char *>page + page.io.data_offset + self.pending_index * size
            value = 0
            # SAFETY: the caller holds the table, which keeps the device alive.
            if page.io.direction == KVM_EXIT_IO_OUT:
                if (<CDevice>found.device).c_write(page.io.port - found.first, size, pykvm_get(data, size)) != 0:
                    return False
            else:
                if (<CDevice>found.device).c_read(page.io.port - found.first, size, &value) != 0:
                    return False
                pykvm_put(data, size, value)
            self.pending_index += 1
        return True

    cdef bint serve_mmio(self, Ranges mmio) noexcept nogil:
        """Have a C device do this MMIO access."""
        cdef kvm_run *page = self.page
        cdef uint64_t value = 0
        cdef Range *found = mmio.find(page.mmio.phys_addr, page.mmio.len)
        if found == NULL or found.device == NULL:
            return False
        # SAFETY: the caller holds the table, which keeps the device alive.
        if page.mmio.is_write:
            value = pykvm_get(page.mmio.data, page.mmio.len)
            return (<CDevice>found.device).c_write(page.mmio.phys_addr - found.first, page.mmio.len, value) == 0
        if (<CDevice>found.device).c_read(page.mmio.phys_addr - found.first, page.mmio.len, &value) != 0:
            return False
        pykvm_put(page.mmio.data, 8, value)
        return True

    cdef object answer(self, io):
        """What this exit means: None if the guest can go on, or else the exit as a value."""
        cdef uint32_t reason = self.page.exit_reason
        if reason == KVM_EXIT_IO or reason == KVM_EXIT_MMIO:
            self.dispatch(io)
            return None
        if reason == KVM_EXIT_INTR:
            return self.interrupted()
        if reason == KVM_EXIT_SET_TPR:  # the guest lowered CR8, which concerns a local APIC: here is none
            return None
        return self.exit_value()

    cdef int dispatch(self, io) except -1:
        """Have Python do the access of this exit. If it raises, pending_index says how far it got."""
        cdef kvm_run *page = self.page
        cdef uint32_t size
        if page.exit_reason == KVM_EXIT_MMIO:
            return self.access(io, page.mmio.is_write, page.mmio.phys_addr, page.mmio.len, page.mmio.data)
        size = page.io.size
        while self.pending_index < page.io.count:
            self.access(io, page.io.direction == KVM_EXIT_IO_OUT, page.io.port, size,
                        <char *>page + page.io.data_offset + self.pending_index * size)
            self.pending_index += 1
        return 0

    cdef int access(self, io, bint is_write, uint64_t address, uint32_t size, void *data) except -1:
        """Have a Python device, or else `io`, do one access."""
        cdef bint is_mmio = self.page.exit_reason == KVM_EXIT_MMIO
        cdef Ranges ranges = self.vm.mmio if is_mmio else self.vm.ports
        cdef Range *found = ranges.find(address, size)
        # SAFETY: `ranges` keeps the handler alive, and may be replaced during the call: `handler` holds it too.
        cdef Handler handler = <Handler>found.handler if found != NULL and found.handler != NULL else None
        cdef uint64_t value = 0
        if is_write:
            value = pykvm_get(data, size)
            if handler is not None:
                handler.write(address - found.first, size, value)
            elif is_mmio:
                io.mmio_write(address, size, value)
            else:
                io.port_write(address, size, value)
            return 0
        if handler is not None:
            handler.read(address - found.first, size, &value)
        else:
            value = io.mmio_read(address, size) if is_mmio else io.port_read(address, size)
        pykvm_put(data, size, value)
        return 0

    cdef int abandon(self) except -1:
        """Have KVM complete an access that Python gave up, before registers are set anew."""
        cdef kvm_run *page = self.page
        if not self.pending or self.running or page == NULL:
            return 0
        self.pending = False
        page.immediate_exit = 1  # completes the access and enters no guest (KVM API 5, "immediate_exit")
        for _ in range(MAX_PARTS):
            if page.exit_reason == KVM_EXIT_IO and page.io.direction == KVM_EXIT_IO_IN:
                memset(<char *>page + page.io.data_offset, 0xFF, page.io.size * page.io.count)
            elif page.exit_reason == KVM_EXIT_MMIO and not page.mmio.is_write:
                memset(page.mmio.data, 0xFF, 8)
            elif page.exit_reason != KVM_EXIT_IO and page.exit_reason != KVM_EXIT_MMIO:
                break
            if ioctl(self.fd, KVM_RUN, 0) < 0:  # 0: another part, as of a string, or of an access across pages
                break
        page.immediate_exit = self.kicked
        self.fresh = 0
        return 0

    cdef object interrupted(self):
        """After EINTR: a kick, a final halt, or a signal of Python's (None: go on)."""
        global pykvm_signalled
        pykvm_signalled = 0
        PyErr_CheckSignals()  # what it raises leaves a kick for the next run
        self.page.immediate_exit = 0
        if self.closing:
            return Interrupted(self.index, "close")
        if self.kicked:
            self.kicked = False
            return Interrupted(self.index, "kick")
        if self.ticker is not None:
            self.ticker.slow_down()
        return Halt(self.index) if self.finally_halted() else None

    cdef bint finally_halted(self) except *:
        """Whether nothing inside the machine can wake any of its vCPUs again.

        A parked vCPU is woken by another that executes. So when the times at which each was found parked,
        without a break, have a moment in common, then nobody executed at that moment or ever will.
        """
        cdef Vcpu other
        cdef uint64_t since, until
        cdef bint newly
        if not self.vm.halts_in_kernel or not self.look_whether_parked(&newly):
            return False
        since, until = self.parked_since, self.parked_until
        for reference in list(self.vm.vcpus.values()):
            other = reference()
            if other is None or other is self:
                continue
            if not other.running:  # then it is up to us to look
                if not other.is_parked():
                    return False
                continue
            if newly:
                other.interrupt_run()  # have it look at itself
            since = max(since, other.parked_since if other.parked_since != 0 else ~<uint64_t>0)
            until = min(until, other.parked_until)
        return since <= until

    cdef bint look_whether_parked(self, bint *newly) noexcept:
        newly[0] = self.parked_since == 0
        if not self.is_parked():
            self.parked_since = 0
            return False
        self.parked_until = pykvm_now_ns()
        if newly[0]:
            self.parked_since = self.parked_until
        return True

    cdef bint is_parked(self) noexcept:
        cdef kvm_mp_state mp
        if ioctl(self.fd, KVM_GET_MP_STATE, &mp) < 0:
            return False
        self.fresh = 0  # that may have put an INIT into effect
        if mp.mp_state == KVM_MP_STATE_HALTED:
            return not self.page.if_flag
        return mp.mp_state == KVM_MP_STATE_UNINITIALIZED

    cdef void interrupt_run(self) noexcept:
        """Make a run in progress, or else the next one, come out of KVM_RUN and look around.

        immediate_exit is set before the signal is sent: a thread that has not yet entered KVM_RUN finds
        the flag, one that is inside gets the signal.
        """
        self.page.immediate_exit = 1
        if self.running:
            pthread_kill(self.thread, kick_signal)

    def kick(self) -> None:
        """Make the current or else the next run return Interrupted; from any thread, never lost."""
        if self.page != NULL:
            self.kicked = True
            self.interrupt_run()

    def clear_kick(self) -> None:
        """Forget a kick that no run has returned for; only while no run is in progress."""
        if self.page != NULL and not self.running:
            self.kicked = False
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
        if error == EINVAL and self.page.kvm_dirty_regs & KVM_SYNC_X86_SREGS:
            self.page.kvm_dirty_regs = 0
            fail("KVM_SET_SREGS", error, "KVM refused the system registers when it was about to run with them")
        if error == EFAULT:
            return Unhandled(self.index, "KVM_RUN: Bad address", (("errno", error),))
        fail("KVM_RUN", error)

    def complete_msr(self, uint64_t value=0, bint error=False) -> None:
        """Answer a KVM_EXIT_X86_RDMSR or _WRMSR exit: with a value, or with #GP in the guest.

        Raises ConfigurationError if the last run did not end with such an exit.
        """
        self.prepare()
        if self.page == NULL:
            fail("KVM_RUN", EBADF, "the vCPU is closed")
        if self.page.exit_reason != KVM_EXIT_X86_RDMSR and self.page.exit_reason != KVM_EXIT_X86_WRMSR:
            raise ConfigurationError(f"vCPU {self.index} waits for no MSR: its last exit was another")
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
        """The last exits, oldest first: (KVM_EXIT_* number, write, address, size, count, value written)."""
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
        self.prepare()
        if self.page == NULL:
            fail("KVM_RUN", EBADF, "the vCPU is closed")
        if self.vm.coalesced_offset == 0:
            return []
        self.take_coalesced()
        result, self.vm.coalesced = self.vm.coalesced, []
        return result

    cdef int take_coalesced(self) except -1:
        """Move what is in the ring, which all vCPUs of the VM share, to the list of the VM."""
        cdef kvm_coalesced_mmio_ring *ring
        cdef kvm_coalesced_mmio entry
        cdef uint32_t room = (sysconf(_SC_PAGESIZE) - sizeof(kvm_coalesced_mmio_ring)) // sizeof(kvm_coalesced_mmio)
        ring = <kvm_coalesced_mmio_ring *>(<char *>self.page + self.vm.coalesced_offset)
        access = structs().CoalescedAccess
        while ring.first != pykvm_load_acquire(&ring.last):
            entry = ring.coalesced_mmio[ring.first % room]
            # Off the ring before anything else: Python code may let another vCPU's thread come here.
            pykvm_store_release(&ring.first, (ring.first + 1) % room)
            self.vm.coalesced.append(access(entry.phys_addr, raw(entry.data, min(entry.len, 8)), bool(entry.pio)))
        return 0

    cdef int deliver_coalesced(self, io) except -1:
        """Do the writes that KVM has collected, before whatever the guest did after them.

        One that raises stays first in the list, for the next run.
        """
        with self.vm.delivering:
            self.take_coalesced()
            while self.vm.coalesced:
                access = self.vm.coalesced.pop(0)
                write = io.port_write if access.pio else io.mmio_write
                try:
                    write(access.address, len(access.data), int.from_bytes(access.data, "little"))
                except BaseException:
                    self.vm.coalesced.insert(0, access)
                    raise
        return 0

    def collect_dirty(self) -> list:
        """The pages this vCPU has written, from its dirty ring, as DirtyGfn (KVM API 8.29).

        Needs Vm.enable_cap(KVM_CAP_DIRTY_LOG_RING, bytes) before the vCPU was made, and
        Vm.reset_dirty_rings afterwards.
        """
        cdef kvm_dirty_gfn *gfn
        cdef kvm_dirty_gfn found
        cdef uint32_t entries = self.vm.dirty_ring_bytes // sizeof(kvm_dirty_gfn)
        cdef void *ring
        result = []
        if self.page == NULL:
            fail("KVM_RUN", EBADF, "the vCPU is closed")
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
            found = gfn[0]
            pykvm_store_release(&gfn.flags, KVM_DIRTY_GFN_F_RESET)
            self.ring_next += 1
            result.append(structs().DirtyGfn(found.slot, found.offset, found.flags))
            gfn = &self.ring[self.ring_next % entries]
        return result


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
