"""Every wrapper on a closed descriptor: KvmError with EBADF and the ioctl's kernel name."""

from __future__ import annotations

import errno
import inspect
import mmap
from typing import TYPE_CHECKING, Any

import pytest

from pykvm.errors import KvmError
from pykvm.kvm.abi import IOCTLS
from pykvm.kvm.structs import ClockData, PitState2, Sregs2
from pykvm.registers import RESET_REGISTERS, SystemRegisters
from pykvm.state import DebugRegisters, FpuState, VcpuEvents

if TYPE_CHECKING:
    from pykvm._kvm import System
    from tests.kvm.machines import Machine

PAGE = mmap.mmap(-1, 4096)

# What each class's methods are given, and the ioctl that they issue
CALLS: dict[str, dict[str, tuple[str, tuple[Any, ...]]]] = {
    "System": {
        "get_api_version": ("KVM_GET_API_VERSION", ()),
        "check_extension": ("KVM_CHECK_EXTENSION", (0,)),
        "get_vcpu_mmap_size": ("KVM_GET_VCPU_MMAP_SIZE", ()),
        "get_supported_cpuid": ("KVM_GET_SUPPORTED_CPUID", ()),
        "get_emulated_cpuid": ("KVM_GET_EMULATED_CPUID", ()),
        "get_supported_hv_cpuid": ("KVM_GET_SUPPORTED_HV_CPUID", ()),
        "get_msr_index_list": ("KVM_GET_MSR_INDEX_LIST", ()),
        "get_msr_feature_index_list": ("KVM_GET_MSR_FEATURE_INDEX_LIST", ()),
        "get_msrs": ("KVM_GET_MSRS", ([0x10],)),
        "get_mce_cap_supported": ("KVM_X86_GET_MCE_CAP_SUPPORTED", ()),
        "get_device_attr": ("KVM_GET_DEVICE_ATTR", (0, 0, 8)),
        "has_device_attr": ("KVM_HAS_DEVICE_ATTR", (0, 0)),
        "create_vm": ("KVM_CREATE_VM", ()),
    },
    "Vm": {
        "check_extension": ("KVM_CHECK_EXTENSION", (0,)),
        "enable_cap": ("KVM_ENABLE_CAP", (0, 1)),
        "set_user_memory_region": ("KVM_SET_USER_MEMORY_REGION", (0, 0, 0, PAGE)),
        "set_user_memory_region2": ("KVM_SET_USER_MEMORY_REGION2", (0, 0, 0, PAGE)),
        "create_guest_memfd": ("KVM_CREATE_GUEST_MEMFD", (4096,)),
        "set_memory_attributes": ("KVM_SET_MEMORY_ATTRIBUTES", (0, 4096, 0)),
        "get_dirty_log": ("KVM_GET_DIRTY_LOG", (0, 1)),
        "clear_dirty_log": ("KVM_CLEAR_DIRTY_LOG", (0, 0, 1, bytes(8))),
        "reset_dirty_rings": ("KVM_RESET_DIRTY_RINGS", ()),
        "set_nr_mmu_pages": ("KVM_SET_NR_MMU_PAGES", (100,)),
        "set_tss_addr": ("KVM_SET_TSS_ADDR", (0xFEFF_D000,)),
        "set_identity_map_addr": ("KVM_SET_IDENTITY_MAP_ADDR", (0xFEFF_C000,)),
        "memory_encrypt_reg_region": ("KVM_MEMORY_ENCRYPT_REG_REGION", (PAGE,)),
        "memory_encrypt_unreg_region": ("KVM_MEMORY_ENCRYPT_UNREG_REGION", (PAGE,)),
        "create_irqchip": ("KVM_CREATE_IRQCHIP", ()),
        "get_irqchip": ("KVM_GET_IRQCHIP", (0,)),
        "set_irqchip": ("KVM_SET_IRQCHIP", (0, bytes(512))),
        "create_pit2": ("KVM_CREATE_PIT2", ()),
        "get_pit2": ("KVM_GET_PIT2", ()),
        "set_pit2": ("KVM_SET_PIT2", (PitState2(),)),
        "reinject_control": ("KVM_REINJECT_CONTROL", (True,)),
        "irq_line": ("KVM_IRQ_LINE", (0, True)),
        "irq_line_status": ("KVM_IRQ_LINE_STATUS", (0, True)),
        "set_gsi_routing": ("KVM_SET_GSI_ROUTING", ([],)),
        "signal_msi": ("KVM_SIGNAL_MSI", (0xFEE0_0000, 0x30)),
        "irqfd": ("KVM_IRQFD", (0, 0)),
        "ioeventfd": ("KVM_IOEVENTFD", (0, 0, 1)),
        "register_coalesced_mmio": ("KVM_REGISTER_COALESCED_MMIO", (0, 4096)),
        "unregister_coalesced_mmio": ("KVM_UNREGISTER_COALESCED_MMIO", (0, 4096)),
        "get_clock": ("KVM_GET_CLOCK", ()),
        "set_clock": ("KVM_SET_CLOCK", (ClockData(),)),
        "set_tsc_khz": ("KVM_SET_TSC_KHZ", (1_000_000,)),
        "get_tsc_khz": ("KVM_GET_TSC_KHZ", ()),
        "set_boot_cpu_id": ("KVM_SET_BOOT_CPU_ID", (0,)),
        "set_msr_filter": ("KVM_X86_SET_MSR_FILTER", ([],)),
        "create_device": ("KVM_CREATE_DEVICE", (4,)),
        "get_stats_fd": ("KVM_GET_STATS_FD", ()),
        "create_vcpu": ("KVM_CREATE_VCPU", (0,)),
    },
    "Vcpu": {
        "get_regs": ("KVM_GET_REGS", ()),
        "set_regs": ("KVM_SET_REGS", (RESET_REGISTERS,)),
        "get_sregs": ("KVM_GET_SREGS", ()),
        "set_sregs": ("KVM_SET_SREGS", (SystemRegisters(),)),
        "get_sregs2": ("KVM_GET_SREGS2", ()),
        "set_sregs2": ("KVM_SET_SREGS2", (Sregs2(SystemRegisters()),)),
        "get_fpu": ("KVM_GET_FPU", ()),
        "set_fpu": ("KVM_SET_FPU", (FpuState(),)),
        "get_xsave": ("KVM_GET_XSAVE", ()),
        "get_xsave2": ("KVM_GET_XSAVE2", ()),
        "set_xsave": ("KVM_SET_XSAVE", (bytes(4096),)),
        "get_xcrs": ("KVM_GET_XCRS", ()),
        "set_xcrs": ("KVM_SET_XCRS", ({0: 1},)),
        "get_msrs": ("KVM_GET_MSRS", ([0x10],)),
        "set_msrs": ("KVM_SET_MSRS", ({0x10: 0},)),
        "get_cpuid2": ("KVM_GET_CPUID2", ()),
        "set_cpuid2": ("KVM_SET_CPUID2", ([],)),
        "get_debugregs": ("KVM_GET_DEBUGREGS", ()),
        "set_debugregs": ("KVM_SET_DEBUGREGS", (DebugRegisters(),)),
        "set_guest_debug": ("KVM_SET_GUEST_DEBUG", (0,)),
        "get_vcpu_events": ("KVM_GET_VCPU_EVENTS", ()),
        "set_vcpu_events": ("KVM_SET_VCPU_EVENTS", (VcpuEvents(),)),
        "get_lapic": ("KVM_GET_LAPIC", ()),
        "set_lapic": ("KVM_SET_LAPIC", (bytes(1024),)),
        "get_mp_state": ("KVM_GET_MP_STATE", ()),
        "set_mp_state": ("KVM_SET_MP_STATE", (0,)),
        "interrupt": ("KVM_INTERRUPT", (0x20,)),
        "nmi": ("KVM_NMI", ()),
        "smi": ("KVM_SMI", ()),
        "tpr_access_reporting": ("KVM_TPR_ACCESS_REPORTING", (True,)),
        "set_vapic_addr": ("KVM_SET_VAPIC_ADDR", (0,)),
        "setup_mce": ("KVM_X86_SETUP_MCE", (0,)),
        "set_mce": ("KVM_X86_SET_MCE", (0, 0)),
        "get_tsc_khz": ("KVM_GET_TSC_KHZ", ()),
        "set_tsc_khz": ("KVM_SET_TSC_KHZ", (1_000_000,)),
        "kvmclock_ctrl": ("KVM_KVMCLOCK_CTRL", ()),
        "translate": ("KVM_TRANSLATE", (0,)),
        "set_signal_mask": ("KVM_SET_SIGNAL_MASK", (None,)),
        "enable_cap": ("KVM_ENABLE_CAP", (0, 1)),
        "get_device_attr": ("KVM_GET_DEVICE_ATTR", (0, 0, 8)),
        "set_device_attr": ("KVM_SET_DEVICE_ATTR", (0, 0, bytes(8))),
        "has_device_attr": ("KVM_HAS_DEVICE_ATTR", (0, 0)),
        "get_stats_fd": ("KVM_GET_STATS_FD", ()),
        "get_nested_state": ("KVM_GET_NESTED_STATE", ()),
        "set_nested_state": ("KVM_SET_NESTED_STATE", (bytes(128),)),
        "run": ("KVM_RUN", (None,)),
        "complete_msr": ("KVM_RUN", (0,)),
        "drain_coalesced": ("KVM_RUN", ()),
        "collect_dirty": ("KVM_RUN", ()),
    },
    "DeviceFd": {
        "set_device_attr": ("KVM_SET_DEVICE_ATTR", (0, 0, bytes(8))),
        "get_device_attr": ("KVM_GET_DEVICE_ATTR", (0, 0, 8)),
        "has_device_attr": ("KVM_HAS_DEVICE_ATTR", (0, 0)),
    },
}

# set_supported_cpuid needs an open System as its argument and has a test of its own.
ON_THE_ARGUMENT = {"set_supported_cpuid"}
WITHOUT_IOCTL = {
    *("fileno", "close", "serve"),
    *("kick", "clear_kick", "exit_counts", "recent_exits", "times", "measure_time"),
}


@pytest.fixture
def closed(system: System, request: pytest.FixtureRequest) -> Any:
    """A closed object of the class that the test names."""
    from pykvm import _kvm

    with _kvm.System() as own, own.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        device = _kvm.DeviceFd.__new__(_kvm.DeviceFd)  # x86 without VFIO has none to make
        return {"System": own, "Vm": vm, "Vcpu": vcpu, "DeviceFd": device}[request.param]


@pytest.mark.parametrize(
    ("closed", "method", "ioctl", "arguments"),
    [
        pytest.param(kind, method, ioctl, arguments, id=f"{kind}.{method}")
        for kind, methods in CALLS.items()
        for method, (ioctl, arguments) in methods.items()
    ],
    indirect=["closed"],
)
def test_a_call_on_a_closed_descriptor_says_ebadf_and_the_name_of_the_ioctl(
    closed: Any, method: str, ioctl: str, arguments: tuple[Any, ...]
) -> None:
    with pytest.raises(KvmError) as caught:
        getattr(closed, method)(*arguments)
    assert (caught.value.request, caught.value.errno) == (ioctl, errno.EBADF)
    assert ioctl in IOCTLS


@pytest.mark.parametrize("closed", ["Vcpu"], indirect=True)
def test_giving_a_closed_vcpu_its_cpuid_says_ebadf(closed: Any, system: System) -> None:
    with pytest.raises(KvmError) as caught:
        closed.set_supported_cpuid(system)
    assert (caught.value.request, caught.value.errno) == ("KVM_SET_CPUID2", errno.EBADF)


def test_a_closed_system_supports_nothing_whatever_it_has_said_before(machine: Machine) -> None:
    from pykvm import _kvm

    with _kvm.System() as own, own.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        vcpu.set_supported_cpuid(own)
    with pytest.raises(KvmError) as caught:
        machine.vcpu.set_supported_cpuid(own)
    assert (caught.value.request, caught.value.errno) == ("KVM_GET_SUPPORTED_CPUID", errno.EBADF)


@pytest.mark.parametrize("kind", CALLS)
def test_every_public_method_is_among_those_calls(kind: str, system: System) -> None:
    from pykvm import _kvm

    methods = inspect.getmembers(getattr(_kvm, kind), callable)
    public = {name for name, _ in methods if not name.startswith("_")}
    assert public - WITHOUT_IOCTL - ON_THE_ARGUMENT == set(CALLS[kind])


@pytest.mark.parametrize("closed", CALLS, indirect=True)
def test_a_closed_descriptor_is_minus_one_and_can_be_closed_again(closed: Any) -> None:
    closed.close()
    assert closed.fileno() == -1
    assert "closed" in repr(closed)


@pytest.mark.parametrize("closed", ["Vcpu"], indirect=True)
def test_a_closed_vcpu_ignores_kicks_and_keeps_its_counters(closed: Any) -> None:
    closed.kick()
    closed.clear_kick()
    assert closed.exit_counts() == {}
    assert closed.recent_exits() == []


@pytest.mark.parametrize("kind", ["Vm", "Vcpu", "DeviceFd"])
def test_what_kvm_makes_cannot_be_made_by_hand(kind: str, system: System) -> None:
    from pykvm import _kvm

    with pytest.raises(TypeError):
        getattr(_kvm, kind)()


def test_a_missing_device_file_is_an_error_that_names_it(system: System) -> None:
    from pykvm import _kvm

    with pytest.raises(KvmError, match="open /dev/no-such-kvm: No such file") as caught:
        _kvm.System("/dev/no-such-kvm")
    assert caught.value.errno == errno.ENOENT
