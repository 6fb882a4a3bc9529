"""The ACPI power management block: timer, events, power off."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.devices.acpi import AcpiPm
from pykvm.errors import ConfigurationError
from pykvm.layout import ACPI_PM_BASE, ACPI_PM_TIMER, ACPI_SHUTDOWN

SECOND = 1_000_000_000
HERTZ = 3_579_545
STATUS, ENABLE, CONTROL, TIMER = 0, 2, 4, 8
TMR, PWRBTN = 0x0001, 0x0100


@dataclass
class Board:
    time: int = 12345
    timer_bits: int = 24
    level: bool = False
    stops: list[tuple[int, str]] = field(default_factory=list)
    pm: AcpiPm = field(init=False)

    def __post_init__(self) -> None:
        self.pm = AcpiPm(self.stop, irq=self, clock=lambda: self.time, timer_bits=self.timer_bits)

    def stop(self, status: int, reason: str) -> None:
        self.stops.append((status, reason))

    def set(self, level: bool) -> None:
        self.level = level

    def pulse(self) -> None:
        raise AssertionError("the SCI is a level")


@pytest.fixture
def board() -> Board:
    return Board()


def test_the_registers_are_where_the_layout_says() -> None:
    assert (ACPI_SHUTDOWN - ACPI_PM_BASE, ACPI_PM_TIMER - ACPI_PM_BASE) == (CONTROL, TIMER)


# Timer


def test_the_timer_counts_at_its_frequency(board: Board) -> None:
    board.time += SECOND
    assert board.pm.read(TIMER, 4) == HERTZ


@pytest.mark.parametrize("bits", [24, 32])
def test_the_timer_wraps_at_its_width(bits: int) -> None:
    board = Board(timer_bits=bits)
    board.time += 10_000 * SECOND
    assert board.pm.read(TIMER, 4) == 10_000 * HERTZ % (1 << bits)


def test_a_timer_of_another_width_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="16 bits"):
        AcpiPm(lambda status, reason: None, timer_bits=16)


def test_writing_the_timer_does_nothing(board: Board) -> None:
    board.pm.write(TIMER, 4, 0xFFFFFFFF)
    assert board.pm.read(TIMER, 4) == 0


def test_the_timers_bytes_can_be_read_one_by_one(board: Board) -> None:
    board.time += SECOND
    assert [board.pm.read(TIMER + index, 1) for index in range(4)] == list(HERTZ.to_bytes(4, "little"))


def test_the_timer_sets_its_status_when_the_highest_bit_changes(board: Board) -> None:
    half_period = (1 << 23) * SECOND // HERTZ
    board.time += half_period - 1000
    before = board.pm.read(STATUS, 2)
    board.time += 2000
    after = board.pm.read(STATUS, 2)
    board.pm.write(STATUS, 2, TMR)
    cleared = board.pm.read(STATUS, 2)
    board.time += half_period
    assert [before, after, cleared, board.pm.read(STATUS, 2)] == [0, TMR, 0, TMR]


# Events


def test_the_power_button_interrupts_if_it_is_enabled_until_it_is_cleared(board: Board) -> None:
    board.pm.press_power_button()
    disabled = board.level
    board.pm.write(ENABLE, 2, PWRBTN)
    enabled = board.level
    status = board.pm.read(STATUS, 2)
    board.pm.write(STATUS, 2, PWRBTN)
    assert [disabled, enabled, board.level] == [False, True, False]
    assert (status, board.pm.read(STATUS, 2)) == (PWRBTN, 0)


def test_writing_a_zero_clears_no_status(board: Board) -> None:
    board.pm.press_power_button()
    board.pm.write(STATUS, 2, 0xFFFF & ~PWRBTN)
    assert board.pm.read(STATUS, 2) == PWRBTN


def test_only_events_that_exist_can_be_enabled(board: Board) -> None:
    board.pm.write(ENABLE, 2, 0xFFFF)
    assert board.pm.read(ENABLE, 2) == 0x0721


def test_status_and_enable_are_written_together_by_a_double_word(board: Board) -> None:
    board.pm.press_power_button()
    board.pm.write(STATUS, 4, PWRBTN << 16 | PWRBTN)
    assert board.pm.read(STATUS, 4) == PWRBTN << 16


# Control


def test_acpi_mode_is_always_on(board: Board) -> None:
    board.pm.write(CONTROL, 2, 0)
    assert board.pm.read(CONTROL, 2) == 1


@pytest.mark.parametrize(
    ("offset", "size", "value"),
    [(CONTROL, 2, 0x2000), (CONTROL, 4, 0x2001), (CONTROL + 1, 1, 0x20), (0, 8, 0x2000 << 32)],
)
def test_sleep_enable_with_type_s5_powers_off(board: Board, offset: int, size: int, value: int) -> None:
    board.pm.write(offset, size, value)
    assert board.stops == [(0, "power-off")]


@pytest.mark.parametrize("value", [0x0000, 0x1000, 0x2400, 0x3C00, 0x4000])
def test_other_control_values_do_not_power_off(board: Board, value: int) -> None:
    board.pm.write(CONTROL, 2, value)
    assert board.stops == []


def test_sleep_enable_reads_as_zero_and_the_type_is_kept(board: Board) -> None:
    board.pm.write(CONTROL, 2, 0x3402)
    assert board.pm.read(CONTROL, 2) == 0x1403


# State and bad input


def test_a_restored_block_goes_on_where_the_other_stopped(board: Board) -> None:
    board.time += SECOND
    board.pm.write(ENABLE, 2, PWRBTN)
    board.pm.press_power_button()
    other = Board(time=99)
    other.pm.restore(board.pm.save())
    assert other.level
    assert other.pm.read(TIMER, 4) == HERTZ
    assert other.pm.save() == board.pm.save()


@given(st.integers(0, 10**15), st.integers(0, 10**15))
def test_restoring_keeps_the_timer_exact(elapsed: int, time: int) -> None:
    board, other = Board(), Board(time=time)
    board.time += elapsed
    other.pm.restore(board.pm.save())
    assert other.pm.save() == board.pm.save()


@pytest.mark.parametrize("offset", [-1, 12, 1 << 64])
def test_nothing_is_beyond_the_block(board: Board, offset: int) -> None:
    board.pm.write(offset, 4, 0xFFFFFFFF)
    assert board.pm.read(offset, 4) == 0xFFFFFFFF
    assert board.stops == []


ACTION = st.tuples(
    st.sampled_from(["read", "write"]),
    st.integers(0, 20),
    st.integers(1, 8),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, 10 * SECOND),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(ACTION, max_size=40))
def test_any_guest_gets_values_that_fit_and_never_an_exception(
    actions: list[tuple[str, int, int, int, int]],
) -> None:
    board = Board()
    for action, offset, size, value, wait in actions:
        board.time += wait
        if action == "write":
            board.pm.write(offset, size, value)
        assert 0 <= board.pm.read(offset, size) < 1 << (8 * size)
    assert set(board.stops) <= {(0, "power-off")}
