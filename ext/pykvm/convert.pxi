# Structures of <linux/kvm.h> to frozen dataclasses and back.
#
# The rare ones are imported on first use, so that a plain boot does not pay for them.


cdef object structs():
    from pykvm.kvm import structs
    return structs


cdef object state():
    from pykvm import state
    return state


cdef object registers_to_python(const kvm_regs *regs):
    # struct kvm_regs is 18 x u64, in the order of the dataclass's fields.
    cdef const uint64_t *r = <const uint64_t *>regs
    return Registers(r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8], r[9], r[10], r[11], r[12], r[13],
                     r[14], r[15], r[16], r[17])


cdef int registers_from_python(kvm_regs *regs, value) except -1:
    cdef uint64_t new[18]
    new[:] = [value.rax, value.rbx, value.rcx, value.rdx, value.rsi, value.rdi, value.rsp, value.rbp, value.r8,
              value.r9, value.r10, value.r11, value.r12, value.r13, value.r14, value.r15, value.rip, value.rflags]
    memcpy(regs, new, sizeof(new))  # at once, so that a value out of range changes nothing
    return 0


cdef object segment_to_python(const kvm_segment *s):
    return Segment(s.base, s.limit, s.selector, s.type, s.present, s.dpl, s.db, s.s, s.l, s.g, s.avl, s.unusable)


cdef int segment_from_python(kvm_segment *s, value) except -1:
    s.base = value.base
    s.limit = value.limit
    s.selector = value.selector
    s.type = value.type
    s.present = value.present
    s.dpl = value.dpl
    s.db = value.db
    s.s = value.s
    s.l = value.l
    s.g = value.g
    s.avl = value.avl
    s.unusable = value.unusable
    return 0


ctypedef fused any_sregs:
    kvm_sregs
    kvm_sregs2


cdef object sregs_to_python(any_sregs *s):
    bitmap = (0, 0, 0, 0)
    if any_sregs is kvm_sregs:
        bitmap = (s.interrupt_bitmap[0], s.interrupt_bitmap[1], s.interrupt_bitmap[2], s.interrupt_bitmap[3])
    return SystemRegisters(
        segment_to_python(&s.cs), segment_to_python(&s.ds), segment_to_python(&s.es), segment_to_python(&s.fs),
        segment_to_python(&s.gs), segment_to_python(&s.ss), segment_to_python(&s.tr), segment_to_python(&s.ldt),
        DescriptorTable(s.gdt.base, s.gdt.limit), DescriptorTable(s.idt.base, s.idt.limit),
        s.cr0, s.cr2, s.cr3, s.cr4, s.cr8, s.efer, s.apic_base, bitmap,
    )


cdef int sregs_from_python(any_sregs *target, value) except -1:
    cdef any_sregs s
    memset(&s, 0, sizeof(s))
    segment_from_python(&s.cs, value.cs)
    segment_from_python(&s.ds, value.ds)
    segment_from_python(&s.es, value.es)
    segment_from_python(&s.fs, value.fs)
    segment_from_python(&s.gs, value.gs)
    segment_from_python(&s.ss, value.ss)
    segment_from_python(&s.tr, value.tr)
    segment_from_python(&s.ldt, value.ldt)
    s.gdt.base = value.gdt.base
    s.gdt.limit = value.gdt.limit
    s.idt.base = value.idt.base
    s.idt.limit = value.idt.limit
    s.cr0 = value.cr0
    s.cr2 = value.cr2
    s.cr3 = value.cr3
    s.cr4 = value.cr4
    s.cr8 = value.cr8
    s.efer = value.efer
    s.apic_base = value.apic_base
    if any_sregs is kvm_sregs:
        for i in range(4):
            s.interrupt_bitmap[i] = value.interrupt_bitmap[i]
    target[0] = s
    return 0


cdef bytes raw(const void *data, Py_ssize_t size):
    return PyBytes_FromStringAndSize(<const char *>data, size)


cdef int copy_exactly(void *target, Py_ssize_t size, bytes source, str what) except -1:
    if len(source) != size:
        raise ConfigurationError(f"{what} is {size} bytes, not {len(source)}")
    memcpy(target, PyBytes_AS_STRING(source), size)
    return 0


cdef object fpu_to_python(const kvm_fpu *f):
    return state().FpuState(
        tuple([raw(f.fpr[i], 16) for i in range(8)]), f.fcw, f.fsw, f.ftwx, f.last_opcode, f.last_ip, f.last_dp,
        tuple([raw(f.xmm[i], 16) for i in range(16)]), f.mxcsr,
    )


cdef int fpu_from_python(kvm_fpu *f, value) except -1:
    memset(f, 0, sizeof(f[0]))
    for i in range(8):
        copy_exactly(f.fpr[i], 16, value.fpr[i], "an FPU register")
    f.fcw = value.fcw
    f.fsw = value.fsw
    f.ftwx = value.ftwx
    f.last_opcode = value.last_opcode
    f.last_ip = value.last_ip
    f.last_dp = value.last_dp
    for i in range(16):
        copy_exactly(f.xmm[i], 16, value.xmm[i], "an XMM register")
    f.mxcsr = value.mxcsr
    return 0


cdef object events_to_python(const kvm_vcpu_events *e):
    return state().VcpuEvents(
        e.exception.injected, e.exception.nr, e.exception.has_error_code, e.exception.pending,
        e.exception.error_code, e.interrupt.injected, e.interrupt.nr, e.interrupt.soft, e.interrupt.shadow,
        e.nmi.injected, e.nmi.pending, e.nmi.masked, e.sipi_vector, e.flags, e.smi.smm, e.smi.pending,
        e.smi.smm_inside_nmi, e.smi.latched_init, e.triple_fault.pending, e.exception_has_payload,
        e.exception_payload,
    )


cdef int events_from_python(kvm_vcpu_events *e, value) except -1:
    memset(e, 0, sizeof(e[0]))
    e.exception.injected = value.exception_injected
    e.exception.nr = value.exception_nr
    e.exception.has_error_code = value.exception_has_error_code
    e.exception.pending = value.exception_pending
    e.exception.error_code = value.exception_error_code
    e.interrupt.injected = value.interrupt_injected
    e.interrupt.nr = value.interrupt_nr
    e.interrupt.soft = value.interrupt_soft
    e.interrupt.shadow = value.interrupt_shadow
    e.nmi.injected = value.nmi_injected
    e.nmi.pending = value.nmi_pending
    e.nmi.masked = value.nmi_masked
    e.sipi_vector = value.sipi_vector
    e.flags = value.flags
    e.smi.smm = value.smi_smm
    e.smi.pending = value.smi_pending
    e.smi.smm_inside_nmi = value.smi_smm_inside_nmi
    e.smi.latched_init = value.smi_latched_init
    e.triple_fault.pending = value.triple_fault_pending
    e.exception_has_payload = value.exception_has_payload
    e.exception_payload = value.exception_payload
    return 0


cdef tuple cpuid_to_python(const kvm_cpuid2 *c):
    entry = structs().CpuidEntry
    return tuple([
        entry(c.entries[i].function, c.entries[i].index, c.entries[i].flags, c.entries[i].eax, c.entries[i].ebx,
              c.entries[i].ecx, c.entries[i].edx)
        for i in range(c.nent)
    ])


cdef Block cpuid_from_python(entries):
    cdef Block block = Block(sizeof(kvm_cpuid2) + len(entries) * sizeof(kvm_cpuid_entry2))
    cdef kvm_cpuid2 *c = <kvm_cpuid2 *>block.data
    cdef kvm_cpuid_entry2 *e
    c.nent = len(entries)
    for i, entry in enumerate(entries):
        e = &c.entries[i]
        e.function = entry.function
        e.index = entry.index
        e.flags = entry.flags
        e.eax = entry.eax
        e.ebx = entry.ebx
        e.ecx = entry.ecx
        e.edx = entry.edx
    return block


cdef tuple read_cpuid(int fd, unsigned long request, const char *name):
    cdef Block block = fetch_cpuid(fd, request, name)
    cdef kvm_cpuid2 *leaves = <kvm_cpuid2 *>block.data
    while leaves.nent > 0 and is_empty(&leaves.entries[leaves.nent - 1]):
        leaves.nent -= 1  # Linux 6.1 does not say how many KVM_GET_CPUID2 has filled in
    return cpuid_to_python(leaves)


cdef bint is_empty(const kvm_cpuid_entry2 *leaf):
    return (leaf.function | leaf.index | leaf.flags | leaf.eax | leaf.ebx | leaf.ecx | leaf.edx) == 0


cdef Block fetch_cpuid(int fd, unsigned long request, const char *name):
    """KVM says E2BIG until there is room for its list (KVM API 4.46)."""
    cdef Block block
    cdef uint32_t room = 128
    while True:
        block = Block(sizeof(kvm_cpuid2) + room * sizeof(kvm_cpuid_entry2))
        (<kvm_cpuid2 *>block.data).nent = room
        if ioctl(fd, request, block.data) == 0:
            return block
        if errno != E2BIG or room >= 65536:
            check(-1, name)
        room *= 2


cdef tuple read_msr_list(int fd, unsigned long request, const char *name):
    cdef kvm_msr_list empty
    cdef Block block
    memset(&empty, 0, sizeof(empty))
    if ioctl(fd, request, &empty) < 0 and errno != E2BIG:
        check(-1, name)
    block = Block(sizeof(kvm_msr_list) + empty.nmsrs * sizeof(uint32_t))
    (<kvm_msr_list *>block.data).nmsrs = empty.nmsrs
    check(ioctl(fd, request, block.data), name)
    return tuple([(<kvm_msr_list *>block.data).indices[i] for i in range((<kvm_msr_list *>block.data).nmsrs)])


cdef dict read_msrs(int fd, indices):
    """KVM stops at the first MSR that it refuses; that one is named in the error."""
    cdef Block block = Block(sizeof(kvm_msrs) + len(indices) * sizeof(kvm_msr_entry))
    cdef kvm_msrs *msrs = <kvm_msrs *>block.data
    cdef int done
    msrs.nmsrs = len(indices)
    for i, index in enumerate(indices):
        msrs.entries[i].index = index
    done = check(ioctl(fd, KVM_GET_MSRS, msrs), "KVM_GET_MSRS")
    if done < len(indices):
        fail("KVM_GET_MSRS", EINVAL, f"MSR {indices[done]:#x} cannot be read ({done} of {len(indices)} were)")
    return {msrs.entries[i].index: msrs.entries[i].data for i in range(msrs.nmsrs)}


cdef int write_msrs(int fd, values) except -1:
    cdef Block block = Block(sizeof(kvm_msrs) + len(values) * sizeof(kvm_msr_entry))
    cdef kvm_msrs *msrs = <kvm_msrs *>block.data
    cdef int done
    items = list(values.items())
    msrs.nmsrs = len(items)
    for i, (index, value) in enumerate(items):
        msrs.entries[i].index = index
        msrs.entries[i].data = value
    done = check(ioctl(fd, KVM_SET_MSRS, msrs), "KVM_SET_MSRS")
    if done < len(items):
        index, value = items[done]
        fail("KVM_SET_MSRS", EINVAL, f"MSR {index:#x} cannot be set to {value:#x} ({done} of {len(items)} were)")
    return 0
