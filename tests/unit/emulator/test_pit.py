"""The 8254 model, against the datasheet and against a model that ticks every pulse."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.emulator.pit import FREQUENCY, Pit, pulses_at, time_of

LOW, HIGH, BOTH = 0x10, 0x20, 0x30
MODE = {mode: mode << 1 for mode in range(8)}


@dataclass
class Board:
    """A timer with a clock set by hand, in CLK pulses, and a record of IRQ 0."""

    pulse: int = 1000
    edges: list[tuple[int, bool]] = field(default_factory=list)
    pit: Pit = field(init=False)

    def __post_init__(self) -> None:
        self.pit = Pit(irq=self.irq, clock=self.clock)

    def irq(self, level: bool) -> None:
        self.edges.append((self.pulse, level))

    def clock(self) -> int:
        return time_of(self.pulse)

    def program(self, counter: int, mode: int, count: int, flags: int = 0) -> None:
        self.pit.port_write(0x43, 1, counter << 6 | BOTH | MODE[mode] | flags)
        self.write_count(counter, count)

    def write_count(self, counter: int, count: int) -> None:
        self.pit.port_write(0x40 + counter, 1, count & 0xFF)
        self.pit.port_write(0x40 + counter, 1, count >> 8)

    def read_count(self, counter: int) -> int:
        low = self.pit.port_read(0x40 + counter, 1)
        return low | self.pit.port_read(0x40 + counter, 1) << 8

    def gate2(self, level: bool) -> None:
        self.pit.port_write(0x61, 1, int(level))

    def out2(self) -> bool:
        return bool(self.pit.port_read(0x61, 1) & 0x20)

    def rises(self, until: int) -> list[int]:
        """Advance from event to event and return the pulses at which IRQ 0 rose."""
        self.edges.clear()
        while (event := self.pit.next_event()) is not None and pulses_at(event) <= until:
            self.pulse = pulses_at(event)
            self.pit.advance()
        self.pulse = until
        return [pulse for pulse, level in self.edges if level]

    def outputs(self, pulses: int) -> str:
        """OUT of counter 2 at this and the following pulses, as 0 and 1."""
        levels = ""
        for _ in range(pulses):
            levels += str(int(self.out2()))
            self.pulse += 1
        return levels


@pytest.fixture
def board() -> Board:
    return Board()


# Time


@given(st.integers(0, 10**25))
def test_a_pulse_has_passed_at_its_time_and_not_a_nanosecond_before(pulse: int) -> None:
    assert pulses_at(time_of(pulse)) == pulse
    assert pulses_at(time_of(pulse + 1) - 1) == pulse


def test_a_thousand_years_of_ticks_do_not_drift(board: Board) -> None:
    board.program(0, 2, 65536)
    start = board.pulse + 1
    board.pulse = start + 65536 * 10**12 - 1
    board.pit.advance()
    assert board.pit.next_event() == -(-(start + 65536 * 10**12) * 10**9 // FREQUENCY)


# Modes: outputs as the datasheet's figures draw them. The first digit is the pulse of the write.


@pytest.mark.parametrize(
    ("mode", "count", "outputs"),
    [
        (0, 3, "000011111111"),
        (2, 3, "111011011011"),
        (3, 4, "111001100110"),
        (3, 5, "111100111001"),
        (4, 3, "111101111111"),
        (6, 3, "111011011011"),
        (7, 4, "111001100110"),
    ],
)
def test_outputs_after_a_count_is_written(board: Board, mode: int, count: int, outputs: str) -> None:
    board.gate2(True)
    board.program(2, mode, count)
    assert board.outputs(12) == outputs


@pytest.mark.parametrize(("mode", "outputs"), [(1, "100011111111"), (5, "111101111111")])
def test_outputs_after_the_gate_rises(board: Board, mode: int, outputs: str) -> None:
    board.program(2, mode, 3)
    assert board.outputs(8) == "11111111"
    board.gate2(True)
    assert board.outputs(12) == outputs


def test_the_one_shot_is_retriggered_without_a_glitch(board: Board) -> None:
    board.program(2, 1, 3)
    board.gate2(True)
    assert board.outputs(3) == "100"
    board.gate2(False)
    board.gate2(True)
    assert board.outputs(6) == "000011"


def test_a_low_gate_suspends_mode_0_without_changing_its_output(board: Board) -> None:
    board.gate2(True)
    board.program(2, 0, 5)
    assert board.outputs(3) == "000"
    board.gate2(False)
    assert board.outputs(10) == "0000000000"
    board.gate2(True)
    assert board.outputs(5) == "00011"


@pytest.mark.parametrize("mode", [2, 3])
def test_a_low_gate_raises_the_output_and_its_rise_starts_a_new_period(board: Board, mode: int) -> None:
    board.gate2(True)
    board.program(2, mode, 4)
    board.pulse += 4
    assert not board.out2()
    board.gate2(False)
    assert board.outputs(9) == "111111111"
    board.gate2(True)
    assert board.outputs(5) == {2: "11110", 3: "11100"}[mode]


def test_a_new_count_in_mode_2_waits_for_the_end_of_the_period(board: Board) -> None:
    board.program(0, 2, 10)
    start = board.pulse + 1
    board.pulse = start + 5
    board.write_count(0, 4)
    assert board.rises(start + 20) == [start + 10, start + 14, start + 18]


def test_a_new_count_in_mode_3_waits_for_the_end_of_the_half_period(board: Board) -> None:
    board.program(0, 3, 20)
    start = board.pulse + 1
    board.pulse = start + 5
    board.write_count(0, 8)
    assert board.rises(start + 30) == [start + 14, start + 22, start + 30]


def test_the_first_byte_of_a_count_stops_mode_0_and_lowers_its_output(board: Board) -> None:
    board.gate2(True)
    board.program(2, 0, 2)
    board.pulse += 10
    assert board.out2()
    board.pit.port_write(0x42, 1, 3)
    assert board.outputs(10) == "0000000000"
    board.pit.port_write(0x42, 1, 0)
    assert board.outputs(5) == "00001"


def test_mode_0_counts_on_below_zero(board: Board) -> None:
    board.program(0, 0, 2)
    board.pulse += 4
    assert board.read_count(0) == 0xFFFF


def test_a_count_of_zero_is_65536(board: Board) -> None:
    board.program(0, 2, 0)
    start = board.pulse + 1
    assert board.rises(start + 200000) == [start + 65536, start + 131072, start + 196608]


def test_mode_3_counts_down_by_two(board: Board) -> None:
    board.program(0, 3, 5)
    counts = []
    for _ in range(6):
        board.pulse += 1
        counts.append(board.read_count(0))
    assert counts == [4, 2, 0, 4, 2, 4]


def test_bcd_counts_are_decimal(board: Board) -> None:
    board.program(0, 2, 0x1000, flags=1)
    board.pulse += 1
    assert board.read_count(0) == 0x1000
    board.pulse += 1
    assert board.read_count(0) == 0x0999
    start = board.pulse - 1
    assert board.rises(start + 2000) == [start + 1000, start + 2000]


def test_a_bcd_count_of_zero_is_10000_and_wraps_to_9999(board: Board) -> None:
    board.program(0, 0, 0, flags=1)
    board.pulse += 1 + 10001
    assert board.read_count(0) == 0x9999


# Access


def test_low_byte_access_loads_and_reads_one_byte(board: Board) -> None:
    board.pit.port_write(0x43, 1, LOW | MODE[2])
    board.pit.port_write(0x40, 1, 0x80)
    board.pulse += 3
    assert [board.pit.port_read(0x40, 1) for _ in range(2)] == [0x7E, 0x7E]


def test_high_byte_access_loads_and_reads_one_byte(board: Board) -> None:
    board.pit.port_write(0x43, 1, HIGH | MODE[2])
    board.pit.port_write(0x40, 1, 0x80)
    board.pulse += 1
    assert board.pit.port_read(0x40, 1) == 0x80


def test_a_latched_count_stays_until_both_bytes_are_read(board: Board) -> None:
    board.program(0, 2, 0x1234)
    board.pulse += 1
    board.pit.port_write(0x43, 1, 0)
    board.pulse += 0x100
    board.pit.port_write(0x43, 1, 0)  # ignored: the first latch was not read
    assert board.read_count(0) == 0x1234
    assert board.read_count(0) == 0x1134


def test_read_back_latches_several_counters_at_once(board: Board) -> None:
    board.program(0, 2, 0x1000)
    board.program(1, 2, 0x2000)
    board.pulse += 1
    board.pit.port_write(0x43, 1, 0xD6)
    board.pulse += 50
    assert [board.read_count(0), board.read_count(1)] == [0x1000, 0x2000]


def test_the_status_byte_comes_before_the_latched_count(board: Board) -> None:
    board.program(0, 3, 0x1000)
    board.pulse += 1
    board.pit.port_write(0x43, 1, 0xC2)
    assert board.pit.port_read(0x40, 1) == 0x80 | BOTH | MODE[3]
    assert board.read_count(0) == 0x1000


def test_null_count_is_set_until_the_count_is_loaded(board: Board) -> None:
    def null_count() -> bool:
        board.pit.port_write(0x43, 1, 0xE2)
        return bool(board.pit.port_read(0x40, 1) & 0x40)

    board.pit.port_write(0x43, 1, BOTH | MODE[2])
    after_control = null_count()
    board.write_count(0, 10)
    after_write = null_count()
    board.pulse += 1
    after_load = null_count()
    board.write_count(0, 20)
    with_a_new_count_waiting = null_count()
    board.pulse += 10
    after_the_period = null_count()
    assert [after_control, after_write, after_load] == [True, True, False]
    assert [with_a_new_count_waiting, after_the_period] == [True, False]


def test_a_control_word_forgets_half_written_counts_and_latches(board: Board) -> None:
    board.program(0, 2, 0x1234)
    board.pit.port_write(0x43, 1, 0)
    board.pit.port_write(0x40, 1, 0x55)
    board.program(0, 2, 0x4321)
    board.pulse += 1
    assert board.read_count(0) == 0x4321


def test_the_control_port_reads_as_an_empty_bus(board: Board) -> None:
    assert board.pit.port_read(0x43, 1) == 0xFF


def test_a_wide_access_is_its_bytes(board: Board) -> None:
    board.pit.port_write(0x43, 1, LOW | MODE[2])
    board.pit.port_write(0x43, 1, 0x40 | LOW | MODE[2])
    board.pit.port_write(0x40, 2, 0x2010)
    board.pulse += 1
    assert board.pit.port_read(0x40, 2) == 0x2010


# Port 0x61


def test_port_61_keeps_gate_and_speaker_and_no_more(board: Board) -> None:
    board.pit.port_write(0x61, 1, 0xFF)
    assert board.pit.port_read(0x61, 1) & 0xCF == 0x0F


def test_the_refresh_bit_toggles_every_18_pulses(board: Board) -> None:
    board.pulse = 18 * 100
    levels = []
    for _ in range(4):
        levels.append(board.pit.port_read(0x61, 1) & 0x10)
        board.pulse += 18
    assert levels == [0, 0x10, 0, 0x10]


# IRQ 0


def test_mode_2_raises_irq_0_once_a_period(board: Board) -> None:
    board.program(0, 2, 100)
    start = board.pulse + 1
    assert board.rises(start + 350) == [start + 100, start + 200, start + 300]


def test_a_strobe_raises_irq_0_at_its_end(board: Board) -> None:
    board.program(0, 4, 100)
    start = board.pulse + 1
    assert board.rises(start + 300) == [start + 101]
    assert board.pit.next_event() is None


def test_missed_periods_are_one_edge(board: Board) -> None:
    board.program(0, 2, 100)
    board.pulse += 1 + 1050
    board.edges.clear()
    board.pit.advance()
    assert [level for _, level in board.edges] == [False, True]


def test_missed_periods_that_end_in_a_low_half_leave_the_line_low(board: Board) -> None:
    board.program(0, 3, 100)
    board.pulse += 1 + 1070
    board.edges.clear()
    board.pit.advance()
    assert [level for _, level in board.edges] == [False, True, False]


def test_an_edge_due_before_a_port_access_is_delivered_by_it(board: Board) -> None:
    board.program(0, 0, 10)
    board.pulse += 20
    board.pit.port_write(0x43, 1, BOTH | MODE[0])
    assert [level for _, level in board.edges] == [True, False]


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([0, 2, 3, 4]),
    st.lists(st.tuples(st.integers(2, 15), st.integers(1, 40)), min_size=1, max_size=6),
)
def test_events_are_the_rises_that_advancing_every_pulse_finds(
    mode: int, counts: list[tuple[int, int]]
) -> None:
    by_event, by_pulse = Board(), Board()
    for board in (by_event, by_pulse):
        board.pit.port_write(0x43, 1, LOW | MODE[mode])
    for count, wait in counts:
        by_event.pit.port_write(0x40, 1, count)
        by_pulse.pit.port_write(0x40, 1, count)
        until = by_event.pulse + wait
        expected = by_event.rises(until)
        by_pulse.edges.clear()
        while by_pulse.pulse < until:
            by_pulse.pulse += 1
            by_pulse.pit.advance()
        assert expected == [pulse for pulse, level in by_pulse.edges if level]


def test_an_unprogrammed_timer_has_no_event(board: Board) -> None:
    assert board.pit.next_event() is None


@pytest.mark.parametrize("mode", [2, 3])
def test_the_illegal_count_of_one_has_no_event(board: Board, mode: int) -> None:
    board.program(0, mode, 1)
    assert board.pit.next_event() is None


# State


def test_a_restored_timer_goes_on_where_the_other_stopped() -> None:
    first = Board(pulse=5000)
    first.program(0, 2, 100)
    first.pulse += 1 + 30
    second = Board(pulse=77)
    second.pit.restore(first.pit.save())
    assert second.rises(77 + 200) == [77 + 70, 77 + 170]


ACCESS = st.one_of(
    st.tuples(st.just("read"), st.sampled_from([0x40, 0x41, 0x42, 0x43, 0x61])),
    st.tuples(
        st.just("write"),
        st.tuples(st.sampled_from([0x40, 0x41, 0x42, 0x43, 0x61]), st.integers(0, 255)),
    ),
    st.tuples(st.just("wait"), st.integers(0, 300)),
)


def apply(board: Board, action: tuple[str, object]) -> int:
    match action:
        case ("read", int(port)):
            return board.pit.port_read(port, 1)
        case ("write", (int(port), int(value))):
            board.pit.port_write(port, 1, value)
        case ("wait", int(pulses)):
            board.pulse += pulses
            board.pit.advance()
    return 0


@settings(max_examples=150, deadline=None)
@given(st.lists(ACCESS, max_size=40), st.integers(1, 4))
def test_any_guest_gets_bytes_and_never_an_exception(actions: list[tuple[str, object]], size: int) -> None:
    board = Board()
    for action in actions:
        assert 0 <= apply(board, action) <= 0xFF
        event = board.pit.next_event()
        assert event is None or event > board.clock()
    assert 0 <= board.pit.port_read(0x40, size) < 1 << (8 * size)


@settings(max_examples=150, deadline=None)
@given(st.lists(ACCESS, max_size=25), st.lists(ACCESS, max_size=25))
def test_a_restored_copy_behaves_like_the_original(
    before: list[tuple[str, object]], after: list[tuple[str, object]]
) -> None:
    first, second = Board(), Board()
    for action in before:
        apply(first, action)
    second.pulse = first.pulse
    second.pit.restore(first.pit.save())
    first.edges.clear()
    assert second.pit.save() == first.pit.save()
    assert [apply(second, action) for action in after] == [apply(first, action) for action in after]
    assert second.edges == first.edges


# Against a counter that ticks


@dataclass
class TickingCounter:
    """The 8254's counter, one CLK pulse after the other, as the datasheet tells it (even mode 3 counts)."""

    mode: int
    gate: bool = True
    reload: int = 0
    count: int = 0
    out: bool = True
    running: bool = False
    load_next: bool = False

    def __post_init__(self) -> None:
        self.out = self.mode != 0

    def write(self, count: int) -> None:
        self.reload = count
        if self.mode in (0, 4) or (self.mode in (2, 3) and not self.running):
            self.load_next = True
            self.out = self.out and self.mode != 0

    def set_gate(self, gate: bool) -> None:
        if gate and not self.gate and self.reload and self.mode in (1, 2, 3, 5):
            self.load_next = True
        if not gate and self.mode in (2, 3):
            self.out = True
        self.gate = gate

    def tick(self) -> None:
        if self.load_next and (self.gate or self.mode not in (2, 3)):
            self.count, self.load_next, self.running = self.reload, False, True
            self.out = self.mode not in (0, 1)
            return
        if not self.running or (not self.gate and self.mode not in (1, 5)):
            return
        self.count = (self.count - (2 if self.mode == 3 else 1)) & 0xFFFF
        if self.mode in (0, 1):
            self.out = self.out or self.count == 0
        elif self.mode == 2:
            self.out = self.count != 1
            self.count = self.count or self.reload
        elif self.mode == 3 and self.count == 0:
            self.count = self.reload
            self.out = not self.out
        elif self.mode in (4, 5):
            self.out = self.count != 0


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 5),
    st.lists(
        st.one_of(
            st.tuples(st.just("count"), st.integers(1, 12)),
            st.tuples(st.just("gate"), st.integers(0, 1)),
            st.tuples(st.just("wait"), st.integers(1, 30)),
        ),
        max_size=15,
    ),
)
def test_computed_outputs_are_those_of_a_counter_that_ticks(
    mode: int, actions: list[tuple[str, int]]
) -> None:
    board = Board()
    board.gate2(True)
    board.pit.port_write(0x43, 1, 2 << 6 | LOW | MODE[mode])
    model = TickingCounter(mode)
    for action, argument in actions:
        match action:
            case "count":
                board.pit.port_write(0x42, 1, 2 * argument)
                model.write(2 * argument)
            case "gate":
                board.gate2(bool(argument))
                model.set_gate(bool(argument))
            case "wait":
                expected = ""
                for _ in range(argument):
                    expected += str(int(model.out))
                    model.tick()
                assert board.outputs(argument) == expected
