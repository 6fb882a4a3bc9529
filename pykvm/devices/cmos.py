"""The PC's real-time clock and CMOS memory: a Motorola MC146818A at ports 0x70 and 0x71.

Sources: MC146818A datasheet, "Register A" to "Register D" and "Update cycle"; IBM PC AT
Technical Reference, "Real-time clock/CMOS RAM information", for the memory's use.

::

    0x00 seconds    0x01 seconds alarm    0x0a A: update in progress, divider, periodic rate
    0x02 minutes    0x03 minutes alarm    0x0b B: hold, interrupt enables, formats
    0x04 hours      0x05 hours alarm      0x0c C: interrupt flags; reading clears them
    0x06 weekday    0x07 day of month     0x0d D: the battery is good
    0x08 month      0x09 year             0x0e..0x7f memory; 0x32 is the century

The clock is not ticked: it is the host's time (in UTC) plus the offset that the guest made by
setting it. Register contents, flags and the next interrupt are computed from it on demand.

Where this differs from the chip: the weekday follows the date, one that is written is not kept;
the square-wave output, daylight saving and the NMI mask (bit 7 of port 0x70) have no effect.
"""

from __future__ import annotations

import threading
import time

from pykvm.bus import all_ones
from pykvm.errors import ConfigurationError
from pykvm.values import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from pykvm.interfaces import IrqLine

    class Timer(Protocol):
        """What a timer factory returns; `threading.Timer` is one."""

        def start(self) -> None: ...
        def cancel(self) -> None: ...


__all__ = ["Cmos", "CmosState"]

SECOND = 1_000_000_000  # in nanoseconds
MINUTES_PER_DAY = 24 * 60
SECONDS_PER_DAY = 86_400
CYCLES = 32_768  # of the crystal, per second
# The chip raises UIP 244 us before an update, which takes 1984 us. Here the registers change at the end.
UPDATE_IN_PROGRESS = (244 + 1984) * 1000  # ns

# Offsets of the device
INDEX = 0
DATA = 1
INDEX_MASK = 0x7F  # bit 7 masks NMI
SIZE = 128

# Registers
SECONDS = 0x00
SECONDS_ALARM = 0x01
MINUTES = 0x02
MINUTES_ALARM = 0x03
HOURS = 0x04
HOURS_ALARM = 0x05
WEEKDAY = 0x06
DAY = 0x07
MONTH = 0x08
YEAR = 0x09
REGISTER_A = 0x0A
REGISTER_B = 0x0B
REGISTER_C = 0x0C
REGISTER_D = 0x0D
CENTURY = 0x32
TIME_REGISTERS = (SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY)

# Register A: UIP DV2 DV1 DV0 RS3 RS2 RS1 RS0
A_UIP = 0x80
A_DIVIDER = 0x70
A_DIVIDER_RESET = 0x60  # 110 and 111 hold the divider in reset: the clock stands
A_RATE = 0x0F
A_INITIAL = 0x26  # 32768 Hz crystal, 1024 Hz

# Register B, and the flags of register C
B_SET = 0x80  # the guest is setting the time: no updates
PERIODIC = 0x40
ALARM = 0x20
UPDATE_ENDED = 0x10
B_BINARY = 0x04
B_24_HOURS = 0x02
C_INTERRUPT = 0x80
EVENTS = PERIODIC | ALARM | UPDATE_ENDED

D_VALID = 0x80

HOURS_PM = 0x80
ALARM_ANY = 0xC0  # an alarm byte with these bits matches every value

# CMOS memory that firmware reads
EQUIPMENT = 0x14
EQUIPMENT_FPU = 0x02
BASE_MEMORY = 0x15  # 2 bytes, KiB
EXTENDED_MEMORY = (0x17, 0x30)  # 2 bytes each, KiB above 1 MiB
MEMORY_ABOVE_16M = 0x34  # 2 bytes, 64 KiB
BOOT_FLAGS_1 = 0x38
BOOT_FLAGS_2 = 0x3D
MEMORY_ABOVE_4G = 0x5B  # 3 bytes, 64 KiB
CPUS_LESS_ONE = 0x5F
BOOT_FLOPPY, BOOT_DISK, BOOT_CDROM = 1, 2, 3
KIB = 1 << 10
MIB = 1 << 20


def _daemon_timer(delay: float, call: Callable[[], None]) -> Timer:
    timer = threading.Timer(delay, call)
    timer.daemon = True  # an enabled alarm must not keep the process alive
    return timer


class CmosState(Value):
    """`memory` is all 128 bytes, `offset` the guest's time less the host's in nanoseconds.

    While the clock stands, `held` is its time registers as the guest left them, else empty.
    """

    index: int
    memory: bytes
    offset: int
    held: bytes
    flags: int


class Cmos:
    """The clock and its memory: offset 0 selects a register, offset 1 is its content.

    `irq` is IRQ 8. `now()` is the host's time in nanoseconds since 1970. Memory sizes are in
    bytes and, like the number of `cpus`, are what firmware finds in the CMOS memory.

    While the guest has an interrupt enabled, one timer runs: `timer(seconds, function)` makes
    it. `close` stops it, and has to be called before `irq` becomes invalid.

    Raises ConfigurationError for a negative size or a number of CPUs that does not fit.
    """

    def __init__(
        self,
        *,
        irq: IrqLine | None = None,
        memory_below_4g: int = 0,
        memory_above_4g: int = 0,
        cpus: int = 1,
        now: Callable[[], int] = time.time_ns,
        timer: Callable[[float, Callable[[], None]], Timer] = _daemon_timer,
    ) -> None:
        self._irq = irq
        self._now = now
        self._new_timer = timer
        self._timer: Timer | None = None
        self._due = 0  # the host time `_timer` runs to
        self._closed = False
        self._lock = threading.Lock()  # the timer's thread comes past the bus
        self._index = 0
        self._memory = _initial_memory(memory_below_4g, memory_above_4g, cpus)
        self._offset = 0
        self._held: dict[int, int] | None = None
        self._flags = 0
        self._seen = now()  # events up to this host time are in `_flags`

    def read(self, offset: int, size: int) -> int:
        """Port 0x71 reads the selected register; port 0x70 cannot be read: all ones."""
        value = all_ones(size)
        if offset <= DATA < offset + size:
            shift = 8 * (DATA - offset)
            value &= ~(0xFF << shift)
            with self._lock:
                value |= self._read_register(self._index) << shift
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Select a register, write the selected one, or both in this order."""
        with self._lock:
            if offset <= INDEX < offset + size:
                self._index = value >> 8 * (INDEX - offset) & INDEX_MASK
            if offset <= DATA < offset + size:
                self._write_register(self._index, value >> 8 * (DATA - offset) & 0xFF)

    def close(self) -> None:
        """Stop the timer. No interrupt is raised after this. May be called again."""
        with self._lock:
            self._closed = True
            self._reschedule()  # to nothing

    def save(self) -> CmosState:
        """The registers, and how far the guest's clock is from the host's."""
        with self._lock:
            self._look()
            held = (
                bytes(self._held[register] for register in TIME_REGISTERS) if self._held is not None else b""
            )
            return CmosState(self._index, bytes(self._memory), self._offset, held, self._flags)

    def restore(self, state: CmosState) -> None:
        """Put back what `save` returned. As with a battery, the time has gone on since."""
        with self._lock:
            self._index = state.index
            self._memory = bytearray(state.memory)
            self._offset = state.offset
            self._held = dict(zip(TIME_REGISTERS, state.held, strict=True)) if state.held else None
            self._flags = state.flags
            self._seen = self._now()
            self._drive()

    # Registers

    def _read_register(self, register: int) -> int:
        self._look()
        if register in TIME_REGISTERS:
            return self._time_registers()[register]
        if register == REGISTER_A:
            return self._memory[REGISTER_A] | (A_UIP if self._updates_soon() else 0)
        if register == REGISTER_C:
            flags = self._flags | (C_INTERRUPT if self._interrupts() else 0)
            self._flags = 0
            self._drive()
            return flags
        if register == REGISTER_D:
            return D_VALID
        return self._memory[register]

    def _write_register(self, register: int, value: int) -> None:
        self._look()
        if register in TIME_REGISTERS:
            registers = self._time_registers()
            registers[register] = value
            if self._held is None:
                self._set_time(registers)
        elif register == REGISTER_A:
            self._write_a(value)
        elif register == REGISTER_B:
            # The chip clears UIE when SET rises: there is no update to end.
            self._memory[REGISTER_B] = value & ~UPDATE_ENDED if value & B_SET else value
            self._hold_or_go()
        elif register not in (REGISTER_C, REGISTER_D):
            self._memory[register] = value
        self._drive()

    def _write_a(self, value: int) -> None:
        was_in_reset = self._divider_in_reset()
        self._memory[REGISTER_A] = value & ~A_UIP
        if was_in_reset and not self._divider_in_reset():
            # The first update comes half a second after the divider starts.
            self._offset += SECOND // 2 - self._guest_time() % SECOND
        self._hold_or_go()

    # The clock

    def _guest_time(self) -> int:
        """The guest's time in nanoseconds since 1970, when `_look` was called last."""
        return self._seen + self._offset

    def _divider_in_reset(self) -> bool:
        return self._memory[REGISTER_A] & A_DIVIDER_RESET == A_DIVIDER_RESET

    def _hold_or_go(self) -> None:
        """Stop or start the clock as register B's SET and the divider say."""
        stands = bool(self._memory[REGISTER_B] & B_SET) or self._divider_in_reset()
        if stands and self._held is None:
            self._held = self._time_registers()
        elif not stands and self._held is not None:
            self._set_time(self._held)
            self._held = None

    def _updates_soon(self) -> bool:
        return self._held is None and self._guest_time() % SECOND >= SECOND - UPDATE_IN_PROGRESS

    def _time_registers(self) -> dict[int, int]:
        """The time as the registers show it, in the formats that register B selects."""
        if self._held is not None:
            return self._held
        now = time.gmtime(self._guest_time() // SECOND)
        return {
            SECONDS: self._encode(now.tm_sec),
            MINUTES: self._encode(now.tm_min),
            HOURS: self._encode_hours(now.tm_hour),
            WEEKDAY: self._encode((now.tm_wday + 1) % 7 + 1),  # Sunday is 1
            DAY: self._encode(now.tm_mday),
            MONTH: self._encode(now.tm_mon),
            YEAR: self._encode(now.tm_year % 100),
            CENTURY: self._encode(now.tm_year // 100 % 100),
        }

    def _set_time(self, registers: dict[int, int]) -> None:
        """Make `registers` the guest's time. The fraction of the second goes on as it was."""
        year = self._decode(registers[CENTURY]) * 100 + self._decode(registers[YEAR])
        days = _days_since_1970(year, self._decode(registers[MONTH]), self._decode(registers[DAY]))
        minutes = self._decode_hours(registers[HOURS]) * 60 + self._decode(registers[MINUTES])
        seconds = (days * MINUTES_PER_DAY + minutes) * 60 + self._decode(registers[SECONDS])
        self._offset = seconds * SECOND + self._guest_time() % SECOND - self._seen

    def _encode(self, value: int) -> int:
        if self._memory[REGISTER_B] & B_BINARY:
            return value
        return value // 10 << 4 | value % 10

    def _decode(self, byte: int) -> int:
        if self._memory[REGISTER_B] & B_BINARY:
            return byte
        return (byte >> 4) * 10 + (byte & 0x0F)

    def _encode_hours(self, hours: int) -> int:
        if self._memory[REGISTER_B] & B_24_HOURS:
            return self._encode(hours)
        return self._encode((hours - 1) % 12 + 1) | (HOURS_PM if hours >= 12 else 0)

    def _decode_hours(self, byte: int) -> int:
        if self._memory[REGISTER_B] & B_24_HOURS:
            return self._decode(byte)
        return self._decode(byte & ~HOURS_PM) % 12 + (12 if byte & HOURS_PM else 0)

    # Events and interrupts

    def _look(self) -> None:
        """Set the flags of what has happened since the last call."""
        before = self._guest_time()
        self._seen = self._now()
        now = self._guest_time()
        flags = self._flags
        period = self._period()
        if period and _cycles(now) // period > _cycles(before) // period:
            flags |= PERIODIC
        if self._held is None and now // SECOND > before // SECOND:
            flags |= UPDATE_ENDED
            alarm = self._next_alarm(before // SECOND)
            if alarm is not None and alarm <= now // SECOND:
                flags |= ALARM
        if flags != self._flags:
            self._flags = flags
            self._drive()

    def _period(self) -> int:
        """Crystal cycles between periodic interrupts, 0 for none."""
        rate = self._memory[REGISTER_A] & A_RATE
        if rate == 0 or self._divider_in_reset():
            return 0
        return 1 << (rate - 1 if rate > 2 else rate + 6)  # rates 1 and 2 are 8 and 9

    def _next_alarm(self, second: int) -> int | None:
        """The first second after `second` that the alarm registers match, None if none ever does."""
        day, after = divmod(second, SECONDS_PER_DAY)
        today = self._first_alarm(after + 1)
        if today is not None:
            return day * SECONDS_PER_DAY + today
        tomorrow = self._first_alarm(0)
        return None if tomorrow is None else (day + 1) * SECONDS_PER_DAY + tomorrow

    def _first_alarm(self, start: int) -> int | None:
        """The first matching second of a day from second `start` of it on."""
        hours = _matches(self._memory[HOURS_ALARM], self._decode_hours, 24)
        minutes = _matches(self._memory[MINUTES_ALARM], self._decode, 60)
        seconds = _matches(self._memory[SECONDS_ALARM], self._decode, 60)
        for hour in hours:
            if (hour + 1) * 3600 <= start:
                continue
            for minute in minutes:
                if hour * 3600 + (minute + 1) * 60 <= start:
                    continue
                for second in seconds:
                    if hour * 3600 + minute * 60 + second >= start:
                        return hour * 3600 + minute * 60 + second
        return None

    def _interrupts(self) -> int:
        return self._flags & self._memory[REGISTER_B] & EVENTS

    def _drive(self) -> None:
        if self._irq is not None and not self._closed:
            self._irq.set(bool(self._interrupts()))
            self._reschedule()

    def _next_interrupt(self) -> int | None:
        """The guest's time of the next interrupt. One that waits for register C to be read is not it."""
        wanted = self._memory[REGISTER_B] & EVENTS & ~self._flags
        now = self._guest_time()
        times = []
        period = self._period()
        if wanted & PERIODIC and period:
            cycle = (_cycles(now) // period + 1) * period
            times.append(-(-cycle * SECOND // CYCLES))
        if wanted & UPDATE_ENDED and self._held is None:
            times.append((now // SECOND + 1) * SECOND)
        if wanted & ALARM and self._held is None:
            alarm = self._next_alarm(now // SECOND)
            if alarm is not None:
                times.append(alarm * SECOND)
        return min(times, default=None)

    def _reschedule(self) -> None:
        """Make the timer run to the next interrupt, if there is one."""
        time_of_next = None if self._closed else self._next_interrupt()
        due = None if time_of_next is None else time_of_next - self._offset
        if self._timer is not None:
            if due == self._due:
                return
            self._timer.cancel()
            self._timer = None
        if due is not None:
            self._due = due
            self._timer = self._new_timer(max(due - self._seen, 0) / SECOND, self._expire)
            self._timer.start()

    def _expire(self) -> None:
        """The timer's call, on a thread of its own. Too early or too often does no harm."""
        with self._lock:
            if not self._closed:
                self._timer = None
                self._look()
                self._drive()


def _cycles(nanoseconds: int) -> int:
    return nanoseconds * CYCLES // SECOND


def _matches(byte: int, decode: Callable[[int], int], limit: int) -> range:
    """The values that an alarm byte matches: all, one, or none if it is not a valid time."""
    if byte & ALARM_ANY == ALARM_ANY:
        return range(limit)
    value = decode(byte)
    return range(value, min(value + 1, limit))


def _days_since_1970(year: int, month: int, day: int) -> int:
    """Days in the Gregorian calendar. A month or day out of range counts on from the year or month."""
    year, month = year + (month - 1) // 12, (month - 1) % 12
    before_month = (0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334)[month]
    last = year if month > 1 else year - 1  # the last year whose leap day has passed
    leap_days = last // 4 - last // 100 + last // 400 - (1969 // 4 - 1969 // 100 + 1969 // 400)
    return (year - 1970) * 365 + leap_days + before_month + day - 1


def _initial_memory(below_4g: int, above_4g: int, cpus: int) -> bytearray:
    """What a PC's set-up program would have left, and what QEMU tells its firmware here."""
    if below_4g < 0 or above_4g < 0:
        raise ConfigurationError(f"CMOS: memory of {below_4g} and {above_4g} bytes; sizes cannot be negative")
    if not 1 <= cpus <= 256:
        raise ConfigurationError(f"CMOS: {cpus} CPUs; the count byte holds 1 to 256")
    memory = bytearray(SIZE)

    def put(register: int, size: int, value: int) -> None:
        most = (1 << 8 * size) - 1
        memory[register : register + size] = min(max(value, 0), most).to_bytes(size, "little")

    memory[REGISTER_A] = A_INITIAL
    memory[REGISTER_B] = B_24_HOURS
    memory[EQUIPMENT] = EQUIPMENT_FPU
    put(BASE_MEMORY, 2, min(below_4g // KIB, 640))
    for register in EXTENDED_MEMORY:
        put(register, 2, (below_4g - MIB) // KIB)
    put(MEMORY_ABOVE_16M, 2, (below_4g - 16 * MIB) // (64 * KIB))
    put(MEMORY_ABOVE_4G, 3, above_4g // (64 * KIB))
    memory[CPUS_LESS_ONE] = cpus - 1
    memory[BOOT_FLAGS_2] = BOOT_CDROM << 4 | BOOT_DISK
    memory[BOOT_FLAGS_1] = BOOT_FLOPPY << 4
    return memory
