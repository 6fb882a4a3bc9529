"""The host side of the guest's serial line: standard input and output, and the terminal.

On a terminal every key goes to the guest, also Ctrl-C; Ctrl-A is ours, as in other emulators:
Ctrl-A x leaves, Ctrl-A Ctrl-A (or Ctrl-A a) sends one Ctrl-A.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress

from pykvm.errors import PykvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any

    from pykvm.devices.serial import Serial

__all__ = ["Console", "Escape", "writer"]

ESCAPE = 0x01  # Ctrl-A
CHUNK = 4096
BACKLOG = 64 << 10  # bytes that wait for the guest before we read more
BACKLOG_PAUSE = 10  # milliseconds
JOIN_TIMEOUT = 1.0  # seconds; another reader of the same input can make ours wait for more of it


def writer(fd: int, name: str) -> Callable[[bytes], None]:
    """A function that writes all of what it is given, also to a pipe or terminal that is non-blocking.

    It raises PykvmError, which calls the file `name`, if nobody reads any more or the disk is full.
    """

    def write(data: bytes) -> None:
        while data:
            try:
                data = data[os.write(fd, data) :]
            except BlockingIOError:
                import select

                select.select([], [fd], [])
            except OSError as error:
                raise PykvmError(f"cannot write to {name} any more: {error.strerror}") from error

    return write


class Escape:
    """Finds the escape sequences in what is typed."""

    def __init__(self) -> None:
        self._escaped = False

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """What goes to the guest, and whether the user wants to leave."""
        out = bytearray()
        for byte in data:
            if self._escaped:
                self._escaped = False
                if byte in b"xX":
                    return bytes(out), True
                if byte in b"aA\x01":
                    out.append(ESCAPE)
            elif byte == ESCAPE:
                self._escaped = True
            else:
                out.append(byte)
        return bytes(out), False


class Console:
    """Feeds standard input to `line` on a thread, with the terminal raw, until closed.

    `leave` is called when the user types Ctrl-A x. The terminal is as before once the with block is left,
    whichever way.
    """

    def __init__(self, line: Serial, leave: Callable[[], object], fd: int = 0) -> None:
        self._line = line
        self._leave = leave
        self._fd = fd
        self._terminal = os.isatty(fd)
        self._saved: list[Any] | None = None  # the terminal's attributes, while it is raw
        self._closing, self._close = os.pipe()  # the first can be read once the second is closed
        self._thread = threading.Thread(target=self._feed, name="console", daemon=True)

    def __enter__(self) -> Console:
        try:
            if self._terminal:
                self._make_raw()
            self._thread.start()
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._restore()
        finally:  # a signal may come here, too
            self._restore()
            os.close(self._close)
            self._thread.join(JOIN_TIMEOUT)
            os.close(self._closing)

    def _make_raw(self) -> None:
        import termios
        import tty

        self._saved = termios.tcgetattr(self._fd)
        tty.setraw(self._fd, termios.TCSANOW)  # keeps what has been typed already
        attributes = termios.tcgetattr(self._fd)
        attributes[1] |= termios.OPOST  # a guest's "\n" still starts at the left
        termios.tcsetattr(self._fd, termios.TCSANOW, attributes)

    def _restore(self) -> None:
        if self._saved is None:
            return
        import termios

        with suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._saved)
        self._saved = None

    def _feed(self) -> None:
        import select

        escape = Escape()
        closing = select.poll()
        closing.register(self._closing)
        either = select.poll()
        either.register(self._closing)
        either.register(self._fd, select.POLLIN)
        while True:
            # A file can be endless and must not fill our memory. What is typed is short, and may be Ctrl-A x.
            while not self._terminal and self._line.waiting >= BACKLOG:
                if closing.poll(BACKLOG_PAUSE):
                    return
            if self._closing in dict(either.poll()):
                return
            try:
                data = os.read(self._fd, CHUNK)
            except BlockingIOError:
                continue
            except OSError:
                return  # the terminal is gone
            if not data:
                return  # end of input: the guest goes on without
            leave = False
            if self._terminal:
                data, leave = escape.feed(data)
            self._line.receive(data)
            if leave:
                self._leave()
                return
