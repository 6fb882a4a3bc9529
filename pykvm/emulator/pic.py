"""The PC's interrupt controllers: two cascaded Intel 8259As and the edge/level registers (ELCR).

Sources: Intel 8259A datasheet (231468-003), "Programming the 8259A" for ICW1..ICW4 and
OCW1..OCW3; Intel 82371AB (PIIX4) datasheet, section 7.1.2, for ELCR1 and ELCR2.

::

    IRQ 0 1 3..7 ────────────► master IR0..IR7 ── INTR ──► processor
    IRQ 8..15 ► slave IR0..IR7 ── INT ──► master IR2

Where this differs from the chip:

- A latched edge stays requested until it is acknowledged, even if its line falls before
  (the datasheet gives a spurious IR7 then). KVM's model does the same, and without it a
  pulsed line would never interrupt. A *level* input that falls is withdrawn.
- Vectors are always delivered in the 8086 manner; ICW4's 8080 mode is accepted and ignored.
- ICW3 is accepted and ignored: the slave is wired to IR2, as in every PC.
"""

from __future__ import annotations

import threading

from pykvm.errors import ConfigurationError
from pykvm.values import Value

LINES = 16
CASCADE = 2  # the master's input that the slave drives

# Ports
MASTER_COMMAND = 0x20
MASTER_DATA = 0x21
SLAVE_COMMAND = 0xA0
SLAVE_DATA = 0xA1
ELCR1 = 0x4D0
ELCR2 = 0x4D1

# IRQ 0, 1, 2, 8 and 13 are edge-triggered whatever the guest writes (PIIX4, 7.1.2)
ELCR1_WRITABLE = 0xF8
ELCR2_WRITABLE = 0xDE

# Initialization command words
ICW1_IC4 = 0x01  # an ICW4 follows
ICW1_SNGL = 0x02  # no ICW3 follows
ICW1_LTIM = 0x08  # all inputs are level-triggered
ICW1_SELECT = 0x10
ICW2_VECTOR = 0xF8
ICW4_AEOI = 0x02
ICW4_SFNM = 0x10

# Operation command words, told apart by bits 3 and 4 of a write to the command port
OCW3_SELECT = 0x08
OCW2_LEVEL = 0x07
OCW2_EOI = 0x20
OCW2_SL = 0x40
OCW2_R = 0x80
OCW3_RIS = 0x01
OCW3_RR = 0x02
OCW3_POLL = 0x04
OCW3_SMM = 0x20
OCW3_ESMM = 0x40

POLL_INTERRUPT = 0x80
SPURIOUS_LEVEL = 7

# What the next write to the data port is
OPERATIONAL, EXPECT_ICW2, EXPECT_ICW3, EXPECT_ICW4 = range(4)


class ChipState(Value):
    """The registers of one 8259A. Bit n of each mask belongs to input n."""

    lines: int = 0
    edges: int = 0
    isr: int = 0
    imr: int = 0
    elcr: int = 0
    vector: int = 0
    icw1: int = 0
    icw4: int = 0
    expects: int = OPERATIONAL
    lowest: int = 7
    read_isr: bool = False
    poll: bool = False
    special_mask: bool = False
    rotate_on_aeoi: bool = False


class PicState(Value):
    """Both chips."""

    master: ChipState
    slave: ChipState


class Chip:
    """One 8259A. Not thread-safe: `Pic` holds the lock."""

    def __init__(self, cascade: int) -> None:
        self.cascade = cascade  # mask of the inputs that another 8259A drives
        self.restore(ChipState())

    def save(self) -> ChipState:
        return ChipState(
            lines=self.lines,
            edges=self.edges,
            isr=self.isr,
            imr=self.imr,
            elcr=self.elcr,
            vector=self.vector,
            icw1=self.icw1,
            icw4=self.icw4,
            expects=self.expects,
            lowest=self.lowest,
            read_isr=self.read_isr,
            poll=self.poll,
            special_mask=self.special_mask,
            rotate_on_aeoi=self.rotate_on_aeoi,
        )

    def restore(self, state: ChipState) -> None:
        self.lines = state.lines  # levels of the inputs
        self.edges = state.edges  # rises seen and not yet acknowledged
        self.isr = state.isr
        self.imr = state.imr
        self.elcr = state.elcr
        self.vector = state.vector
        self.icw1 = state.icw1
        self.icw4 = state.icw4
        self.expects = state.expects
        self.lowest = state.lowest  # the input of lowest priority; the next one has the highest
        self.read_isr = state.read_isr
        self.poll = state.poll
        self.special_mask = state.special_mask
        self.rotate_on_aeoi = state.rotate_on_aeoi

    # Inputs and priority

    def set_line(self, line: int, level: bool) -> None:
        bit = 1 << line
        if not level:
            self.lines &= ~bit
        elif not self.lines & bit:
            self.lines |= bit
            self.edges |= bit

    def irr(self) -> int:
        """The interrupt request register: latched edges and high levels."""
        level = 0xFF if self.icw1 & ICW1_LTIM else self.elcr
        return (self.edges & ~level) | (self.lines & level)

    def _first(self, mask: int) -> int:
        """The input of highest priority among `mask`, as its rank 0..7; 8 for none."""
        for rank in range(8):
            if mask >> ((self.lowest + 1 + rank) & 7) & 1:
                return rank
        return 8

    def request(self) -> int:
        """The input to be serviced next, or -1: the INT output is high unless it is -1.

        A chip accepts requests only once its initialization is complete.
        """
        if self.expects != OPERATIONAL:
            return -1
        wanted = self.irr() & ~self.imr
        if not wanted:
            return -1
        # In special mask mode a masked input that is in service holds nobody back.
        serving = self.isr & ~self.imr if self.special_mask else self.isr
        first = self._first(wanted)
        limit = self._first(serving)
        level = (self.lowest + 1 + first) & 7
        nested = self.icw4 & ICW4_SFNM and self.cascade >> level & 1
        if first < limit or (nested and first == limit):
            return level
        return -1

    def acknowledge(self) -> int:
        """Take the interrupt of highest priority into service and return its input.

        Without a request it is the spurious interrupt: input 7, which is not put in service.
        """
        level = self.request()
        if level < 0:
            return SPURIOUS_LEVEL
        bit = 1 << level
        self.edges &= ~bit
        if not self.icw4 & ICW4_AEOI:
            self.isr |= bit
        elif self.rotate_on_aeoi:
            self.lowest = level
        return level

    # Ports

    def read(self, data_port: bool) -> int:
        if self.poll:
            self.poll = False
            if self.request() < 0:
                return 0
            return POLL_INTERRUPT | self.acknowledge()
        if data_port:
            return self.imr
        return self.isr if self.read_isr else self.irr()

    def write_command(self, value: int) -> None:
        if value & ICW1_SELECT:
            self._write_icw1(value)
        elif value & OCW3_SELECT:
            self._write_ocw3(value)
        else:
            self._write_ocw2(value)

    def write_data(self, value: int) -> None:
        if self.expects == EXPECT_ICW2:
            self.vector = value & ICW2_VECTOR
            self.expects = EXPECT_ICW4 if self.icw1 & ICW1_SNGL else EXPECT_ICW3
        elif self.expects == EXPECT_ICW3:
            self.expects = EXPECT_ICW4
        elif self.expects == EXPECT_ICW4:
            self.icw4 = value
            self.expects = OPERATIONAL
        else:
            self.imr = value  # OCW1
        if self.expects == EXPECT_ICW4 and not self.icw1 & ICW1_IC4:
            self.expects = OPERATIONAL

    def _write_icw1(self, value: int) -> None:
        """Reset all but the inputs: after this a line has to fall and rise to be an edge."""
        self.restore(ChipState(lines=self.lines, elcr=self.elcr, icw1=value, expects=EXPECT_ICW2))

    def _write_ocw2(self, value: int) -> None:
        """End of interrupt and rotation. R, SL and EOI select one of eight commands."""
        rotate = bool(value & OCW2_R)
        if not value & OCW2_EOI:
            if not value & OCW2_SL:
                self.rotate_on_aeoi = rotate
            elif rotate:
                self.lowest = value & OCW2_LEVEL
            return
        if value & OCW2_SL:
            level = value & OCW2_LEVEL
        else:
            # In special mask mode a non-specific EOI leaves the masked ones in service.
            rank = self._first(self.isr & ~self.imr if self.special_mask else self.isr)
            if rank == 8:
                return
            level = (self.lowest + 1 + rank) & 7
        self.isr &= ~(1 << level)
        if rotate:
            self.lowest = level

    def _write_ocw3(self, value: int) -> None:
        if value & OCW3_ESMM:
            self.special_mask = bool(value & OCW3_SMM)
        self.poll = bool(value & OCW3_POLL)
        if value & OCW3_RR and not self.poll:
            self.read_isr = bool(value & OCW3_RIS)


class Pic:
    """The pair of 8259As: 16 lines in, one INTR out. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._master = Chip(cascade=1 << CASCADE)
        self._slave = Chip(cascade=0)
        self._intr = False

    def set_irq(self, line: int, level: bool) -> None:
        """Drive input `line` (0..15, not 2: the cascade) to `level`.

        Raises ConfigurationError if there is no such input.
        """
        if not 0 <= line < LINES or line == CASCADE:
            raise ConfigurationError(f"IRQ {line}: the PIC has lines 0, 1 and 3 to 15; use one of them")
        with self._lock:
            (self._slave if line & 8 else self._master).set_line(line & 7, level)
            self._update()

    def pending(self) -> bool:
        """The INTR output: an interrupt waits to be acknowledged."""
        return self._intr

    def unmasked(self) -> int:
        """The lines that may interrupt, bit n for line n."""
        master, slave = ~self._master.imr & 0xFF, ~self._slave.imr & 0xFF
        return master & ~(1 << CASCADE) | (slave << 8 if master >> CASCADE & 1 else 0)

    def acknowledge(self) -> int:
        """Answer the processor's INTA cycle: take the first interrupt into service, return its vector."""
        with self._lock:
            level = self._master.acknowledge()
            # A spurious level is 7, so only a true request of the slave gets here.
            if level == CASCADE:
                vector = self._slave.vector | self._slave.acknowledge()
                self._master.set_line(CASCADE, False)  # INT falls during INTA, so the next request is an edge
            else:
                vector = self._master.vector | level
            self._update()
            return vector

    def port_read(self, port: int, size: int) -> int:
        """Read `size` bytes. Each byte is an access of its own, as on the ISA bus."""
        value = 0
        with self._lock:
            for index in range(size):
                value |= self._read(port + index) << (8 * index)
            self._update()
        return value

    def port_write(self, port: int, size: int, value: int) -> None:
        """Write `size` bytes, each an access of its own."""
        with self._lock:
            for index in range(size):
                self._write(port + index, (value >> (8 * index)) & 0xFF)
                self._update()

    def save(self) -> PicState:
        """The state of both chips."""
        with self._lock:
            return PicState(self._master.save(), self._slave.save())

    def restore(self, state: PicState) -> None:
        """Put back what `save` returned."""
        with self._lock:
            self._master.restore(state.master)
            self._slave.restore(state.slave)
            self._update()

    def _update(self) -> None:
        """Carry the slave's INT output to the master, and the master's to `pending`."""
        self._master.set_line(CASCADE, self._slave.request() >= 0)
        self._intr = self._master.request() >= 0

    def _read(self, port: int) -> int:
        if port in (MASTER_COMMAND, MASTER_DATA):
            return self._master.read(port == MASTER_DATA)
        if port in (SLAVE_COMMAND, SLAVE_DATA):
            return self._read_slave(port == SLAVE_DATA)
        if port == ELCR1:
            return self._master.elcr
        if port == ELCR2:
            return self._slave.elcr
        return 0xFF

    def _read_slave(self, data_port: bool) -> int:
        if self._slave.poll:
            self._master.set_line(CASCADE, False)  # a poll is an INTA: INT falls
        return self._slave.read(data_port)

    def _write(self, port: int, value: int) -> None:
        if port == MASTER_COMMAND:
            self._master.write_command(value)
        elif port == MASTER_DATA:
            self._master.write_data(value)
        elif port == SLAVE_COMMAND:
            self._slave.write_command(value)
        elif port == SLAVE_DATA:
            self._slave.write_data(value)
        elif port == ELCR1:
            self._master.elcr = value & ELCR1_WRITABLE
        elif port == ELCR2:
            self._slave.elcr = value & ELCR2_WRITABLE
