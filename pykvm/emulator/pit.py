"""The PC's interval timer: an Intel 8254 with three counters, and its gate and speaker port 0x61.

Sources: Intel 8254 datasheet (231164-005), "Mode definitions" and "Read-back command";
Intel 82371AB (PIIX4) datasheet, NMISC register, for port 0x61.

A counter is not ticked. It stores the CLK pulse at which its count was loaded, and computes
its count and its output from the pulses since then. Time is the number of CLK pulses since
the clock's zero, ``floor(ns * 1193182 / 10**9)``, so nothing drifts however long it runs.

Mode 2 with count N, its output high but for the last pulse of a period::

    pulse    L         L+1  ...  L+N-1  L+N        L: the pulse after the count was written
    count    N         N-1       1      N
    OUT      ▔▔▔▔▔▔▔▔▔▔▔▔▔▔▔▔▔▔▔▔▁▁▁▁▁▁▔▔▔▔▔▔
"""

from __future__ import annotations

from pykvm.values import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

FREQUENCY = 1_193_182  # Hz
NANOSECONDS = 1_000_000_000

# Ports
COUNTER0 = 0x40
CONTROL = 0x43
PORT_B = 0x61

# Control word: SC1 SC0 RW1 RW0 M2 M1 M0 BCD
CONTROL_BCD = 0x01
CONTROL_KEPT = 0x3F  # what the status byte repeats
SELECT_READ_BACK = 3
RW_LATCH = 0
RW_LOW = 1
RW_HIGH = 2
RW_BOTH = 3

# Read-back command: 1 1 COUNT# STATUS# CNT2 CNT1 CNT0 0
READ_BACK_NO_COUNT = 0x20
READ_BACK_NO_STATUS = 0x10
READ_BACK_COUNTER0 = 0x02

# Status byte, above the six bits of the control word
STATUS_NULL_COUNT = 0x40
STATUS_OUT = 0x80

# Port 0x61
PORT_B_GATE2 = 0x01
PORT_B_WRITABLE = 0x0F  # gate, speaker and the two NMI enables
PORT_B_REFRESH = 0x10
PORT_B_OUT2 = 0x20
REFRESH_PULSES = 18  # memory refresh is requested every 15.09 us

# Modes 6 and 7 are modes 2 and 3: M2 is "don't care" there.
MODES = (0, 1, 2, 3, 4, 5, 2, 3)
INTERRUPT, ONE_SHOT, RATE, SQUARE, SOFTWARE_STROBE, HARDWARE_STROBE = range(6)
TRIGGERED = (ONE_SHOT, HARDWARE_STROBE)  # counting starts when the gate rises
PERIODIC = (RATE, SQUARE)
STROBES = (SOFTWARE_STROBE, HARDWARE_STROBE)

NONE = -1  # no such pulse, byte or count


class CounterState(Value):
    """One counter. Pulses are absolute; -1 stands for none."""

    control: int = RW_BOTH << 4
    gate: bool = True
    reload: int = 0
    count: int = 0
    start: int = NONE
    held: int = NONE
    switch: int = NONE
    out_before: bool = False
    written_low: int = NONE
    read_high: bool = False
    latched_count: int = NONE
    latched_status: int = NONE


class PitState(Value):
    """The whole timer at CLK pulse `pulse` of the clock it ran by."""

    pulse: int
    counters: tuple[CounterState, CounterState, CounterState]
    port_b: int
    level: bool


def pulses_at(nanoseconds: int) -> int:
    """How many CLK pulses have passed at this time."""
    return nanoseconds * FREQUENCY // NANOSECONDS


def time_of(pulse: int) -> int:
    """The first nanosecond at which this CLK pulse has passed."""
    return -(-pulse * NANOSECONDS // FREQUENCY)


class Counter:
    """One of the 8254's counters. `now` is always the current CLK pulse."""

    def __init__(self, gate: bool) -> None:
        self.restore(CounterState(gate=gate), 0)

    def save(self) -> CounterState:
        return CounterState(
            control=self.control,
            gate=self.gate,
            reload=self.reload,
            count=self.count,
            start=self.start,
            held=self.held,
            switch=self.switch,
            out_before=self.out_before,
            written_low=self.written_low,
            read_high=self.read_high,
            latched_count=self.latched_count,
            latched_status=self.latched_status,
        )

    def restore(self, state: CounterState, shift: int) -> None:
        """Take `state`, of a clock that is `shift` pulses behind the present one."""
        self.control = state.control
        self.mode = MODES[state.control >> 1 & 7]
        self.gate = state.gate
        self.reload = state.reload  # the count register (CR): the last count written, 0 for none
        self.count = state.count  # the count in use, 0 before the first one is loaded
        self.start = state.start + shift  # the pulse that loads or loaded `count`
        self.held = state.held  # pulses counted when the gate fell, or NONE while it counts
        self.switch = state.switch if state.switch == NONE else state.switch + shift  # when CR is loaded
        self.out_before = state.out_before  # the output until `start`
        self.written_low = state.written_low  # first byte of a two-byte write
        self.read_high = state.read_high  # the next byte read is the high one
        self.latched_count = state.latched_count
        self.latched_status = state.latched_status

    # Counting

    def sync(self, now: int) -> None:
        """Load the count register if a period (mode 2) or half-period (mode 3) ended since."""
        if self.switch == NONE or now < self.switch:
            return
        if self._switch_is_fall():
            self.start = self.switch - (self.reload + 1) // 2  # the low half begins at `switch`
        else:
            self.start = self.switch
        self.count = self.reload
        self.switch = NONE

    def _switch_is_fall(self) -> bool:
        """`switch` is in the middle of a period: mode 3 loads counts at each half."""
        return (self.switch - self.start) % self.count != 0

    def _elapsed(self, now: int) -> int:
        """Pulses counted since the load; negative before it."""
        return self.held if self.held != NONE and now >= self.start else now - self.start

    def out(self, now: int) -> bool:
        """The level of OUT, after `sync`."""
        elapsed = self._elapsed(now)
        if not self.count or elapsed < 0:
            return self.out_before
        if self.mode == INTERRUPT or self.mode == ONE_SHOT:
            return elapsed >= self.count
        if self.mode == RATE:
            return not self.gate or elapsed % self.count != self.count - 1
        if self.mode == SQUARE:
            return not self.gate or elapsed % self.count < (self.count + 1) // 2
        return elapsed != self.count

    def next_rise(self, now: int) -> int:
        """The first pulse after `now` at which OUT rises, or NONE. `now` is that of the last `sync`."""
        if not self.count or self.held != NONE:
            return NONE
        if self.mode in PERIODIC:
            return self._next_periodic_rise(now)
        rise = self.start + self.count
        if self.mode in STROBES:
            if now < self.start and not self.out_before:
                return self.start  # a count written during the strobe ends it when it is loaded
            rise += 1
        return rise if rise > now else NONE

    def _next_periodic_rise(self, now: int) -> int:
        start = self.start
        count = self.count
        if self.switch != NONE:
            if not self._switch_is_fall():
                return self.switch  # the end of a period is itself a rise
            count = self.reload
            start = self.switch - (count + 1) // 2
        if count < 2:
            return NONE  # a count of 1 is illegal in these modes: OUT does not change
        periods = (now - start) // count + 1
        return start + (periods if periods > 1 else 1) * count

    def _load(self, now: int) -> None:
        """Load the count register at the next pulse, counting from there."""
        self.out_before = self.out(now)
        self.count = self.reload
        self.start = now + 1
        self.switch = NONE

    def set_gate(self, gate: bool, now: int) -> None:
        """Drive the GATE input: it suspends modes 0, 2, 3 and 4, its rise triggers 1, 2, 3 and 5."""
        if gate == self.gate:
            return
        if self.mode in TRIGGERED:
            if gate and self.reload:
                self._load(now)
        elif gate:
            self._release(now)
        elif self.count:
            elapsed = now - self.start
            self.held = elapsed if elapsed > 0 else 0
            self.switch = NONE  # in modes 2 and 3 the next trigger loads the count register
        self.gate = gate

    def _release(self, now: int) -> None:
        if self.count and self.mode in PERIODIC:
            self._load(now)
            self.out_before = True
        elif self.count:
            self.start = max(self.start, now - self.held)  # the pulse that loads it may be to come
        self.held = NONE

    def read_count(self, now: int) -> int:
        """The counting element as its two bytes are read: in BCD if so programmed."""
        elapsed = self._elapsed(now)
        if elapsed < 0:
            elapsed = 0
        if self.mode == SQUARE and self.count:
            value = self._square_count(elapsed % self.count)
        elif self.mode == RATE and self.count:
            value = self.count - elapsed % self.count
        else:
            value = self.count - elapsed if self.count else 0
        if not self.control & CONTROL_BCD:
            return value & 0xFFFF
        value %= 10000
        return value // 1000 << 12 | value // 100 % 10 << 8 | value // 10 % 10 << 4 | value % 10

    def _square_count(self, phase: int) -> int:
        """Mode 3 counts down by two, through N (or N-1 if N is odd) in each half-period."""
        high = (self.count + 1) // 2
        if phase >= high:
            phase -= high
        return (self.count & ~1) - 2 * phase

    # Programming

    def write_control(self, control: int) -> None:
        """Take a control word: stop, and wait for a count."""
        self.restore(CounterState(control=control, gate=self.gate), 0)
        self.out_before = self.mode != INTERRUPT

    def write(self, value: int, now: int) -> None:
        """Take one byte of a count."""
        access = self.control >> 4
        if access == RW_LOW:
            self._write_count(value, now)
        elif access == RW_HIGH:
            self._write_count(value << 8, now)
        elif self.written_low == NONE:
            self.written_low = value
            if self.mode == INTERRUPT:
                self.count = 0  # the first byte stops mode 0 and lowers its output
                self.out_before = False
        else:
            low = self.written_low
            self.written_low = NONE
            self._write_count(value << 8 | low, now)

    def _write_count(self, value: int, now: int) -> None:
        if self.control & CONTROL_BCD:
            self.reload = (
                (value >> 12) * 1000 + (value >> 8 & 15) * 100 + (value >> 4 & 15) * 10 + (value & 15)
            ) or 10000
        else:
            self.reload = value or 0x10000
        if self.mode in TRIGGERED:
            if now < self.start:
                self.count = self.reload  # triggered, and the pulse that loads it is still to come
            return
        if self.mode in PERIODIC:
            self._write_periodic_count(now)
            return
        self._load(now)
        if self.mode == INTERRUPT:
            self.out_before = False
        if not self.gate:
            self.held = 0

    def _write_periodic_count(self, now: int) -> None:
        if not self.count:
            self._load(now)
            if not self.gate:
                self.held = 0
        elif self.gate and self.switch == NONE:
            elapsed = now - self.start
            if elapsed < 0:
                self.count = self.reload  # the pulse that loads it is still to come
                return
            phase = elapsed % self.count
            half = (self.count + 1) // 2
            rest = half - phase if self.mode == SQUARE and phase < half else self.count - phase
            self.switch = now + rest

    # Reading

    def latch_count(self, now: int) -> None:
        """Keep the count until it is read. A second latch before that is ignored."""
        if self.latched_count == NONE:
            self.latched_count = self.read_count(now)

    def latch_status(self, now: int) -> None:
        """Keep the status byte until it is read."""
        if self.latched_status != NONE:
            return
        status = self.control
        if self.out(now):
            status |= STATUS_OUT
        if self._count_is_null(now):
            status |= STATUS_NULL_COUNT
        self.latched_status = status

    def _count_is_null(self, now: int) -> bool:
        """The last count written has not reached the counting element yet."""
        return self.count != self.reload or not self.count or self.switch != NONE or self._elapsed(now) < 0

    def read(self, now: int) -> int:
        """One byte: of the latched status, else of the latched count, else of the count now."""
        if self.latched_status != NONE:
            status = self.latched_status
            self.latched_status = NONE
            return status
        access = self.control >> 4
        high = self.read_high if access == RW_BOTH else access == RW_HIGH
        count = self.latched_count if self.latched_count != NONE else self.read_count(now)
        if access == RW_BOTH:
            self.read_high = not high
        if high or access != RW_BOTH:
            self.latched_count = NONE
        return count >> 8 if high else count & 0xFF


class Pit:
    """The timer: counter 0 drives IRQ 0, counter 1 refresh, counter 2 the speaker.

    `irq(level)` is called from `advance` and from the port methods; `clock()` returns virtual
    nanoseconds and never goes back. Not thread-safe: all calls belong to the vCPU's thread.
    """

    def __init__(self, irq: Callable[[bool], None], clock: Callable[[], int]) -> None:
        self._irq = irq
        self._clock = clock
        self._counters = (Counter(gate=True), Counter(gate=True), Counter(gate=False))
        self._port_b = 0
        self._pulse = pulses_at(clock())  # edges of counter 0 are delivered up to this pulse
        self._level = False  # what `irq` was told last

    def next_event(self) -> int | None:
        """When IRQ 0 rises next, in nanoseconds of the clock, or None if it does not.

        Call after `advance`. A fall requests nothing, so it is no event of its own: the next
        `advance` delivers it.
        """
        rise = self._counters[0].next_rise(self._pulse)
        return None if rise == NONE else time_of(rise)

    def advance(self) -> None:
        """Deliver the edges of IRQ 0 that are due.

        However many periods have passed, IRQ 0 rises once and then takes its present level:
        the 8259A remembers no more than one edge, so more would be lost all the same.
        """
        self._advance()

    def port_read(self, port: int, size: int) -> int:
        """Read `size` bytes from 0x40..0x43 or 0x61. Each byte is an access of its own."""
        value = 0
        for index in range(size):
            value |= self._read(port + index) << (8 * index)
        return value

    def port_write(self, port: int, size: int, value: int) -> None:
        """Write `size` bytes, each an access of its own."""
        for index in range(size):
            self._write(port + index, (value >> (8 * index)) & 0xFF)

    def save(self) -> PitState:
        """The state at the present time; `advance` is called first."""
        now = self._advance()
        first, second, third = self._counters
        return PitState(now, (first.save(), second.save(), third.save()), self._port_b, self._level)

    def restore(self, state: PitState) -> None:
        """Put back what `save` returned and go on from the clock's present time."""
        self._pulse = pulses_at(self._clock())
        for counter, saved in zip(self._counters, state.counters, strict=True):
            counter.restore(saved, self._pulse - state.pulse)
        self._port_b = state.port_b
        self._level = state.level

    def _advance(self) -> int:
        now = pulses_at(self._clock())
        counter = self._counters[0]
        rise = counter.next_rise(self._pulse)
        for each in self._counters:
            each.sync(now)
        self._pulse = now
        self._drive(rose=rise != NONE and rise <= now)
        return now

    def _drive(self, rose: bool) -> None:
        """Tell IRQ 0 about an edge since the last call, if any, and the level now."""
        if rose:
            self._set_level(False)
            self._set_level(True)
        self._set_level(self._counters[0].out(self._pulse))

    def _set_level(self, level: bool) -> None:
        if level != self._level:
            self._level = level
            self._irq(level)

    def _read(self, port: int) -> int:
        now = self._advance()
        if COUNTER0 <= port < CONTROL:
            return self._counters[port - COUNTER0].read(now)
        if port == PORT_B:
            refresh = PORT_B_REFRESH if now // REFRESH_PULSES & 1 else 0
            out2 = PORT_B_OUT2 if self._counters[2].out(now) else 0
            return self._port_b | refresh | out2
        return 0xFF

    def _write(self, port: int, value: int) -> None:
        now = self._advance()
        if COUNTER0 <= port < CONTROL:
            self._counters[port - COUNTER0].write(value, now)
        elif port == CONTROL:
            self._write_control(value, now)
        elif port == PORT_B:
            self._port_b = value & PORT_B_WRITABLE
            self._counters[2].set_gate(bool(value & PORT_B_GATE2), now)
        self._drive(rose=False)

    def _write_control(self, value: int, now: int) -> None:
        select = value >> 6
        if select == SELECT_READ_BACK:
            self._read_back(value, now)
        elif value >> 4 & 3 == RW_LATCH:
            self._counters[select].latch_count(now)
        else:
            self._counters[select].write_control(value & CONTROL_KEPT)

    def _read_back(self, value: int, now: int) -> None:
        for index, counter in enumerate(self._counters):
            if not value & READ_BACK_COUNTER0 << index:
                continue
            if not value & READ_BACK_NO_COUNT:
                counter.latch_count(now)
            if not value & READ_BACK_NO_STATUS:
                counter.latch_status(now)
