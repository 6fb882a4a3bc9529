"""What can be read of a vCPU can be set again, and an error says what was refused."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from pykvm.errors import ConfigurationError, KvmError
from pykvm.exits import Debug, Halt, Interrupted
from pykvm.kvm import stats, structs
from pykvm.registers import CR0_PE, CR0_PG, RFLAGS_FIXED, RFLAGS_IF, Registers
from pykvm.state import MP_STATE_HALTED, MP_STATE_RUNNABLE, DebugRegisters
from pykvm.values import replace
from tests.kvm.machines import CODE, HLT, MMIO, OUT_AL, PORT, Machine, NoIO, Recorder

if TYPE_CHECKING:
    from pykvm._kvm import System

MSR_TSC = 0x10
MSR_SYSENTER_CS = 0x174
MSR_SYSENTER_ESP = 0x175
NO_SUCH_MSR = 0x1234_5678

KVM_CAP = Callable[..., None]


def test_general_registers_come_back_as_they_were_set(machine: Machine) -> None:
    general = range(0x1_0000_0000, 0x1_0000_0010)
    value = Registers(*[*general, CODE, RFLAGS_FIXED | RFLAGS_IF])
    machine.vcpu.set_regs(value)
    machine.vcpu.get_fpu()  # an ioctl, before which synchronised registers are handed over
    assert machine.vcpu.get_regs() == value


def test_a_register_of_65_bits_is_refused_and_nothing_is_set(machine: Machine) -> None:
    before = machine.vcpu.get_regs()
    with pytest.raises(OverflowError):
        machine.vcpu.set_regs(Registers(rax=1, r15=1 << 64))
    assert machine.vcpu.get_regs() == before


def test_system_registers_come_back_as_they_were_set(machine: Machine) -> None:
    before = machine.vcpu.get_sregs()
    value = replace(before, ds=replace(before.ds, base=0x1230, selector=0x123), cr2=0xDEAD_B000)
    machine.vcpu.set_sregs(value)
    machine.vcpu.get_fpu()
    assert machine.vcpu.get_sregs() == value


def test_sregs2_come_back_as_they_were_set(machine: Machine, need: KVM_CAP) -> None:
    need("KVM_CAP_SREGS2")
    before = machine.vcpu.get_sregs2()
    value = replace(before, sregs=replace(before.sregs, cr2=0xDEAD_B000))
    machine.vcpu.set_sregs2(value)
    assert machine.vcpu.get_sregs2() == value
    assert machine.vcpu.get_sregs().cr2 == 0xDEAD_B000


def test_system_registers_that_make_no_sense_are_refused_by_name(machine: Machine) -> None:
    machine.load(HLT)
    machine.vcpu.get_fpu()  # hands the good ones over
    before = machine.vcpu.get_sregs()
    machine.vcpu.set_sregs(replace(before, cr0=CR0_PG, cr4=1 << 63))  # paging without protection
    with pytest.raises(KvmError) as caught:
        machine.vcpu.run(NoIO())
    assert (caught.value.request, caught.value.errno) == ("KVM_SET_SREGS", errno.EINVAL)
    assert machine.vcpu.get_sregs() == before
    assert machine.vcpu.run(NoIO()) == Halt()


def test_refused_system_registers_are_named_by_the_next_call_too(machine: Machine) -> None:
    before = machine.vcpu.get_sregs()
    machine.vcpu.set_sregs(replace(before, cr0=CR0_PG, cr4=1 << 63))
    with pytest.raises(KvmError, match="KVM_SET_SREGS"):
        machine.vcpu.get_fpu()
    assert machine.vcpu.get_sregs() == before


def test_fpu_and_sse_registers_come_back_as_they_were_set(machine: Machine) -> None:
    before = machine.vcpu.get_fpu()
    xmm = tuple(bytes([i]) * 16 for i in range(16))
    fpr = tuple(bytes([i] * 10) + bytes(6) for i in range(8))
    value = replace(before, xmm=xmm, fpr=fpr, fcw=0x27F, ftwx=0xFF)
    machine.vcpu.set_fpu(value)
    assert machine.vcpu.get_fpu() == value


def test_an_xmm_register_of_15_bytes_is_refused(machine: Machine) -> None:
    value = machine.vcpu.get_fpu()
    with pytest.raises(ConfigurationError, match="an XMM register is 16 bytes, not 15"):
        machine.vcpu.set_fpu(replace(value, xmm=(*value.xmm[:-1], bytes(15))))


def test_the_xsave_area_comes_back_as_it_was_set(machine: Machine) -> None:
    area = bytearray(machine.vcpu.get_xsave())
    area[:2] = (0x27F).to_bytes(2, "little")  # FCW
    area[512] |= 1  # XSTATE_BV: the x87 part is not in its initial state
    machine.vcpu.set_xsave(bytes(area))
    assert machine.vcpu.get_xsave() == area
    assert machine.vcpu.get_fpu().fcw == 0x27F
    assert len(area) == 4096


def test_the_full_xsave_area_has_the_size_of_the_capability(machine: Machine, need: KVM_CAP) -> None:
    need("KVM_CAP_XSAVE2")
    area = machine.vcpu.get_xsave2()
    machine.vcpu.set_xsave(area)
    assert len(area) == max(4096, machine.vm.check_extension(208))  # KVM_CAP_XSAVE2
    assert machine.vcpu.get_xsave2() == area


def test_the_full_xsave_area_needs_the_vm_to_be_open(machine: Machine) -> None:
    machine.vm.close()
    with pytest.raises(KvmError, match=r"KVM_GET_XSAVE2: .*the VM is closed"):
        machine.vcpu.get_xsave2()


def test_extended_control_registers_come_back_as_they_were_set(machine: Machine, need: KVM_CAP) -> None:
    need("KVM_CAP_XCRS")
    machine.vcpu.set_xcrs({0: 0x3})  # x87 and SSE state
    assert machine.vcpu.get_xcrs() == {0: 0x3}
    with pytest.raises(ConfigurationError, match="at most 16 XCRs, not 17"):
        machine.vcpu.set_xcrs(dict.fromkeys(range(17), 1))


def test_msrs_come_back_as_they_were_set(machine: Machine) -> None:
    values = {MSR_SYSENTER_CS: 8, MSR_SYSENTER_ESP: 0x8000}
    machine.vcpu.set_msrs(values)
    assert machine.vcpu.get_msrs(iter(values)) == values


def test_an_msr_that_cannot_be_read_is_named(machine: Machine) -> None:
    with pytest.raises(KvmError, match=r"MSR 0x12345678 cannot be read \(1 of 2 were\)") as caught:
        machine.vcpu.get_msrs([MSR_TSC, NO_SUCH_MSR])
    assert (caught.value.request, caught.value.errno) == ("KVM_GET_MSRS", errno.EINVAL)


def test_an_msr_that_cannot_be_set_is_named_and_those_before_it_are_set(machine: Machine) -> None:
    with pytest.raises(KvmError, match="MSR 0x12345678 cannot be set to 0x1") as caught:
        machine.vcpu.set_msrs({MSR_SYSENTER_CS: 16, NO_SUCH_MSR: 1, MSR_SYSENTER_ESP: 32})
    assert caught.value.request == "KVM_SET_MSRS"
    assert machine.vcpu.get_msrs([MSR_SYSENTER_CS, MSR_SYSENTER_ESP]) == {
        MSR_SYSENTER_CS: 16,
        MSR_SYSENTER_ESP: 0,
    }


def test_the_cpuid_that_is_set_is_the_cpuid_that_is_shown(system: System) -> None:
    with system.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        leaves = system.get_supported_cpuid()
        given = [replace(leaf, ebx=0x6B79_7670) if leaf.function == 0 else leaf for leaf in leaves]
        vcpu.set_cpuid2(given)
        shown = vcpu.get_cpuid2()
    assert [leaf for leaf in shown if leaf.function == 0] == [leaf for leaf in given if leaf.function == 0]
    assert {leaf.function for leaf in shown} >= {0, 1, 0x8000_0000}


def test_the_supported_cpuid_carries_the_apic_id(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(cpus=2, irqchip=True)
    ids = [next(leaf.ebx >> 24 for leaf in vcpu.get_cpuid2() if leaf.function == 1) for vcpu in machine.vcpus]
    assert ids == [0, 1]


def test_the_local_apic_comes_back_as_it_was_set(irq_machine: Machine) -> None:
    page = bytearray(irq_machine.vcpu.get_lapic())
    page[0x80] = 0x20  # the task priority register
    irq_machine.vcpu.set_lapic(bytes(page))
    assert irq_machine.vcpu.get_lapic()[0x80] == 0x20
    with pytest.raises(ConfigurationError, match="a local APIC state is 1024 bytes, not 3"):
        irq_machine.vcpu.set_lapic(b"abc")


def test_the_multiprocessing_state_comes_back_as_it_was_set(irq_machine: Machine) -> None:
    assert irq_machine.vcpu.get_mp_state() == MP_STATE_RUNNABLE
    irq_machine.vcpu.set_mp_state(MP_STATE_HALTED)
    assert irq_machine.vcpu.get_mp_state() == MP_STATE_HALTED


def test_events_come_back_as_they_were_set(machine: Machine) -> None:
    before = machine.vcpu.get_vcpu_events()
    value = replace(before, nmi_masked=1)  # AMD-V knows no two kinds of interrupt shadow
    machine.vcpu.set_vcpu_events(value)
    assert machine.vcpu.get_vcpu_events() == value


def test_debug_registers_come_back_as_they_were_set(machine: Machine) -> None:
    value = DebugRegisters(db=(1, 2, 3, 4), dr7=0x700)
    machine.vcpu.set_debugregs(value)
    assert machine.vcpu.get_debugregs() == value


def test_a_linear_address_without_paging_is_its_physical_address(machine: Machine) -> None:
    machine.load(HLT)
    found = machine.vcpu.translate(0x1234)
    assert (found.physical_address, found.valid) == (0x1234, True)


def test_single_steps_end_after_each_instruction(machine: Machine) -> None:
    machine.load(b"\x40\x40\xf4")  # inc ax; inc ax; hlt
    machine.vcpu.set_guest_debug(structs.KVM_GUESTDBG_ENABLE | structs.KVM_GUESTDBG_SINGLESTEP)
    steps = [machine.vcpu.run(NoIO()) for _ in range(2)]
    machine.vcpu.set_guest_debug(0)
    assert [type(step) for step in steps] == [Debug, Debug]
    assert [step.address for step in steps if isinstance(step, Debug)] == [CODE + 1, CODE + 2]
    assert machine.vcpu.run(NoIO()) == Halt()
    assert machine.vcpu.get_regs().rax == 2


def test_more_than_eight_debug_registers_are_refused(machine: Machine) -> None:
    with pytest.raises(ConfigurationError, match="there are 8 debug registers, not 9"):
        machine.vcpu.set_guest_debug(structs.KVM_GUESTDBG_ENABLE, [0] * 9)


def test_an_interrupt_that_is_queued_is_taken(machine: Machine) -> None:
    machine.ram[0x20 * 4 : 0x20 * 4 + 4] = (0x2000).to_bytes(4, "little")  # vector 0x20 to 0:2000
    machine.ram[0x2000:0x2002] = OUT_AL + HLT
    machine.load(b"\xfb\xeb\xfe", rax=0x55)  # sti; jmp $
    machine.vcpu.set_regs(replace(machine.vcpu.get_regs(), rflags=RFLAGS_FIXED | RFLAGS_IF))
    machine.vcpu.interrupt(0x20)
    io = Recorder()
    assert machine.vcpu.run(io) == Halt()
    assert io.log == [("out", PORT, 1, 0x55)]


def test_a_nonmaskable_interrupt_is_taken_with_interrupts_off(machine: Machine) -> None:
    machine.ram[2 * 4 : 2 * 4 + 4] = (0x2000).to_bytes(4, "little")
    machine.ram[0x2000:0x2002] = OUT_AL + HLT
    machine.load(b"\xfa\xeb\xfe", rax=0x66)
    machine.vcpu.nmi()
    io = Recorder()
    assert machine.vcpu.run(io) == Halt()
    assert io.log == [("out", PORT, 1, 0x66)]


def test_a_system_management_interrupt_is_taken(irq_machine: Machine, need: KVM_CAP) -> None:
    need("KVM_CAP_X86_SMM")
    # SMRAM is at 0x30000 after RESET and the handler at 0x38000: beyond RAM, where the fetch fails.
    irq_machine.load(b"\xfa\xeb\xfe")
    irq_machine.vcpu.smi()
    assert irq_machine.vcpu.get_vcpu_events().smi_pending == 1


def test_an_smi_is_refused_where_there_is_no_smm(irq_machine: Machine, system: System) -> None:
    if system.check_extension(117):
        pytest.skip("check_extension(KVM_CAP_X86_SMM) is 1")
    with pytest.raises(KvmError, match="KVM_SMI"):
        irq_machine.vcpu.smi()


def test_access_to_the_task_priority_can_be_reported(irq_machine: Machine) -> None:
    irq_machine.vcpu.tpr_access_reporting(True)
    irq_machine.vcpu.tpr_access_reporting(False)
    irq_machine.vcpu.set_vapic_addr(0x3000)


def test_machine_checks_can_be_set_up_and_injected(irq_machine: Machine, system: System) -> None:
    banks = system.check_extension(31)  # KVM_CAP_MCE
    if banks == 0:
        pytest.skip("check_extension(KVM_CAP_MCE) is 0")
    irq_machine.vcpu.setup_mce(1)  # one bank
    corrected = 1 << 63  # valid, and nothing worse
    irq_machine.vcpu.set_mce(0, corrected, 0x1000)
    assert irq_machine.vcpu.get_msrs([0x401]) == {0x401: corrected}  # MC0_STATUS


def test_the_tsc_frequency_is_known(machine: Machine, need: KVM_CAP) -> None:
    need("KVM_CAP_GET_TSC_KHZ")
    assert machine.vcpu.get_tsc_khz() > 0


def test_the_tsc_frequency_can_be_set(machine: Machine, need: KVM_CAP) -> None:
    need("KVM_CAP_TSC_CONTROL")
    khz = machine.vcpu.get_tsc_khz() // 2
    machine.vcpu.set_tsc_khz(khz)
    assert machine.vcpu.get_tsc_khz() == khz


def test_a_guest_without_kvmclock_cannot_be_told_of_a_pause(machine: Machine, need: KVM_CAP) -> None:
    need("KVM_CAP_KVMCLOCK_CTRL")
    with pytest.raises(KvmError) as caught:
        machine.vcpu.kvmclock_ctrl()
    assert (caught.value.request, caught.value.errno) == ("KVM_KVMCLOCK_CTRL", errno.EINVAL)


def test_a_guest_with_kvmclock_is_told_of_a_pause(machine: Machine, need: KVM_CAP) -> None:
    need("KVM_CAP_KVMCLOCK_CTRL")
    machine.vcpu.set_msrs({0x4B56_4D01: 0x3000 | 1})  # MSR_KVM_SYSTEM_TIME_NEW: the clock's page, enabled
    machine.run(HLT)
    machine.vcpu.kvmclock_ctrl()
    machine.run(HLT)
    flags = machine.ram[0x3000 + 29]  # struct pvclock_vcpu_time_info
    assert flags & 2  # PVCLOCK_GUEST_STOPPED


def test_the_signal_mask_of_the_guest_can_be_set_and_taken_back(machine: Machine) -> None:
    machine.vcpu.set_signal_mask({signal.SIGUSR1})
    machine.vcpu.set_signal_mask(None)
    assert machine.run(HLT) == Halt()
    with pytest.raises(ConfigurationError, match="there is no signal 65"):
        machine.vcpu.set_signal_mask({65})


def test_the_statistics_of_a_vcpu_and_a_vm_can_be_read(machine: Machine, need: KVM_CAP) -> None:
    need("KVM_CAP_BINARY_STATS_FD")
    machine.run(HLT)
    fds = machine.vcpu.get_stats_fd(), machine.vm.get_stats_fd()
    vcpu, vm = (stats.read(fd) for fd in fds)
    for fd in fds:
        os.close(fd)
    assert vcpu["exits"] != 0
    assert vm.id.startswith("kvm-")


def test_nested_state_comes_back_as_it_was_set(machine: Machine, need: KVM_CAP) -> None:
    need("KVM_CAP_NESTED_STATE")
    state = machine.vcpu.get_nested_state()
    machine.vcpu.set_nested_state(state)
    assert machine.vcpu.get_nested_state() == state
    with pytest.raises(ConfigurationError, match="truncated"):
        machine.vcpu.set_nested_state(state[:100])


def test_the_offset_of_the_tsc_is_an_attribute_of_the_vcpu(machine: Machine, need: KVM_CAP) -> None:
    need("KVM_CAP_VCPU_ATTRIBUTES")
    where = structs.KVM_VCPU_TSC_CTRL, structs.KVM_VCPU_TSC_OFFSET
    if not machine.vcpu.has_device_attr(*where):
        pytest.skip("has_device_attr(KVM_VCPU_TSC_OFFSET) is False")
    offset = machine.vcpu.get_device_attr(*where, 8)
    machine.vcpu.set_device_attr(*where, offset)
    assert machine.vcpu.get_device_attr(*where, 8) == offset
    assert len(offset) == 8


def test_one_byte_of_an_attribute_leaves_the_bytes_of_python_alone(machine: Machine) -> None:
    # CPython shares objects of one byte: a kernel that wrote into one would change it for everybody.
    with pytest.raises(KvmError):
        machine.vcpu.get_device_attr(0xFFFF, 0, 1)
    assert bytes(1) == b"\0"


def test_a_capability_has_at_most_four_arguments(machine: Machine) -> None:
    for owner in (machine.vm, machine.vcpu):
        with pytest.raises(ConfigurationError, match="at most 4 arguments, not 5"):
            owner.enable_cap(0, 1, 2, 3, 4, 5)


def test_a_capability_that_cannot_be_enabled_is_an_error(machine: Machine) -> None:
    for owner in (machine.vm, machine.vcpu):
        with pytest.raises(KvmError, match="KVM_ENABLE_CAP") as caught:
            owner.enable_cap(0xFFFF)
        assert caught.value.errno == errno.EINVAL


def rdmsr(index: int) -> bytes:
    """16-bit code: mov ecx, index; rdmsr; hlt."""
    return b"\x66\xb9" + index.to_bytes(4, "little") + b"\x0f\x32\xf4"


@pytest.fixture
def msr_exits(machine: Machine, need: KVM_CAP) -> Machine:
    """A machine whose accesses to MSR_SYSENTER_CS leave the guest."""
    need("KVM_CAP_X86_USER_SPACE_MSR", "KVM_CAP_X86_MSR_FILTER")
    machine.vm.enable_cap(188, structs.KVM_MSR_EXIT_REASON_FILTER)  # KVM_CAP_X86_USER_SPACE_MSR
    denied = (structs.KVM_MSR_FILTER_READ | structs.KVM_MSR_FILTER_WRITE, MSR_SYSENTER_CS, 1, b"\0")
    machine.vm.set_msr_filter([denied], structs.KVM_MSR_FILTER_DEFAULT_ALLOW)
    return machine


def test_a_filtered_msr_read_exits_and_is_answered(msr_exits: Machine) -> None:
    exit: Any = msr_exits.run(rdmsr(MSR_SYSENTER_CS))
    msr_exits.vcpu.complete_msr(0x1_0000_0042)
    end = msr_exits.vcpu.run(NoIO())
    registers = msr_exits.vcpu.get_regs()
    assert exit.reason == "KVM_EXIT_X86_RDMSR"
    assert dict(exit.data)["index"] == MSR_SYSENTER_CS
    assert end == Halt()
    assert (registers.rax, registers.rdx) == (0x42, 1)


def test_a_filtered_msr_write_exits_with_its_value(msr_exits: Machine) -> None:
    wrmsr = rdmsr(MSR_SYSENTER_CS).replace(b"\x0f\x32", b"\x0f\x30")
    exit: Any = msr_exits.run(wrmsr, rax=7, rdx=1)
    msr_exits.vcpu.complete_msr()
    assert exit.reason == "KVM_EXIT_X86_WRMSR"
    assert dict(exit.data)["data"] == 0x1_0000_0007
    assert msr_exits.vcpu.run(NoIO()) == Halt()


def test_a_filtered_msr_read_can_be_refused_with_a_fault(msr_exits: Machine) -> None:
    msr_exits.ram[13 * 4 : 13 * 4 + 4] = (0x2000).to_bytes(4, "little")  # #GP to 0:2000
    msr_exits.ram[0x2000:0x2002] = OUT_AL + HLT
    msr_exits.run(rdmsr(MSR_SYSENTER_CS), rdx=PORT, rax=1)
    msr_exits.vcpu.complete_msr(error=True)
    io = Recorder()
    assert msr_exits.vcpu.run(io) == Halt()
    assert io.log == [("out", PORT, 1, 1)]


def test_an_msr_can_only_be_answered_when_one_was_asked(machine: Machine) -> None:
    machine.run(HLT)
    with pytest.raises(ConfigurationError, match="waits for no MSR"):
        machine.vcpu.complete_msr(1)


def test_a_filter_with_too_short_a_bitmap_is_refused(machine: Machine) -> None:
    with pytest.raises(ConfigurationError, match="a bitmap of 1 bytes does not cover 9 MSRs"):
        machine.vm.set_msr_filter([(1, MSR_TSC, 9, b"\0")])
    with pytest.raises(ConfigurationError, match="at most 16 ranges, not 17"):
        machine.vm.set_msr_filter([(1, MSR_TSC, 1, b"\0")] * 17)


def test_the_system_knows_its_cpuid_and_msrs(system: System) -> None:
    assert system.get_api_version() == 12
    assert system.get_vcpu_mmap_size() >= 2 * 4096
    assert {leaf.function for leaf in system.get_supported_cpuid()} >= {0, 1}
    assert isinstance(system.get_emulated_cpuid(), tuple)
    assert MSR_SYSENTER_CS in system.get_msr_index_list()


def test_feature_msrs_are_read_from_the_system(system: System, need: KVM_CAP) -> None:
    need("KVM_CAP_GET_MSR_FEATURES")
    listed = system.get_msr_feature_index_list()
    readable = [index for index in listed if index == 0x8B]  # IA32_BIOS_SIGN_ID is on every processor's list
    assert set(system.get_msrs(readable)) == set(readable)
    with pytest.raises(KvmError, match="MSR 0x12345678 cannot be read"):
        system.get_msrs([NO_SUCH_MSR])


def test_hyper_v_leaves_and_machine_check_capabilities_are_listed(system: System, need: KVM_CAP) -> None:
    need("KVM_CAP_SYS_HYPERV_CPUID", "KVM_CAP_MCE")
    assert any(leaf.function == 0x4000_0000 for leaf in system.get_supported_hv_cpuid())
    assert system.get_mce_cap_supported() >= 0


def test_the_system_has_attributes(system: System, need: KVM_CAP) -> None:
    need("KVM_CAP_SYS_ATTRIBUTES")
    assert system.has_device_attr(0, 0)  # KVM_X86_XCOMP_GUEST_SUPP
    assert len(system.get_device_attr(0, 0, 8)) == 8
    assert not system.has_device_attr(0, 0xFFFF)


def test_a_vm_of_an_unknown_type_cannot_be_made(system: System) -> None:
    with pytest.raises(KvmError, match="KVM_CREATE_VM"):
        system.create_vm(99)


def test_a_second_vcpu_with_the_same_index_is_refused(machine: Machine) -> None:
    with pytest.raises(KvmError, match=r"KVM_CREATE_VCPU: File exists \(errno 17\)"):
        machine.vm.create_vcpu(0)


def test_state_can_be_set_between_the_parts_of_a_run(machine: Machine) -> None:
    machine.load(OUT_AL + b"\x40" + HLT, rax=1)  # out; inc ax; hlt
    machine.vcpu.kick()
    assert machine.vcpu.run(NoIO()) == Interrupted()
    machine.vcpu.set_regs(replace(machine.vcpu.get_regs(), rax=7))
    io = Recorder()
    assert machine.vcpu.run(io) == Halt()
    assert io.log == [("out", PORT, 1, 7)]
    assert machine.vcpu.get_regs().rax == 8
    assert machine.vcpu.get_sregs().es.base == MMIO
    assert machine.vcpu.get_sregs().cr0 & CR0_PE == 0
