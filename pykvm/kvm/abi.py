"""The KVM ABI in numbers: ioctl requests, their structures, exit reasons, capabilities.

Every request number is derived from its structure with `ioctl_opt`, as ``<linux/kvm.h>`` derives it with
``_IOW`` and its kin; the extension compiles against that header, and a test proves that both agree. So this
module needs no header, and knows what is newer than the one a distribution installs.

Structures carry the kernel's names and fields (``<linux/kvm.h>`` and x86 ``<asm/kvm.h>``, up to Linux 6.19);
trailing arrays of variable length have length zero here, as their size is no part of the request number. A
leading underscore marks a structure that has no name in C.

Importing this costs milliseconds (ctypes): do it inside the function that needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import (
    Structure,
    Union,
    c_char,
    c_int16,
    c_int32,
    c_int64,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_ulong,
    c_void_p,
)
from types import MappingProxyType
from typing import Any

import ioctl_opt  # type: ignore[import-untyped]

from pykvm.values import Value

KVM_API_VERSION = 12
KVMIO = 0xAE

_u8, _u16, _u32, _u64 = c_uint8, c_uint16, c_uint32, c_uint64


def _each(ctype: Any, names: str) -> list[tuple[str, Any]]:
    """Fields of one type, declared together as C does: ``__u32 slot, flags;``."""
    return [(name, ctype) for name in names.split()]


class kvm_userspace_memory_region(Structure):
    _fields_ = [*_each(_u32, "slot flags"), *_each(_u64, "guest_phys_addr memory_size userspace_addr")]


class kvm_userspace_memory_region2(Structure):
    _fields_ = [
        *_each(_u32, "slot flags"),
        *_each(_u64, "guest_phys_addr memory_size userspace_addr guest_memfd_offset"),
        *_each(_u32, "guest_memfd pad1"),
        ("pad2", _u64 * 14),
    ]


class kvm_create_guest_memfd(Structure):
    _fields_ = [*_each(_u64, "size flags"), ("reserved", _u64 * 6)]


class kvm_memory_attributes(Structure):
    _fields_ = [*_each(_u64, "address size attributes flags")]


class kvm_pre_fault_memory(Structure):
    _fields_ = [*_each(_u64, "gpa size flags"), ("padding", _u64 * 5)]


class kvm_enc_region(Structure):
    _fields_ = [*_each(_u64, "addr size")]


class _bitmap_pointer(Union):
    _fields_ = [("dirty_bitmap", c_void_p), ("padding2", _u64)]


class kvm_dirty_log(Structure):
    _anonymous_ = ("_bitmap",)
    _fields_ = [*_each(_u32, "slot padding1"), ("_bitmap", _bitmap_pointer)]


class kvm_clear_dirty_log(Structure):
    _anonymous_ = ("_bitmap",)
    _fields_ = [*_each(_u32, "slot num_pages"), ("first_page", _u64), ("_bitmap", _bitmap_pointer)]


class kvm_dirty_gfn(Structure):
    _fields_ = [*_each(_u32, "flags slot"), ("offset", _u64)]


class _irq_or_status(Union):
    _fields_ = [("irq", _u32), ("status", c_int32)]


class kvm_irq_level(Structure):
    _anonymous_ = ("_irq",)
    _fields_ = [("_irq", _irq_or_status), ("level", _u32)]


class kvm_pic_state(Structure):
    _fields_ = [
        *_each(_u8, "last_irr irr imr isr priority_add irq_base read_reg_select poll"),
        *_each(_u8, "special_mask init_state auto_eoi rotate_on_auto_eoi special_fully_nested_mode init4"),
        *_each(_u8, "elcr elcr_mask"),
    ]


class kvm_ioapic_state(Structure):
    _fields_ = [("base_address", _u64), *_each(_u32, "ioregsel id irr pad"), ("redirtbl", _u64 * 24)]


class _irqchip_chip(Union):
    _fields_ = [("dummy", c_char * 512), ("pic", kvm_pic_state), ("ioapic", kvm_ioapic_state)]


class kvm_irqchip(Structure):
    _fields_ = [*_each(_u32, "chip_id pad"), ("chip", _irqchip_chip)]


class kvm_pit_config(Structure):
    _fields_ = [("flags", _u32), ("pad", _u32 * 15)]


class kvm_pit_channel_state(Structure):
    _fields_ = [
        ("count", _u32),
        ("latched_count", _u16),
        *_each(
            _u8,
            "count_latched status_latched status read_state write_state write_latch rw_mode mode bcd gate",
        ),
        ("count_load_time", c_int64),
    ]


class kvm_pit_state(Structure):
    _fields_ = [("channels", kvm_pit_channel_state * 3)]


class kvm_pit_state2(Structure):
    _fields_ = [("channels", kvm_pit_channel_state * 3), ("flags", _u32), ("reserved", _u32 * 9)]


class kvm_irq_routing_irqchip(Structure):
    _fields_ = [*_each(_u32, "irqchip pin")]


class kvm_irq_routing_msi(Structure):
    _fields_ = [*_each(_u32, "address_lo address_hi data devid")]


class kvm_irq_routing_hv_sint(Structure):
    _fields_ = [*_each(_u32, "vcpu sint")]


class kvm_irq_routing_xen_evtchn(Structure):
    _fields_ = [*_each(_u32, "port vcpu priority")]


class _irq_routing_target(Union):
    _fields_ = [
        ("irqchip", kvm_irq_routing_irqchip),
        ("msi", kvm_irq_routing_msi),
        ("hv_sint", kvm_irq_routing_hv_sint),
        ("xen_evtchn", kvm_irq_routing_xen_evtchn),
        ("pad", _u32 * 8),
    ]


class kvm_irq_routing_entry(Structure):
    _fields_ = [*_each(_u32, "gsi type flags pad"), ("u", _irq_routing_target)]


class kvm_irq_routing(Structure):
    _fields_ = [*_each(_u32, "nr flags"), ("entries", kvm_irq_routing_entry * 0)]


class kvm_msi(Structure):
    _fields_ = [*_each(_u32, "address_lo address_hi data flags devid"), ("pad", _u8 * 12)]


class kvm_irqfd(Structure):
    _fields_ = [*_each(_u32, "fd gsi flags resamplefd"), ("pad", _u8 * 16)]


class kvm_ioeventfd(Structure):
    _fields_ = [
        *_each(_u64, "datamatch addr"),
        ("len", _u32),
        ("fd", c_int32),
        ("flags", _u32),
        ("pad", _u8 * 36),
    ]


class kvm_coalesced_mmio_zone(Structure):
    _fields_ = [("addr", _u64), *_each(_u32, "size pio")]


class kvm_coalesced_mmio(Structure):
    _fields_ = [("phys_addr", _u64), *_each(_u32, "len pio"), ("data", _u8 * 8)]


class kvm_coalesced_mmio_ring(Structure):
    _fields_ = [*_each(_u32, "first last"), ("coalesced_mmio", kvm_coalesced_mmio * 0)]


class kvm_clock_data(Structure):
    _fields_ = [
        ("clock", _u64),
        *_each(_u32, "flags pad0"),
        *_each(_u64, "realtime host_tsc"),
        ("pad", _u32 * 4),
    ]


class kvm_enable_cap(Structure):
    _fields_ = [*_each(_u32, "cap flags"), ("args", _u64 * 4), ("pad", _u8 * 64)]


class kvm_create_device(Structure):
    _fields_ = [*_each(_u32, "type fd flags")]


class kvm_device_attr(Structure):
    _fields_ = [*_each(_u32, "flags group"), *_each(_u64, "attr addr")]


class kvm_msr_filter_range(Structure):
    _fields_ = [*_each(_u32, "flags nmsrs base"), ("bitmap", c_void_p)]


class kvm_msr_filter(Structure):
    _fields_ = [("flags", _u32), ("ranges", kvm_msr_filter_range * 16)]


class kvm_pmu_event_filter(Structure):
    _fields_ = [
        *_each(_u32, "action nevents fixed_counter_bitmap flags"),
        ("pad", _u32 * 4),
        ("events", _u64 * 0),
    ]


class kvm_hyperv_eventfd(Structure):
    _fields_ = [("conn_id", _u32), ("fd", c_int32), ("flags", _u32), ("padding", _u32 * 3)]


class kvm_xen_hvm_config(Structure):
    _fields_ = [
        *_each(_u32, "flags msr"),
        *_each(_u64, "blob_addr_32 blob_addr_64"),
        *_each(_u8, "blob_size_32 blob_size_64"),
        ("pad2", _u8 * 30),
    ]


class kvm_regs(Structure):
    _fields_ = _each(_u64, "rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags")


class kvm_segment(Structure):
    _fields_ = [
        ("base", _u64),
        ("limit", _u32),
        ("selector", _u16),
        *_each(_u8, "type present dpl db s l g avl unusable padding"),
    ]


class kvm_dtable(Structure):
    _fields_ = [("base", _u64), ("limit", _u16), ("padding", _u16 * 3)]


_SREGS_COMMON = [
    *_each(kvm_segment, "cs ds es fs gs ss tr ldt"),
    *_each(kvm_dtable, "gdt idt"),
    *_each(_u64, "cr0 cr2 cr3 cr4 cr8 efer apic_base"),
]


class kvm_sregs(Structure):
    _fields_ = [*_SREGS_COMMON, ("interrupt_bitmap", _u64 * 4)]


class kvm_sregs2(Structure):
    _fields_ = [*_SREGS_COMMON, ("flags", _u64), ("pdptrs", _u64 * 4)]


class kvm_fpu(Structure):
    _fields_ = [
        ("fpr", _u8 * 16 * 8),
        *_each(_u16, "fcw fsw"),
        *_each(_u8, "ftwx pad1"),
        ("last_opcode", _u16),
        *_each(_u64, "last_ip last_dp"),
        ("xmm", _u8 * 16 * 16),
        *_each(_u32, "mxcsr pad2"),
    ]


class kvm_msr_entry(Structure):
    _fields_ = [*_each(_u32, "index reserved"), ("data", _u64)]


class kvm_msrs(Structure):
    _fields_ = [*_each(_u32, "nmsrs pad"), ("entries", kvm_msr_entry * 0)]


class kvm_msr_list(Structure):
    _fields_ = [("nmsrs", _u32), ("indices", _u32 * 0)]


class kvm_cpuid_entry2(Structure):
    _fields_ = [*_each(_u32, "function index flags eax ebx ecx edx"), ("padding", _u32 * 3)]


class kvm_cpuid2(Structure):
    _fields_ = [*_each(_u32, "nent padding"), ("entries", kvm_cpuid_entry2 * 0)]


class kvm_signal_mask(Structure):
    _fields_ = [("len", _u32), ("sigset", _u8 * 0)]


class kvm_translation(Structure):
    _fields_ = [
        *_each(_u64, "linear_address physical_address"),
        *_each(_u8, "valid writeable usermode"),
        ("pad", _u8 * 5),
    ]


class kvm_interrupt(Structure):
    _fields_ = [("irq", _u32)]


class kvm_lapic_state(Structure):
    _fields_ = [("regs", c_char * 1024)]


class kvm_tpr_access_ctl(Structure):
    _fields_ = [*_each(_u32, "enabled flags"), ("reserved", _u32 * 8)]


class kvm_vapic_addr(Structure):
    _fields_ = [("vapic_addr", _u64)]


class kvm_mp_state(Structure):
    _fields_ = [("mp_state", _u32)]


class kvm_guest_debug_arch(Structure):
    _fields_ = [("debugreg", _u64 * 8)]


class kvm_guest_debug(Structure):
    _fields_ = [*_each(_u32, "control pad"), ("arch", kvm_guest_debug_arch)]


class kvm_x86_mce(Structure):
    _fields_ = [
        *_each(_u64, "status addr misc mcg_status"),
        ("bank", _u8),
        ("pad1", _u8 * 7),
        ("pad2", _u64 * 3),
    ]


class _event_exception(Structure):
    _fields_ = [*_each(_u8, "injected nr has_error_code pending"), ("error_code", _u32)]


class _event_interrupt(Structure):
    _fields_ = [*_each(_u8, "injected nr soft shadow")]


class _event_nmi(Structure):
    _fields_ = [*_each(_u8, "injected pending masked pad")]


class _event_smi(Structure):
    _fields_ = [*_each(_u8, "smm pending smm_inside_nmi latched_init")]


class _event_triple_fault(Structure):
    _fields_ = [("pending", _u8)]


class kvm_vcpu_events(Structure):
    _fields_ = [
        ("exception", _event_exception),
        ("interrupt", _event_interrupt),
        ("nmi", _event_nmi),
        *_each(_u32, "sipi_vector flags"),
        ("smi", _event_smi),
        ("triple_fault", _event_triple_fault),
        ("reserved", _u8 * 26),
        ("exception_has_payload", _u8),
        ("exception_payload", _u64),
    ]


class kvm_debugregs(Structure):
    _fields_ = [("db", _u64 * 4), *_each(_u64, "dr6 dr7 flags"), ("reserved", _u64 * 9)]


class kvm_xsave(Structure):
    _fields_ = [("region", _u32 * 1024), ("extra", _u32 * 0)]


class kvm_xcr(Structure):
    _fields_ = [*_each(_u32, "xcr reserved"), ("value", _u64)]


class kvm_xcrs(Structure):
    _fields_ = [*_each(_u32, "nr_xcrs flags"), ("xcrs", kvm_xcr * 16), ("padding", _u64 * 16)]


class _vmx_smm(Structure):
    _fields_ = [("flags", _u16)]


class kvm_vmx_nested_state_hdr(Structure):
    _fields_ = [
        *_each(_u64, "vmxon_pa vmcs12_pa"),
        ("smm", _vmx_smm),
        ("pad", _u16),
        ("flags", _u32),
        ("preemption_timer_deadline", _u64),
    ]


class kvm_svm_nested_state_hdr(Structure):
    _fields_ = [("vmcb_pa", _u64)]


class _nested_state_hdr(Union):
    _fields_ = [("vmx", kvm_vmx_nested_state_hdr), ("svm", kvm_svm_nested_state_hdr), ("pad", _u8 * 120)]


class kvm_nested_state(Structure):
    _fields_ = [*_each(_u16, "flags format"), ("size", _u32), ("hdr", _nested_state_hdr), ("data", _u8 * 0)]


class kvm_stats_header(Structure):
    _fields_ = _each(_u32, "flags name_size num_desc id_offset desc_offset data_offset")


class kvm_stats_desc(Structure):
    _fields_ = [
        ("flags", _u32),
        ("exponent", c_int16),
        ("size", _u16),
        *_each(_u32, "offset bucket_size"),
        ("name", c_char * 0),
    ]


class Ioctl(Value):
    """One request of the KVM API.

    `direction` is ``""``, ``"R"`` (the kernel writes the structure), ``"W"`` or ``"WR"`` as in
    ``_IO``, ``_IOR``, ``_IOW``, ``_IOWR``; a few requests name it wrongly, as the header does.
    `structure` is the ctypes type of the argument; None where that is an integer or nothing.
    """

    number: int
    direction: str
    structure: Any = None


def _io(nr: int) -> Ioctl:
    return Ioctl(ioctl_opt.IO(KVMIO, nr), "")


def _ior(nr: int, structure: Any) -> Ioctl:
    return Ioctl(ioctl_opt.IOR(KVMIO, nr, structure), "R", structure)


def _iow(nr: int, structure: Any) -> Ioctl:
    return Ioctl(ioctl_opt.IOW(KVMIO, nr, structure), "W", structure)


def _iowr(nr: int, structure: Any) -> Ioctl:
    return Ioctl(ioctl_opt.IOWR(KVMIO, nr, structure), "WR", structure)


IOCTLS: Mapping[str, Ioctl] = MappingProxyType(
    {
        # /dev/kvm
        "KVM_GET_API_VERSION": _io(0x00),
        "KVM_CREATE_VM": _io(0x01),
        "KVM_GET_MSR_INDEX_LIST": _iowr(0x02, kvm_msr_list),
        "KVM_CHECK_EXTENSION": _io(0x03),  # a VM's too
        "KVM_GET_VCPU_MMAP_SIZE": _io(0x04),
        "KVM_GET_SUPPORTED_CPUID": _iowr(0x05, kvm_cpuid2),
        "KVM_GET_EMULATED_CPUID": _iowr(0x09, kvm_cpuid2),
        "KVM_GET_MSR_FEATURE_INDEX_LIST": _iowr(0x0A, kvm_msr_list),
        "KVM_GET_SUPPORTED_HV_CPUID": _iowr(0xC1, kvm_cpuid2),
        # VM: memory
        "KVM_SET_NR_MMU_PAGES": _io(0x44),
        "KVM_GET_NR_MMU_PAGES": _io(0x45),
        "KVM_SET_USER_MEMORY_REGION": _iow(0x46, kvm_userspace_memory_region),
        "KVM_SET_USER_MEMORY_REGION2": _iow(0x49, kvm_userspace_memory_region2),
        "KVM_CREATE_GUEST_MEMFD": _iowr(0xD4, kvm_create_guest_memfd),
        "KVM_SET_MEMORY_ATTRIBUTES": _iow(0xD2, kvm_memory_attributes),
        "KVM_GET_DIRTY_LOG": _iow(0x42, kvm_dirty_log),
        "KVM_CLEAR_DIRTY_LOG": _iowr(0xC0, kvm_clear_dirty_log),
        "KVM_RESET_DIRTY_RINGS": _io(0xC7),
        "KVM_SET_TSS_ADDR": _io(0x47),
        "KVM_SET_IDENTITY_MAP_ADDR": _iow(0x48, c_uint64),
        "KVM_MEMORY_ENCRYPT_OP": _iowr(0xBA, c_ulong),
        "KVM_MEMORY_ENCRYPT_REG_REGION": _ior(0xBB, kvm_enc_region),
        "KVM_MEMORY_ENCRYPT_UNREG_REGION": _ior(0xBC, kvm_enc_region),
        # VM: processors
        "KVM_CREATE_VCPU": _io(0x41),
        "KVM_SET_BOOT_CPU_ID": _io(0x78),
        "KVM_SET_PMU_EVENT_FILTER": _iow(0xB2, kvm_pmu_event_filter),
        "KVM_X86_SET_MSR_FILTER": _iow(0xC6, kvm_msr_filter),
        # VM: interrupts and timers
        "KVM_CREATE_IRQCHIP": _io(0x60),
        "KVM_IRQ_LINE": _iow(0x61, kvm_irq_level),
        "KVM_GET_IRQCHIP": _iowr(0x62, kvm_irqchip),
        "KVM_SET_IRQCHIP": _ior(0x63, kvm_irqchip),
        "KVM_CREATE_PIT": _io(0x64),
        "KVM_GET_PIT": _iowr(0x65, kvm_pit_state),
        "KVM_SET_PIT": _ior(0x66, kvm_pit_state),
        "KVM_IRQ_LINE_STATUS": _iowr(0x67, kvm_irq_level),
        "KVM_SET_GSI_ROUTING": _iow(0x6A, kvm_irq_routing),
        "KVM_REINJECT_CONTROL": _io(0x71),
        "KVM_IRQFD": _iow(0x76, kvm_irqfd),
        "KVM_CREATE_PIT2": _iow(0x77, kvm_pit_config),
        "KVM_SET_CLOCK": _iow(0x7B, kvm_clock_data),
        "KVM_GET_CLOCK": _ior(0x7C, kvm_clock_data),
        "KVM_GET_PIT2": _ior(0x9F, kvm_pit_state2),
        "KVM_SET_PIT2": _iow(0xA0, kvm_pit_state2),
        "KVM_SIGNAL_MSI": _iow(0xA5, kvm_msi),
        # VM: device input and output
        "KVM_REGISTER_COALESCED_MMIO": _iow(0x67, kvm_coalesced_mmio_zone),
        "KVM_UNREGISTER_COALESCED_MMIO": _iow(0x68, kvm_coalesced_mmio_zone),
        "KVM_IOEVENTFD": _iow(0x79, kvm_ioeventfd),
        "KVM_HYPERV_EVENTFD": _iow(0xBD, kvm_hyperv_eventfd),
        "KVM_XEN_HVM_CONFIG": _iow(0x7A, kvm_xen_hvm_config),
        "KVM_XEN_HVM_EVTCHN_SEND": _iow(0xD0, kvm_irq_routing_xen_evtchn),
        "KVM_CREATE_DEVICE": _iowr(0xE0, kvm_create_device),
        # VM and vCPU
        "KVM_SET_TSC_KHZ": _io(0xA2),
        "KVM_GET_TSC_KHZ": _io(0xA3),
        "KVM_ENABLE_CAP": _iow(0xA3, kvm_enable_cap),
        "KVM_GET_STATS_FD": _io(0xCE),
        # device fd; VM, vCPU and /dev/kvm as well
        "KVM_SET_DEVICE_ATTR": _iow(0xE1, kvm_device_attr),
        "KVM_GET_DEVICE_ATTR": _iow(0xE2, kvm_device_attr),
        "KVM_HAS_DEVICE_ATTR": _iow(0xE3, kvm_device_attr),
        # vCPU
        "KVM_RUN": _io(0x80),
        "KVM_GET_REGS": _ior(0x81, kvm_regs),
        "KVM_SET_REGS": _iow(0x82, kvm_regs),
        "KVM_GET_SREGS": _ior(0x83, kvm_sregs),
        "KVM_SET_SREGS": _iow(0x84, kvm_sregs),
        "KVM_GET_SREGS2": _ior(0xCC, kvm_sregs2),
        "KVM_SET_SREGS2": _iow(0xCD, kvm_sregs2),
        "KVM_TRANSLATE": _iowr(0x85, kvm_translation),
        "KVM_INTERRUPT": _iow(0x86, kvm_interrupt),
        "KVM_GET_MSRS": _iowr(0x88, kvm_msrs),  # /dev/kvm too: feature MSRs
        "KVM_SET_MSRS": _iow(0x89, kvm_msrs),
        "KVM_SET_SIGNAL_MASK": _iow(0x8B, kvm_signal_mask),
        "KVM_GET_FPU": _ior(0x8C, kvm_fpu),
        "KVM_SET_FPU": _iow(0x8D, kvm_fpu),
        "KVM_GET_LAPIC": _ior(0x8E, kvm_lapic_state),
        "KVM_SET_LAPIC": _iow(0x8F, kvm_lapic_state),
        "KVM_SET_CPUID2": _iow(0x90, kvm_cpuid2),
        "KVM_GET_CPUID2": _iowr(0x91, kvm_cpuid2),
        "KVM_TPR_ACCESS_REPORTING": _iowr(0x92, kvm_tpr_access_ctl),
        "KVM_SET_VAPIC_ADDR": _iow(0x93, kvm_vapic_addr),
        "KVM_GET_MP_STATE": _ior(0x98, kvm_mp_state),
        "KVM_SET_MP_STATE": _iow(0x99, kvm_mp_state),
        "KVM_NMI": _io(0x9A),
        "KVM_SMI": _io(0xB7),
        "KVM_SET_GUEST_DEBUG": _iow(0x9B, kvm_guest_debug),
        "KVM_X86_SETUP_MCE": _iow(0x9C, c_uint64),
        "KVM_X86_GET_MCE_CAP_SUPPORTED": _ior(0x9D, c_uint64),  # /dev/kvm
        "KVM_X86_SET_MCE": _iow(0x9E, kvm_x86_mce),
        "KVM_GET_VCPU_EVENTS": _ior(0x9F, kvm_vcpu_events),
        "KVM_SET_VCPU_EVENTS": _iow(0xA0, kvm_vcpu_events),
        "KVM_GET_DEBUGREGS": _ior(0xA1, kvm_debugregs),
        "KVM_SET_DEBUGREGS": _iow(0xA2, kvm_debugregs),
        "KVM_GET_XSAVE": _ior(0xA4, kvm_xsave),
        "KVM_SET_XSAVE": _iow(0xA5, kvm_xsave),
        "KVM_GET_XSAVE2": _ior(0xCF, kvm_xsave),
        "KVM_GET_XCRS": _ior(0xA6, kvm_xcrs),
        "KVM_SET_XCRS": _iow(0xA7, kvm_xcrs),
        "KVM_KVMCLOCK_CTRL": _io(0xAD),
        "KVM_GET_NESTED_STATE": _iowr(0xBE, kvm_nested_state),
        "KVM_SET_NESTED_STATE": _iow(0xBF, kvm_nested_state),
        "KVM_PRE_FAULT_MEMORY": _iowr(0xD5, kvm_pre_fault_memory),
    }
)
"""Every request of an x86 virtual machine monitor by the kernel's name, grouped by the fd it is for."""

EXIT_REASONS: Mapping[int, str] = MappingProxyType(
    dict(
        enumerate(
            f"KVM_EXIT_{name}"
            for name in (
                *("UNKNOWN", "EXCEPTION", "IO", "HYPERCALL", "DEBUG", "HLT", "MMIO", "IRQ_WINDOW_OPEN"),
                *("SHUTDOWN", "FAIL_ENTRY", "INTR", "SET_TPR", "TPR_ACCESS", "S390_SIEIC", "S390_RESET"),
                *("DCR", "NMI", "INTERNAL_ERROR", "OSI", "PAPR_HCALL", "S390_UCONTROL", "WATCHDOG"),
                *("S390_TSCH", "EPR", "SYSTEM_EVENT", "S390_STSI", "IOAPIC_EOI", "HYPERV", "ARM_NISV"),
                *("X86_RDMSR", "X86_WRMSR", "DIRTY_RING_FULL", "AP_RESET_HOLD", "X86_BUS_LOCK", "XEN"),
                *("RISCV_SBI", "RISCV_CSR", "NOTIFY", "LOONGARCH_IOCSR", "MEMORY_FAULT", "TDX", "ARM_SEA"),
            )
        )
    )
)
"""``kvm_run.exit_reason`` by number, of all architectures."""

INTERNAL_ERRORS: Mapping[int, str] = MappingProxyType(
    {
        1: "KVM_INTERNAL_ERROR_EMULATION",
        2: "KVM_INTERNAL_ERROR_SIMUL_EX",
        3: "KVM_INTERNAL_ERROR_DELIVERY_EV",
        4: "KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON",
    }
)
"""``kvm_run.internal.suberror`` by number."""

SYSTEM_EVENTS: Mapping[int, str] = MappingProxyType(
    {
        1: "KVM_SYSTEM_EVENT_SHUTDOWN",
        2: "KVM_SYSTEM_EVENT_RESET",
        3: "KVM_SYSTEM_EVENT_CRASH",
        4: "KVM_SYSTEM_EVENT_WAKEUP",
        5: "KVM_SYSTEM_EVENT_SUSPEND",
        6: "KVM_SYSTEM_EVENT_SEV_TERM",
        7: "KVM_SYSTEM_EVENT_TDX_FATAL",
    }
)
"""``kvm_run.system_event.type`` by number."""

# The numbers are dense, so a row gives its first one and the names that follow; "-" marks a hole.
_CAPABILITY_ROWS = {
    0: "IRQCHIP HLT MMU_SHADOW_CACHE_CONTROL USER_MEMORY SET_TSS_ADDR - VAPIC EXT_CPUID CLOCKSOURCE",
    9: "NR_VCPUS NR_MEMSLOTS PIT NOP_IO_DELAY PV_MMU MP_STATE COALESCED_MMIO SYNC_MMU - IOMMU - -",
    21: "DESTROY_MEMORY_REGION_WORKS USER_NMI SET_GUEST_DEBUG REINJECT_CONTROL IRQ_ROUTING",
    26: "IRQ_INJECT_STATUS - - ASSIGN_DEV_IRQ JOIN_MEMORY_REGIONS_WORKS MCE IRQFD PIT2 SET_BOOT_CPU_ID",
    35: "PIT_STATE2 IOEVENTFD SET_IDENTITY_MAP_ADDR XEN_HVM ADJUST_CLOCK INTERNAL_ERROR_DATA VCPU_EVENTS",
    42: "S390_PSW PPC_SEGSTATE HYPERV HYPERV_VAPIC HYPERV_SPIN PCI_SEGMENT PPC_PAIRED_SINGLES INTR_SHADOW",
    50: "DEBUGREGS X86_ROBUST_SINGLESTEP PPC_OSI PPC_UNSET_IRQ ENABLE_CAP XSAVE XCRS PPC_GET_PVINFO",
    58: "PPC_IRQ_LEVEL ASYNC_PF TSC_CONTROL GET_TSC_KHZ PPC_BOOKE_SREGS SPAPR_TCE PPC_SMT PPC_RMA",
    66: "MAX_VCPUS PPC_HIOR PPC_PAPR SW_TLB ONE_REG S390_GMAP TSC_DEADLINE_TIMER S390_UCONTROL SYNC_REGS",
    75: "PCI_2_3 KVMCLOCK_CTRL SIGNAL_MSI PPC_GET_SMMU_INFO S390_COW PPC_ALLOC_HTAB READONLY_MEM",
    82: "IRQFD_RESAMPLE PPC_BOOKE_WATCHDOG PPC_HTAB_FD S390_CSS_SUPPORT PPC_EPR ARM_PSCI",
    88: "ARM_SET_DEVICE_ADDR DEVICE_CTRL IRQ_MPIC PPC_RTAS IRQ_XICS ARM_EL1_32BIT SPAPR_MULTITCE",
    95: "EXT_EMUL_CPUID HYPERV_TIME IOAPIC_POLARITY_IGNORED ENABLE_CAP_VM S390_IRQCHIP IOEVENTFD_NO_LENGTH",
    101: "VM_ATTRIBUTES ARM_PSCI_0_2 PPC_FIXUP_HCALL PPC_ENABLE_HCALL CHECK_EXTENSION_VM S390_USER_SIGP",
    107: "S390_VECTOR_REGISTERS S390_MEM_OP S390_USER_STSI S390_SKEYS MIPS_FPU MIPS_MSA S390_INJECT_IRQ",
    114: "S390_IRQ_STATE PPC_HWRNG DISABLE_QUIRKS X86_SMM MULTI_ADDRESS_SPACE GUEST_DEBUG_HW_BPS",
    120: "GUEST_DEBUG_HW_WPS SPLIT_IRQCHIP IOEVENTFD_ANY_LENGTH HYPERV_SYNIC S390_RI SPAPR_TCE_64",
    126: "ARM_PMU_V3 VCPU_ATTRIBUTES MAX_VCPU_ID X2APIC_API S390_USER_INSTR0 MSI_DEVID PPC_HTM",
    133: "SPAPR_RESIZE_HPT PPC_MMU_RADIX PPC_MMU_HASH_V3 IMMEDIATE_EXIT MIPS_VZ MIPS_TE MIPS_64BIT S390_GS",
    141: "S390_AIS SPAPR_TCE_VFIO X86_DISABLE_EXITS ARM_USER_IRQ S390_CMMA_MIGRATION PPC_FWNMI",
    147: "PPC_SMT_POSSIBLE HYPERV_SYNIC2 HYPERV_VP_INDEX S390_AIS_MIGRATION PPC_GET_CPU_CHAR S390_BPB",
    153: "GET_MSR_FEATURES HYPERV_EVENTFD HYPERV_TLBFLUSH S390_HPAGE_1M NESTED_STATE ARM_INJECT_SERROR_ESR",
    159: "MSR_PLATFORM_INFO PPC_NESTED_HV HYPERV_SEND_IPI COALESCED_PIO HYPERV_ENLIGHTENED_VMCS",
    164: "EXCEPTION_PAYLOAD ARM_VM_IPA_SIZE MANUAL_DIRTY_LOG_PROTECT HYPERV_CPUID",
    168: "MANUAL_DIRTY_LOG_PROTECT2 PPC_IRQ_XIVE ARM_SVE ARM_PTRAUTH_ADDRESS ARM_PTRAUTH_GENERIC",
    173: "PMU_EVENT_FILTER ARM_IRQ_LINE_LAYOUT_2 HYPERV_DIRECT_TLBFLUSH PPC_GUEST_DEBUG_SSTEP",
    177: "ARM_NISV_TO_USER ARM_INJECT_EXT_DABT S390_VCPU_RESETS S390_PROTECTED PPC_SECURE_GUEST HALT_POLL",
    183: "ASYNC_PF_INT LAST_CPU SMALLER_MAXPHYADDR S390_DIAG318 STEAL_TIME X86_USER_SPACE_MSR",
    189: "X86_MSR_FILTER ENFORCE_PV_FEATURE_CPUID SYS_HYPERV_CPUID DIRTY_LOG_RING X86_BUS_LOCK_EXIT",
    194: "PPC_DAWR1 SET_GUEST_DEBUG2 SGX_ATTRIBUTE VM_COPY_ENC_CONTEXT_FROM PTP_KVM HYPERV_ENFORCE_CPUID",
    200: "SREGS2 EXIT_HYPERCALL PPC_RPT_INVALIDATE BINARY_STATS_FD EXIT_ON_EMULATION_FAILURE ARM_MTE",
    206: "VM_MOVE_ENC_CONTEXT_FROM VM_GPA_BITS XSAVE2 SYS_ATTRIBUTES PPC_AIL_MODE_3 S390_MEM_OP_EXTENSION",
    212: "PMU_CAPABILITY DISABLE_QUIRKS2 VM_TSC_CONTROL SYSTEM_EVENT_DATA ARM_SYSTEM_SUSPEND",
    217: "S390_PROTECTED_DUMP X86_TRIPLE_FAULT_EVENT X86_NOTIFY_VMEXIT VM_DISABLE_NX_HUGE_PAGES",
    221: "S390_ZPCI_OP S390_CPU_TOPOLOGY DIRTY_LOG_RING_ACQ_REL S390_PROTECTED_ASYNC_DISABLE",
    225: "DIRTY_LOG_RING_WITH_BITMAP PMU_EVENT_MASKED_EVENTS COUNTER_OFFSET ARM_EAGER_SPLIT_CHUNK_SIZE",
    229: "ARM_SUPPORTED_BLOCK_SIZES ARM_SUPPORTED_REG_MASK_RANGES USER_MEMORY2 MEMORY_FAULT_INFO",
    233: "MEMORY_ATTRIBUTES GUEST_MEMFD VM_TYPES PRE_FAULT_MEMORY X86_APIC_BUS_CYCLES_NS X86_GUEST_MODE",
    239: "ARM_WRITABLE_IMP_ID_REGS ARM_EL2 ARM_EL2_E2H0 RISCV_MP_STATE_RESET",
    243: "ARM_CACHEABLE_PFNMAP_SUPPORTED GUEST_MEMFD_FLAGS ARM_SEA_TO_USER S390_USER_OPEREXEC",
}

CAPABILITIES: Mapping[str, int] = MappingProxyType(
    {
        f"KVM_CAP_{name}": number
        for first, row in _CAPABILITY_ROWS.items()
        for number, name in enumerate(row.split(), first)
        if name != "-"
    }
)
"""Arguments of KVM_CHECK_EXTENSION and KVM_ENABLE_CAP by name, of all architectures."""
