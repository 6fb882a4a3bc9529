"""The MC146818A clock and CMOS memory, on a clock and timers that the test moves by hand."""

from __future__ import annotations

import calendar
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.devices.cmos import SECOND, Cmos
from pykvm.errors import ConfigurationError

MILLISECOND = SECOND // 1000
NOON = calendar.timegm((2024, 2, 28, 12, 34, 56)) * SECOND  # a Wednesday
SET, PIE, AIE, UIE, BINARY, HOURS24 = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
IRQF, PF, AF, UF = 0x80, 0x40, 0x20, 0x10


@dataclass
class Line:
    level: bool = False
    rises: int = 0

    def set(self, level: bool) -> None:
        self.rises += level and not self.level
        self.level = level

    def pulse(self) -> None:
        self.set(True)
        self.set(False)


@dataclass
class HandTimer:
    due: int
    call: Callable[[], None]
    started: bool = False
    cancelled: bool = False

    def start(self) -> None:
        self.started = True

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class Host:
    """The host's time in nanoseconds, with a clock device on it."""

    time: int = NOON
    irq: Line = field(default_factory=Line)
    timers: list[HandTimer] = field(default_factory=list)
    cmos: Cmos = field(init=False)

    def __post_init__(self) -> None:
        self.cmos = Cmos(irq=self.irq, now=lambda: self.time, timer=self.timer)

    def timer(self, delay: float, call: Callable[[], None]) -> HandTimer:
        self.timers.append(HandTimer(self.time + round(delay * SECOND), call))
        return self.timers[-1]

    def running(self) -> list[HandTimer]:
        return [timer for timer in self.timers if timer.started and not timer.cancelled]

    def wait(self, nanoseconds: int) -> None:
        """Let time pass, firing timers as they come due (a thread may be a little late)."""
        until = self.time + nanoseconds
        while due := [timer for timer in self.running() if timer.due <= until]:
            first = min(due, key=lambda timer: timer.due)
            self.time = max(self.time, first.due + 1000)
            self.timers.remove(first)
            first.call()
        self.time = max(self.time, until)

    def read(self, register: int) -> int:
        self.cmos.write(0, 1, register)
        return self.cmos.read(1, 1)

    def write(self, register: int, value: int) -> None:
        self.cmos.write(0, 1, register)
        self.cmos.write(1, 1, value)

    def clock(self) -> list[int]:
        """Century, year, month, day, hours, minutes, seconds: as the registers show them."""
        return [self.read(register) for register in (0x32, 9, 8, 7, 4, 2, 0)]

    def set_clock(self, *values: int) -> None:
        for register, value in zip((0x32, 9, 8, 7, 4, 2, 0), values, strict=True):
            self.write(register, value)


@pytest.fixture
def host() -> Host:
    return Host()


# Time of day


def test_the_time_is_the_hosts_in_bcd(host: Host) -> None:
    assert host.clock() == [0x20, 0x24, 0x02, 0x28, 0x12, 0x34, 0x56]
    assert host.read(6) == 4


def test_binary_mode_shows_plain_numbers(host: Host) -> None:
    host.write(0x0B, HOURS24 | BINARY)
    assert host.clock() == [20, 24, 2, 28, 12, 34, 56]


@pytest.mark.parametrize(
    ("hour", "shown"), [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)]
)
def test_twelve_hour_mode_marks_the_afternoon(host: Host, hour: int, shown: int) -> None:
    host.time = (NOON // (86400 * SECOND)) * 86400 * SECOND + hour * 3600 * SECOND
    host.write(0x0B, 0)
    assert host.read(4) == shown
    host.write(4, shown)
    host.write(0x0B, HOURS24 | BINARY)
    assert host.read(4) == hour


def test_time_passes(host: Host) -> None:
    host.wait(4 * SECOND)
    assert host.clock() == [0x20, 0x24, 0x02, 0x28, 0x12, 0x35, 0x00]


def test_the_guest_sets_the_time_and_it_goes_on_from_there(host: Host) -> None:
    host.write(0x0B, HOURS24 | SET)
    host.set_clock(0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58)
    host.wait(10 * SECOND)
    standing = host.clock()
    host.write(0x0B, HOURS24)
    host.wait(2 * SECOND)
    assert standing == [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58]
    assert host.clock() == [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00]


def test_a_register_written_without_hold_takes_effect_at_once(host: Host) -> None:
    host.write(2, 0x05)
    host.wait(4 * SECOND)
    assert host.clock()[-2:] == [0x06, 0x00]


def test_the_clock_starts_half_a_second_after_the_divider(host: Host) -> None:
    host.time += 123 * MILLISECOND
    host.write(0x0A, 0x76)
    host.set_clock(0x20, 0x01, 0x01, 0x01, 0x00, 0x00, 0x00)
    host.wait(5 * SECOND)
    host.write(0x0A, 0x26)
    host.wait(499 * MILLISECOND)
    before = host.read(0)
    host.wait(2 * MILLISECOND)
    assert (before, host.read(0)) == (0x00, 0x01)


@settings(deadline=None)
@given(st.integers(-(10**10), 10**11))
def test_every_time_that_is_set_reads_back(seconds: int) -> None:
    shown, written = Host(time=seconds * SECOND), Host()
    for host in (shown, written):
        host.write(0x0B, HOURS24 | SET)
    shown.write(0x0B, HOURS24)
    written.set_clock(*shown.clock())
    written.write(0x0B, HOURS24)
    assert written.clock() == shown.clock()
    assert written.read(6) == shown.read(6)


@given(st.lists(st.integers(0, 255), min_size=7, max_size=7), st.sampled_from([0, 2, 4, 6]))
def test_nonsense_set_as_the_time_gives_some_time(values: list[int], formats: int) -> None:
    host = Host()
    host.write(0x0B, SET | formats)
    host.set_clock(*values)
    host.write(0x0B, formats)
    assert all(0 <= value <= 255 for value in host.clock())


def test_update_in_progress_announces_the_new_second(host: Host) -> None:
    host.time += SECOND - 3 * MILLISECOND
    early = host.read(0x0A)
    host.time += 2 * MILLISECOND
    shortly_before = host.read(0x0A)
    host.time += MILLISECOND
    after = host.read(0x0A)
    assert [early, shortly_before, after] == [0x26, 0xA6, 0x26]


def test_there_is_no_update_in_progress_while_the_guest_sets_the_time(host: Host) -> None:
    host.time += SECOND - MILLISECOND
    host.write(0x0B, HOURS24 | SET)
    assert host.read(0x0A) == 0x26


# Flags and interrupts


def test_flags_rise_without_being_enabled_and_reading_clears_them(host: Host) -> None:
    host.write(5, 0xFF)
    host.write(3, 0xFF)
    host.write(1, 0xFF)
    host.read(0x0C)
    host.time += SECOND
    assert host.read(0x0C) == PF | AF | UF
    assert host.read(0x0C) == 0
    assert host.irq.rises == 0
    assert host.timers == []


def test_the_periodic_interrupt_comes_at_its_rate_while_it_is_acknowledged(host: Host) -> None:
    host.write(0x0A, 0x2F)  # 2 Hz
    host.read(0x0C)
    host.write(0x0B, HOURS24 | PIE)
    flags = []
    for _ in range(6):
        host.wait(500 * MILLISECOND)
        flags.append(host.read(0x0C))
    assert host.irq.rises == 6
    assert all(value & ~UF == IRQF | PF for value in flags)


@pytest.mark.parametrize(("rate", "hertz"), [(1, 256), (2, 128), (3, 8192), (6, 1024), (15, 2)])
def test_the_rate_selects_the_period(host: Host, rate: int, hertz: int) -> None:
    host.write(0x0A, 0x20 | rate)
    host.read(0x0C)
    host.time += SECOND // hertz - 10_000
    before = host.read(0x0C)
    host.time += 20_000
    assert (before & PF, host.read(0x0C) & PF) == (0, PF)


def test_an_unacknowledged_interrupt_runs_no_timer(host: Host) -> None:
    host.write(0x0B, HOURS24 | PIE)
    host.wait(10 * SECOND)
    assert host.irq.level
    assert host.running() == []
    host.read(0x0C)
    assert not host.irq.level
    assert len(host.running()) == 1


def test_the_update_ended_interrupt_comes_every_second(host: Host) -> None:
    host.read(0x0C)
    host.write(0x0B, HOURS24 | UIE)
    for _ in range(3):
        host.wait(SECOND)
        host.read(0x0C)
    assert host.irq.rises == 3


def test_setting_the_time_disables_the_update_ended_interrupt(host: Host) -> None:
    host.write(0x0B, HOURS24 | UIE | SET)
    assert host.read(0x0B) == HOURS24 | SET


@pytest.mark.parametrize(
    ("alarm", "seconds"),
    [
        ((0x12, 0x35, 0x10), 14),
        ((0xFF, 0x35, 0x10), 14),
        ((0xFF, 0xFF, 0x10), 14),
        ((0xC0, 0xC1, 0xFF), 1),
        ((0x12, 0xFF, 0x00), 4),
        ((0x12, 0x34, 0x56), 86400),
        ((0x00, 0x00, 0x00), 41104),
        ((0x13, 0xFF, 0xFF), 1504),
    ],
)
def test_the_alarm_comes_when_all_bytes_match(host: Host, alarm: tuple[int, int, int], seconds: int) -> None:
    for register, value in zip((5, 3, 1), alarm, strict=True):
        host.write(register, value)
    host.write(0x0B, HOURS24 | AIE)
    host.wait(seconds * SECOND - MILLISECOND)
    before = host.irq.rises
    host.wait(2 * MILLISECOND)
    assert (before, host.irq.rises) == (0, 1)
    assert host.read(0x0C) & ~PF == IRQF | AF | UF


def test_an_alarm_that_is_no_time_never_comes(host: Host) -> None:
    host.write(5, 0x25)
    host.write(0x0B, HOURS24 | AIE)
    assert host.running() == []
    host.time += 10**6 * SECOND
    assert host.read(0x0C) & AF == 0


def test_the_alarm_follows_the_time_that_the_guest_sets(host: Host) -> None:
    for register, value in ((5, 0x06), (3, 0x00), (1, 0x00)):
        host.write(register, value)
    host.write(0x0B, HOURS24 | AIE)
    host.write(4, 0x05)
    host.write(2, 0x59)
    host.write(0, 0x50)
    host.wait(9 * SECOND)
    before = host.irq.rises
    host.wait(2 * SECOND)
    assert (before, host.irq.rises) == (0, 1)


def test_enabling_an_interrupt_whose_flag_is_set_raises_the_line_at_once(host: Host) -> None:
    host.time += SECOND
    host.write(0x0B, HOURS24 | UIE)
    assert host.irq.level


def test_disabling_the_interrupt_lowers_the_line_and_stops_the_timer(host: Host) -> None:
    host.write(0x0B, HOURS24 | PIE)
    host.wait(SECOND)
    host.write(0x0B, HOURS24)
    assert not host.irq.level
    assert host.running() == []


def test_a_timer_that_fires_early_is_set_again(host: Host) -> None:
    host.read(0x0C)
    host.write(0x0B, HOURS24 | UIE)
    host.timers.pop().call()
    assert not host.irq.level
    assert [timer.due for timer in host.running()] == [NOON + SECOND]


def test_without_an_interrupt_line_no_timer_is_made() -> None:
    def refuse(delay: float, call: Callable[[], None]) -> HandTimer:
        raise AssertionError("a timer was made")

    cmos = Cmos(timer=refuse)
    cmos.write(0, 1, 0x0B)
    cmos.write(1, 1, PIE | AIE | UIE)
    assert cmos.read(1, 1) == PIE | AIE | UIE


def test_close_stops_the_timer_for_good(host: Host) -> None:
    host.write(0x0B, HOURS24 | PIE)
    late = host.running()[0]
    host.cmos.close()
    host.cmos.close()
    host.time += SECOND
    late.call()
    host.write(0x0B, HOURS24 | PIE | UIE)
    assert host.running() == []
    assert host.irq.rises == 0


def test_the_default_timer_interrupts_in_real_time_and_ends_with_close() -> None:
    raised = threading.Event()

    class EventLine(Line):
        def set(self, level: bool) -> None:
            if level:
                raised.set()

    cmos = Cmos(irq=EventLine())
    cmos.write(0, 2, HOURS24 | PIE << 8 | 0x0B)
    arrived = raised.wait(5)
    cmos.close()
    assert arrived


# Memory and ports


def test_reset_values_of_the_registers(host: Host) -> None:
    assert [host.read(register) for register in (0x0A, 0x0B, 0x0C, 0x0D)] == [0x26, 0x02, 0, 0x80]


def test_registers_c_and_d_cannot_be_written(host: Host) -> None:
    host.write(0x0C, 0xFF)
    host.write(0x0D, 0)
    assert (host.read(0x0C), host.read(0x0D)) == (0, 0x80)


def test_the_nmi_bit_does_not_select_another_register(host: Host) -> None:
    host.write(0x40, 0x77)
    assert host.read(0x80 | 0x40) == 0x77


def test_the_index_port_cannot_be_read(host: Host) -> None:
    assert host.cmos.read(0, 1) == 0xFF


def test_a_word_selects_and_writes_and_reads_the_data_above_the_index(host: Host) -> None:
    host.cmos.write(0, 2, 0x5540)
    assert host.read(0x40) == 0x55
    assert host.cmos.read(0, 4) == 0xFFFF55FF


def words(cmos: Cmos, *registers: int) -> list[int]:
    values = []
    for register in registers:
        cmos.write(0, 1, register)
        values.append(cmos.read(1, 1))
    return values


@pytest.mark.parametrize(
    ("below", "above", "base", "extended", "above_16m", "above_4g"),
    [
        (0, 0, 0, 0, 0, 0),
        (512 << 10, 0, 512, 0, 0, 0),
        (8 << 20, 0, 640, 7 << 10, 0, 0),
        (64 << 20, 0, 640, 63 << 10, 48 << 4, 0),
        (3 << 30, 5 << 30, 640, 0xFFFF, (3072 - 16) << 4, 5 << 14),
        (3 << 30, 1 << 50, 640, 0xFFFF, (3072 - 16) << 4, 0xFFFFFF),
    ],
)
def test_firmware_finds_the_memory_sizes(
    below: int, above: int, base: int, extended: int, above_16m: int, above_4g: int
) -> None:
    cmos = Cmos(memory_below_4g=below, memory_above_4g=above)

    def number(*registers: int) -> int:
        return int.from_bytes(words(cmos, *registers), "little")

    assert number(0x15, 0x16) == base
    assert number(0x17, 0x18) == number(0x30, 0x31) == extended
    assert number(0x34, 0x35) == above_16m
    assert number(0x5B, 0x5C, 0x5D) == above_4g


def test_firmware_finds_cpus_and_boot_order() -> None:
    assert words(Cmos(cpus=4), 0x5F, 0x3D, 0x38) == [3, 0x32, 0x10]


@pytest.mark.parametrize(
    ("below", "above", "cpus", "message"),
    [(-1, 0, 1, "negative"), (0, -1, 1, "negative"), (0, 0, 0, "0 CPUs"), (0, 0, 257, "257 CPUs")],
)
def test_a_configuration_that_does_not_fit_is_refused(
    below: int, above: int, cpus: int, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Cmos(memory_below_4g=below, memory_above_4g=above, cpus=cpus)


# State


def test_a_restored_clock_has_gone_on_like_one_with_a_battery(host: Host) -> None:
    host.write(4, 0x01)
    host.write(0x40, 0x99)
    state = host.cmos.save()
    other = Host(time=NOON + 60 * SECOND)
    other.cmos.restore(state)
    assert other.clock()[-3:] == [0x01, 0x35, 0x56]
    assert other.read(0x40) == 0x99


def test_a_clock_restored_with_its_alarm_interrupts(host: Host) -> None:
    host.write(0x0B, HOURS24 | UIE)
    other = Host()
    other.cmos.restore(host.cmos.save())
    other.wait(SECOND)
    assert other.irq.rises == 1


ACTION = st.one_of(
    st.tuples(st.just("write"), st.integers(0, 3), st.integers(0, 0xFFFFFFFF)),
    st.tuples(st.just("select"), st.integers(0, 0x0F), st.just(0)),
    st.tuples(st.just("read"), st.integers(0, 3), st.just(0)),
    st.tuples(st.just("wait"), st.just(0), st.integers(0, 5 * SECOND)),
)


def apply(host: Host, action: str, offset: int, value: int, size: int) -> int:
    match action:
        case "write":
            host.cmos.write(offset, size, value & ((1 << 8 * size) - 1))
        case "select":
            host.cmos.write(0, 1, offset)
        case "read":
            return host.cmos.read(offset, size)
        case "wait":
            host.time += value
    return 0


@settings(max_examples=200, deadline=None)
@given(st.lists(ACTION, max_size=40), st.sampled_from([1, 2, 3, 4, 8]))
def test_any_guest_gets_values_that_fit_and_never_an_exception(
    actions: list[tuple[str, int, int]], size: int
) -> None:
    host = Host()
    for action in actions:
        assert 0 <= apply(host, *action, size) < 1 << (8 * size)
    assert len(host.running()) <= 1


@settings(max_examples=200, deadline=None)
@given(st.lists(ACTION, max_size=30), st.lists(ACTION, max_size=30))
def test_a_restored_copy_behaves_like_the_original(
    before: list[tuple[str, int, int]], after: list[tuple[str, int, int]]
) -> None:
    first = Host()
    for action in before:
        apply(first, *action, 1)
    second = Host(time=first.time)
    second.cmos.restore(first.cmos.save())
    assert [apply(second, *action, 1) for action in after] == [apply(first, *action, 1) for action in after]
    assert second.irq.level == first.irq.level
    assert second.cmos.save() == first.cmos.save()


def test_importing_the_clock_does_not_import_datetime() -> None:
    code = "import sys, pykvm.devices.cmos; sys.exit('datetime' in sys.modules or 'calendar' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
