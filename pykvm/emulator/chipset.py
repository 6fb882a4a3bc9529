"""Port space of an emulated machine, with the PC's interrupt controllers and timer if it has them.

The counterpart of KVM's in-kernel irqchip and PIT: their ports never reach the machine's bus.
"""

from __future__ import annotations

from pykvm.emulator.cpu import NANOSECONDS, Clock
from pykvm.emulator.pic import ELCR1, ELCR2, MASTER_COMMAND, MASTER_DATA, SLAVE_COMMAND, SLAVE_DATA, Pic
from pykvm.emulator.pit import Pit
from pykvm.errors import ConfigurationError
from pykvm.layout import IRQ_PIT, PIT, PORT_B

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.emulator.accesses import Accesses

PIC_PORTS = frozenset((MASTER_COMMAND, MASTER_DATA, SLAVE_COMMAND, SLAVE_DATA, ELCR1, ELCR2))
PIT_PORTS = frozenset((PIT, PIT + 1, PIT + 2, PIT + 3, PORT_B))
LINES = 16


class Chipset:
    """The interrupt controllers and the timer, in the virtual time of `clock`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.pic = Pic()
        self.pit = Pit(lambda level: self.pic.set_irq(IRQ_PIT, level), clock.nanoseconds)
        self._driven = 0  # bit n: something outside drives line n

    def line(self, gsi: int, changed: Callable[[], None]) -> IrqLine:
        """An input for a device. `changed` is called when it rises. Raises ConfigurationError for none."""
        check_line(gsi)
        self._driven |= 1 << gsi
        return IrqLine(self.pic, gsi, changed)

    def advance(self) -> int | None:
        """Deliver timer edges that are due. Returns when the next comes, in ticks of the clock."""
        self.pit.advance()
        event = self.pit.next_event()
        return None if event is None else -(-event // NANOSECONDS)

    def pending(self) -> bool:
        """Whether the processor's INTR input is asserted."""
        return self.pic.pending()

    def acknowledge(self) -> int:
        """The vector of the interrupt that the processor takes now."""
        return self.pic.acknowledge()

    def may_interrupt(self) -> bool:
        """Whether any interrupt line is unmasked."""
        return self.pic.unmasked() != 0

    def devices_may_interrupt(self) -> bool:
        """Whether a line is unmasked that something outside drives."""
        return self.pic.unmasked() & self._driven != 0


class IrqLine:
    """One input of the interrupt controllers. Any thread may drive it."""

    def __init__(self, pic: Pic, line: int, changed: Callable[[], None]) -> None:
        self._pic = pic
        self._line = line
        self._changed = changed

    def set(self, level: bool) -> None:
        """Drive the line to `level`."""
        self._pic.set_irq(self._line, level)
        if level:
            self._changed()

    def pulse(self) -> None:
        """Raise and lower the line: one edge."""
        self._pic.set_irq(self._line, True)
        self._pic.set_irq(self._line, False)
        self._changed()


class Ports:
    """Where IN and OUT go: the chipset's ports inside, all others to the machine's bus."""

    def __init__(self, accesses: Accesses) -> None:
        self._accesses = accesses
        self.chipset: Chipset | None = None
        self.changed: Callable[[], None] = _nothing

    def read(self, port: int, size: int) -> int:
        """IN: `size` bytes from `port`."""
        chipset = self.chipset
        if chipset is not None:
            if port in PIC_PORTS:
                return chipset.pic.port_read(port, size)
            if port in PIT_PORTS:
                return chipset.pit.port_read(port, size)
        return self._accesses.port_read(port, size)

    def write(self, port: int, size: int, value: int) -> None:
        """OUT: `size` bytes to `port`."""
        chipset = self.chipset
        if chipset is not None and port in PIC_PORTS:
            chipset.pic.port_write(port, size, value)
            self.changed()
        elif chipset is not None and port in PIT_PORTS:
            chipset.pit.port_write(port, size, value)
            self.changed()
        else:
            self._accesses.port_write(port, size, value)


def _nothing() -> None:
    pass


def check_line(gsi: int) -> None:
    """Raise ConfigurationError unless `gsi` is an input of the interrupt controllers."""
    if not 0 <= gsi < LINES:
        raise ConfigurationError(f"GSI {gsi}: the emulator has interrupt lines 0 to {LINES - 1}")
