"""With the local APIC in the kernel HLT blocks there; a halt that nothing can end is still noticed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pykvm.exits import Exit, Halt, Interrupted
from pykvm.state import MP_STATE_RUNNABLE
from pykvm.values import replace
from tests.kvm.machines import CLI_HLT, KVM_EXIT_INTR, SPIN, Machine, NoIO, Recorder

SLEEP = b"\xfb\xf4\xeb\xfd"  # sti; 1: hlt; jmp 1b
ICR_INIT = (0xC_4500).to_bytes(4, "little")
ICR_SIPI_AT_0X3000 = (0xC_4603).to_bytes(4, "little")
SAFETY_LIMIT = 10.0

MakeMachine = Callable[..., Machine]


def run_all(machine: Machine, *, kick_after: float | None = None) -> list[Exit]:
    """Run every processor on a thread of its own; how they ended, by index."""
    ends: dict[int, Exit] = {}

    def run(index: int) -> None:
        ends[index] = machine.vcpus[index].run(NoIO())
        for other in machine.vcpus:
            other.kick()

    threads = [
        threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(machine.vcpus))
    ]
    for thread in threads:
        thread.start()
    if kick_after is not None:
        time.sleep(kick_after)
        machine.vcpu.kick()
    for thread in threads:
        thread.join(SAFETY_LIMIT)
    return [end for _, end in sorted(ends.items())]


def test_a_halt_with_interrupts_off_is_final(irq_machine: Machine) -> None:
    assert irq_machine.run(CLI_HLT) == Halt()


def test_a_halt_is_noticed_on_every_thread(irq_machine: Machine) -> None:
    # Threads that follow each other get the same pthread_t, but another kernel thread to be signalled.
    ends: list[Exit] = []
    for _ in range(5):
        irq_machine.load(CLI_HLT)
        thread = threading.Thread(target=lambda: ends.append(irq_machine.vcpu.run(NoIO())), daemon=True)
        thread.start()
        thread.join(SAFETY_LIMIT)
    assert ends == [Halt()] * 5


def test_a_halt_that_an_interrupt_could_end_lasts_until_a_kick(irq_machine: Machine) -> None:
    irq_machine.load(SLEEP)
    timer = threading.Timer(0.15, irq_machine.vcpu.kick)
    timer.start()
    start = time.monotonic()
    assert irq_machine.vcpu.run(NoIO()) == Interrupted()
    assert time.monotonic() - start > 0.1


def test_a_processor_that_halts_for_good_does_not_end_another_that_runs(make_machine: MakeMachine) -> None:
    machine = make_machine(cpus=2, irqchip=True)
    machine.vcpus[1].set_mp_state(MP_STATE_RUNNABLE)
    machine.load(SPIN, cpu=0, at=0x1000)
    machine.load(CLI_HLT, cpu=1, at=0x2000)
    assert run_all(machine, kick_after=0.2) == [Interrupted(0), Interrupted(1)]


def test_halted_processors_leave_one_that_runs_in_peace(make_machine: MakeMachine) -> None:
    machine = make_machine(cpus=4, irqchip=True)
    machine.load(SPIN, cpu=0)
    for index in (1, 2, 3):
        machine.vcpus[index].set_mp_state(MP_STATE_RUNNABLE)
        machine.load(CLI_HLT, cpu=index, at=0x2000)
    run_all(machine, kick_after=0.4)
    interruptions = [vcpu.exit_counts()[KVM_EXIT_INTR] for vcpu in machine.vcpus]
    assert max(interruptions) < 60  # ticks of 1, 2, 4, ... 32 ms, and a few for news


def test_when_all_processors_halt_for_good_the_run_ends(make_machine: MakeMachine) -> None:
    machine = make_machine(cpus=4, irqchip=True)
    for index in range(3):
        machine.vcpus[index].set_mp_state(MP_STATE_RUNNABLE)
        machine.load(CLI_HLT, cpu=index, at=0x1000 * (1 + index))
    ends = run_all(machine)  # the fourth waits for INIT all the while
    assert len(ends) == 4
    assert any(isinstance(end, Halt) for end in ends)


def test_a_processor_about_to_be_woken_is_waited_for(make_machine: MakeMachine) -> None:
    """The first processor sends INIT and SIPI and halts for good; only then does the second get a thread."""
    machine = make_machine(cpus=2, irqchip=True)
    machine.ram[0x3000:0x3003] = b"\xee\xfa\xf4"  # out dx, al; cli; hlt
    # mov dword [0xfee00300], ...: the interrupt command register, to all but the sender
    init, sipi = (b"\x66\x67\xc7\x05\x00\x03\xe0\xfe" + command for command in (ICR_INIT, ICR_SIPI_AT_0X3000))
    machine.load(init + sipi + CLI_HLT)
    system = machine.vcpu.get_sregs()
    machine.vcpu.set_sregs(replace(system, ds=replace(system.ds, limit=0xFFFF_FFFF, g=1)))
    lapic = bytearray(machine.vcpu.get_lapic())
    lapic[0xF0:0xF2] = b"\xff\x01"  # the spurious-interrupt register: APIC enabled
    machine.vcpu.set_lapic(bytes(lapic))
    ends: list[Exit] = []
    first = threading.Thread(target=lambda: ends.append(machine.vcpu.run(NoIO())), daemon=True)
    first.start()
    time.sleep(0.2)
    alive = first.is_alive()
    io = Recorder()
    ends.append(machine.vcpus[1].run(io))
    machine.vcpu.kick()
    first.join(SAFETY_LIMIT)
    assert alive
    assert [entry[0] for entry in io.log] == ["out"]
    assert any(isinstance(end, Halt) for end in ends)
