"""The run loop: accesses reach devices once and in order, and whatever they raise, the vCPU goes on."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pykvm.boot.modes import CODE32
from pykvm.boot.modes import DATA as DATA32
from pykvm.errors import ConfigurationError
from pykvm.exits import EmulationFailure, Halt, Interrupted, Shutdown, Unhandled
from pykvm.registers import CR0_ET, CR0_PE, DescriptorTable, Registers
from pykvm.values import replace
from tests.kvm.machines import (
    CODE,
    HLT,
    IN_AL,
    KVM_EXIT_HLT,
    KVM_EXIT_IO,
    KVM_EXIT_MMIO,
    MMIO,
    OUT_AL,
    OUT_FOREVER,
    PORT,
    SPIN,
    Machine,
    NoIO,
    Recorder,
    exits_of,
)

DATA = 0x3000


class Refusal(Exception):
    """What the devices of these tests raise."""


class Refusing(Recorder):
    """Raises at the accesses whose numbers are given, and does not count them as done."""

    def __init__(self, *refused: int, answer: Callable[[], int] = lambda: 0) -> None:
        super().__init__(answer)
        self.refused = refused
        self.calls = 0

    def check(self) -> None:
        self.calls += 1
        if self.calls - 1 in self.refused:
            raise Refusal(self.calls)

    def port_read(self, port: int, size: int) -> int:
        self.check()
        return super().port_read(port, size)

    def port_write(self, port: int, size: int, value: int) -> None:
        self.check()
        super().port_write(port, size, value)

    def mmio_read(self, address: int, size: int) -> int:
        self.check()
        return super().mmio_read(address, size)

    def mmio_write(self, address: int, size: int, value: int) -> None:
        self.check()
        super().mmio_write(address, size, value)


@pytest.mark.parametrize(
    ("code", "size", "value"),
    [(b"\xee", 1, 0x44), (b"\xef", 2, 0x3344), (b"\x66\xef", 4, 0x11223344)],
    ids=["outb", "outw", "outl"],
)
def test_a_port_write_reaches_its_device_once(machine: Machine, code: bytes, size: int, value: int) -> None:
    io = Recorder()
    assert machine.run(code + HLT, io, rax=0x1122_3344) == Halt()
    assert io.log == [("out", PORT, size, value)]


@pytest.mark.parametrize(
    ("code", "size", "rax"),
    [(b"\xec", 1, 0x1111_11DD), (b"\xed", 2, 0x1111_CCDD), (b"\x66\xed", 4, 0xAABB_CCDD)],
    ids=["inb", "inw", "inl"],
)
def test_a_port_read_changes_as_much_of_rax_as_it_has(
    machine: Machine, code: bytes, size: int, rax: int
) -> None:
    io = Recorder(lambda: 0xAABB_CCDD)
    assert machine.run(code + HLT, io, rax=0x1111_1111) == Halt()
    assert io.log == [("in", PORT, size)]
    assert machine.vcpu.get_regs().rax == rax


@pytest.mark.parametrize(
    ("store", "load", "size"),
    [
        (b"\x26\x88\x07", b"\x26\x8a\x07", 1),  # mov es:[bx], al; mov al, es:[bx]
        (b"\x26\x89\x07", b"\x26\x8b\x07", 2),
        (b"\x26\x66\x89\x07", b"\x26\x66\x8b\x07", 4),
    ],
    ids=["byte", "word", "dword"],
)
def test_mmio_is_read_and_written_in_the_size_of_the_instruction(
    machine: Machine, store: bytes, load: bytes, size: int
) -> None:
    mask = (1 << 8 * size) - 1
    io = Recorder(lambda: 0xA1B2_C3D4)
    assert machine.run(store + load + HLT, io, rax=0x0102_0304, rbx=8) == Halt()
    assert io.log == [("write", MMIO + 8, size, 0x0102_0304 & mask), ("read", MMIO + 8, size)]
    assert machine.vcpu.get_regs().rax & mask == 0xA1B2_C3D4 & mask


def test_mmio_of_eight_bytes_is_one_access(machine: Machine) -> None:
    # fs: movq mm0, [si]; es: movq [bx], mm0; es: movq mm1, [bx]; movq [di], mm1; hlt
    code = b"\x0f\x6f\x04" + b"\x26\x0f\x7f\x07" + b"\x26\x0f\x6f\x0f" + b"\x0f\x7f\x0d" + HLT
    machine.ram[DATA : DATA + 8] = bytes(range(8))
    io = Recorder(lambda: 0x1122_3344_5566_7788)
    assert machine.run(code, io, rbx=0, rsi=DATA, rdi=DATA + 8) == Halt()
    assert io.log == [("write", MMIO, 8, 0x0706_0504_0302_0100), ("read", MMIO, 8)]
    assert machine.ram[DATA + 8 : DATA + 16] == (0x1122_3344_5566_7788).to_bytes(8, "little")


REP_OUTSB = b"\xfc\xf3\x6e\xf4"  # cld; rep outsb; hlt
REP_INSB = b"\xfc\xf3\x6c\xf4"


def test_a_string_of_writes_arrives_element_by_element_and_complete(machine: Machine) -> None:
    data = bytes(range(256)) * 4
    machine.ram[DATA : DATA + len(data)] = data
    io = Recorder()
    assert machine.run(REP_OUTSB, io, rsi=DATA, rcx=len(data)) == Halt()
    assert io.log == [("out", PORT, 1, byte) for byte in data]


def test_a_string_of_reads_fills_memory_in_order(machine: Machine) -> None:
    numbers = iter(range(10_000))
    io = Recorder(lambda: next(numbers) & 0xFF)
    machine.load(REP_INSB, rcx=1000, rdi=DATA)
    system = machine.vcpu.get_sregs()
    machine.vcpu.set_sregs(replace(system, es=system.ds))
    assert machine.vcpu.run(io) == Halt()
    assert len(io.log) == 1000
    assert machine.ram[DATA : DATA + 1000] == bytes(number & 0xFF for number in range(1000))
    assert machine.vcpu.get_regs().rcx == 0


def test_a_device_that_raises_in_a_string_is_offered_that_element_again(machine: Machine) -> None:
    data = b"the quick brown fox"
    machine.ram[DATA : DATA + len(data)] = data
    io = Refusing(3, 7, 8)
    machine.load(REP_OUTSB, rsi=DATA, rcx=len(data))
    for _ in range(3):
        with pytest.raises(Refusal):
            machine.vcpu.run(io)
    assert machine.vcpu.run(io) == Halt()
    assert bytes(value for _, _, _, value in io.log) == data
    assert io.calls == len(data) + 3


@pytest.mark.parametrize("code", [OUT_AL, IN_AL, b"\x26\xa2\x00\x00", b"\x26\xa0\x00\x00"])
def test_what_a_device_raises_leaves_run_and_the_access_is_offered_again(
    machine: Machine, code: bytes
) -> None:
    io = Refusing(0, 1, answer=lambda: 0x42)
    machine.load(code + HLT, rax=0x42)
    for _ in range(2):
        with pytest.raises(Refusal):
            machine.vcpu.run(io)
    assert machine.vcpu.run(io) == Halt()
    assert len(io.log) == 1
    assert machine.vcpu.get_regs().rax == 0x42


@pytest.mark.parametrize("code", [OUT_AL, IN_AL, b"\x26\xa2\x00\x00", b"\x26\xa0\x00\x00", REP_OUTSB])
@pytest.mark.parametrize("set_system_registers", [False, True])
def test_setting_registers_abandons_the_access_that_raised(
    machine: Machine, code: bytes, set_system_registers: bool
) -> None:
    machine.load(code + HLT, rsi=DATA, rcx=3)
    with pytest.raises(Refusal):
        machine.vcpu.run(Refusing(0))
    machine.ram[0x4000:0x4002] = OUT_AL + HLT
    if set_system_registers:
        machine.vcpu.set_sregs(machine.vcpu.get_sregs())
    machine.vcpu.set_regs(Registers(rip=0x4000, rdx=PORT + 1, rax=5))
    io = Recorder()
    assert machine.vcpu.run(io) == Halt()
    assert io.log == [("out", PORT + 1, 1, 5)]
    assert machine.vcpu.get_regs().rax == 5


def test_a_string_without_end_can_be_abandoned_too(machine: Machine) -> None:
    # cld; mov ecx, -1; a32 rep insb
    machine.load(b"\xfc\x66\xb9\xff\xff\xff\xff\x67\xf3\x6c" + HLT, rdi=0)
    with pytest.raises(Refusal):
        machine.vcpu.run(Refusing(0))
    machine.load(HLT, rbx=4)
    assert machine.vcpu.run(Recorder()) == Halt()
    assert machine.vcpu.get_regs().rbx == 4


def test_a_value_that_is_no_unsigned_integer_is_an_error_and_the_read_is_offered_again(
    machine: Machine,
) -> None:
    machine.load(IN_AL + HLT)
    answers: Iterator[Any] = iter((-1, 1 << 64, "x", 7))
    io = Recorder(lambda: next(answers))
    for expected in (OverflowError, OverflowError, TypeError):
        with pytest.raises(expected):
            machine.vcpu.run(io)
    assert machine.vcpu.run(io) == Halt()
    assert machine.vcpu.get_regs().rax == 7


def test_registers_are_right_within_a_device(machine: Machine) -> None:
    seen = []

    class Looking(Recorder):
        def port_write(self, port: int, size: int, value: int) -> None:
            seen.append(machine.vcpu.get_regs())

    code = b"\x40" + OUT_AL + b"\x40" + OUT_AL + HLT  # inc ax; out dx, al, twice
    assert machine.run(code, Looking()) == Halt()
    assert [registers.rax for registers in seen] == [1, 2]
    # At the OUT, or after it where KVM has emulated it
    assert [registers.rip - CODE in (1 + at, 2 + at) for at, registers in zip((0, 2), seen, strict=True)] == [
        True,
        True,
    ]


def test_registers_that_a_device_sets_are_seen_by_the_guest(machine: Machine) -> None:
    class Setting(Recorder):
        def port_write(self, port: int, size: int, value: int) -> None:
            super().port_write(port, size, value)
            registers = machine.vcpu.get_regs()
            machine.vcpu.set_regs(replace(registers, rbx=0x1234))

    assert machine.run(OUT_AL + HLT, Setting()) == Halt()
    assert machine.vcpu.get_regs().rbx == 0x1234


def test_a_device_cannot_run_the_vcpu_that_called_it(machine: Machine) -> None:
    class Recursive(Recorder):
        def port_write(self, port: int, size: int, value: int) -> None:
            machine.vcpu.run(self)

    with pytest.raises(ConfigurationError, match="vCPU 0 is already running"):
        machine.run(OUT_AL + HLT, Recursive())
    assert machine.vcpu.run(Recorder()) == Halt()


def test_every_exit_is_counted_and_the_last_are_remembered(machine: Machine) -> None:
    machine.vcpu.measure_time()
    machine.run(OUT_AL * 40 + b"\x26\xa2\x04\x00" + HLT, Recorder(), rax=0x21)
    guest_ns, elapsed_ns, served = machine.vcpu.times()
    recent = machine.vcpu.recent_exits()
    assert exits_of(machine.vcpu) == {KVM_EXIT_IO: 40, KVM_EXIT_MMIO: 1, KVM_EXIT_HLT: 1}
    assert recent[-3:-1] == [
        (KVM_EXIT_IO, True, PORT, 1, 1, 0x21),
        (KVM_EXIT_MMIO, True, MMIO + 4, 1, 1, 0x21),
    ]
    assert len(recent) == 32
    assert 0 < guest_ns <= elapsed_ns
    assert served == 0


# How a run ends


def test_a_triple_fault_is_a_shutdown(machine: Machine) -> None:
    machine.load(b"\x0f\x0b")  # ud2, in protected mode with an IDT that holds nothing
    system = replace(machine.vcpu.get_sregs(), cs=CODE32, ss=DATA32, cr0=CR0_PE | CR0_ET)
    machine.vcpu.set_sregs(replace(system, idt=DescriptorTable(0, 0)))
    assert machine.vcpu.run(NoIO()) == Shutdown()


def test_running_into_a_hole_ends_the_run_by_name(machine: Machine) -> None:
    machine.load(HLT)
    system = machine.vcpu.get_sregs()
    beyond = replace(system.cs, base=MMIO, selector=MMIO >> 4)
    machine.vcpu.set_sregs(replace(system, cs=beyond))
    machine.vcpu.set_regs(Registers(rip=0))
    exit = machine.vcpu.run(Recorder(lambda: 0xFF))
    assert isinstance(exit, EmulationFailure | Unhandled)


# Signals


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """Receives the numbers of SIGUSR1 that Python has handled."""
    numbers: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: numbers.append(number))
    yield numbers
    signal.signal(signal.SIGUSR1, before)


def after(seconds: float, call: Callable[[], object]) -> threading.Timer:
    timer = threading.Timer(seconds, call)
    timer.start()
    return timer


def test_ctrl_c_ends_a_spinning_guest_and_it_can_go_on(machine: Machine) -> None:
    machine.load(SPIN)
    timer = after(0.02, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        machine.vcpu.run(NoIO())
    timer.join()
    machine.vcpu.kick()
    assert machine.vcpu.run(NoIO()) == Interrupted()


def test_ctrl_c_that_comes_with_an_access_ends_the_run(machine: Machine) -> None:
    class Pressing(Recorder):
        def port_write(self, port: int, size: int, value: int) -> None:
            signal.raise_signal(signal.SIGINT)

    machine.load(OUT_FOREVER)
    with pytest.raises(KeyboardInterrupt):
        machine.vcpu.run(Pressing())
    with pytest.raises(KeyboardInterrupt):
        machine.vcpu.run(Pressing())


def test_ctrl_c_that_comes_just_before_the_entry_ends_the_run_soon(machine: Machine) -> None:
    machine.load(SPIN)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    slowest = 0.0
    for microseconds in range(20, 220):
        start = time.monotonic()
        try:
            signal.setitimer(signal.ITIMER_REAL, microseconds * 1e-6)
            machine.vcpu.run(NoIO())
        except KeyboardInterrupt:
            slowest = max(slowest, time.monotonic() - start)
    signal.signal(signal.SIGALRM, before)
    assert 0 < slowest < 1.0


def test_a_signal_that_python_handles_does_not_end_the_run(machine: Machine, handled: list[int]) -> None:
    machine.load(SPIN)
    kicker = after(0.3, machine.vcpu.kick)
    for delay in (0.01, 0.1, 0.2):
        after(delay, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    assert machine.vcpu.run(NoIO()) == Interrupted()
    kicker.join()
    assert set(handled) == {signal.SIGUSR1}  # Linux may merge several that are pending at once


def test_a_kick_is_not_lost_to_a_signal_that_raises(machine: Machine) -> None:
    def raise_refusal(number: int, frame: object) -> None:
        raise Refusal

    before = signal.signal(signal.SIGUSR1, raise_refusal)
    machine.load(SPIN)
    machine.vcpu.kick()
    timer = after(0.02, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    ends: list[object] = []
    while len(ends) < 2:
        try:
            ends.append(machine.vcpu.run(NoIO()))
        except Refusal as refusal:
            ends.append(type(refusal))
    timer.join()
    signal.signal(signal.SIGUSR1, before)
    assert ends == [Interrupted(), Refusal]


# Other threads


def test_a_running_vcpu_cannot_be_asked_from_another_thread(machine: Machine) -> None:
    machine.load(OUT_AL + SPIN)
    entered = threading.Event()

    class Entered(Recorder):
        def port_write(self, port: int, size: int, value: int) -> None:
            entered.set()

    thread = threading.Thread(target=machine.vcpu.run, args=(Entered(),))
    thread.start()
    entered.wait()
    for call in (
        machine.vcpu.get_regs,
        machine.vcpu.get_fpu,
        lambda: machine.vcpu.set_regs(Registers()),
        lambda: machine.vcpu.run(NoIO()),
    ):
        with pytest.raises(ConfigurationError, match="running"):
            call()
    machine.vcpu.kick()
    thread.join()
    assert machine.vcpu.get_regs().rip in (CODE + 1, CODE + 2)


def test_another_python_thread_makes_progress_while_the_guest_spins(machine: Machine) -> None:
    machine.load(SPIN)
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(machine.vcpu.run(NoIO())))
    thread.start()
    count = sum(1 for _ in range(100_000))
    machine.vcpu.kick()
    thread.join()
    assert count == 100_000
    assert done == [Interrupted()]
