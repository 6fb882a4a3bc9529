"""Structures of the KVM API that cross the extension, as frozen values, and their named flags.

Field names are the kernel's (``<linux/kvm.h>``, x86 ``<asm/kvm.h>``; Linux Documentation/virt/kvm/api.rst,
whose sections the docstrings cite). What the kernel calls opaque crosses as `bytes` and has no class here:
the local APIC page, PIC and I/O APIC chips, XSAVE areas, nested state.
"""

from __future__ import annotations

from pykvm.registers import SystemRegisters
from pykvm.values import Value

# kvm_userspace_memory_region.flags
KVM_MEM_LOG_DIRTY_PAGES = 1 << 0
KVM_MEM_READONLY = 1 << 1
KVM_MEM_GUEST_MEMFD = 1 << 2

# kvm_create_guest_memfd.flags
GUEST_MEMFD_FLAG_MMAP = 1 << 0
GUEST_MEMFD_FLAG_INIT_SHARED = 1 << 1

# kvm_memory_attributes.attributes
KVM_MEMORY_ATTRIBUTE_PRIVATE = 1 << 3

# KVM_CREATE_VM types (bits of KVM_CAP_VM_TYPES)
KVM_X86_DEFAULT_VM = 0
KVM_X86_SW_PROTECTED_VM = 1
KVM_X86_SEV_VM = 2
KVM_X86_SEV_ES_VM = 3
KVM_X86_SNP_VM = 4
KVM_X86_TDX_VM = 5

# kvm_irqfd.flags
KVM_IRQFD_FLAG_DEASSIGN = 1 << 0
KVM_IRQFD_FLAG_RESAMPLE = 1 << 1

# kvm_ioeventfd.flags
KVM_IOEVENTFD_FLAG_DATAMATCH = 1 << 0
KVM_IOEVENTFD_FLAG_PIO = 1 << 1
KVM_IOEVENTFD_FLAG_DEASSIGN = 1 << 2

# kvm_guest_debug.control
KVM_GUESTDBG_ENABLE = 0x0000_0001
KVM_GUESTDBG_SINGLESTEP = 0x0000_0002
KVM_GUESTDBG_USE_SW_BP = 0x0001_0000
KVM_GUESTDBG_USE_HW_BP = 0x0002_0000
KVM_GUESTDBG_INJECT_DB = 0x0004_0000
KVM_GUESTDBG_INJECT_BP = 0x0008_0000
KVM_GUESTDBG_BLOCKIRQ = 0x0010_0000

# kvm_cpuid_entry2.flags; the kernel misspells SIGNIFICANT
KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1 << 0
KVM_CPUID_FLAG_STATEFUL_FUNC = 1 << 1
KVM_CPUID_FLAG_STATE_READ_NEXT = 1 << 2

# kvm_clock_data.flags
KVM_CLOCK_TSC_STABLE = 1 << 1
KVM_CLOCK_REALTIME = 1 << 2
KVM_CLOCK_HOST_TSC = 1 << 3

# kvm_pit_config.flags, kvm_pit_state2.flags
KVM_PIT_SPEAKER_DUMMY = 1 << 0
KVM_PIT_FLAGS_HPET_LEGACY = 1 << 0
KVM_PIT_FLAGS_SPEAKER_DATA_ON = 1 << 1

# kvm_irqchip.chip_id
KVM_IRQCHIP_PIC_MASTER = 0
KVM_IRQCHIP_PIC_SLAVE = 1
KVM_IRQCHIP_IOAPIC = 2

# kvm_irq_routing_entry.type
KVM_IRQ_ROUTING_IRQCHIP = 1
KVM_IRQ_ROUTING_MSI = 2

# kvm_msi.flags, kvm_irq_routing_entry.flags
KVM_MSI_VALID_DEVID = 1 << 0

# kvm_vcpu_events.flags and interrupt.shadow
KVM_VCPUEVENT_VALID_NMI_PENDING = 1 << 0
KVM_VCPUEVENT_VALID_SIPI_VECTOR = 1 << 1
KVM_VCPUEVENT_VALID_SHADOW = 1 << 2
KVM_VCPUEVENT_VALID_SMM = 1 << 3
KVM_VCPUEVENT_VALID_PAYLOAD = 1 << 4
KVM_VCPUEVENT_VALID_TRIPLE_FAULT = 1 << 5
KVM_X86_SHADOW_INT_MOV_SS = 1 << 0
KVM_X86_SHADOW_INT_STI = 1 << 1

# kvm_sregs2.flags
KVM_SREGS2_FLAGS_PDPTRS_VALID = 1 << 0

# KVM_CAP_SYNC_REGS: kvm_run.kvm_valid_regs and kvm_dirty_regs
KVM_SYNC_X86_REGS = 1 << 0
KVM_SYNC_X86_SREGS = 1 << 1
KVM_SYNC_X86_EVENTS = 1 << 2

# kvm_run.flags
KVM_RUN_X86_SMM = 1 << 0
KVM_RUN_X86_BUS_LOCK = 1 << 1
KVM_RUN_X86_GUEST_MODE = 1 << 2

# kvm_dirty_gfn.flags
KVM_DIRTY_GFN_F_DIRTY = 1 << 0
KVM_DIRTY_GFN_F_RESET = 1 << 1

# KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE = 1 << 0
KVM_DIRTY_LOG_INITIALLY_SET = 1 << 1

# KVM_CAP_X86_DISABLE_EXITS
KVM_X86_DISABLE_EXITS_MWAIT = 1 << 0
KVM_X86_DISABLE_EXITS_HLT = 1 << 1
KVM_X86_DISABLE_EXITS_PAUSE = 1 << 2
KVM_X86_DISABLE_EXITS_CSTATE = 1 << 3
KVM_X86_DISABLE_EXITS_APERFMPERF = 1 << 4

# KVM_CAP_X86_USER_SPACE_MSR and kvm_run.msr.reason
KVM_MSR_EXIT_REASON_INVAL = 1 << 0
KVM_MSR_EXIT_REASON_UNKNOWN = 1 << 1
KVM_MSR_EXIT_REASON_FILTER = 1 << 2

# kvm_msr_filter.flags and kvm_msr_filter_range.flags
KVM_MSR_FILTER_DEFAULT_ALLOW = 0
KVM_MSR_FILTER_DEFAULT_DENY = 1 << 0
KVM_MSR_FILTER_READ = 1 << 0
KVM_MSR_FILTER_WRITE = 1 << 1

# KVM_CAP_X2APIC_API
KVM_X2APIC_API_USE_32BIT_IDS = 1 << 0
KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK = 1 << 1

# KVM_CAP_X86_BUS_LOCK_EXIT, KVM_CAP_X86_NOTIFY_VMEXIT
KVM_BUS_LOCK_DETECTION_OFF = 1 << 0
KVM_BUS_LOCK_DETECTION_EXIT = 1 << 1
KVM_X86_NOTIFY_VMEXIT_ENABLED = 1 << 0
KVM_X86_NOTIFY_VMEXIT_USER = 1 << 1

# Device control
KVM_CREATE_DEVICE_TEST = 1
KVM_DEV_TYPE_VFIO = 4
KVM_DEV_VFIO_GROUP = 1
KVM_DEV_VFIO_GROUP_ADD = 1
KVM_DEV_VFIO_GROUP_DEL = 2
KVM_VCPU_TSC_CTRL = 0
KVM_VCPU_TSC_OFFSET = 0


class CpuidEntry(Value):
    """One CPUID leaf, or sub-leaf `index` where `flags` has KVM_CPUID_FLAG_SIGNIFCANT_INDEX (4.46)."""

    function: int
    index: int = 0
    flags: int = 0
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0


class PitChannelState(Value):
    """One counter of the i8254 (``struct kvm_pit_channel_state``, 4.72).

    `count` is up to 65536; `count_load_time` is host time in nanoseconds.
    """

    count: int = 0
    latched_count: int = 0
    count_latched: int = 0
    status_latched: int = 0
    status: int = 0
    read_state: int = 0
    write_state: int = 0
    write_latch: int = 0
    rw_mode: int = 0
    mode: int = 0
    bcd: int = 0
    gate: int = 0
    count_load_time: int = 0


class PitState2(Value):
    """The i8254 with its speaker and HPET flags (``struct kvm_pit_state2``, 4.72)."""

    channels: tuple[PitChannelState, PitChannelState, PitChannelState] = (PitChannelState(),) * 3
    flags: int = 0


class ClockData(Value):
    """kvmclock (``struct kvm_clock_data``, 4.29).

    `clock` and `realtime` are nanoseconds, `realtime` since the Unix epoch; `realtime` and
    `host_tsc` count only where `flags` has KVM_CLOCK_REALTIME and KVM_CLOCK_HOST_TSC.
    """

    clock: int = 0
    flags: int = 0
    realtime: int = 0
    host_tsc: int = 0


class IrqchipRoute(Value):
    """GSI to `pin` of a chip (KVM_IRQCHIP_PIC_MASTER, _PIC_SLAVE or _IOAPIC)."""

    gsi: int
    irqchip: int
    pin: int


class MsiRoute(Value):
    """GSI to a message-signalled interrupt: `data` is written to the 64-bit `address`."""

    gsi: int
    address: int
    data: int
    devid: int = 0
    flags: int = 0


IrqRoutingEntry = IrqchipRoute | MsiRoute
"""One entry of KVM_SET_GSI_ROUTING (4.52)."""


class DirtyGfn(Value):
    """An entry of the dirty ring (``struct kvm_dirty_gfn``, 8.29).

    `slot` has the address space in its upper 16 bits; `offset` counts pages from the slot's start.
    """

    slot: int
    offset: int
    flags: int = 0


class CoalescedAccess(Value):
    """A write that KVM put in the coalesced ring (4.116); `address` is a port where `pio` is true."""

    address: int
    data: bytes
    pio: bool = False


class Translation(Value):
    """What KVM_TRANSLATE says of a linear address (``struct kvm_translation``, 4.15)."""

    linear_address: int
    physical_address: int
    valid: bool
    writeable: bool
    usermode: bool


class Sregs2(Value):
    """System registers with the PAE page-directory pointers (``struct kvm_sregs2``, 4.131).

    There is no interrupt bitmap: `sregs.interrupt_bitmap` is zero when read, ignored when set.
    `pdptrs` count only where `flags` has KVM_SREGS2_FLAGS_PDPTRS_VALID.
    """

    sregs: SystemRegisters
    flags: int = 0
    pdptrs: tuple[int, int, int, int] = (0, 0, 0, 0)
