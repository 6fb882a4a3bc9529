# One virtual machine: memory map, interrupt controllers, clocks, devices inside KVM.


@cython.internal
cdef class Pinned:
    """A writable host buffer that cannot be moved, resized or unmapped while this object lives."""

    cdef Py_buffer buffer
    cdef bint held

    def __cinit__(self, exporter, bint readonly):
        PyObject_GetBuffer(exporter, &self.buffer, PyBUF_SIMPLE if readonly else PyBUF_WRITABLE)
        self.held = True

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.buffer)


cdef class Vm(Fd):
    """A VM descriptor. Made by `System.create_vm`.

    The guest keeps running memory after `close` for as long as one of its vCPUs is open, since Linux keeps
    the VM alive until then; the host buffers behind the slots stay pinned exactly that long.
    """

    cdef int mmap_size
    cdef int sync_regs
    cdef bint halts_in_kernel  # HLT blocks inside KVM_RUN because the local APIC is there
    cdef Py_ssize_t coalesced_offset  # of the ring in each vCPU's page; 0 while nothing is coalesced
    cdef list coalesced  # taken from the ring, but not yet delivered
    cdef object delivering  # a lock: whoever holds it delivers coalesced writes, in order
    cdef size_t dirty_ring_bytes
    cdef dict regions
    cdef Ranges ports, mmio  # what the run loop serves
    cdef dict vcpus  # the open ones by index, as weak references, since each holds its Vm

    def __init__(self) -> None:
        raise TypeError("a Vm is made by System.create_vm()")

    def __cinit__(self):
        self.regions = {}
        self.ports = Ranges()
        self.mmio = Ranges()
        self.vcpus = {}
        self.coalesced = []

    def close(self) -> None:
        """Close the descriptor; memory stays pinned while a vCPU of this VM is open."""
        Fd.close(self)
        self.unpin()

    cdef void unpin(self):
        if self.fd < 0 and not self.vcpus:
            self.regions = {}
            self.ports = Ranges()
            self.mmio = Ranges()

    def check_extension(self, int cap) -> int:
        """The value of capability `cap` for this VM: 0 if absent."""
        return check(ioctl(self.fd, KVM_CHECK_EXTENSION, cap), "KVM_CHECK_EXTENSION")

    def enable_cap(self, uint32_t cap, *args, uint32_t flags=0) -> None:
        """Turn on capability `cap` with up to four arguments (KVM API 4.37)."""
        enable_cap(self.fd, cap, flags, args)
        if cap == CAP_SPLIT_IRQCHIP:
            self.halts_in_kernel = True
        if cap in (KVM_CAP_DIRTY_LOG_RING, CAP_DIRTY_LOG_RING_ACQ_REL):
            self.dirty_ring_bytes = args[0]

    # Memory

    def set_user_memory_region(self, uint32_t slot, uint32_t flags, uint64_t address, buffer) -> None:
        """Put `buffer` (writable, page-aligned) at guest-physical `address`; None removes the slot."""
        cdef kvm_userspace_memory_region arg
        cdef Pinned pinned = None
        memset(&arg, 0, sizeof(arg))
        arg.slot = slot
        arg.flags = flags
        arg.guest_phys_addr = address
        if buffer is not None:
            pinned = Pinned(buffer, flags & MEM_READONLY)
            arg.memory_size = pinned.buffer.len
            arg.userspace_addr = <uintptr_t>pinned.buffer.buf  # SAFETY: pinned until the slot or VM is gone
        check(ioctl(self.fd, KVM_SET_USER_MEMORY_REGION, &arg), "KVM_SET_USER_MEMORY_REGION")
        self.keep(slot, pinned)

    def set_user_memory_region2(self, uint32_t slot, uint32_t flags, uint64_t address, buffer, *,
                                int guest_memfd=-1, uint64_t guest_memfd_offset=0) -> None:
        """As set_user_memory_region, with an optional guest_memfd for private pages (KVM API 4.140)."""
        cdef kvm_userspace_memory_region2 arg
        cdef Pinned pinned = None
        memset(&arg, 0, sizeof(arg))
        arg.slot = slot
        arg.flags = flags
        arg.guest_phys_addr = address
        if guest_memfd >= 0:
            arg.guest_memfd = guest_memfd
            arg.guest_memfd_offset = guest_memfd_offset
        if buffer is not None:
            pinned = Pinned(buffer, flags & MEM_READONLY)
            arg.memory_size = pinned.buffer.len
            arg.userspace_addr = <uintptr_t>pinned.buffer.buf  # SAFETY: pinned until the slot or VM is gone
        check(ioctl(self.fd, KVM_SET_USER_MEMORY_REGION2, &arg), "KVM_SET_USER_MEMORY_REGION2")
        self.keep(slot, pinned)

    cdef void keep(self, uint32_t slot, Pinned pinned):
        if pinned is None:
            self.regions.pop(slot, None)
        else:
            self.regions[slot] = pinned

    def create_guest_memfd(self, uint64_t size, uint64_t flags=0) -> int:
        """A new descriptor of guest-private memory; the caller closes it."""
        cdef kvm_create_guest_memfd arg
        memset(&arg, 0, sizeof(arg))
        arg.size = size
        arg.flags = flags
        return check(ioctl(self.fd, KVM_CREATE_GUEST_MEMFD, &arg), "KVM_CREATE_GUEST_MEMFD")

    def set_memory_attributes(self, uint64_t address, uint64_t size, uint64_t attributes) -> None:
        """Set attributes (KVM_MEMORY_ATTRIBUTE_PRIVATE) of a guest-physical range, in bytes."""
        cdef kvm_memory_attributes arg
        memset(&arg, 0, sizeof(arg))
        arg.address = address
        arg.size = size
        arg.attributes = attributes
        check(ioctl(self.fd, KVM_SET_MEMORY_ATTRIBUTES, &arg), "KVM_SET_MEMORY_ATTRIBUTES")

    def get_dirty_log(self, uint32_t slot, Py_ssize_t pages) -> bytes:
        """The dirty bitmap of a slot of `pages` pages, one bit a page, in 64-bit words."""
        cdef kvm_dirty_log arg
        cdef bytes bitmap = bytes((pages + 63) // 64 * 8)
        if slot in self.regions and (<Pinned>self.regions[slot]).buffer.len > pages * sysconf(_SC_PAGESIZE):
            raise ConfigurationError(f"slot {slot} has more than {pages} pages")  # KVM writes a bit for each
        memset(&arg, 0, sizeof(arg))
        arg.slot = slot
        arg.dirty_bitmap = PyBytes_AS_STRING(bitmap)  # SAFETY: ours alone until it is returned
        check(ioctl(self.fd, KVM_GET_DIRTY_LOG, &arg), "KVM_GET_DIRTY_LOG")
        return bitmap

    def clear_dirty_log(self, uint32_t slot, uint64_t first_page, uint32_t pages, bitmap: bytes) -> None:
        """Protect again the pages whose bits are set (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)."""
        cdef kvm_clear_dirty_log arg
        if len(bitmap) * 8 < pages:
            raise ConfigurationError(f"a bitmap of {len(bitmap)} bytes does not cover {pages} pages")
        memset(&arg, 0, sizeof(arg))
        arg.slot = slot
        arg.first_page = first_page
        arg.num_pages = pages
        arg.dirty_bitmap = PyBytes_AS_STRING(bitmap)
        check(ioctl(self.fd, KVM_CLEAR_DIRTY_LOG, &arg), "KVM_CLEAR_DIRTY_LOG")

    def reset_dirty_rings(self) -> int:
        """Give collected dirty-ring entries back to KVM; returns how many pages were reset."""
        return check(ioctl(self.fd, KVM_RESET_DIRTY_RINGS, 0), "KVM_RESET_DIRTY_RINGS")

    def set_nr_mmu_pages(self, unsigned long pages) -> None:
        """Limit the pages KVM uses for shadow page tables."""
        check(ioctl(self.fd, KVM_SET_NR_MMU_PAGES, pages), "KVM_SET_NR_MMU_PAGES")

    def set_tss_addr(self, unsigned long address) -> None:
        """Three pages below 4 GiB that VT-x needs for real mode; call before the first vCPU."""
        check(ioctl(self.fd, KVM_SET_TSS_ADDR, address), "KVM_SET_TSS_ADDR")

    def set_identity_map_addr(self, uint64_t address) -> None:
        """One page below 4 GiB that VT-x needs for unpaged mode; call before the first vCPU."""
        check(ioctl(self.fd, KVM_SET_IDENTITY_MAP_ADDR, &address), "KVM_SET_IDENTITY_MAP_ADDR")

    def memory_encrypt_reg_region(self, buffer) -> None:
        """Register encrypted guest memory (SEV)."""
        cdef Pinned pinned = Pinned(buffer, False)
        cdef kvm_enc_region arg
        arg.addr = <uintptr_t>pinned.buffer.buf
        arg.size = pinned.buffer.len
        check(ioctl(self.fd, KVM_MEMORY_ENCRYPT_REG_REGION, &arg), "KVM_MEMORY_ENCRYPT_REG_REGION")

    def memory_encrypt_unreg_region(self, buffer) -> None:
        """Undo memory_encrypt_reg_region."""
        cdef Pinned pinned = Pinned(buffer, False)
        cdef kvm_enc_region arg
        arg.addr = <uintptr_t>pinned.buffer.buf
        arg.size = pinned.buffer.len
        check(ioctl(self.fd, KVM_MEMORY_ENCRYPT_UNREG_REGION, &arg), "KVM_MEMORY_ENCRYPT_UNREG_REGION")

    # Interrupts

    def create_irqchip(self) -> None:
        """PIC, I/O APIC and local APICs inside KVM; call before the first vCPU."""
        check(ioctl(self.fd, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP")
        self.halts_in_kernel = True

    def get_irqchip(self, uint32_t chip) -> bytes:
        """State of one controller: 0 and 1 the PICs, 2 the I/O APIC. 512 opaque bytes."""
        cdef kvm_irqchip arg
        memset(&arg, 0, sizeof(arg))
        arg.chip_id = chip
        check(ioctl(self.fd, KVM_GET_IRQCHIP, &arg), "KVM_GET_IRQCHIP")
        return raw(arg.chip_data, 512)

    def set_irqchip(self, uint32_t chip, value: bytes) -> None:
        """Put back what get_irqchip returned."""
        cdef kvm_irqchip arg
        memset(&arg, 0, sizeof(arg))
        arg.chip_id = chip
        copy_exactly(arg.chip_data, 512, value, "an irqchip state")
        check(ioctl(self.fd, KVM_SET_IRQCHIP, &arg), "KVM_SET_IRQCHIP")

    def create_pit2(self, uint32_t flags=0) -> None:
        """The 8254 inside KVM; KVM_PIT_SPEAKER_DUMMY in `flags` also claims port 0x61."""
        cdef kvm_pit_config arg
        memset(&arg, 0, sizeof(arg))
        arg.flags = flags
        check(ioctl(self.fd, KVM_CREATE_PIT2, &arg), "KVM_CREATE_PIT2")

    def get_pit2(self):
        """The PIT's state as PitState2."""
        cdef kvm_pit_state2 arg
        cdef kvm_pit_channel_state *c
        memset(&arg, 0, sizeof(arg))
        check(ioctl(self.fd, KVM_GET_PIT2, &arg), "KVM_GET_PIT2")
        channels = []
        for i in range(3):
            c = &arg.channels[i]
            channels.append(structs().PitChannelState(
                c.count, c.latched_count, c.count_latched, c.status_latched, c.status, c.read_state,
                c.write_state, c.write_latch, c.rw_mode, c.mode, c.bcd, c.gate, c.count_load_time))
        return structs().PitState2(tuple(channels), arg.flags)

    def set_pit2(self, value) -> None:
        """Set the PIT's state from a PitState2."""
        cdef kvm_pit_state2 arg
        cdef kvm_pit_channel_state *c
        memset(&arg, 0, sizeof(arg))
        for i in range(3):
            c = &arg.channels[i]
            channel = value.channels[i]
            c.count = channel.count
            c.latched_count = channel.latched_count
            c.count_latched = channel.count_latched
            c.status_latched = channel.status_latched
            c.status = channel.status
            c.read_state = channel.read_state
            c.write_state = channel.write_state
            c.write_latch = channel.write_latch
            c.rw_mode = channel.rw_mode
            c.mode = channel.mode
            c.bcd = channel.bcd
            c.gate = channel.gate
            c.count_load_time = channel.count_load_time
        arg.flags = value.flags
        check(ioctl(self.fd, KVM_SET_PIT2, &arg), "KVM_SET_PIT2")

    def reinject_control(self, bint pit_reinject) -> None:
        """Whether PIT ticks that the guest missed are delivered later."""
        cdef kvm_reinject_control arg
        memset(&arg, 0, sizeof(arg))
        arg.pit_reinject = pit_reinject
        check(ioctl(self.fd, KVM_REINJECT_CONTROL, &arg), "KVM_REINJECT_CONTROL")

    def irq_line(self, uint32_t gsi, bint level) -> None:
        """Drive interrupt line `gsi`."""
        cdef kvm_irq_level arg
        arg.irq = gsi
        arg.level = level
        check(ioctl(self.fd, KVM_IRQ_LINE, &arg), "KVM_IRQ_LINE")

    def irq_line_status(self, uint32_t gsi, bint level) -> int:
        """Drive line `gsi`; returns >0 delivered, 0 coalesced, <0 ignored (masked)."""
        cdef kvm_irq_level arg
        arg.irq = gsi
        arg.level = level
        check(ioctl(self.fd, KVM_IRQ_LINE_STATUS, &arg), "KVM_IRQ_LINE_STATUS")
        return arg.status

    def set_gsi_routing(self, routes) -> None:
        """Replace the whole GSI table by IrqchipRoute and MsiRoute entries."""
        cdef list entries = list(routes)
        cdef Block block = Block(sizeof(kvm_irq_routing) + len(entries) * sizeof(kvm_irq_routing_entry))
        cdef kvm_irq_routing *arg = <kvm_irq_routing *>block.data
        cdef kvm_irq_routing_entry *e
        arg.nr = len(entries)
        for i, route in enumerate(entries):
            e = &arg.entries[i]
            e.gsi = route.gsi
            if isinstance(route, structs().IrqchipRoute):
                e.type = KVM_IRQ_ROUTING_IRQCHIP
                e.u.irqchip.irqchip = route.irqchip
                e.u.irqchip.pin = route.pin
            else:
                e.type = KVM_IRQ_ROUTING_MSI
                e.flags = route.flags
                e.u.msi.address_lo = route.address & 0xFFFFFFFF
                e.u.msi.address_hi = route.address >> 32
                e.u.msi.data = route.data
                e.u.msi.devid = route.devid
        check(ioctl(self.fd, KVM_SET_GSI_ROUTING, arg), "KVM_SET_GSI_ROUTING")

    def signal_msi(self, uint64_t address, uint32_t data, uint32_t flags=0, uint32_t devid=0) -> int:
        """Deliver an MSI; returns >0 delivered, 0 blocked by the guest."""
        cdef kvm_msi arg
        memset(&arg, 0, sizeof(arg))
        arg.address_lo = address & 0xFFFFFFFF
        arg.address_hi = address >> 32
        arg.data = data
        arg.flags = flags
        arg.devid = devid
        return check(ioctl(self.fd, KVM_SIGNAL_MSI, &arg), "KVM_SIGNAL_MSI")

    def irqfd(self, int eventfd, uint32_t gsi, uint32_t flags=0, int resamplefd=-1) -> None:
        """Raise `gsi` whenever `eventfd` is written (KVM_IRQFD_FLAG_DEASSIGN undoes it)."""
        cdef kvm_irqfd arg
        memset(&arg, 0, sizeof(arg))
        arg.fd = <uint32_t>eventfd
        arg.gsi = gsi
        arg.flags = flags
        if resamplefd >= 0:
            arg.resamplefd = resamplefd
        check(ioctl(self.fd, KVM_IRQFD, &arg), "KVM_IRQFD")

    def ioeventfd(self, int eventfd, uint64_t address, uint32_t length, uint32_t flags=0,
                  uint64_t datamatch=0) -> None:
        """Signal `eventfd` on a guest write, with no exit.

        `length` is 0 (any), 1, 2, 4 or 8; `flags` are KVM_IOEVENTFD_FLAG_PIO, _DATAMATCH, _DEASSIGN.
        """
        cdef kvm_ioeventfd arg
        memset(&arg, 0, sizeof(arg))
        arg.fd = eventfd
        arg.addr = address
        arg.len = length
        arg.flags = flags
        arg.datamatch = datamatch
        check(ioctl(self.fd, KVM_IOEVENTFD, &arg), "KVM_IOEVENTFD")

    def register_coalesced_mmio(self, uint64_t address, uint32_t size, bint pio=False) -> None:
        """Collect writes to this range in a ring instead of exiting for each (KVM API 4.116)."""
        self.coalesced_zone(KVM_REGISTER_COALESCED_MMIO, "KVM_REGISTER_COALESCED_MMIO", address, size, pio)
        if self.coalesced_offset == 0:
            self.delivering = allocate_lock()
            self.coalesced_offset = self.check_extension(KVM_CAP_COALESCED_MMIO) * <Py_ssize_t>sysconf(_SC_PAGESIZE)

    def unregister_coalesced_mmio(self, uint64_t address, uint32_t size, bint pio=False) -> None:
        """Undo register_coalesced_mmio. What is still in the ring stays there until it is delivered."""
        self.coalesced_zone(KVM_UNREGISTER_COALESCED_MMIO, "KVM_UNREGISTER_COALESCED_MMIO", address, size, pio)

    cdef int coalesced_zone(self, unsigned long request, const char *name, uint64_t address, uint32_t size,
                            bint pio) except -1:
        cdef kvm_coalesced_mmio_zone arg
        arg.addr = address
        arg.size = size
        arg.pio = pio
        return check(ioctl(self.fd, request, &arg), name)

    # Clocks, filters, devices

    def get_clock(self):
        """The kvmclock as ClockData; nanoseconds."""
        cdef kvm_clock_data arg
        memset(&arg, 0, sizeof(arg))
        check(ioctl(self.fd, KVM_GET_CLOCK, &arg), "KVM_GET_CLOCK")
        return structs().ClockData(arg.clock, arg.flags, arg.realtime, arg.host_tsc)

    def set_clock(self, value) -> None:
        """Set the kvmclock from a ClockData."""
        cdef kvm_clock_data arg
        memset(&arg, 0, sizeof(arg))
        arg.clock = value.clock
        arg.flags = value.flags
        arg.realtime = value.realtime
        arg.host_tsc = value.host_tsc
        check(ioctl(self.fd, KVM_SET_CLOCK, &arg), "KVM_SET_CLOCK")

    def set_tsc_khz(self, unsigned long khz) -> None:
        """Default TSC frequency of vCPUs made from now on."""
        check(ioctl(self.fd, KVM_SET_TSC_KHZ, khz), "KVM_SET_TSC_KHZ")

    def get_tsc_khz(self) -> int:
        """Default TSC frequency of new vCPUs."""
        return check(ioctl(self.fd, KVM_GET_TSC_KHZ, 0), "KVM_GET_TSC_KHZ")

    def set_boot_cpu_id(self, unsigned long apic_id) -> None:
        """Which vCPU is the bootstrap processor; call before the first vCPU."""
        check(ioctl(self.fd, KVM_SET_BOOT_CPU_ID, apic_id), "KVM_SET_BOOT_CPU_ID")

    def set_msr_filter(self, ranges, uint32_t flags=0) -> None:
        """Which MSR accesses reach KVM (KVM API 4.97).

        `ranges` holds up to 16 tuples (flags, base, count, bitmap: bytes with one bit an MSR, 1 allows).
        """
        cdef kvm_msr_filter arg
        cdef list keep = list(ranges)
        memset(&arg, 0, sizeof(arg))
        if len(keep) > 16:
            raise ConfigurationError(f"an MSR filter has at most 16 ranges, not {len(keep)}")
        arg.flags = flags
        for i, (range_flags, base, count, bitmap) in enumerate(keep):
            if len(bitmap) * 8 < count:
                raise ConfigurationError(f"a bitmap of {len(bitmap)} bytes does not cover {count} MSRs")
            arg.ranges[i].flags = range_flags
            arg.ranges[i].base = base
            arg.ranges[i].nmsrs = count
            arg.ranges[i].bitmap = <uint8_t *>PyBytes_AS_STRING(bitmap)  # SAFETY: `keep` outlives the call
        check(ioctl(self.fd, KVM_X86_SET_MSR_FILTER, &arg), "KVM_X86_SET_MSR_FILTER")

    def create_device(self, uint32_t type, uint32_t flags=0) -> DeviceFd:
        """A device inside KVM (KVM_DEV_TYPE_*)."""
        cdef kvm_create_device arg
        cdef DeviceFd device = DeviceFd.__new__(DeviceFd)
        memset(&arg, 0, sizeof(arg))
        arg.type = type
        arg.flags = flags
        check(ioctl(self.fd, KVM_CREATE_DEVICE, &arg), "KVM_CREATE_DEVICE")
        device.fd = <int>arg.fd
        return device

    def get_stats_fd(self) -> int:
        """A descriptor of the VM's binary statistics (KVM API 4.133); the caller closes it."""
        return check(ioctl(self.fd, KVM_GET_STATS_FD, 0), "KVM_GET_STATS_FD")

    # Processors, and the devices that they call

    def create_vcpu(self, unsigned long index) -> Vcpu:
        """A new virtual processor; `index` is its APIC ID."""
        cdef Vcpu vcpu = Vcpu.__new__(Vcpu, self)
        vcpu.fd = check(ioctl(self.fd, KVM_CREATE_VCPU, index), "KVM_CREATE_VCPU")
        vcpu.index = index
        self.vcpus[vcpu.index] = PyWeakref_NewRef(vcpu, None)
        vcpu.map_run_page()
        return vcpu

    def serve(self, space: str, entries) -> None:
        """Replace the devices of `space` ("port" or "mmio") that the run loop calls; others are left to its `io`.

        An entry is (`pykvm.bus.Attachment`, lock), by address and without overlaps. A `pykvm.device.CDevice` is
        called without the GIL. The methods of others, as they are now, are called with the lock held if it is a
        `DeviceLock`. A vCPU that is about to access a device that is no longer there may do so once more.
        Raises ConfigurationError for another space, and for ranges that cannot be.
        """
        cdef Vcpu vcpu
        if space == "port":
            self.ports = Ranges(entries)
        elif space == "mmio":
            self.mmio = Ranges(entries)
        else:
            raise ConfigurationError(f"a device is at a port or in mmio, not in {space!r}")
        for reference in list(self.vcpus.values()):
            vcpu = reference()
            if vcpu is not None and vcpu.running:
                vcpu.interrupt_run()  # it looks at the tables whenever it comes back
