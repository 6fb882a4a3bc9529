"""The 16550A, driven register by register as a guest does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.bus import Bus
from pykvm.devices.serial import Serial, SerialState

RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR, MCR, LSR, MSR, SCR = 3, 4, 5, 6, 7

ERBFI, ETBEI, ELSI, EDSSI = 1, 2, 4, 8
DTR, RTS, OUT1, OUT2, LOOP = 1, 2, 4, 8, 16
NONE, LINE_STATUS, RECEIVED, TIMEOUT, THR_EMPTY, MODEM = 1, 6, 4, 12, 2, 0


class Line:
    """An interrupt line that remembers each time it was driven."""

    def __init__(self) -> None:
        self.history: list[bool] = []

    def set(self, level: bool) -> None:
        self.history.append(level)

    def pulse(self) -> None:
        raise AssertionError("a UART drives levels")

    @property
    def level(self) -> bool:
        return bool(self.history) and self.history[-1]


class Uart:
    """A serial port with the wires a test looks at."""

    def __init__(self) -> None:
        self.line = Line()
        self.sent: list[bytes] = []
        self.device = Serial(irq=self.line, output=self.sent.append)

    def read(self, register: int) -> int:
        return self.device.read(register, 1)

    def write(self, register: int, value: int) -> None:
        self.device.write(register, 1, value)

    def cause(self) -> int:
        return self.read(IIR) & 0x0F

    def drain(self) -> bytes:
        """Read what LSR says is there, as a polling guest does."""
        result = bytearray()
        while self.read(LSR) & 1:
            result.append(self.read(RBR))
        return bytes(result)


@pytest.fixture
def uart() -> Uart:
    return Uart()


@pytest.fixture
def gated(uart: Uart) -> Uart:
    """With OUT2, so that interrupts reach the line."""
    uart.write(MCR, OUT2)
    return uart


# Registers


def test_power_on_values_are_those_of_the_data_sheet(uart: Uart) -> None:
    assert [uart.read(register) for register in range(8)] == [0, 0, 0x01, 0, 0, 0x60, 0xB0, 0]


@pytest.mark.parametrize(("register", "kept"), [(IER, 0x0F), (LCR, 0xFF), (MCR, 0x1F), (SCR, 0xFF)])
def test_registers_keep_the_bits_they_have(uart: Uart, register: int, kept: int) -> None:
    uart.write(register, 0xFF)

    assert uart.read(register) == kept


def test_the_divisor_is_behind_dlab_and_hides_data_and_interrupt_enable(uart: Uart) -> None:
    uart.device.receive(b"x")
    uart.write(IER, 0x05)
    uart.write(LCR, 0x83)
    uart.write(DLL, 0x34)
    uart.write(DLM, 0x12)

    assert uart.device.read(DLL, 2) == 0x1234
    assert uart.sent == []
    uart.write(LCR, 0x03)
    assert uart.read(IER) == 0x05
    assert uart.read(RBR) == ord("x")


def test_a_wide_access_is_one_of_each_byte(uart: Uart) -> None:
    uart.device.write(LCR, 2, 0x0B1F)

    assert uart.device.read(LCR, 2) == 0x0B1F
    assert uart.device.read(LCR, 4) == 0xB0600B1F
    assert uart.device.read(6, 4) == 0xFFFF00B0


def test_the_status_registers_ignore_writes(uart: Uart) -> None:
    uart.write(LSR, 0xFF)
    uart.write(MSR, 0x0F)

    assert (uart.read(LSR), uart.read(MSR)) == (0x60, 0xB0)


# Sending


def test_each_byte_goes_out_as_it_is_written(uart: Uart) -> None:
    for byte in b"hi\xff\0":
        uart.write(THR, byte)

    assert uart.sent == [b"h", b"i", b"\xff", b"\0"]
    assert uart.read(LSR) & 0x60 == 0x60


def test_without_output_sending_is_harmless() -> None:
    serial = Serial()

    serial.write(THR, 1, 65)

    assert serial.read(LSR, 1) == 0x60


def test_what_is_sent_during_a_break_is_lost_on_the_line(uart: Uart) -> None:
    uart.write(LCR, 0x43)
    uart.write(THR, ord("x"))
    uart.write(LCR, 0x03)
    uart.write(THR, ord("y"))

    assert uart.sent == [b"y"]


def test_an_output_that_raises_leaves_the_access_undone() -> None:
    def fail(data: bytes) -> None:
        raise BrokenPipeError

    line = Line()
    serial = Serial(irq=line, output=fail)
    serial.write(MCR, 1, OUT2)
    serial.write(IER, 1, ETBEI)
    serial.read(IIR, 1)
    before = serial.save()

    with pytest.raises(BrokenPipeError):
        serial.write(THR, 1, 65)

    assert serial.save() == before
    assert line.history == [True, False]


def test_an_output_may_answer_at_once() -> None:
    serial = Serial(output=lambda data: serial.receive(data.upper()))

    serial.write(THR, 1, ord("a"))

    assert serial.read(RBR, 1) == ord("A")


# The THR-empty interrupt


def test_enabling_the_transmit_interrupt_while_empty_raises_it(gated: Uart) -> None:
    gated.write(IER, ETBEI)

    assert gated.line.level
    assert gated.cause() == THR_EMPTY


def test_reading_iir_clears_the_transmit_interrupt(gated: Uart) -> None:
    gated.write(IER, ETBEI)
    gated.read(IIR)

    assert gated.cause() == NONE
    assert gated.line.history == [True, False]


def test_reading_iir_clears_the_transmit_interrupt_only_if_it_was_reported(gated: Uart) -> None:
    gated.device.receive(b"x")
    gated.write(IER, ETBEI | ERBFI)
    gated.read(IIR)
    gated.read(RBR)

    assert gated.cause() == THR_EMPTY


def test_sending_raises_the_transmit_interrupt_again(gated: Uart) -> None:
    gated.write(IER, ETBEI)
    gated.read(IIR)
    gated.write(THR, 65)

    assert gated.line.level
    assert gated.cause() == THR_EMPTY


def test_writing_ier_again_without_change_does_not_raise_it(gated: Uart) -> None:
    gated.write(IER, ETBEI)
    gated.read(IIR)
    gated.write(IER, ETBEI)

    assert gated.cause() == NONE


# Receiving


def test_a_polling_guest_gets_every_byte_in_order(uart: Uart) -> None:
    data = bytes(range(256)) * 3

    uart.device.receive(data)

    assert uart.device.waiting == len(data)
    assert uart.drain() == data
    assert uart.device.waiting == 0


def test_with_fifos_every_byte_arrives_in_order_too(uart: Uart) -> None:
    data = bytes(range(256)) * 3
    uart.write(FCR, 0x01)

    uart.device.receive(data[:100])
    uart.device.receive(data[100:])

    assert uart.drain() == data


def test_reading_an_empty_receiver_returns_zero(uart: Uart) -> None:
    assert uart.read(RBR) == 0


@pytest.mark.parametrize("fifo_control", [0x00, 0x01, 0x03, 0x07, 0xC7])
def test_a_guest_that_sets_up_its_fifos_after_input_came_loses_none_of_it(
    uart: Uart, fifo_control: int
) -> None:
    uart.device.receive(b"typed ahead, more than sixteen bytes")

    uart.write(FCR, fifo_control)
    uart.write(FCR, 0x01)
    uart.write(FCR, fifo_control)

    assert uart.drain() == b"typed ahead, more than sixteen bytes"


def test_without_fifos_one_byte_raises_the_interrupt_and_reading_it_clears_it(gated: Uart) -> None:
    gated.write(IER, ERBFI)
    gated.device.receive(b"x")

    assert gated.line.level
    assert gated.read(IIR) == RECEIVED
    gated.read(RBR)
    assert gated.read(IIR) == NONE
    assert not gated.line.level


def test_iir_tells_that_fifos_are_enabled(uart: Uart) -> None:
    uart.write(FCR, 0x01)
    enabled = uart.read(IIR)
    uart.write(FCR, 0x00)

    assert (enabled, uart.read(IIR)) == (0xC1, 0x01)


@pytest.mark.parametrize(("fifo_control", "level"), [(0x01, 1), (0x41, 4), (0x81, 8), (0xC1, 14)])
def test_the_trigger_level_tells_data_from_timeout(gated: Uart, fifo_control: int, level: int) -> None:
    gated.write(FCR, fifo_control)
    gated.write(IER, ERBFI)

    causes = []
    for _ in range(16):
        gated.device.receive(b"x")
        causes.append(gated.cause())

    assert causes == [TIMEOUT] * (level - 1) + [RECEIVED] * (17 - level)
    assert gated.line.history == [True]


def test_fcr_bits_count_only_together_with_enable(gated: Uart) -> None:
    gated.write(FCR, 0xC0)
    gated.write(IER, ERBFI)
    gated.device.receive(b"x")

    assert gated.read(IIR) == RECEIVED


def test_a_break_is_a_zero_with_its_error_shown_when_it_comes_up(gated: Uart) -> None:
    gated.write(FCR, 0x01)
    gated.write(IER, ELSI)
    gated.device.receive(b"a")
    gated.device.receive_break()
    gated.device.receive(b"b")

    assert gated.cause() == NONE
    assert gated.read(LSR) == 0xE1
    assert gated.read(RBR) == ord("a")
    assert gated.line.level
    assert gated.cause() == LINE_STATUS
    assert gated.read(LSR) == 0xF1
    assert not gated.line.level
    assert gated.read(LSR) == 0x61
    assert [gated.read(RBR), gated.read(RBR)] == [0, ord("b")]


def test_without_fifos_a_break_shows_no_fifo_error(uart: Uart) -> None:
    uart.device.receive_break()

    assert uart.read(LSR) == 0x71


# Priorities and the gate


def test_interrupts_are_reported_by_priority(gated: Uart) -> None:
    gated.device.receive_break()
    gated.device.set_modem_lines(cts=False)
    gated.write(IER, ERBFI | ETBEI | ELSI | EDSSI)

    causes = [gated.cause()]
    gated.read(LSR)
    causes.append(gated.cause())
    gated.read(RBR)
    causes.append(gated.cause())
    causes.append(gated.cause())
    gated.read(MSR)
    causes.append(gated.cause())

    assert causes == [LINE_STATUS, RECEIVED, THR_EMPTY, MODEM, NONE]
    assert gated.line.history == [True, False]


def test_out2_gates_the_interrupt_line_but_not_iir(uart: Uart) -> None:
    uart.write(IER, ERBFI)
    uart.device.receive(b"x")

    assert uart.line.history == []
    assert uart.cause() == RECEIVED
    uart.write(MCR, OUT2)
    assert uart.line.history == [True]
    uart.write(MCR, 0)
    assert uart.line.history == [True, False]


def test_loopback_takes_out2_off_the_line(gated: Uart) -> None:
    gated.write(IER, ETBEI)

    gated.write(MCR, OUT2 | LOOP)

    assert not gated.line.level


# Loopback and modem


def test_loopback_returns_what_is_sent_and_keeps_it_off_the_line(uart: Uart) -> None:
    uart.write(MCR, LOOP)
    uart.write(THR, ord("q"))

    assert uart.sent == []
    assert uart.read(LSR) == 0x61
    assert uart.read(RBR) == ord("q")


def test_input_waits_while_in_loopback(uart: Uart) -> None:
    uart.write(MCR, LOOP)
    uart.device.receive(b"later")
    during = uart.read(LSR)
    uart.write(MCR, 0)

    assert during == 0x60
    assert uart.drain() == b"later"


def test_overrun_without_fifos_loses_the_older_byte(uart: Uart) -> None:
    uart.write(MCR, LOOP)
    uart.write(THR, ord("a"))
    uart.write(THR, ord("b"))

    assert uart.read(LSR) == 0x63
    assert uart.read(LSR) == 0x61
    assert uart.read(RBR) == ord("b")


def test_overrun_with_fifos_loses_the_newest_byte(gated: Uart) -> None:
    gated.write(MCR, LOOP)
    gated.write(FCR, 0x01)
    gated.write(IER, ELSI)
    for byte in b"0123456789abcdefX":
        gated.write(THR, byte)

    assert gated.cause() == LINE_STATUS
    assert gated.read(LSR) == 0x63
    assert gated.drain() == b"0123456789abcdef"


def test_clearing_the_fifo_clears_looped_bytes(uart: Uart) -> None:
    uart.write(MCR, LOOP)
    uart.write(FCR, 0x01)
    uart.write(THR, ord("a"))
    uart.write(FCR, 0x03)

    assert uart.read(LSR) == 0x60


@pytest.mark.parametrize(
    ("control", "status"), [(DTR, 0x20), (RTS, 0x10), (OUT1, 0x40), (OUT2, 0x80), (0, 0)]
)
def test_in_loopback_the_outputs_are_the_inputs(uart: Uart, control: int, status: int) -> None:
    uart.write(MCR, LOOP | control)

    assert uart.read(MSR) & 0xF0 == status
    uart.write(MCR, control)
    assert uart.read(MSR) & 0xF0 == 0xB0


@pytest.mark.parametrize(
    ("change", "deltas"),
    [
        (lambda uart: uart.set_modem_lines(cts=False), 0x01),
        (lambda uart: uart.set_modem_lines(dsr=False), 0x02),
        (lambda uart: uart.set_modem_lines(dcd=False), 0x08),
        (lambda uart: uart.set_modem_lines(ring=True), 0x00),
        (lambda uart: uart.set_modem_lines(), 0x00),
    ],
)
def test_modem_changes_are_remembered_until_msr_is_read(
    gated: Uart, change: Callable[[Serial], None], deltas: int
) -> None:
    gated.write(IER, EDSSI)

    change(gated.device)

    assert gated.line.level == bool(deltas)
    assert gated.read(MSR) & 0x0F == deltas
    assert gated.read(MSR) & 0x0F == 0
    assert not gated.line.level


def test_the_ring_indicator_reports_its_end(uart: Uart) -> None:
    uart.device.set_modem_lines(ring=True)
    ringing = uart.read(MSR)
    uart.device.set_modem_lines(ring=False)

    assert (ringing, uart.read(MSR)) == (0xF0, 0xB4)


# The ways drivers find and use it


def test_the_probe_of_linux_finds_a_16550a(uart: Uart) -> None:
    """Interrupt enable bits, scratch, loopback modem bits, and both FIFO bits in IIR."""
    uart.write(IER, 0)
    low = uart.read(IER)
    uart.write(IER, 0x0F)
    high = uart.read(IER)
    uart.write(IER, 0)
    uart.write(MCR, LOOP | OUT2 | RTS)
    loop = uart.read(MSR) & 0xF0
    uart.write(MCR, 0)
    uart.write(FCR, 0x01)

    assert (low, high, loop, uart.read(IIR) >> 6) == (0, 0x0F, 0x90, 3)


def test_an_interrupt_handler_that_loops_until_iir_is_quiet_serves_everything(gated: Uart) -> None:
    to_send, got = list(b"sent by interrupt"), bytearray()
    gated.write(FCR, 0xC7)
    gated.device.receive(b"received by interrupt")
    gated.write(IER, ERBFI | ETBEI)

    while gated.line.level:
        cause = gated.cause()
        if cause in (RECEIVED, TIMEOUT):
            got += gated.drain()
        elif cause == THR_EMPTY and to_send:
            gated.write(THR, to_send.pop(0))

    assert bytes(got) == b"received by interrupt"
    assert b"".join(gated.sent) == b"sent by interrupt"


def test_input_may_come_from_another_thread_while_the_guest_reads() -> None:
    line, data = Line(), bytes(range(256)) * 8
    serial = Serial(irq=line)
    serial.write(FCR, 1, 0x01)
    serial.write(MCR, 1, OUT2)
    serial.write(IER, 1, ERBFI)
    got = bytearray()

    def feed() -> None:
        for start in range(0, len(data), 7):
            serial.receive(data[start : start + 7])

    with ThreadPoolExecutor(1) as thread:
        feeding = thread.submit(feed)
        while len(got) < len(data):
            if serial.read(LSR, 1) & 1:
                got.append(serial.read(RBR, 1))
        feeding.result(timeout=5)

    assert bytes(got) == data
    assert all(before != after for before, after in zip(line.history, line.history[1:], strict=False))
    assert not line.level


# State


def test_a_restored_port_goes_on_where_the_saved_one_was(gated: Uart) -> None:
    gated.write(FCR, 0x41)
    gated.write(IER, ERBFI)
    gated.write(SCR, 0x5A)
    gated.device.receive(b"more bytes than the FIFO holds")
    gated.read(RBR)

    other = Uart()
    other.device.restore(gated.device.save())

    assert other.device.save() == gated.device.save()
    assert other.line.history == [True]
    assert other.drain() == b"ore bytes than the FIFO holds"


def test_restoring_drives_the_line_even_to_the_level_it_had(uart: Uart) -> None:
    uart.device.restore(SerialState())

    assert uart.line.history == [False]


def test_the_default_state_is_that_of_a_new_port(uart: Uart) -> None:
    assert uart.device.save() == SerialState()
    assert dataclasses.astuple(SerialState())[-2:] == ((), ())


steps = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(0, 9), st.integers(1, 8)),
        st.tuples(
            st.just("write"), st.integers(0, 9), st.tuples(st.integers(1, 8), st.integers(0, 2**64 - 1))
        ),
        st.tuples(st.just("poke"), st.integers(0, 7), st.integers(0, 255)),
        st.tuples(st.just("receive"), st.just(0), st.binary(max_size=40)),
        st.tuples(st.just("break"), st.just(0), st.just(0)),
        st.tuples(st.just("modem"), st.just(0), st.tuples(*[st.booleans()] * 4)),
    ),
    max_size=40,
)


@given(steps)
def test_no_guest_can_make_the_port_fail(actions: list[tuple[str, int, object]]) -> None:
    uart = Uart()
    bus = Bus("port", 16)
    bus.attach(uart.device, 0, 16)
    perform: dict[str, Callable[[int, object], object]] = {
        "read": lambda offset, size: bus.read(offset, size),  # type: ignore[arg-type]
        "write": lambda offset, access: bus.write(offset, *access),  # type: ignore[misc]
        "poke": lambda offset, value: bus.write(offset, 1, value),  # type: ignore[arg-type]
        "receive": lambda _, data: uart.device.receive(data),  # type: ignore[arg-type]
        "break": lambda *_: uart.device.receive_break(),
        "modem": lambda _, levels: uart.device.set_modem_lines(
            **dict(zip(("cts", "dsr", "ring", "dcd"), levels, strict=True))  # type: ignore[call-overload]
        ),
    }

    for action, offset, argument in actions:
        perform[action](offset, argument)

    state = uart.device.save()
    registers = [state.ier, state.fcr, state.lcr, state.mcr, state.msr, state.scr, state.dll, state.dlm]
    assert all(0 <= value <= 0xFF for value in registers)
    assert len(state.received) <= 16
    assert uart.line.history == [index % 2 == 0 for index in range(len(uart.line.history))]
    twin = Uart()
    twin.device.restore(state)
    assert [twin.read(register) for register in range(8)] == [uart.read(register) for register in range(8)]
    assert twin.line.level == uart.line.level


@given(st.lists(st.one_of(st.binary(max_size=20), st.sampled_from([0x00, 0x01, 0x03, 0xC7])), max_size=20))
def test_whatever_a_guest_does_to_its_fifos_input_arrives_complete(script: list[bytes | int]) -> None:
    uart = Uart()
    got = bytearray()
    actions: dict[type, Callable[[bytes | int], None]] = {
        bytes: lambda data: uart.device.receive(data),  # type: ignore[arg-type]
        int: lambda control: uart.write(FCR, control),  # type: ignore[arg-type]
    }

    for each in script:
        actions[type(each)](each)
        got += bytes([uart.read(RBR)] if uart.read(LSR) & 1 else [])

    assert bytes(got) + uart.drain() == b"".join(each for each in script if isinstance(each, bytes))
