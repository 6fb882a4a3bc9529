"""Kicks: each one ends a run, the current or the next, however it races with the entry into the guest."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from pykvm.exits import Halt, Interrupted
from tests.kvm.machines import HLT, OUT_FOREVER, SPIN, Machine, NoIO, Recorder

KICKS = 1000
SAFETY_LIMIT = 1.0  # seconds for one kick, on a machine where others work too


def kick_again_and_again(machine: Machine, io: Recorder, kicks: int) -> tuple[list[object], float]:
    """Run the guest once for each kick; the ends of the runs, and how long the slowest kick took."""
    ends: list[object] = []
    slowest = 0.0
    randomly = random.Random(20)
    turn = threading.Semaphore(0)
    done = threading.Semaphore(0)

    def runner() -> None:
        for _ in range(kicks):
            turn.acquire()
            ends.append(machine.vcpu.run(io))
            done.release()

    thread = threading.Thread(target=runner, daemon=True)
    thread.start()
    for number in range(kicks):
        # A third before the run, a third that race the entry, a third well inside the guest
        if number % 3:
            turn.release()
        if number % 3 == 2:
            time.sleep(randomly.random() * 0.004)
        start = time.monotonic()
        machine.vcpu.kick()
        if number % 3 == 0:
            turn.release()
        assert done.acquire(timeout=SAFETY_LIMIT), f"kick {number} was lost"
        slowest = max(slowest, time.monotonic() - start)
    thread.join()
    return ends, slowest


def test_a_thousand_kicks_stop_a_guest_that_spins_with_interrupts_off(machine: Machine) -> None:
    machine.load(SPIN)
    ends, slowest = kick_again_and_again(machine, NoIO(), KICKS)
    assert ends == [Interrupted()] * KICKS
    assert slowest < SAFETY_LIMIT


def test_kicks_stop_a_guest_that_keeps_a_python_device_busy(machine: Machine) -> None:
    machine.load(OUT_FOREVER)
    ends, _ = kick_again_and_again(machine, Recorder(), 150)
    assert ends == [Interrupted()] * 150


def test_kicks_stop_a_guest_with_an_irqchip(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(irqchip=True)
    machine.load(b"\xfb\xf4\xeb\xfd")  # sti; 1: hlt; jmp 1b
    ends, _ = kick_again_and_again(machine, NoIO(), 150)
    assert ends == [Interrupted()] * 150


def test_a_kick_before_the_run_ends_that_run_and_only_that(machine: Machine) -> None:
    machine.load(HLT)
    machine.vcpu.kick()
    machine.vcpu.kick()
    assert machine.vcpu.run(NoIO()) == Interrupted()
    assert machine.vcpu.run(NoIO()) == Halt()


def test_a_kick_that_was_cleared_ends_nothing(machine: Machine) -> None:
    machine.load(HLT)
    machine.vcpu.kick()
    machine.vcpu.clear_kick()
    assert machine.vcpu.run(NoIO()) == Halt()


def test_a_kick_survives_a_run_that_ends_by_itself(machine: Machine) -> None:
    class Kicking(Recorder):
        def port_write(self, port: int, size: int, value: int) -> None:
            super().port_write(port, size, value)
            machine.vcpu.kick()

    io = Kicking()
    machine.load(OUT_FOREVER)
    assert machine.vcpu.run(io) == Interrupted()
    assert len(io.log) == 1


def test_a_kick_survives_an_access_that_is_abandoned(machine: Machine) -> None:
    class Refusing(Recorder):
        def port_write(self, port: int, size: int, value: int) -> None:
            machine.vcpu.kick()
            raise RuntimeError

    machine.load(OUT_FOREVER)
    try:
        machine.vcpu.run(Refusing())
    except RuntimeError:
        machine.load(HLT)
    assert machine.vcpu.run(NoIO()) == Interrupted()
    assert machine.vcpu.run(NoIO()) == Halt()
