"""ACPI power management: the PM1 event and control registers and the PM timer.

Sources: ACPI specification 6.5, sections 4.8.3.1 (PM1 event), 4.8.3.2 (PM1 control) and 4.8.3.3
(timer). The block is laid out as in QEMU's PC machines, so that the usual way to power off,
writing 0x2000 to port 0x604, works without reading tables::

    offset  0        2        4        6        8               12
            +--------+--------+--------+--------+---------------+
            | PM1_STS| PM1_EN | PM1_CNT|  zero  |    PM_TMR     |
            +--------+--------+--------+--------+---------------+
                                  |        3579545 Hz, 24 or 32 bits
                                  +-- 15 .. 13 | 12 .. 10 | 9 .. 1 | 0
                                        SLP_EN   SLP_TYP            SCI_EN

Sleep type 0 is S5, power off; the other types do nothing. There is no legacy mode to leave, so
SCI_EN is always set.
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

    from pykvm.interfaces import IrqLine

__all__ = ["AcpiPm", "AcpiPmState"]

TIMER_FREQUENCY = 3_579_545  # Hz
NANOSECONDS = 1_000_000_000

# PM1_STS and PM1_EN
TMR = 0x0001  # the timer's highest bit changed
GBL = 0x0020
PWRBTN = 0x0100
SLPBTN = 0x0200
RTC = 0x0400
PM1_ENABLE_WRITABLE = TMR | GBL | PWRBTN | SLPBTN | RTC

# PM1_CNT
SCI_EN = 0x0001
BM_RLD = 0x0002
SLP_TYP = 0x1C00
SLP_TYP_S5 = 0x0000
SLP_EN = 0x2000
PM1_CONTROL_WRITABLE = BM_RLD | SLP_TYP

# Where the registers lie in the block, in bits
ENABLE_SHIFT = 16
CONTROL_SHIFT = 32
TIMER_SHIFT = 64


class AcpiPmState(Value):
    """`ticks` is the timer, counted without wrapping; the registers are as the guest sees them."""

    ticks: int
    status: int
    enable: int
    control: int


class AcpiPm:
    """The power management block, `SIZE` bytes of ports.

    `stop(0, "power-off")` is called when the guest powers off. `irq` is the system control
    interrupt (SCI), high while an enabled event is pending. `clock()` returns nanoseconds and
    never goes back. The timer has `timer_bits` bits, 24 or 32.

    The timer's overflow is noticed when the guest looks: TMR_STS is right whenever it is read,
    but does not raise the SCI by itself.

    Raises ConfigurationError for another number of timer bits.
    """

    SIZE = 12

    def __init__(
        self,
        stop: Callable[[int, str], object],
        *,
        irq: IrqLine | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
        timer_bits: int = 24,
    ) -> None:
        if timer_bits not in (24, 32):
            raise ConfigurationError(
                f"ACPI PM timer of {timer_bits} bits: it has 24 or 32; pass one of these"
            )
        self._stop = stop
        self._irq = irq
        self._clock = clock
        self._timer_bits = timer_bits
        self._lock = threading.Lock()  # press_power_button may come from any thread
        self._origin = clock()  # when the timer was 0
        self._half_periods = 0  # how often the highest bit had changed when last looked at
        self._status = 0
        self._enable = 0
        self._control = SCI_EN

    def read(self, offset: int, size: int) -> int:
        """Read any bytes of the block; beyond it, all ones."""
        if not 0 <= offset < self.SIZE:
            return all_ones(size)
        with self._lock:
            self._look_at_timer()
            timer = self._ticks() & ((1 << self._timer_bits) - 1)
            block = (
                self._status
                | self._enable << ENABLE_SHIFT
                | self._control << CONTROL_SHIFT
                | timer << TIMER_SHIFT
            )
            return (block >> 8 * offset) & ((1 << 8 * size) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write any bytes of the block. Status bits are cleared by writing ones."""
        if not 0 <= offset < self.SIZE:
            return
        written = ((1 << 8 * size) - 1) << 8 * offset
        value = value << 8 * offset & written
        with self._lock:
            self._look_at_timer()
            self._status &= ~value & 0xFFFF
            mask = written >> ENABLE_SHIFT & PM1_ENABLE_WRITABLE
            self._enable = self._enable & ~mask | value >> ENABLE_SHIFT & mask
            mask = written >> CONTROL_SHIFT & PM1_CONTROL_WRITABLE
            self._control = self._control & ~mask | value >> CONTROL_SHIFT & mask
            self._drive()
            sleeps = bool(value >> CONTROL_SHIFT & SLP_EN) and self._control & SLP_TYP == SLP_TYP_S5
        if sleeps:
            self._stop(0, "power-off")

    def press_power_button(self) -> None:
        """Ask the guest to shut down. It takes notice if it has enabled the event."""
        with self._lock:
            self._status |= PWRBTN
            self._drive()

    def save(self) -> AcpiPmState:
        """The registers and the timer at the present time."""
        with self._lock:
            self._look_at_timer()
            return AcpiPmState(self._ticks(), self._status, self._enable, self._control)

    def restore(self, state: AcpiPmState) -> None:
        """Put back what `save` returned; the timer goes on from there."""
        with self._lock:
            # Rounded up, so that the division in _ticks gives back exactly `ticks`.
            self._origin = self._clock() + state.ticks * -NANOSECONDS // TIMER_FREQUENCY
            self._half_periods = self._ticks() >> (self._timer_bits - 1)
            self._status = state.status
            self._enable = state.enable
            self._control = state.control
            self._drive()

    def _ticks(self) -> int:
        return (self._clock() - self._origin) * TIMER_FREQUENCY // NANOSECONDS

    def _look_at_timer(self) -> None:
        half_periods = self._ticks() >> (self._timer_bits - 1)
        if half_periods != self._half_periods:
            self._half_periods = half_periods
            self._status |= TMR
            self._drive()

    def _drive(self) -> None:
        if self._irq is not None:
            self._irq.set(bool(self._status & self._enable))
