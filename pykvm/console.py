"""The host side of the guest's serial line: standard input and output, and the terminal.

On a terminal every key goes to the guest, also Ctrl-C; Ctrl-A is ours, as in other emulators:
Ctrl-A x leaves, Ctrl-A Ctrl-A (or Ctrl-A a) sends one Ctrl-A.
"""

from __future__ import annotations

import os
import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

__all__ = ["Console", "Escape", "write_all"]

ESCAPE = 0x01  # Ctrl-A
CHUNK = 4096


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data`, also to a pipe or terminal that is set to non-blocking.

    Raises BrokenPipeError when nobody reads any more.
    """
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:
            import select

            select.select([], [fd], [])


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
    """Feeds standard input to `receive` on a thread, with the terminal raw, until closed.

    `leave` is called when the user types Ctrl-A x. The terminal is as before once `close` returns, or the
    with block is left, whichever way.
    """

    def __init__(self, receive: Callable[[bytes], object], leave: Callable[[], object], fd: int = 0) -> None:
        self._receive = receive
        self._leave = leave
        self._fd = fd
        self._saved: list[object] | None = None
        self._wake_read, self._wake_write = os.pipe()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Console:
        try:
            terminal = os.isatty(self._fd)
            os.fstat(self._fd)
        except OSError:
            return self  # no standard input at all
        if terminal:
            self._make_raw()
        self._thread = threading.Thread(target=self._feed, args=(terminal,), name="console", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading and put the terminal back. Twice is fine."""
        if self._wake_write < 0:
            return
        self._restore()
        os.close(self._wake_write)
        self._wake_write = -1
        if self._thread is not None:
            self._thread.join()
        os.close(self._wake_read)

    def _make_raw(self) -> None:
        import termios
        import tty

        self._saved = termios.tcgetattr(self._fd)
        tty.setraw(self._fd)
        attributes = termios.tcgetattr(self._fd)
        attributes[1] |= termios.OPOST  # a guest's "\n" still starts at the left
        termios.tcsetattr(self._fd, termios.TCSANOW, attributes)

    def _restore(self) -> None:
        if self._saved is not None:
            import termios

            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._saved)
            self._saved = None

    def _feed(self, terminal: bool) -> None:
        import select

        escape = Escape()
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN | select.POLLHUP)
        poll.register(self._fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._wake_read in ready:
                return
            try:
                data = os.read(self._fd, CHUNK)
            except BlockingIOError:
                continue
            except OSError:
                return
            if not data:
                return  # end of input: the guest goes on without
            leave = False
            if terminal:
                data, leave = escape.feed(data)
            if data:
                self._receive(data)
            if leave:
                self._leave()
                return
