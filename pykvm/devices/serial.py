"""Serial port: a 16550A UART (National Semiconductor PC16550D data sheet).

Eight ports::

    offset  read                    write                 with LCR.DLAB
    0       RBR  received byte      THR  byte to send     DLL  divisor, low
    1       IER  interrupt enable   IER                   DLM  divisor, high
    2       IIR  interrupt cause    FCR  FIFO control
    3       LCR  line control       LCR
    4       MCR  modem control      MCR
    5       LSR  line status        -
    6       MSR  modem status       -
    7       SCR  scratch            SCR

Time does not pass on this line, which is where it differs from the chip: a byte is sent when it is
written, so the transmitter is always empty; the character timeout of the receive FIFO is due at once; the
divisor and the word format are kept and have no effect. Bytes from the host wait until the guest
has room for them, and a guest that clears its FIFO while it starts finds them still on the line: only
bytes looped back can be overrun or cleared away.
"""

from __future__ import annotations

from collections import deque
from threading import Lock

from pykvm.values import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.interfaces import IrqLine

__all__ = ["Serial", "SerialState"]

FIFO_SIZE = 16

# Interrupt enable register
IER_RECEIVED = 0x01
IER_TRANSMIT_EMPTY = 0x02
IER_LINE_STATUS = 0x04
IER_MODEM_STATUS = 0x08
IER_ALL = 0x0F

# Interrupt identification register, by priority
IIR_LINE_STATUS = 0x06
IIR_RECEIVED = 0x04
IIR_TIMEOUT = 0x0C
IIR_TRANSMIT_EMPTY = 0x02
IIR_MODEM_STATUS = 0x00
IIR_NONE = 0x01
IIR_FIFOS_ENABLED = 0xC0

# FIFO control register
FCR_ENABLE = 0x01
FCR_CLEAR_RECEIVER = 0x02
FCR_DMA_MODE = 0x08
FCR_TRIGGER = 0xC0
FCR_TRIGGER_SHIFT = 6
TRIGGER_LEVELS = (1, 4, 8, 14)

# Line control register
LCR_BREAK = 0x40
LCR_DLAB = 0x80

# Modem control register
MCR_DTR = 0x01
MCR_RTS = 0x02
MCR_OUT1 = 0x04
MCR_OUT2 = 0x08
MCR_LOOP = 0x10
MCR_ALL = 0x1F

# Line status register
LSR_DATA_READY = 0x01
LSR_OVERRUN = 0x02
LSR_PARITY = 0x04
LSR_FRAMING = 0x08
LSR_BREAK = 0x10
LSR_TRANSMITTER_EMPTY = 0x60  # holding register and shift register
LSR_FIFO_ERROR = 0x80
LSR_CHARACTER_ERRORS = LSR_PARITY | LSR_FRAMING | LSR_BREAK

# Modem status register
MSR_DELTA_CTS = 0x01
MSR_DELTA_DSR = 0x02
MSR_RING_ENDED = 0x04
MSR_DELTA_DCD = 0x08
MSR_DELTAS = 0x0F
MSR_CTS = 0x10
MSR_DSR = 0x20
MSR_RING = 0x40
MSR_DCD = 0x80

# A received character: the byte, its LSR errors from bit 8 on, and where it came from.
CHARACTER_ERRORS_SHIFT = 8
CHARACTER_LOOPED = 1 << 16
CHARACTER_BREAK = LSR_BREAK << CHARACTER_ERRORS_SHIFT


class SerialState(Value):
    """The state of a `Serial`; the default is that after power-on, with a terminal connected.

    `received` and `waiting` are characters in the receive FIFO and still on the line: the byte, its LSR
    error bits shifted by 8, and bit 16 if it was looped back. `line_errors` are the LSR bits
    that reading LSR clears; `modem_lines` the levels of CTS, DSR, RI and DCD in MSR's bits.
    """

    ier: int = 0
    fcr: int = 0
    lcr: int = 0
    mcr: int = 0
    msr: int = MSR_CTS | MSR_DSR | MSR_DCD
    scr: int = 0
    dll: int = 12
    dlm: int = 0
    line_errors: int = 0
    transmit_pending: bool = False
    modem_lines: int = MSR_CTS | MSR_DSR | MSR_DCD
    received: tuple[int, ...] = ()
    waiting: tuple[int, ...] = ()


class Serial:
    """A 16550A with `irq` as its interrupt line, passing what the guest sends to `output`, byte by byte.

    `receive`, `receive_break` and `set_modem_lines` may be called from any thread, also from `output`.
    The interrupt line is driven only when its level changes, and only while MCR.OUT2 is set, which
    is the gate between UART and interrupt controller on a PC.
    """

    def __init__(
        self, *, irq: IrqLine | None = None, output: Callable[[bytes], object] | None = None
    ) -> None:
        self._irq = irq
        self._output = output
        # Registers that the guest writes change under the bus' lock for this device; all that
        # `receive` shares with the guest, the interrupt line included, under this one.
        self._lock = Lock()
        self._level: bool | None = False  # of the interrupt line; None if unknown
        self._load(SerialState())

    # The guest's side

    def read(self, offset: int, size: int) -> int:
        """Read a register; a wider read is one of each byte, as on an 8-bit bus."""
        if size == 1:
            return self._read_byte(offset)
        return int.from_bytes(bytes([self._read_byte(offset + index) for index in range(size)]), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a register; a wider write is one of each byte, as on an 8-bit bus."""
        for index in range(size):
            self._write_byte(offset + index, value >> (8 * index) & 0xFF)

    def _read_byte(self, offset: int) -> int:
        if self._lcr & LCR_DLAB and offset < 2:
            return self._dlm if offset else self._dll
        if offset >= len(self._READERS):
            return 0xFF
        with self._lock:
            value = self._READERS[offset](self)
            self._update_irq()
        return value

    def _write_byte(self, offset: int, value: int) -> None:
        if self._lcr & LCR_DLAB and offset < 2:
            if offset:
                self._dlm = value
            else:
                self._dll = value
            return
        if offset >= len(self._WRITERS):
            return
        on_the_line = not (self._mcr & MCR_LOOP or self._lcr & LCR_BREAK)
        if offset == 0 and on_the_line and self._output is not None:
            # Before anything changes, as it may raise, and without the lock, as it may call `receive`.
            self._output(bytes((value,)))
        with self._lock:
            self._WRITERS[offset](self, value)
            self._update_irq()

    # The host's side

    def receive(self, data: bytes) -> None:
        """Put `data` on the line to the guest. Nothing is lost; see `waiting` for what is unread."""
        with self._lock:
            self._waiting.extend(data)
            self._refill()
            self._update_irq()

    def receive_break(self) -> None:
        """Send a break to the guest, after all that was sent before."""
        with self._lock:
            self._waiting.append(CHARACTER_BREAK)
            self._refill()
            self._update_irq()

    @property
    def waiting(self) -> int:
        """How many characters for the guest it has not read yet. Feed less while this is high."""
        return len(self._waiting) + len(self._received)

    def set_modem_lines(
        self, *, cts: bool = True, dsr: bool = True, ring: bool = False, dcd: bool = True
    ) -> None:
        """Drive the modem's lines; the defaults are those of a connected terminal."""
        with self._lock:
            self._modem_lines = MSR_CTS * cts | MSR_DSR * dsr | MSR_RING * ring | MSR_DCD * dcd
            self._update_modem_status()
            self._update_irq()

    def save(self) -> SerialState:
        with self._lock:
            return SerialState(
                ier=self._ier,
                fcr=self._fcr,
                lcr=self._lcr,
                mcr=self._mcr,
                msr=self._msr,
                scr=self._scr,
                dll=self._dll,
                dlm=self._dlm,
                line_errors=self._line_errors,
                transmit_pending=self._transmit_pending,
                modem_lines=self._modem_lines,
                received=tuple(self._received),
                waiting=tuple(self._waiting),
            )

    def restore(self, state: SerialState) -> None:
        """Take over `state`, and drive the interrupt line to the level that belongs to it."""
        with self._lock:
            self._load(state)
            self._level = None
            self._update_irq()

    def _load(self, state: SerialState) -> None:
        self._ier = state.ier
        self._fcr = state.fcr
        self._lcr = state.lcr
        self._mcr = state.mcr
        self._msr = state.msr
        self._scr = state.scr
        self._dll = state.dll
        self._dlm = state.dlm
        self._line_errors = state.line_errors
        self._transmit_pending = state.transmit_pending
        self._modem_lines = state.modem_lines
        self._received = deque(state.received)
        self._waiting = deque(state.waiting)

    # Receiver

    def _read_rbr(self) -> int:
        if not self._received:
            return 0
        character = self._received.popleft()
        self._expose_errors()
        self._refill()
        return character & 0xFF

    def _read_lsr(self) -> int:
        value = self._line_errors | LSR_TRANSMITTER_EMPTY
        if self._received:
            value |= LSR_DATA_READY
        if self._fcr & FCR_ENABLE and (self._line_errors & LSR_CHARACTER_ERRORS or self._errors_behind()):
            value |= LSR_FIFO_ERROR
        self._line_errors = 0
        return value

    def _errors_behind(self) -> bool:
        errors = LSR_CHARACTER_ERRORS << CHARACTER_ERRORS_SHIFT
        return any(character & errors for character in self._received)

    def _refill(self) -> None:
        """Move what waits on the line into the FIFO, as far as there is room. In loopback the line is cut."""
        room = self._depth() - len(self._received)
        if room <= 0 or not self._waiting or self._mcr & MCR_LOOP:
            return
        for _ in range(min(room, len(self._waiting))):
            self._received.append(self._waiting.popleft())
        self._expose_errors()

    def _expose_errors(self) -> None:
        """LSR shows the errors of the character that is next to be read."""
        if self._received:
            character = self._received[0]
            self._line_errors |= character >> CHARACTER_ERRORS_SHIFT & LSR_CHARACTER_ERRORS
            self._received[0] = character & (CHARACTER_LOOPED | 0xFF)

    def _loop_back(self, value: int) -> None:
        if len(self._received) < self._depth():
            self._received.append(value | CHARACTER_LOOPED)
            return
        self._line_errors |= LSR_OVERRUN
        if not self._fcr & FCR_ENABLE:  # RBR is overwritten; a full FIFO keeps what it has
            self._received[0] = value | CHARACTER_LOOPED

    def _depth(self) -> int:
        return FIFO_SIZE if self._fcr & FCR_ENABLE else 1

    def _clear_receiver(self) -> None:
        from_the_line = [character for character in self._received if not character & CHARACTER_LOOPED]
        self._waiting.extendleft(reversed(from_the_line))
        self._received.clear()

    # Transmitter and control

    def _write_thr(self, value: int) -> None:
        if self._mcr & MCR_LOOP:
            self._loop_back(value)
        self._transmit_pending = True  # sent and empty again

    def _write_ier(self, value: int) -> None:
        if value & ~self._ier & IER_TRANSMIT_EMPTY:
            self._transmit_pending = True  # enabling it while the transmitter is empty raises it
        self._ier = value & IER_ALL

    def _write_fcr(self, value: int) -> None:
        if not value & FCR_ENABLE:
            value = 0  # the other bits count only together with this one
        if value & FCR_CLEAR_RECEIVER or (value ^ self._fcr) & FCR_ENABLE:
            self._clear_receiver()
        self._fcr = value & (FCR_ENABLE | FCR_DMA_MODE | FCR_TRIGGER)
        self._refill()

    def _write_lcr(self, value: int) -> None:
        self._lcr = value

    def _write_scr(self, value: int) -> None:
        self._scr = value

    def _ignore(self, value: int) -> None:
        """Writing LSR or MSR is for factory tests."""

    # Modem

    def _write_mcr(self, value: int) -> None:
        self._mcr = value & MCR_ALL
        self._update_modem_status()
        self._refill()

    def _read_msr(self) -> int:
        value = self._msr
        self._msr &= ~MSR_DELTAS
        return value

    def _update_modem_status(self) -> None:
        lines, mcr = self._modem_lines, self._mcr
        if mcr & MCR_LOOP:  # the outputs are the inputs
            lines = (
                MSR_CTS * bool(mcr & MCR_RTS)
                | MSR_DSR * bool(mcr & MCR_DTR)
                | MSR_RING * bool(mcr & MCR_OUT1)
                | MSR_DCD * bool(mcr & MCR_OUT2)
            )
        changed = self._msr ^ lines
        deltas = (
            MSR_DELTA_CTS * bool(changed & MSR_CTS)
            | MSR_DELTA_DSR * bool(changed & MSR_DSR)
            | MSR_RING_ENDED * bool(changed & ~lines & MSR_RING)
            | MSR_DELTA_DCD * bool(changed & MSR_DCD)
        )
        self._msr = lines | self._msr & MSR_DELTAS | deltas

    # Interrupts

    def _read_iir(self) -> int:
        cause = self._cause()
        if cause == IIR_TRANSMIT_EMPTY:
            self._transmit_pending = False
        return cause | IIR_FIFOS_ENABLED if self._fcr & FCR_ENABLE else cause

    def _cause(self) -> int:
        """The pending interrupt of the highest priority."""
        enabled = self._ier
        if enabled & IER_LINE_STATUS and self._line_errors:
            return IIR_LINE_STATUS
        if enabled & IER_RECEIVED and self._received:
            full = len(self._received) >= TRIGGER_LEVELS[self._fcr >> FCR_TRIGGER_SHIFT]
            return IIR_RECEIVED if full else IIR_TIMEOUT
        if enabled & IER_TRANSMIT_EMPTY and self._transmit_pending:
            return IIR_TRANSMIT_EMPTY
        if enabled & IER_MODEM_STATUS and self._msr & MSR_DELTAS:
            return IIR_MODEM_STATUS
        return IIR_NONE

    def _update_irq(self) -> None:
        # In loopback the OUT2 pin is inactive whatever its bit says.
        connected = self._mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2
        level = connected and self._cause() != IIR_NONE
        if level != self._level:
            self._level = level
            if self._irq is not None:
                self._irq.set(level)

    # By offset
    _READERS: tuple[Callable[[Serial], int], ...] = (
        _read_rbr,
        lambda self: self._ier,
        _read_iir,
        lambda self: self._lcr,
        lambda self: self._mcr,
        _read_lsr,
        _read_msr,
        lambda self: self._scr,
    )
    _WRITERS: tuple[Callable[[Serial, int], None], ...] = (
        _write_thr,
        _write_ier,
        _write_fcr,
        _write_lcr,
        _write_mcr,
        _ignore,
        _ignore,
        _write_scr,
    )
