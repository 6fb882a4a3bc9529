"""Registers in the shared page (KVM_CAP_SYNC_REGS): always what the ioctls would say, never stale."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pykvm.errors import KvmError
from pykvm.exits import Halt, Interrupted
from pykvm.registers import CR0_PG, Registers
from pykvm.values import replace
from tests.kvm.machines import CODE, HLT, OUT_AL, PORT, SPIN, Machine, NoIO, Recorder

INC_OUT = b"\x40\xee\xeb\xfc"  # 1: inc ax; out dx, al; jmp 1b
EXITS_UNTIL_KVM_STOPS_STORING = 64


@pytest.fixture(autouse=True)
def synchronised(need: Callable[..., None]) -> None:
    need("KVM_CAP_SYNC_REGS")


def both(machine: Machine) -> tuple[object, object]:
    """The registers as they are in the page, and as the ioctls say."""
    in_page = machine.vcpu.get_regs(), machine.vcpu.get_sregs()
    machine.vcpu.get_fpu()  # any other ioctl makes the next look a real one
    return in_page, (machine.vcpu.get_regs(), machine.vcpu.get_sregs())


def test_after_each_run_the_page_says_what_the_ioctls_say(machine: Machine) -> None:
    for value in range(5):
        machine.run(b"\x40" + HLT, rax=value, rbx=value)  # inc ax; hlt
        in_page, by_ioctl = both(machine)
        assert in_page == by_ioctl


def test_before_any_run_the_page_says_what_the_ioctls_say(machine: Machine) -> None:
    assert machine.vcpu.get_regs() == machine.vcpu.get_regs()
    in_page, by_ioctl = both(machine)
    assert in_page == by_ioctl


def test_within_a_device_the_page_says_what_the_ioctls_say(machine: Machine) -> None:
    pairs = []

    class Looking(Recorder):
        def port_write(self, port: int, size: int, value: int) -> None:
            pairs.append(both(machine))

    machine.run(OUT_AL * 3 + HLT, Looking())
    assert [in_page == by_ioctl for in_page, by_ioctl in pairs] == [True] * 3


def test_registers_are_right_when_nobody_looked_for_many_exits(machine: Machine) -> None:
    class Looking(Recorder):
        def port_write(self, port: int, size: int, value: int) -> None:
            super().port_write(port, size, value)
            count = len(self.log)
            if count % (EXITS_UNTIL_KVM_STOPS_STORING * 3) == 0:
                seen.append((machine.vcpu.get_regs().rax, count))
            if count == 1000:
                machine.vcpu.kick()

    seen: list[tuple[int, int]] = []
    assert machine.run(INC_OUT, Looking()) == Interrupted()
    assert seen == [(count, count) for _, count in seen]
    assert len(seen) == 5
    assert machine.vcpu.get_regs().rax == 1000


def test_what_is_set_is_seen_by_the_guest_each_time(machine: Machine) -> None:
    machine.load(OUT_AL + HLT)
    io = Recorder()
    for value in range(10):
        machine.vcpu.set_regs(Registers(rip=CODE, rdx=PORT, rax=value))
        assert machine.vcpu.run(io) == Halt()
    assert [value for *_, value in io.log] == list(range(10))


def test_what_is_set_is_read_back_before_and_after_the_next_run(machine: Machine) -> None:
    machine.load(HLT, rbx=5)
    assert machine.vcpu.get_regs().rbx == 5
    machine.vcpu.run(NoIO())
    machine.vcpu.set_regs(replace(machine.vcpu.get_regs(), rbx=6, rip=CODE))
    assert machine.vcpu.get_regs().rbx == 6
    machine.vcpu.kick()
    machine.vcpu.run(NoIO())
    assert machine.vcpu.get_regs().rbx == 6


def test_setting_one_part_leaves_the_other_as_it_is(machine: Machine) -> None:
    machine.run(HLT, rbx=7)
    system = machine.vcpu.get_sregs()
    machine.vcpu.set_sregs(replace(system, cr2=0x1000))
    assert machine.vcpu.get_regs().rbx == 7
    machine.vcpu.set_regs(replace(machine.vcpu.get_regs(), rbx=8, rip=CODE))
    assert machine.vcpu.get_sregs().cr2 == 0x1000
    machine.vcpu.run(NoIO())
    assert (machine.vcpu.get_regs().rbx, machine.vcpu.get_sregs().cr2) == (8, 0x1000)


def test_after_a_run_that_failed_the_registers_are_those_of_before(machine: Machine) -> None:
    machine.run(HLT, rbx=9)
    before = machine.vcpu.get_regs(), machine.vcpu.get_sregs()
    machine.vcpu.set_sregs(replace(before[1], cr0=CR0_PG, cr4=1 << 63))
    with pytest.raises(KvmError, match="KVM_SET_SREGS"):
        machine.vcpu.run(NoIO())
    in_page, by_ioctl = both(machine)
    assert in_page == by_ioctl == before


def test_a_processor_that_waits_for_init_keeps_the_registers_it_was_given(
    make_machine: Callable[..., Machine],
) -> None:
    machine = make_machine(cpus=2, irqchip=True)
    waiting = machine.vcpus[1]
    waiting.get_regs()  # from now on KVM stores registers at each exit
    waiting.kick()
    waiting.run(NoIO())
    machine.load(SPIN, cpu=1, rbx=0x77)
    waiting.kick()
    assert waiting.run(NoIO()) == Interrupted(1)
    assert waiting.get_regs().rbx == 0x77
    waiting.get_fpu()
    assert waiting.get_regs().rbx == 0x77
