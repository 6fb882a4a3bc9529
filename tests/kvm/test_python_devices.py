"""Devices in Python that the run loop calls itself: by the rules of the bus, and with its locks."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pykvm import VM
from pykvm.bus import Bus
from pykvm.exits import Halt
from tests.kvm.machines import HLT, IN_AL, MMIO, OUT_AL, PORT, Machine, NoIO, Recorder

DATA = 0x3000
READ_MMIO = b"\x26\xa1\x00\x00"  # mov ax, es:[0]
WRITE_MMIO = b"\x26\xa3\x00\x00"  # mov es:[0], ax
PATIENCE = 10.0  # seconds


class Noting:
    """Notes what it is asked; reads return `value`."""

    def __init__(self, value: Any = 0) -> None:
        self.value = value
        self.log: list[tuple[int, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.log.append((offset, size))
        value: int = self.value
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        self.log.append((offset, size, value))


def rep_outsb(machine: Machine, count: int) -> None:
    """Have the guest write bytes 1, 2, ... to PORT by one instruction."""
    machine.ram[DATA : DATA + count] = bytes(range(1, count + 1))
    machine.load(b"\xfc\xf3\x6e" + HLT, rcx=count, rsi=DATA)  # cld; rep outsb; hlt


def test_a_device_sees_offsets_sizes_and_values(machine: Machine) -> None:
    port, mmio = Noting(0x1234), Noting(0x5678)
    machine.bus("port").attach(port, PORT - 2, 4)
    machine.bus("mmio").attach(mmio, MMIO, 2)
    assert machine.run(OUT_AL + b"\xed" + WRITE_MMIO + READ_MMIO + HLT, NoIO(), rax=0xFFF1) == Halt()
    assert (port.log, mmio.log) == ([(2, 1, 0xF1), (2, 2)], [(0, 2, 0x1234), (0, 2)])
    assert machine.vcpu.get_regs().rax & 0xFFFF == 0x5678


@pytest.mark.parametrize("value", [-1, (1 << 100) - 1, True, 0x1FF])
def test_what_a_device_returns_is_cut_to_the_access(machine: Machine, value: int) -> None:
    machine.bus("port").attach(Noting(value), PORT, 1)
    machine.run(IN_AL + HLT, NoIO(), rax=0xAB00)
    assert machine.vcpu.get_regs().rax == 0xAB00 | (value & 0xFF)


@pytest.mark.parametrize("value", ["5", None, 1.0])
def test_what_is_no_integer_is_an_error_that_names_device_and_range(machine: Machine, value: Any) -> None:
    device = Noting(value)
    machine.bus("port").attach(device, PORT, 1)
    with pytest.raises(TypeError, match=f"Noting at 0x510..0x511: read returned {value!r}, not an integer"):
        machine.run(IN_AL + HLT, NoIO())
    device.value = 7
    assert machine.vcpu.run(NoIO()) == Halt()
    assert machine.vcpu.get_regs().rax == 7


def test_of_several_ranges_the_one_that_holds_all_of_the_access_answers(machine: Machine) -> None:
    devices = [Noting(0x1010 + number) for number in range(5)]
    ports, io = machine.bus("port"), Recorder(lambda: 0x77)
    for number, device in enumerate(devices):
        ports.attach(device, PORT + 2 * number, 2)
    # in ax, dx; inc dx; in ax, dx; add dx, 7; in ax, dx; inc dx; in al, dx; inc dx; in al, dx; hlt
    code = b"\xed\x42\xed\x83\xc2\x07\xed\x42\xec\x42\xec" + HLT
    assert machine.run(code, io) == Halt()
    assert [device.log for device in devices] == [[(0, 2)], [], [], [], [(0, 2), (1, 1)]]
    assert io.log == [("in", PORT + 1, 2), ("in", PORT + 10, 1)]


def test_a_device_that_detaches_itself_in_a_string_gets_no_more_of_it(machine: Machine) -> None:
    ports, io = machine.bus("port"), Recorder()

    class Leaving(Noting):
        def write(self, offset: int, size: int, value: int) -> None:
            super().write(offset, size, value)
            if value == 2:
                ports.detach(self)

    device = Leaving()
    ports.attach(device, PORT, 1)
    rep_outsb(machine, 4)
    assert machine.vcpu.run(io) == Halt()
    assert device.log == [(0, 1, 1), (0, 1, 2)]
    assert io.log == [("out", PORT, 1, 3), ("out", PORT, 1, 4)]


def test_a_device_that_raises_in_a_string_is_offered_that_element_again(machine: Machine) -> None:
    class Failing(Noting):
        def write(self, offset: int, size: int, value: int) -> None:
            super().write(offset, size, value)
            if self.log.count((0, 1, 2)) == 1 and value == 2:
                raise LookupError

    device = Failing()
    machine.bus("port").attach(device, PORT, 1)
    rep_outsb(machine, 3)
    with pytest.raises(LookupError):
        machine.vcpu.run(NoIO())
    assert machine.vcpu.run(NoIO()) == Halt()
    assert [value for _, _, value in device.log] == [1, 2, 2, 3]


def test_a_device_with_a_lock_of_another_kind_is_left_to_the_bus(machine: Machine) -> None:
    device, io = Noting(), Recorder()
    elsewhere = Bus("port", 1 << 16)  # where it gets a lock of Python's
    elsewhere.attach(device, 0, 1)
    machine.bus("port").attach(device, PORT, 1)
    assert machine.run(OUT_AL + HLT, io, rax=3) == Halt()
    assert (device.log, io.log) == ([], [("out", PORT, 1, 3)])


@pytest.fixture
def vm() -> Iterator[VM]:
    with VM("64K", backend="kvm") as vm:
        yield vm


def test_a_trace_sees_what_the_run_loop_would_serve(vm: VM, system: object) -> None:
    from pykvm.device import CDevice

    seen: list[tuple[str, int, int, int]] = []
    vm.attach(Noting(), port=PORT, size=1)
    vm.attach(CDevice(), port=PORT + 1, size=1)
    vm.load(b"\xba\x10\x05\xb0\x07\xee\x42\xec" + HLT)  # mov dx, 0x510; mov al, 7; out; inc dx; in; hlt
    vm.ports.trace = lambda *access: seen.append(access)
    assert vm.run(timeout=PATIENCE) == Halt()
    assert seen == [("write", PORT, 1, 7), ("read", PORT + 1, 1, 0xFF)]


def test_no_other_thread_is_in_a_device_while_the_run_loop_is(vm: VM, system: object) -> None:
    inside, overlaps, entered = 0, 0, threading.Event()

    class Alone:
        def read(self, offset: int, size: int) -> int:
            nonlocal inside, overlaps
            inside += 1
            entered.set()
            overlaps += inside != 1
            threading.Event().wait(0.0005)
            overlaps += inside != 1
            inside -= 1
            return vm.ports.read(PORT + 1, 1)  # its own register: the lock is re-entrant

        def write(self, offset: int, size: int, value: int) -> None: ...

    class Own(Alone):
        def read(self, offset: int, size: int) -> int:
            return 5 if offset == 1 else super().read(offset, size)

    vm.attach(Own(), port=PORT, size=2)
    # mov dx, 0x510; mov cx, 50; 1: in al, dx; loop 1b; hlt
    vm.load(b"\xba\x10\x05\xb9\x32\x00\xec\xe2\xfd" + HLT)
    runner = threading.Thread(target=vm.run, args=(PATIENCE,), daemon=True)
    runner.start()
    assert entered.wait(PATIENCE)
    while runner.is_alive():
        assert vm.ports.read(PORT, 1) == 5
    assert overlaps == 0


# The lock


def test_a_lock_is_given_back_only_by_its_holder(system: object) -> None:
    from pykvm._kvm import DeviceLock

    lock = DeviceLock()
    failures: list[str] = []

    def give_back() -> None:
        try:
            lock.__exit__(None, None, None)
        except RuntimeError as error:
            failures.append(str(error))

    give_back()
    with lock, lock:
        other = threading.Thread(target=give_back)
        other.start()
        other.join(PATIENCE)
    give_back()
    assert failures == ["a device's lock is given back by a thread that does not hold it"] * 3


def test_a_signal_handler_that_raises_ends_the_wait_for_a_lock(system: object) -> None:
    from pykvm._kvm import DeviceLock

    lock, held, done = DeviceLock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            done.wait(PATIENCE)

    def alarm(*_: object) -> None:
        raise InterruptedError

    holder = threading.Thread(target=hold, daemon=True)
    holder.start()
    assert held.wait(PATIENCE)
    before = signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, 0.02)
    try:
        with pytest.raises(InterruptedError), lock:
            pytest.fail("two threads have the lock")
    finally:
        signal.signal(signal.SIGALRM, before)
        done.set()
        holder.join(PATIENCE)
    with lock:  # it is whole
        pass


def test_who_waits_for_a_lock_is_not_passed_by(system: object) -> None:
    from pykvm._kvm import DeviceLock

    lock, waiting, served = DeviceLock(), threading.Event(), threading.Event()

    def wait() -> None:
        waiting.set()
        with lock:
            served.set()

    waiter = threading.Thread(target=wait, daemon=True)
    with lock:
        waiter.start()
        assert waiting.wait(PATIENCE)
        waiter.join(0.05)
    with lock:  # the same thread again, at once
        assert served.is_set()
    waiter.join(PATIENCE)


def interrupted_waits(lock: Any, threads: list[threading.Thread]) -> int:
    """Take the lock until the threads have ended; how often a signal handler prevented that."""
    interrupted = 0
    while any(thread.is_alive() for thread in threads):
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.0001)
            with lock:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except InterruptedError:
            interrupted += 1
    return interrupted


def test_threads_exclude_each_other_also_when_signals_end_some_waits(system: object) -> None:
    from pykvm._kvm import DeviceLock

    lock, rounds, count = DeviceLock(), 100, 0

    def add() -> None:
        nonlocal count
        for _ in range(rounds):
            with lock, lock:
                before = count
                time.sleep(0.0002)
                count = before + 1

    def alarm(*_: object) -> None:
        raise InterruptedError

    threads = [threading.Thread(target=add, daemon=True) for _ in range(3)]
    before = signal.signal(signal.SIGALRM, alarm)
    for thread in threads:
        thread.start()
    interrupted = interrupted_waits(lock, threads)
    signal.signal(signal.SIGALRM, before)
    assert count == len(threads) * rounds
    assert interrupted > 0
