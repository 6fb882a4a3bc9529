# One virtual processor: its state, an ioctl each, and the page it shares with KVM. Running it is in run.pxi.

cdef class VcpuState(Fd):
    """What can be asked of and set in a vCPU between runs: its registers, interrupts, clocks."""

    cdef object __weakref__
    cdef Vm vm
    cdef readonly unsigned int index
    cdef kvm_run *page  # shared with KVM; NULL when closed
    cdef size_t page_size
    cdef uint64_t fresh  # KVM_SYNC_X86_* parts of the page that hold the present state
    cdef unsigned int unread  # exits since someone last looked at synchronised registers
    cdef bint running
    cdef pthread_t thread  # the one that runs it, while running

    def __cinit__(self, Vm vm not None):
        self.vm = vm

    def __init__(self, vm) -> None:
        raise TypeError("a vCPU is made by Vm.create_vcpu()")

    cdef int abandon(self) except -1:
        """Drop an access that a device gave up; see Vcpu."""
        return 0

    cdef int prepare(self) except -1:
        """Before an ioctl on this vCPU: it must not be running elsewhere, and pending registers go first."""
        if self.running and not pthread_equal(self.thread, pthread_self()):
            raise ConfigurationError(
                f"vCPU {self.index} is running on another thread: kick it and wait for its run to end first")
        self.fresh = 0  # before anything can fail: what was set and refused is not the present state
        if self.page == NULL:
            return 0  # closed: the ioctl itself says EBADF
        if self.page.kvm_dirty_regs & KVM_SYNC_X86_SREGS:
            self.page.kvm_dirty_regs &= ~<uint64_t>KVM_SYNC_X86_SREGS
            check(ioctl(self.fd, KVM_SET_SREGS, &self.page.s.regs.sregs), "KVM_SET_SREGS")
        if self.page.kvm_dirty_regs & KVM_SYNC_X86_REGS:
            self.page.kvm_dirty_regs &= ~<uint64_t>KVM_SYNC_X86_REGS
            check(ioctl(self.fd, KVM_SET_REGS, &self.page.s.regs.regs), "KVM_SET_REGS")
        return 0

    cdef bint synchronised(self, uint64_t part) except *:
        """Whether `part` of the shared page holds the present state; asks KVM to keep it there if not."""
        if self.running and not pthread_equal(self.thread, pthread_self()):
            self.prepare()
        if self.page == NULL or not self.vm.sync_regs & part:
            return False
        self.unread = 0
        self.page.kvm_valid_regs |= part
        return ((self.fresh | self.page.kvm_dirty_regs) & part) != 0

    # Registers

    def get_regs(self):
        """General registers, RIP and RFLAGS as Registers."""
        cdef kvm_regs regs
        if self.synchronised(KVM_SYNC_X86_REGS):
            return registers_to_python(&self.page.s.regs.regs)
        check(ioctl(self.fd, KVM_GET_REGS, &regs), "KVM_GET_REGS")
        return registers_to_python(&regs)

    def set_regs(self, value) -> None:
        """Set general registers, RIP and RFLAGS; costs no ioctl where KVM_CAP_SYNC_REGS is there."""
        cdef kvm_regs regs
        registers_from_python(&regs, value)
        self.synchronised(KVM_SYNC_X86_REGS)  # asserts that the vCPU is ours
        self.abandon()
        if self.page != NULL and self.vm.sync_regs & KVM_SYNC_X86_REGS:
            self.page.s.regs.regs = regs
            self.page.kvm_dirty_regs |= KVM_SYNC_X86_REGS
            return
        check(ioctl(self.fd, KVM_SET_REGS, &regs), "KVM_SET_REGS")

    def get_sregs(self):
        """Segments, descriptor tables and control registers as SystemRegisters."""
        cdef kvm_sregs sregs
        if self.synchronised(KVM_SYNC_X86_SREGS):
            return sregs_to_python(&self.page.s.regs.sregs)
        check(ioctl(self.fd, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS")
        return sregs_to_python(&sregs)

    def set_sregs(self, value) -> None:
        """Set segments, tables and control registers. KVM may refuse a bad set only when it next runs."""
        cdef kvm_sregs sregs
        sregs_from_python(&sregs, value)
        self.synchronised(KVM_SYNC_X86_SREGS)
        self.abandon()
        if self.page != NULL and self.vm.sync_regs & KVM_SYNC_X86_SREGS:
            self.page.s.regs.sregs = sregs
            self.page.kvm_dirty_regs |= KVM_SYNC_X86_SREGS
            return
        check(ioctl(self.fd, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS")

    def get_sregs2(self):
        """System registers with the PAE page-directory pointers, as Sregs2."""
        cdef kvm_sregs2 s
        self.prepare()
        memset(&s, 0, sizeof(s))
        check(ioctl(self.fd, KVM_GET_SREGS2, &s), "KVM_GET_SREGS2")
        return structs().Sregs2(sregs_to_python(&s), s.flags, (s.pdptrs[0], s.pdptrs[1], s.pdptrs[2], s.pdptrs[3]))

    def set_sregs2(self, value) -> None:
        """Set system registers and page-directory pointers from an Sregs2."""
        cdef kvm_sregs2 s
        sregs_from_python(&s, value.sregs)
        s.flags = value.flags
        for i in range(4):
            s.pdptrs[i] = value.pdptrs[i]
        self.prepare()
        self.abandon()
        check(ioctl(self.fd, KVM_SET_SREGS2, &s), "KVM_SET_SREGS2")

    def get_fpu(self):
        """x87 and SSE registers as FpuState."""
        cdef kvm_fpu fpu
        self.prepare()
        check(ioctl(self.fd, KVM_GET_FPU, &fpu), "KVM_GET_FPU")
        return fpu_to_python(&fpu)

    def set_fpu(self, value) -> None:
        """Set x87 and SSE registers from an FpuState."""
        cdef kvm_fpu fpu
        fpu_from_python(&fpu, value)
        self.prepare()
        check(ioctl(self.fd, KVM_SET_FPU, &fpu), "KVM_SET_FPU")

    def get_xsave(self) -> bytes:
        """The XSAVE area, 4096 bytes (KVM API 4.41); layout as CPUID leaf 0xD says."""
        cdef kvm_xsave area
        self.prepare()
        check(ioctl(self.fd, KVM_GET_XSAVE, &area), "KVM_GET_XSAVE")
        return raw(&area, sizeof(area))

    def get_xsave2(self) -> bytes:
        """The XSAVE area in full: as many bytes as KVM_CAP_XSAVE2 says (AMX needs more than 4096)."""
        cdef Py_ssize_t size = self.xsave_size("KVM_GET_XSAVE2")
        cdef Block block = Block(size)
        self.prepare()
        check(ioctl(self.fd, KVM_GET_XSAVE2, block.data), "KVM_GET_XSAVE2")
        return raw(block.data, size)

    def set_xsave(self, area: bytes) -> None:
        """Set the XSAVE area from get_xsave or get_xsave2."""
        cdef Block block = Block(max(self.xsave_size("KVM_SET_XSAVE"), len(area)))
        self.prepare()
        memcpy(block.data, PyBytes_AS_STRING(area), len(area))
        check(ioctl(self.fd, KVM_SET_XSAVE, block.data), "KVM_SET_XSAVE")

    cdef Py_ssize_t xsave_size(self, const char *request) except -1:
        """Bytes that KVM reads or writes; only the VM's descriptor can tell."""
        if self.fd < 0:
            fail(request, EBADF)
        if self.vm.fd < 0:
            fail(request, EBADF, "the VM is closed")
        return max(ioctl(self.vm.fd, KVM_CHECK_EXTENSION, KVM_CAP_XSAVE2), <int>sizeof(kvm_xsave))

    def get_xcrs(self) -> dict:
        """Extended control registers by index (XCR0 is 0)."""
        cdef kvm_xcrs arg
        self.prepare()
        memset(&arg, 0, sizeof(arg))
        check(ioctl(self.fd, KVM_GET_XCRS, &arg), "KVM_GET_XCRS")
        return {arg.xcrs[i].xcr: arg.xcrs[i].value for i in range(arg.nr_xcrs)}

    def set_xcrs(self, values) -> None:
        """Set extended control registers by index."""
        cdef kvm_xcrs arg
        if len(values) > 16:
            raise ConfigurationError(f"there are at most 16 XCRs, not {len(values)}")
        memset(&arg, 0, sizeof(arg))
        arg.nr_xcrs = len(values)
        for i, (index, value) in enumerate(values.items()):
            arg.xcrs[i].xcr = index
            arg.xcrs[i].value = value
        self.prepare()
        check(ioctl(self.fd, KVM_SET_XCRS, &arg), "KVM_SET_XCRS")

    def get_msrs(self, indices) -> dict:
        """MSRs by index. Raises KvmError naming the first that cannot be read."""
        self.prepare()
        return read_msrs(self.fd, list(indices))

    def set_msrs(self, values) -> None:
        """Set MSRs, in order. Raises KvmError naming the first that is refused; those before it are set."""
        self.prepare()
        write_msrs(self.fd, dict(values))

    def get_cpuid2(self) -> tuple:
        """The CPUID leaves that this vCPU shows, as CpuidEntry values."""
        self.prepare()
        return read_cpuid(self.fd, KVM_GET_CPUID2, "KVM_GET_CPUID2")

    def set_cpuid2(self, entries) -> None:
        """Set the CPUID leaves; before the first run."""
        cdef Block block = cpuid_from_python(list(entries))
        self.prepare()
        check(ioctl(self.fd, KVM_SET_CPUID2, block.data), "KVM_SET_CPUID2")

    def set_supported_cpuid(self, System system not None, uint32_t cpus=1) -> None:
        """Show the guest everything that KVM supports, with this vCPU's APIC ID and `cpus` processors.

        The same as set_cpuid2(system.get_supported_cpuid()) with leaves 1, 0xB and 0x1F completed,
        without a Python object for each leaf, and asked for once per `system`.
        """
        cdef Block block = system.copy_supported_cpuid()
        cdef kvm_cpuid2 *leaves = <kvm_cpuid2 *>block.data
        cdef kvm_cpuid_entry2 *leaf
        self.prepare()
        for i in range(leaves.nent):
            leaf = &leaves.entries[i]
            if leaf.function == 1:  # EBX: initial APIC ID, addressable processors; EDX bit 28: HTT
                leaf.ebx = (leaf.ebx & 0xFFFF) | (self.index << 24) | (min(cpus, 255) << 16)
                leaf.edx = leaf.edx | (1 << 28) if cpus > 1 else leaf.edx & ~<uint32_t>(1 << 28)
                leaf.ecx |= 1u << 31  # a hypervisor is present
            elif leaf.function == 0xB or leaf.function == 0x1F:
                leaf.edx = self.index
        check(ioctl(self.fd, KVM_SET_CPUID2, leaves), "KVM_SET_CPUID2")

    def get_debugregs(self):
        """DR0..DR3, DR6 and DR7 as DebugRegisters."""
        cdef kvm_debugregs d
        self.prepare()
        memset(&d, 0, sizeof(d))
        check(ioctl(self.fd, KVM_GET_DEBUGREGS, &d), "KVM_GET_DEBUGREGS")
        return state().DebugRegisters((d.db[0], d.db[1], d.db[2], d.db[3]), d.dr6, d.dr7, d.flags)

    def set_debugregs(self, value) -> None:
        """Set the debug registers from a DebugRegisters."""
        cdef kvm_debugregs d
        memset(&d, 0, sizeof(d))
        for i in range(4):
            d.db[i] = value.db[i]
        d.dr6 = value.dr6
        d.dr7 = value.dr7
        d.flags = value.flags
        self.prepare()
        check(ioctl(self.fd, KVM_SET_DEBUGREGS, &d), "KVM_SET_DEBUGREGS")

    def set_guest_debug(self, uint32_t control, debugreg=()) -> None:
        """Single-step or break on the host's behalf (KVM_GUESTDBG_*); up to eight debug registers."""
        cdef kvm_guest_debug arg
        if len(debugreg) > 8:
            raise ConfigurationError(f"there are 8 debug registers, not {len(debugreg)}")
        memset(&arg, 0, sizeof(arg))
        arg.control = control
        for i, value in enumerate(debugreg):
            arg.arch.debugreg[i] = value
        self.prepare()
        check(ioctl(self.fd, KVM_SET_GUEST_DEBUG, &arg), "KVM_SET_GUEST_DEBUG")

    # Interrupts and events

    def get_vcpu_events(self):
        """Exceptions, interrupts and NMIs in flight, as VcpuEvents."""
        cdef kvm_vcpu_events e
        self.prepare()
        memset(&e, 0, sizeof(e))
        check(ioctl(self.fd, KVM_GET_VCPU_EVENTS, &e), "KVM_GET_VCPU_EVENTS")
        return events_to_python(&e)

    def set_vcpu_events(self, value) -> None:
        """Set what is in flight from a VcpuEvents."""
        cdef kvm_vcpu_events e
        events_from_python(&e, value)
        self.prepare()
        check(ioctl(self.fd, KVM_SET_VCPU_EVENTS, &e), "KVM_SET_VCPU_EVENTS")

    def get_lapic(self) -> bytes:
        """The local APIC's registers, 1024 bytes."""
        cdef kvm_lapic_state lapic
        self.prepare()
        check(ioctl(self.fd, KVM_GET_LAPIC, &lapic), "KVM_GET_LAPIC")
        return raw(&lapic, sizeof(lapic))

    def set_lapic(self, value: bytes) -> None:
        """Set the local APIC's registers from get_lapic."""
        cdef kvm_lapic_state lapic
        copy_exactly(&lapic, sizeof(lapic), value, "a local APIC state")
        self.prepare()
        check(ioctl(self.fd, KVM_SET_LAPIC, &lapic), "KVM_SET_LAPIC")

    def get_mp_state(self) -> int:
        """Whether it executes, is halted or waits for INIT (`pykvm.state.MP_STATE_*`)."""
        cdef kvm_mp_state arg
        self.prepare()
        check(ioctl(self.fd, KVM_GET_MP_STATE, &arg), "KVM_GET_MP_STATE")
        return arg.mp_state

    def set_mp_state(self, uint32_t value) -> None:
        """Set the multiprocessing state."""
        cdef kvm_mp_state arg
        arg.mp_state = value
        self.prepare()
        check(ioctl(self.fd, KVM_SET_MP_STATE, &arg), "KVM_SET_MP_STATE")

    def interrupt(self, uint32_t vector) -> None:
        """Queue an external interrupt; only where the local APIC is not in KVM."""
        cdef kvm_interrupt arg
        arg.irq = vector
        self.prepare()
        check(ioctl(self.fd, KVM_INTERRUPT, &arg), "KVM_INTERRUPT")

    def nmi(self) -> None:
        """Queue a non-maskable interrupt."""
        self.prepare()
        check(ioctl(self.fd, KVM_NMI, 0), "KVM_NMI")

    def smi(self) -> None:
        """Queue a system-management interrupt (needs KVM_CAP_X86_SMM)."""
        self.prepare()
        check(ioctl(self.fd, KVM_SMI, 0), "KVM_SMI")

    def tpr_access_reporting(self, bint enabled) -> None:
        """Exit on each access to the task-priority register."""
        cdef kvm_tpr_access_ctl arg
        memset(&arg, 0, sizeof(arg))
        arg.enabled = enabled
        self.prepare()
        check(ioctl(self.fd, KVM_TPR_ACCESS_REPORTING, &arg), "KVM_TPR_ACCESS_REPORTING")

    def set_vapic_addr(self, uint64_t address) -> None:
        """Guest-physical address of the virtual APIC page."""
        cdef kvm_vapic_addr arg
        arg.vapic_addr = address
        self.prepare()
        check(ioctl(self.fd, KVM_SET_VAPIC_ADDR, &arg), "KVM_SET_VAPIC_ADDR")

    def setup_mce(self, uint64_t mcg_cap) -> None:
        """Give the vCPU machine-check banks."""
        self.prepare()
        check(ioctl(self.fd, KVM_X86_SETUP_MCE, &mcg_cap), "KVM_X86_SETUP_MCE")

    def set_mce(self, uint8_t bank, uint64_t status, uint64_t address=0, uint64_t misc=0, uint64_t mcg_status=0) -> None:
        """Inject a machine check."""
        cdef kvm_x86_mce arg
        memset(&arg, 0, sizeof(arg))
        arg.bank = bank
        arg.status = status
        arg.addr = address
        arg.misc = misc
        arg.mcg_status = mcg_status
        self.prepare()
        check(ioctl(self.fd, KVM_X86_SET_MCE, &arg), "KVM_X86_SET_MCE")

    # Clocks, translation, the rest

    def get_tsc_khz(self) -> int:
        """TSC frequency in kHz."""
        self.prepare()
        return check(ioctl(self.fd, KVM_GET_TSC_KHZ, 0), "KVM_GET_TSC_KHZ")

    def set_tsc_khz(self, unsigned long khz) -> None:
        """Set the TSC frequency in kHz."""
        self.prepare()
        check(ioctl(self.fd, KVM_SET_TSC_KHZ, khz), "KVM_SET_TSC_KHZ")

    def kvmclock_ctrl(self) -> None:
        """Tell the guest's kvmclock that it was paused, so that its watchdogs stay quiet."""
        self.prepare()
        check(ioctl(self.fd, KVM_KVMCLOCK_CTRL, 0), "KVM_KVMCLOCK_CTRL")

    def translate(self, uint64_t linear_address):
        """Walk the guest's page tables for a linear address: a Translation."""
        cdef kvm_translation arg
        self.prepare()
        memset(&arg, 0, sizeof(arg))
        arg.linear_address = linear_address
        check(ioctl(self.fd, KVM_TRANSLATE, &arg), "KVM_TRANSLATE")
        return structs().Translation(
            arg.linear_address, arg.physical_address, bool(arg.valid), bool(arg.writeable), bool(arg.usermode))

    def set_signal_mask(self, signals) -> None:
        """Signals blocked while in KVM_RUN: a set of numbers, or None for the thread's own mask."""
        cdef Block block = Block(sizeof(kvm_signal_mask) + 8)
        cdef kvm_signal_mask *arg = <kvm_signal_mask *>block.data
        cdef uint64_t mask = 0
        self.prepare()
        if signals is None:
            check(ioctl(self.fd, KVM_SET_SIGNAL_MASK, NULL), "KVM_SET_SIGNAL_MASK")
            return
        for number in signals:
            if not 1 <= number <= 64:
                raise ConfigurationError(f"there is no signal {number}")
            mask |= 1 << (number - 1)
        arg.len = 8
        memcpy(arg.sigset, &mask, 8)
        check(ioctl(self.fd, KVM_SET_SIGNAL_MASK, arg), "KVM_SET_SIGNAL_MASK")

    def enable_cap(self, uint32_t cap, *args, uint32_t flags=0) -> None:
        """Turn on capability `cap` for this vCPU, with up to four arguments."""
        self.prepare()
        enable_cap(self.fd, cap, flags, args)

    def get_device_attr(self, uint32_t group, uint64_t attr, Py_ssize_t size) -> bytes:
        """A vCPU attribute, such as KVM_VCPU_TSC_OFFSET of group KVM_VCPU_TSC_CTRL."""
        self.prepare()
        return get_device_attr(self.fd, group, attr, size)

    def set_device_attr(self, uint32_t group, uint64_t attr, value: bytes) -> None:
        """Set a vCPU attribute."""
        self.prepare()
        set_device_attr(self.fd, group, attr, value)

    def has_device_attr(self, uint32_t group, uint64_t attr) -> bool:
        """Whether the vCPU has this attribute."""
        self.prepare()
        return has_device_attr(self.fd, group, attr)

    def get_stats_fd(self) -> int:
        """A descriptor of the vCPU's binary statistics; the caller closes it."""
        self.prepare()
        return check(ioctl(self.fd, KVM_GET_STATS_FD, 0), "KVM_GET_STATS_FD")

    def get_nested_state(self) -> bytes:
        """The nested-virtualisation state, opaque."""
        cdef int size = max(ioctl(self.vm.fd, KVM_CHECK_EXTENSION, KVM_CAP_NESTED_STATE), <int>sizeof(kvm_nested_state))
        cdef Block block = Block(size)
        self.prepare()
        (<kvm_nested_state *>block.data).size = size
        check(ioctl(self.fd, KVM_GET_NESTED_STATE, block.data), "KVM_GET_NESTED_STATE")
        return raw(block.data, (<kvm_nested_state *>block.data).size)

    def set_nested_state(self, value: bytes) -> None:
        """Set the nested-virtualisation state from get_nested_state."""
        cdef Block block = Block(max(<int>len(value), <int>sizeof(kvm_nested_state)))
        self.prepare()
        memcpy(block.data, PyBytes_AS_STRING(value), len(value))
        if len(value) < <Py_ssize_t>sizeof(kvm_nested_state) or (<kvm_nested_state *>block.data).size > len(value):
            raise ConfigurationError(f"a nested state of {len(value)} bytes is truncated")
        check(ioctl(self.fd, KVM_SET_NESTED_STATE, block.data), "KVM_SET_NESTED_STATE")
