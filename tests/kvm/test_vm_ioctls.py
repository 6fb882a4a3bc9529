"""The ioctls of a VM: memory, interrupts, clocks, and events that enter and leave it without an exit."""

from __future__ import annotations

import mmap
import os
import select
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from pykvm.errors import ConfigurationError, KvmError
from pykvm.exits import Halt
from pykvm.kvm import structs
from pykvm.kvm.abi import CAPABILITIES
from pykvm.kvm.structs import ClockData, CoalescedAccess, IrqchipRoute, MsiRoute
from pykvm.values import replace
from tests.kvm.machines import (
    CODE,
    HLT,
    KVM_EXIT_HLT,
    KVM_EXIT_IO,
    MMIO,
    OUT_AL,
    PORT,
    RAM,
    STI_HLT,
    Machine,
    NoIO,
    Recorder,
    exits_of,
)

if TYPE_CHECKING:
    from pykvm._kvm import System

Need = Callable[..., None]

PAGE = 4096
VECTOR = 0x30
STORE_MMIO = b"\x26\xa2\x00\x00"  # mov es:[0], al
STORE_WORD_MMIO = b"\x26\xa3\x04\x00"  # mov es:[4], ax
LOAD_MMIO = b"\x26\xa0\x00\x00"  # mov al, es:[0]
WRITE_PAGES_2_AND_5 = b"\xa2\x00\x20\xa2\x00\x50\xf4"  # mov [0x2000], al; mov [0x5000], al; hlt


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def is_signalled(fd: int) -> bool:
    """Whether the eventfd was written; it is zero afterwards."""
    readable = bool(select.select([fd], [], [], 0)[0])
    if readable:
        os.eventfd_read(fd)
    return readable


# Memory


def test_a_write_to_read_only_memory_goes_to_io_and_changes_nothing(machine: Machine, need: Need) -> None:
    need("KVM_CAP_READONLY_MEM")
    rom = mmap.mmap(-1, PAGE)
    rom[0] = 0x5A
    machine.vm.set_user_memory_region(1, structs.KVM_MEM_READONLY, MMIO, rom)
    io = Recorder()
    # mov al, es:[0]; inc al; mov es:[0], al; mov al, es:[0]; hlt
    exit = machine.run(LOAD_MMIO + b"\xfe\xc0" + STORE_MMIO + LOAD_MMIO + HLT, io)
    assert exit == Halt()
    assert io.log == [("write", MMIO, 1, 0x5B)]
    assert machine.vcpu.get_regs().rax & 0xFF == 0x5A
    machine.vm.set_user_memory_region(1, 0, 0, None)
    rom.close()


def test_read_only_memory_may_be_a_read_only_buffer(machine: Machine, need: Need) -> None:
    need("KVM_CAP_READONLY_MEM")
    rom = mmap.mmap(-1, PAGE, prot=mmap.PROT_READ)
    machine.vm.set_user_memory_region(1, structs.KVM_MEM_READONLY, MMIO, rom)
    assert machine.run(LOAD_MMIO + HLT, rax=7) == Halt()
    assert machine.vcpu.get_regs().rax == 0
    machine.vm.set_user_memory_region(1, 0, 0, None)
    rom.close()


def test_writable_memory_must_be_a_writable_buffer(machine: Machine) -> None:
    with pytest.raises((BufferError, TypeError)):
        machine.vm.set_user_memory_region(1, 0, MMIO, bytes(PAGE))


def test_memory_cannot_be_unmapped_while_the_guest_has_it(machine: Machine) -> None:
    with pytest.raises(BufferError):
        machine.ram.close()


def test_memory_that_was_removed_can_be_unmapped_and_is_a_hole(machine: Machine) -> None:
    more = mmap.mmap(-1, PAGE)
    machine.vm.set_user_memory_region(1, 0, MMIO, more)
    machine.vm.set_user_memory_region(1, 0, 0, None)
    more.close()
    io = Recorder()
    machine.run(STORE_MMIO + HLT, io, rax=9)
    assert io.log == [("write", MMIO, 1, 9)]


def test_overlapping_memory_is_refused(machine: Machine) -> None:
    more = mmap.mmap(-1, PAGE)
    with pytest.raises(KvmError, match="KVM_SET_USER_MEMORY_REGION: File exists"):
        machine.vm.set_user_memory_region(1, 0, 0, more)
    more.close()  # a refused buffer is not kept


def test_region2_maps_memory_as_region_does(machine: Machine, need: Need) -> None:
    need("KVM_CAP_USER_MEMORY2")
    more = mmap.mmap(-1, PAGE)
    machine.vm.set_user_memory_region2(1, 0, MMIO, more)
    assert machine.run(STORE_MMIO + HLT, rax=0x77) == Halt()
    assert more[0] == 0x77
    machine.vm.set_user_memory_region2(1, 0, 0, None)
    more.close()


def test_a_guest_memfd_backs_a_slot_of_a_protected_vm(system: System, need: Need) -> None:
    need("KVM_CAP_GUEST_MEMFD", "KVM_CAP_USER_MEMORY2", "KVM_CAP_VM_TYPES")
    if not system.check_extension(CAPABILITIES["KVM_CAP_VM_TYPES"]) & 1 << structs.KVM_X86_SW_PROTECTED_VM:
        pytest.skip("check_extension(KVM_CAP_VM_TYPES) lacks KVM_X86_SW_PROTECTED_VM")
    shared = mmap.mmap(-1, PAGE)
    with system.create_vm(structs.KVM_X86_SW_PROTECTED_VM) as vm:
        fd = vm.create_guest_memfd(PAGE)
        vm.set_user_memory_region2(0, structs.KVM_MEM_GUEST_MEMFD, 0, shared, guest_memfd=fd)
        vm.set_memory_attributes(0, PAGE, structs.KVM_MEMORY_ATTRIBUTE_PRIVATE)
        os.close(fd)
    shared.close()


def test_a_guest_memfd_needs_a_size_in_pages(machine: Machine, need: Need) -> None:
    need("KVM_CAP_GUEST_MEMFD")
    with pytest.raises(KvmError, match="KVM_CREATE_GUEST_MEMFD"):
        machine.vm.create_guest_memfd(3)


def dirty_pages(bitmap: bytes) -> set[int]:
    """The pages of the bitmap, but for the code's: KVM may count one that it maps writable as written."""
    bits = int.from_bytes(bitmap, "little")
    return {page for page in range(8 * len(bitmap)) if bits >> page & 1} - {CODE // PAGE}


def test_the_dirty_log_holds_the_pages_written_since_it_was_read(
    make_machine: Callable[..., Machine],
) -> None:
    machine = make_machine(flags=structs.KVM_MEM_LOG_DIRTY_PAGES)
    machine.load(WRITE_PAGES_2_AND_5)
    machine.vm.get_dirty_log(0, RAM // PAGE)
    assert machine.vcpu.run(NoIO()) == Halt()
    first, second = (dirty_pages(machine.vm.get_dirty_log(0, RAM // PAGE)) for _ in range(2))
    assert first == {2, 5}
    assert second == set()


def test_too_small_a_dirty_log_is_refused(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(flags=structs.KVM_MEM_LOG_DIRTY_PAGES)
    with pytest.raises(ConfigurationError, match="slot 0 has more than 1 pages"):
        machine.vm.get_dirty_log(0, 1)
    with pytest.raises(ConfigurationError, match="a bitmap of 1 bytes does not cover 64 pages"):
        machine.vm.clear_dirty_log(0, 0, 64, b"\0")


def test_with_manual_protection_a_page_stays_dirty_until_it_is_cleared(
    make_machine: Callable[..., Machine], need: Need
) -> None:
    need("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")
    machine = make_machine()
    machine.vm.enable_cap(168, structs.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)
    machine.vm.set_user_memory_region(0, structs.KVM_MEM_LOG_DIRTY_PAGES, 0, machine.ram)
    machine.run(WRITE_PAGES_2_AND_5)
    pages = RAM // PAGE
    first, again = (machine.vm.get_dirty_log(0, pages) for _ in range(2))
    machine.vm.clear_dirty_log(0, 0, pages, (1 << 2).to_bytes(8, "little"))
    after = machine.vm.get_dirty_log(0, pages)
    assert dirty_pages(first) == dirty_pages(again) == {2, 5}
    assert dirty_pages(after) == {5}


def test_the_dirty_ring_holds_the_pages_a_vcpu_wrote(system: System, need: Need) -> None:
    need("KVM_CAP_DIRTY_LOG_RING")
    ring_bytes = PAGE * 16
    ram = mmap.mmap(-1, RAM)
    with system.create_vm() as vm:
        vm.enable_cap(CAPABILITIES["KVM_CAP_DIRTY_LOG_RING"], ring_bytes)
        machine = Machine.__new__(Machine)
        machine.vm, machine.ram = vm, ram
        vm.set_user_memory_region(0, structs.KVM_MEM_LOG_DIRTY_PAGES, 0, ram)
        with vm.create_vcpu(0) as vcpu:
            machine.vcpus = [vcpu]
            machine.run(WRITE_PAGES_2_AND_5)
            found = vcpu.collect_dirty()
            again = vcpu.collect_dirty()
            reset = vm.reset_dirty_rings()
    ram.close()
    written = [(each.slot, each.offset) for each in found if each.offset != CODE // PAGE]
    assert written == [(0, 2), (0, 5)]
    assert again == []
    assert reset == len(found)


def test_a_vm_without_a_dirty_ring_says_how_to_get_one(machine: Machine) -> None:
    with pytest.raises(ConfigurationError, match="enable KVM_CAP_DIRTY_LOG_RING"):
        machine.vcpu.collect_dirty()


def test_the_number_of_shadow_pages_can_be_limited(machine: Machine) -> None:
    machine.vm.set_nr_mmu_pages(1000)
    assert machine.run(HLT) == Halt()


def test_encrypted_regions_need_a_vm_that_has_them(machine: Machine) -> None:
    for call in (machine.vm.memory_encrypt_reg_region, machine.vm.memory_encrypt_unreg_region):
        with pytest.raises(KvmError, match=r"KVM_MEMORY_ENCRYPT_(UN)?REG_REGION"):
            call(machine.ram)


# Interrupt controllers, timer, clocks


def test_the_interrupt_controllers_come_back_as_they_were_set(irq_machine: Machine) -> None:
    for chip in (structs.KVM_IRQCHIP_PIC_MASTER, structs.KVM_IRQCHIP_PIC_SLAVE, structs.KVM_IRQCHIP_IOAPIC):
        state = irq_machine.vm.get_irqchip(chip)
        irq_machine.vm.set_irqchip(chip, state)
        assert irq_machine.vm.get_irqchip(chip) == state
        assert len(state) == 512
    with pytest.raises(ConfigurationError, match="an irqchip state is 512 bytes, not 1"):
        irq_machine.vm.set_irqchip(0, b"a")


def test_the_interval_timer_comes_back_as_it_was_set(irq_machine: Machine) -> None:
    irq_machine.vm.create_pit2()
    irq_machine.vm.reinject_control(False)
    before = irq_machine.vm.get_pit2()
    third = replace(before.channels[2], count=0x1234, rw_mode=3, mode=3)
    irq_machine.vm.set_pit2(replace(before, channels=(*before.channels[:2], third)))
    assert irq_machine.vm.get_pit2().channels[2].count == 0x1234
    assert irq_machine.vm.get_pit2().channels[2].mode == 3


def test_the_clock_goes_on_from_where_it_was_set(machine: Machine, need: Need) -> None:
    need("KVM_CAP_ADJUST_CLOCK")
    hour = 3600 * 10**9
    machine.vm.set_clock(ClockData(clock=hour))
    assert hour <= machine.vm.get_clock().clock < 2 * hour


def test_the_default_tsc_frequency_can_be_set(machine: Machine, need: Need) -> None:
    need("KVM_CAP_VM_TSC_CONTROL")
    khz = machine.vm.get_tsc_khz()
    machine.vm.set_tsc_khz(khz)
    assert machine.vm.get_tsc_khz() == khz


def test_another_vcpu_can_be_the_one_that_boots(system: System) -> None:
    with system.create_vm() as vm:
        vm.create_irqchip()
        vm.set_boot_cpu_id(1)
        with vm.create_vcpu(0) as first, vm.create_vcpu(1) as second:
            assert (first.get_mp_state(), second.get_mp_state()) == (1, 0)  # waits for INIT, runnable


def test_a_split_irqchip_leaves_the_local_apic_in_the_kernel(system: System, need: Need) -> None:
    need("KVM_CAP_SPLIT_IRQCHIP")
    with system.create_vm() as vm:
        vm.enable_cap(CAPABILITIES["KVM_CAP_SPLIT_IRQCHIP"], 24)
        with vm.create_vcpu(0) as vcpu:
            assert len(vcpu.get_lapic()) == 1024


def test_a_device_type_that_does_not_exist_is_refused(machine: Machine) -> None:
    with pytest.raises(KvmError, match="KVM_CREATE_DEVICE"):
        machine.vm.create_device(0xFFFF)


def test_a_vfio_device_can_be_tested_for_and_made(machine: Machine) -> None:
    try:
        device = machine.vm.create_device(structs.KVM_DEV_TYPE_VFIO)
    except KvmError as error:
        pytest.skip(str(error))
    with device:
        assert not device.has_device_attr(0xFFFF, 0)


@pytest.fixture
def listening(irq_machine: Machine) -> Machine:
    """A guest that halts until an interrupt comes, and then writes what is in al, and halts for good."""
    lapic = bytearray(irq_machine.vcpu.get_lapic())
    lapic[0xF0:0xF2] = b"\xff\x01"  # the spurious-interrupt register: APIC enabled
    irq_machine.vcpu.set_lapic(bytes(lapic))
    irq_machine.ram[VECTOR * 4 : VECTOR * 4 + 4] = (0x2000).to_bytes(4, "little")
    irq_machine.ram[0x2000:0x2003] = OUT_AL + b"\xfa" + HLT  # out dx, al; cli; hlt
    irq_machine.load(STI_HLT + b"\xeb\xfd", rax=0x42)  # sti; 1: hlt; jmp 1b
    return irq_machine


INTERRUPTED = [("out", PORT, 1, 0x42)]
MSI_ADDRESS = 0xFEE0_0000  # to the local APIC with ID 0, fixed delivery


def test_an_msi_wakes_the_guest(listening: Machine) -> None:
    io = Recorder()
    assert listening.vm.signal_msi(MSI_ADDRESS, VECTOR) > 0
    assert listening.vcpu.run(io) == Halt()
    assert io.log == INTERRUPTED


def test_a_line_of_the_pic_wakes_the_guest(listening: Machine) -> None:
    lapic = bytearray(listening.vcpu.get_lapic())
    lapic[0x350:0x354] = (0x700).to_bytes(4, "little")  # LINT0: ExtINT, unmasked
    listening.vcpu.set_lapic(bytes(lapic))
    # Initialise the master PIC to VECTOR and unmask all; say so; wait.
    program = b""
    for port, value in ((0x20, 0x11), (0x21, VECTOR), (0x21, 4), (0x21, 1), (0x21, 0)):
        program += bytes([0xB0, value, 0xE6, port])
    listening.load(program + b"\xb0\x42" + OUT_AL + STI_HLT + b"\xeb\xfd")
    answers = []

    class Raising(Recorder):
        def port_write(self, port: int, size: int, value: int) -> None:
            super().port_write(port, size, value)
            listening.vm.irq_line(0, False)
            answers.append(listening.vm.irq_line_status(0, True))

    io = Raising()
    assert listening.vcpu.run(io) == Halt()
    assert io.log == INTERRUPTED * 2
    assert answers[0] > 0


def test_an_eventfd_routed_to_an_msi_wakes_the_guest(listening: Machine, eventfd: int) -> None:
    listening.vm.set_gsi_routing(
        [IrqchipRoute(0, structs.KVM_IRQCHIP_IOAPIC, 0), MsiRoute(24, MSI_ADDRESS, VECTOR)]
    )
    listening.vm.irqfd(eventfd, 24)
    os.eventfd_write(eventfd, 1)
    io = Recorder()
    assert listening.vcpu.run(io) == Halt()
    assert io.log == INTERRUPTED
    listening.vm.irqfd(eventfd, 24, structs.KVM_IRQFD_FLAG_DEASSIGN)
    os.eventfd_write(eventfd, 1)
    assert is_signalled(eventfd)  # nobody in the kernel takes it any more


def test_a_line_that_resamples_can_be_made_and_undone(listening: Machine, eventfd: int, need: Need) -> None:
    need("KVM_CAP_IRQFD_RESAMPLE")
    resample = os.eventfd(0, os.EFD_NONBLOCK)
    listening.vm.irqfd(eventfd, 5, structs.KVM_IRQFD_FLAG_RESAMPLE, resample)
    listening.vm.irqfd(eventfd, 5, structs.KVM_IRQFD_FLAG_DEASSIGN)
    os.close(resample)


# Writes of the guest that need no exit


def test_a_port_write_signals_its_eventfd_without_an_exit(machine: Machine, eventfd: int) -> None:
    machine.vm.ioeventfd(eventfd, PORT, 1, structs.KVM_IOEVENTFD_FLAG_PIO)
    assert machine.run(OUT_AL + HLT) == Halt()
    assert is_signalled(eventfd)
    machine.vm.ioeventfd(
        eventfd, PORT, 1, structs.KVM_IOEVENTFD_FLAG_PIO | structs.KVM_IOEVENTFD_FLAG_DEASSIGN
    )
    io = Recorder()
    machine.run(OUT_AL + HLT, io, rax=3)
    assert io.log == [("out", PORT, 1, 3)]
    assert not is_signalled(eventfd)


def test_only_the_matching_value_signals_the_eventfd(machine: Machine, eventfd: int) -> None:
    flags = structs.KVM_IOEVENTFD_FLAG_PIO | structs.KVM_IOEVENTFD_FLAG_DATAMATCH
    machine.vm.ioeventfd(eventfd, PORT, 1, flags, datamatch=5)
    io = Recorder()
    machine.run(OUT_AL + HLT, io, rax=4)
    assert io.log == [("out", PORT, 1, 4)]
    assert not is_signalled(eventfd)
    assert machine.run(OUT_AL + HLT, rax=5) == Halt()
    assert is_signalled(eventfd)


def test_an_mmio_write_of_any_length_signals_its_eventfd(machine: Machine, eventfd: int, need: Need) -> None:
    need("KVM_CAP_IOEVENTFD_ANY_LENGTH")
    machine.vm.ioeventfd(eventfd, MMIO, 0)
    assert machine.run(STORE_MMIO + HLT) == Halt()
    assert is_signalled(eventfd)


def test_coalesced_writes_arrive_in_order_before_the_exit_that_follows_them(
    machine: Machine, need: Need
) -> None:
    need("KVM_CAP_COALESCED_MMIO")
    machine.vm.register_coalesced_mmio(MMIO, PAGE)
    io = Recorder()
    exit = machine.run(STORE_MMIO + STORE_WORD_MMIO + OUT_AL + STORE_MMIO + HLT, io, rax=0x1234)
    assert exit == Halt()
    assert io.log == [
        ("write", MMIO, 1, 0x34),
        ("write", MMIO + 4, 2, 0x1234),
        ("out", PORT, 1, 0x34),
        ("write", MMIO, 1, 0x34),
    ]
    assert exits_of(machine.vcpu) == {KVM_EXIT_IO: 1, KVM_EXIT_HLT: 1}


def test_coalesced_port_writes_arrive_too(machine: Machine, need: Need) -> None:
    need("KVM_CAP_COALESCED_PIO")
    machine.vm.register_coalesced_mmio(PORT, 1, pio=True)
    io = Recorder()
    assert machine.run(OUT_AL + OUT_AL + HLT, io, rax=8) == Halt()
    assert io.log == [("out", PORT, 1, 8)] * 2
    machine.vm.unregister_coalesced_mmio(PORT, 1, pio=True)
    machine.run(OUT_AL + HLT, io, rax=9)
    assert exits_of(machine.vcpu)[KVM_EXIT_IO] == 1


def test_a_device_that_refuses_a_coalesced_write_gets_it_again_and_the_exit_is_not_lost(
    machine: Machine, need: Need
) -> None:
    need("KVM_CAP_COALESCED_MMIO")
    machine.vm.register_coalesced_mmio(MMIO, PAGE)

    class Refusing(Recorder):
        def mmio_write(self, address: int, size: int, value: int) -> None:
            raise RuntimeError("not now")

    machine.load(STORE_MMIO + STORE_WORD_MMIO + b"\xec" + HLT, rax=0x1234)  # ... in al, dx; hlt
    with pytest.raises(RuntimeError, match="not now"):
        machine.vcpu.run(Refusing())
    io = Recorder(lambda: 0x99)
    assert machine.vcpu.run(io) == Halt()
    assert io.log == [("write", MMIO, 1, 0x34), ("write", MMIO + 4, 2, 0x1234), ("in", PORT, 1)]
    assert machine.vcpu.get_regs().rax == 0x1299


def test_coalesced_writes_can_be_taken_by_hand(machine: Machine, need: Need) -> None:
    need("KVM_CAP_COALESCED_MMIO")
    machine.vm.register_coalesced_mmio(MMIO, PAGE)

    class Refusing(Recorder):
        def mmio_write(self, address: int, size: int, value: int) -> None:
            raise RuntimeError("not now")

    with pytest.raises(RuntimeError):
        machine.run(STORE_MMIO + STORE_WORD_MMIO + HLT, Refusing(), rax=0x1234)
    taken = machine.vcpu.drain_coalesced()
    io = Recorder()  # an interruption may have come between the two
    assert machine.vcpu.run(io) == Halt()
    assert taken[0] == CoalescedAccess(MMIO, b"\x34")
    assert [each.address for each in taken] + [entry[1] for entry in io.log] == [MMIO, MMIO + 4]
    assert machine.vcpu.drain_coalesced() == []
