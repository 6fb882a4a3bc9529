"""The keyboard controller without a keyboard, and the reset control register."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.devices.i8042 import I8042, ResetControl

OBF, SYSTEM, COMMAND, AUX, TIMEOUT = 0x01, 0x04, 0x08, 0x20, 0x40
RESET = (0, "reset")


@dataclass
class Board:
    level: bool = False
    stops: list[tuple[int, str]] = field(default_factory=list)
    controller: I8042 = field(init=False)

    def __post_init__(self) -> None:
        self.controller = I8042(self.stop, irq=self)

    def stop(self, status: int, reason: str) -> None:
        self.stops.append((status, reason))

    def set(self, level: bool) -> None:
        self.level = level

    def pulse(self) -> None:
        raise AssertionError("the keyboard's line is a level")

    def command(self, *values: int) -> None:
        self.controller.command.write(0, 1, values[0])
        for value in values[1:]:
            self.controller.data.write(0, 1, value)

    def send(self, value: int) -> None:
        self.controller.data.write(0, 1, value)

    def status(self) -> int:
        return self.controller.command.read(0, 1)

    def answer(self) -> int | None:
        """The byte in the output buffer, or None if there is none."""
        return self.controller.data.read(0, 1) if self.status() & OBF else None


@pytest.fixture
def board() -> Board:
    return Board()


# Probing


def test_the_output_buffer_is_empty_at_first(board: Board) -> None:
    assert board.answer() is None


def test_the_self_test_passes_and_sets_the_system_flag(board: Board) -> None:
    board.command(0xAA)
    assert board.answer() == 0x55
    assert board.status() & SYSTEM
    assert board.answer() is None


def test_the_keyboard_lines_are_good(board: Board) -> None:
    board.command(0xAB)
    assert board.answer() == 0


@pytest.mark.parametrize("byte", [0xFF, 0xF2, 0xED, 0x00])
def test_a_byte_for_the_keyboard_times_out(board: Board, byte: int) -> None:
    board.send(byte)
    status = board.status()
    assert board.answer() == 0xFE
    assert status & (OBF | TIMEOUT | AUX) == OBF | TIMEOUT
    assert board.status() & (OBF | TIMEOUT) == 0


def test_a_byte_for_the_mouse_times_out_on_the_second_port(board: Board) -> None:
    board.command(0xD4, 0xFF)
    status = board.status()
    assert board.answer() == 0xFE
    assert status & (OBF | TIMEOUT | AUX) == OBF | TIMEOUT | AUX


def test_the_second_port_cannot_be_enabled(board: Board) -> None:
    board.command(0xA8)
    board.command(0x60, 0x00)
    board.command(0x20)
    assert board.answer() == 0x20


def test_the_second_port_fails_its_test(board: Board) -> None:
    board.command(0xA9)
    assert board.answer() == 1


def test_loop_back_of_the_second_port_answers_as_the_keyboards(board: Board) -> None:
    board.command(0xD3, 0x5A)
    status = board.status()
    assert board.answer() == 0x5A
    assert status & AUX == 0


def test_the_status_tells_commands_from_data(board: Board) -> None:
    board.command(0x20)
    after_command = board.status() & COMMAND
    board.send(0)
    assert (after_command, board.status() & COMMAND) == (COMMAND, 0)


def test_writing_the_status_port_twice_forgets_the_first_command(board: Board) -> None:
    board.command(0x60)
    board.command(0xAE, 0xF4)
    assert board.answer() == 0xFE


def test_the_newest_answer_wins(board: Board) -> None:
    board.send(0xFF)
    board.command(0xAA)
    status = board.status()
    assert board.answer() == 0x55
    assert status & TIMEOUT == 0


# Configuration


def test_the_configuration_reads_back(board: Board) -> None:
    board.command(0x60, 0x45)
    board.command(0x20)
    assert board.answer() == 0x65


def test_the_keyboard_is_disabled_and_enabled_by_command(board: Board) -> None:
    board.command(0xAE)
    board.command(0x20)
    enabled = board.answer()
    board.command(0xAD)
    board.command(0x20)
    assert (enabled, board.answer()) == (0x20, 0x30)


def test_an_answer_interrupts_when_enabled_until_it_is_read(board: Board) -> None:
    board.send(0xFF)
    disabled = board.level
    board.command(0x60, 0x01)
    enabled = board.level
    board.answer()
    assert [disabled, enabled, board.level] == [False, True, False]


def test_an_answer_of_the_second_port_does_not_interrupt(board: Board) -> None:
    board.command(0x60, 0x03)
    board.command(0xD4, 0xF4)
    assert not board.level


def test_the_controller_works_without_an_interrupt_line() -> None:
    controller = I8042(lambda status, reason: None)
    controller.data.write(0, 1, 0xFF)
    assert controller.data.read(0, 1) == 0xFE


# Output port


def test_the_a20_bit_is_kept(board: Board) -> None:
    board.command(0xD0)
    at_first = board.answer()
    board.command(0xD1, 0x01)
    board.command(0xD0)
    written = board.answer()
    board.command(0xDF)
    board.command(0xD0)
    enabled = board.answer()
    board.command(0xDD)
    board.command(0xD0)
    assert [at_first, written, enabled, board.answer()] == [3, 1, 3, 1]
    assert board.stops == []


@pytest.mark.parametrize("command", [0xFE, 0xF0, 0xFC])
def test_pulsing_line_0_resets(board: Board, command: int) -> None:
    board.command(command)
    assert board.stops == [RESET]


@pytest.mark.parametrize("command", [0xFF, 0xF1, 0xFD])
def test_pulsing_other_lines_does_not_reset(board: Board, command: int) -> None:
    board.command(command)
    assert board.stops == []


def test_clearing_bit_0_of_the_output_port_resets(board: Board) -> None:
    board.command(0xD1, 0x02)
    assert board.stops == [RESET]


# Ports, state, any guest


def test_only_the_first_byte_of_a_port_is_there(board: Board) -> None:
    board.controller.command.write(1, 1, 0xFE)
    assert board.stops == []
    assert board.controller.data.read(1, 1) == 0xFF
    assert board.controller.data.read(0, 4) == 0xFFFFFF00


ACTION = st.tuples(
    st.sampled_from(["data", "command"]),
    st.booleans(),
    st.integers(0, 2),
    st.sampled_from([0x20, 0x60, 0xAA, 0xD0, 0xD1, 0xD2, 0xD3, 0xD4, 0xFE]) | st.integers(0, 0xFFFFFFFF),
)


def apply(board: Board, port: str, write: bool, offset: int, value: int, size: int) -> int:
    device = board.controller.data if port == "data" else board.controller.command
    if not write:
        return device.read(offset, size)
    device.write(offset, size, value & ((1 << 8 * size) - 1))
    return 0


@settings(max_examples=200, deadline=None)
@given(st.lists(ACTION, max_size=40), st.sampled_from([1, 2, 3, 4, 8]))
def test_any_guest_gets_values_that_fit_and_never_an_exception(
    actions: list[tuple[str, bool, int, int]], size: int
) -> None:
    board = Board()
    for action in actions:
        assert 0 <= apply(board, *action, size) < 1 << (8 * size)
    assert set(board.stops) <= {RESET}


@settings(max_examples=200, deadline=None)
@given(st.lists(ACTION, max_size=30), st.lists(ACTION, max_size=30))
def test_a_restored_copy_behaves_like_the_original(
    before: list[tuple[str, bool, int, int]], after: list[tuple[str, bool, int, int]]
) -> None:
    first, second = Board(), Board()
    for action in before:
        apply(first, *action, 1)
    second.controller.restore(first.controller.save())
    assert second.level == first.level
    assert [apply(second, *action, 1) for action in after] == [apply(first, *action, 1) for action in after]
    assert second.controller.save() == first.controller.save()


# Reset control


@pytest.mark.parametrize(("value", "stops"), [(0x02, 0), (0x06, 1), (0x0E, 1), (0x04, 1), (0xFB, 0)])
def test_reset_control_resets_by_bit_2(board: Board, value: int, stops: int) -> None:
    ResetControl(board.stop).write(0, 1, value)
    assert board.stops == [RESET] * stops


def test_reset_control_keeps_the_kind_of_reset(board: Board) -> None:
    first, second = ResetControl(board.stop), ResetControl(board.stop)
    first.write(0, 1, 0xFB)
    second.restore(first.save())
    assert second.read(0, 1) == 0x0A


def test_reset_control_has_one_byte(board: Board) -> None:
    control = ResetControl(board.stop)
    control.write(1, 1, 0x06)
    assert board.stops == []
    assert (control.read(1, 1), control.read(0, 2)) == (0xFF, 0xFF00)
