"""The keyboard controller (Intel 8042) without keyboard or mouse, and the reset control register.

Sources: IBM PS/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary Device
Controller"; Intel 82371AB (PIIX4) datasheet, section 4.2.6, for port 0xcf9.

What a guest that probes for devices sees:

- The controller is there and passes its self-test (0xaa: 0x55) and its line test (0xab: 0).
- A byte sent to the keyboard is answered as the 8042 does when no device takes it: 0xfe
  (resend) with the time-out bit in the status. Firmware and Linux conclude at once that
  there is no keyboard.
- There is no second (mouse) port: the configuration's bit 5 stays set, the port's test (0xa9)
  fails, and its loop-back (0xd3) answers as the keyboard's.
- Guest memory is always addressed with A20 on. The A20 bit of the output port is kept and
  reads back.

The output buffer holds one byte, and the newest answer wins.
"""

from __future__ import annotations

import threading

from pykvm.bus import all_ones
from pykvm.values import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.interfaces import IrqLine

__all__ = ["I8042", "I8042State", "ResetControl"]

# Status register (read from the command port)
STATUS_OBF = 0x01  # the output buffer is full
STATUS_SYSTEM = 0x04  # the self-test was passed; follows CONFIG_SYSTEM
STATUS_COMMAND = 0x08  # the last write was a command
STATUS_UNLOCKED = 0x10  # the keyboard is not locked
STATUS_AUX = 0x20  # the output buffer's byte is from the second port
STATUS_TIMEOUT = 0x40

# Configuration byte
CONFIG_KEYBOARD_IRQ = 0x01
CONFIG_SYSTEM = 0x04
CONFIG_KEYBOARD_OFF = 0x10
CONFIG_AUX_OFF = 0x20
CONFIG_WRITABLE = 0x5F

# Output port
OUTPUT_NOT_RESET = 0x01
OUTPUT_A20 = 0x02
OUTPUT_OBF = 0x10

# Commands (written to the command port)
READ_CONFIG = 0x20
WRITE_CONFIG = 0x60
TEST_AUX = 0xA9
SELF_TEST = 0xAA
TEST_KEYBOARD = 0xAB
DISABLE_KEYBOARD = 0xAD
ENABLE_KEYBOARD = 0xAE
READ_INPUT_PORT = 0xC0
READ_OUTPUT_PORT = 0xD0
WRITE_OUTPUT_PORT = 0xD1
WRITE_KEYBOARD_BUFFER = 0xD2
WRITE_AUX_BUFFER = 0xD3
WRITE_AUX = 0xD4
DISABLE_A20 = 0xDD
ENABLE_A20 = 0xDF
PULSE_OUTPUT_PORT = 0xF0  # ..0xff: the bits that are 0 are pulsed low

WITH_DATA = (WRITE_CONFIG, WRITE_OUTPUT_PORT, WRITE_KEYBOARD_BUFFER, WRITE_AUX_BUFFER, WRITE_AUX)

# Answers
SELF_TEST_PASSED = 0x55
LINES_GOOD = 0x00
CLOCK_STUCK_LOW = 0x01
INPUT_PORT_UNLOCKED = 0x80
RESEND = 0xFE  # nobody took the byte

# Reset control register
RESET_SYSTEM = 0x02  # a hard reset rather than the processor's INIT
RESET_NOW = 0x04
RESET_FULL = 0x08  # cycle the power


class _Port:
    """One of the controller's two byte-wide ports."""

    def __init__(self, read: Callable[[], int], write: Callable[[int], None]) -> None:
        self._read = read
        self._write = write

    def read(self, offset: int, size: int) -> int:
        """The port's byte; the bytes above it are empty bus."""
        if offset != 0:
            return all_ones(size)
        return all_ones(size) & ~0xFF | self._read()

    def write(self, offset: int, size: int, value: int) -> None:
        """Take the low byte."""
        if offset == 0:
            self._write(value & 0xFF)


class I8042State(Value):
    """The controller's registers. `command` is the one that waits for its data byte, or 0."""

    config: int = CONFIG_KEYBOARD_OFF | CONFIG_AUX_OFF
    output_port: int = OUTPUT_NOT_RESET | OUTPUT_A20
    status: int = STATUS_UNLOCKED
    buffer: int = 0
    command: int = 0


class I8042:
    """The controller. Attach `data` at port 0x60 and `command` at port 0x64, one byte each.

    `stop(0, "reset")` is called when the guest resets the machine: by command 0xfe (or any
    pulse of output line 0) or by clearing bit 0 of the output port. `irq` is the keyboard's
    line, IRQ 1, high while a byte waits and the configuration enables it.
    """

    def __init__(self, stop: Callable[[int, str], object], *, irq: IrqLine | None = None) -> None:
        self._stop = stop
        self._irq = irq
        # The bus locks each port by itself; they share the registers.
        self._lock = threading.Lock()
        self._take(I8042State())
        self.data = _Port(self._read_data, self._write_data)
        self.command = _Port(self._read_status, self._write_command)

    def save(self) -> I8042State:
        """The registers."""
        with self._lock:
            return I8042State(self._config, self._output_port, self._status, self._buffer, self._command)

    def restore(self, state: I8042State) -> None:
        """Put back what `save` returned."""
        with self._lock:
            self._take(state)
            self._drive()

    def _take(self, state: I8042State) -> None:
        self._config = state.config
        self._output_port = state.output_port
        self._status = state.status
        self._buffer = state.buffer
        self._command = state.command

    def _read_data(self) -> int:
        with self._lock:
            self._status &= ~(STATUS_OBF | STATUS_AUX | STATUS_TIMEOUT)
            self._drive()
            return self._buffer

    def _read_status(self) -> int:
        system = STATUS_SYSTEM if self._config & CONFIG_SYSTEM else 0
        return self._status | system

    def _write_command(self, value: int) -> None:
        with self._lock:
            self._status |= STATUS_COMMAND
            self._command = value if value in WITH_DATA else 0
            self._execute(value)
            resets = value >= PULSE_OUTPUT_PORT and not value & OUTPUT_NOT_RESET
        if resets:
            self._stop(0, "reset")

    def _write_data(self, value: int) -> None:
        with self._lock:
            self._status &= ~STATUS_COMMAND
            command = self._command
            self._command = 0
            self._execute_with_data(command, value)
            resets = command == WRITE_OUTPUT_PORT and not value & OUTPUT_NOT_RESET
        if resets:
            self._stop(0, "reset")

    def _execute(self, command: int) -> None:
        if command == READ_CONFIG:
            self._answer(self._config)
        elif command == SELF_TEST:
            self._config = CONFIG_SYSTEM | CONFIG_KEYBOARD_OFF | CONFIG_AUX_OFF
            self._answer(SELF_TEST_PASSED)
        elif command == TEST_KEYBOARD:
            self._answer(LINES_GOOD)
        elif command == TEST_AUX:
            self._answer(CLOCK_STUCK_LOW)
        elif command == DISABLE_KEYBOARD:
            self._config |= CONFIG_KEYBOARD_OFF
        elif command == ENABLE_KEYBOARD:
            self._config &= ~CONFIG_KEYBOARD_OFF
        elif command == READ_INPUT_PORT:
            self._answer(INPUT_PORT_UNLOCKED)
        elif command == READ_OUTPUT_PORT:
            self._answer(self._output_port | (OUTPUT_OBF if self._status & STATUS_OBF else 0))
        elif command == DISABLE_A20:
            self._output_port &= ~OUTPUT_A20
        elif command == ENABLE_A20:
            self._output_port |= OUTPUT_A20

    def _execute_with_data(self, command: int, value: int) -> None:
        if command == WRITE_CONFIG:
            self._config = value & CONFIG_WRITABLE | CONFIG_AUX_OFF
            self._drive()
        elif command == WRITE_OUTPUT_PORT:
            self._output_port = OUTPUT_NOT_RESET | value & OUTPUT_A20
        elif command in (WRITE_KEYBOARD_BUFFER, WRITE_AUX_BUFFER):
            self._answer(value)
        elif command == WRITE_AUX:
            self._answer(RESEND, STATUS_AUX | STATUS_TIMEOUT)
        else:
            self._answer(RESEND, STATUS_TIMEOUT)  # a byte for the keyboard

    def _answer(self, value: int, flags: int = 0) -> None:
        self._buffer = value
        self._status = self._status & ~(STATUS_AUX | STATUS_TIMEOUT) | STATUS_OBF | flags
        self._drive()

    def _drive(self) -> None:
        if self._irq is not None:
            waits = self._status & (STATUS_OBF | STATUS_AUX) == STATUS_OBF
            self._irq.set(waits and bool(self._config & CONFIG_KEYBOARD_IRQ))


class ResetControl:
    """The reset control register, one byte at port 0xcf9.

    Writing RESET_NOW calls `stop(0, "reset")`; the kind of reset makes no difference here.
    """

    def __init__(self, stop: Callable[[int, str], object]) -> None:
        self._stop = stop
        self._value = 0

    def read(self, offset: int, size: int) -> int:
        """The kind of reset last chosen; the bytes above it are empty bus."""
        if offset != 0:
            return all_ones(size)
        return all_ones(size) & ~0xFF | self._value

    def write(self, offset: int, size: int, value: int) -> None:
        """Choose a kind of reset, and reset if bit 2 is set."""
        if offset != 0:
            return
        self._value = value & (RESET_SYSTEM | RESET_FULL)
        if value & RESET_NOW:
            self._stop(0, "reset")

    def save(self) -> int:
        """The register."""
        return self._value

    def restore(self, state: int) -> None:
        """Put back what `save` returned."""
        self._value = state
