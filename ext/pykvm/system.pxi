# /dev/kvm itself: what this kernel can do, and new VMs (KVM API 4.1 to 4.5).


cdef class System(Fd):
    """/dev/kvm. Raises KvmError("open ...") when it cannot be opened.

    What every VM and vCPU needs to know of it is asked once.
    """

    cdef int mmap_size  # of a vCPU's page, in bytes; 0 until asked
    cdef int sync_regs
    cdef Block cpuid  # what KVM supports, or None until asked: the answer takes KVM as long as making a vCPU

    def __init__(self, path: str = "/dev/kvm") -> None:
        encoded = path.encode()
        self.close()  # should __init__ be called again
        self.mmap_size = 0
        self.cpuid = None
        self.fd = c_open(encoded, O_RDWR | O_CLOEXEC)
        if self.fd < 0:
            raise KvmError(f"open {path}", errno)

    def get_api_version(self) -> int:
        """The API version: 12 since Linux 2.6.22."""
        return check(ioctl(self.fd, KVM_GET_API_VERSION, 0), "KVM_GET_API_VERSION")

    def check_extension(self, int cap) -> int:
        """The value of capability `cap`: 0 if absent."""
        return check(ioctl(self.fd, KVM_CHECK_EXTENSION, cap), "KVM_CHECK_EXTENSION")

    def get_vcpu_mmap_size(self) -> int:
        """Size in bytes of a vCPU's shared mapping."""
        return check(ioctl(self.fd, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE")

    def get_supported_cpuid(self) -> tuple:
        """The CPUID leaves that a vCPU may be given, as CpuidEntry values."""
        return read_cpuid(self.fd, KVM_GET_SUPPORTED_CPUID, "KVM_GET_SUPPORTED_CPUID")

    cdef Block copy_supported_cpuid(self):
        """The same as a structure of KVM's, a new one for each caller."""
        cdef Block copy
        cdef size_t size
        if self.cpuid is None or self.fd < 0:
            self.cpuid = fetch_cpuid(self.fd, KVM_GET_SUPPORTED_CPUID, "KVM_GET_SUPPORTED_CPUID")
        size = sizeof(kvm_cpuid2) + (<kvm_cpuid2 *>self.cpuid.data).nent * sizeof(kvm_cpuid_entry2)
        copy = Block(size)
        memcpy(copy.data, self.cpuid.data, size)
        return copy

    def get_emulated_cpuid(self) -> tuple:
        """The CPUID features that KVM emulates in software although the processor lacks them."""
        return read_cpuid(self.fd, KVM_GET_EMULATED_CPUID, "KVM_GET_EMULATED_CPUID")

    def get_supported_hv_cpuid(self) -> tuple:
        """The Hyper-V CPUID leaves that KVM can offer."""
        return read_cpuid(self.fd, KVM_GET_SUPPORTED_HV_CPUID, "KVM_GET_SUPPORTED_HV_CPUID")

    def get_msr_index_list(self) -> tuple:
        """The MSRs that get_msrs and set_msrs of a vCPU accept, apart from feature MSRs."""
        return read_msr_list(self.fd, KVM_GET_MSR_INDEX_LIST, "KVM_GET_MSR_INDEX_LIST")

    def get_msr_feature_index_list(self) -> tuple:
        """The feature MSRs: what the host offers, readable with `get_msrs` of the system."""
        return read_msr_list(self.fd, KVM_GET_MSR_FEATURE_INDEX_LIST, "KVM_GET_MSR_FEATURE_INDEX_LIST")

    def get_msrs(self, indices) -> dict:
        """Feature MSRs by index. Raises KvmError naming the first that cannot be read."""
        return read_msrs(self.fd, list(indices))

    def get_mce_cap_supported(self) -> int:
        """The machine-check capabilities KVM supports (MCG_CAP)."""
        cdef uint64_t value = 0
        check(ioctl(self.fd, KVM_X86_GET_MCE_CAP_SUPPORTED, &value), "KVM_X86_GET_MCE_CAP_SUPPORTED")
        return value

    def get_device_attr(self, uint32_t group, uint64_t attr, Py_ssize_t size) -> bytes:
        """A system attribute, such as KVM_X86_XCOMP_GUEST_SUPP of group 0."""
        return get_device_attr(self.fd, group, attr, size)

    def has_device_attr(self, uint32_t group, uint64_t attr) -> bool:
        """Whether the system has this attribute."""
        return has_device_attr(self.fd, group, attr)

    def create_vm(self, unsigned long type=0) -> Vm:
        """A new VM of machine type `type` (0 is the ordinary one)."""
        cdef Vm vm = Vm.__new__(Vm)
        cdef int fd
        while True:
            fd = ioctl(self.fd, KVM_CREATE_VM, type)
            if fd >= 0 or errno != EINTR:  # a signal may interrupt the wait for memory: nothing was made
                break
            PyErr_CheckSignals()
        vm.fd = check(fd, "KVM_CREATE_VM")
        if self.mmap_size == 0:
            self.sync_regs = self.check_extension(KVM_CAP_SYNC_REGS)
            self.mmap_size = self.get_vcpu_mmap_size()
        vm.mmap_size = self.mmap_size
        vm.sync_regs = self.sync_regs
        return vm
