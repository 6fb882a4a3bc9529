"""Debug ports: end the run with a status, and print without any set-up.

The ports are conventions of emulators, not hardware: exit at 0xf4 (QEMU's isa-debug-exit), console at
0xe9 (Bochs) and 0x402 (SeaBIOS).
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DebugConsole", "DebugExit"]


class DebugExit:
    """Ends the run when the guest writes: ``stop(status, "debug-exit")``.

    The status fits the exit status of a process. It is the value written, of any size, and 255 for every
    value above, so that no failure code can turn into a success. With `qemu` it is
    ``(value << 1 | 1) & 0xff``, what a shell sees after QEMU; it is never 0 then. Reads return 0.
    """

    __slots__ = ("_qemu", "_stop")

    def __init__(self, stop: Callable[[int, str], object], *, qemu: bool = False) -> None:
        self._stop = stop
        self._qemu = qemu

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        status = (value << 1 | 1) & 0xFF if self._qemu else min(value, 0xFF)
        self._stop(status, "debug-exit")


class DebugConsole:
    """Hands each byte the guest writes to `output`. Reads return 0xe9, by which guests detect it.

    A wider write is its bytes, lowest first.
    """

    PRESENT = 0xE9

    __slots__ = ("_output",)

    def __init__(self, output: Callable[[bytes], object]) -> None:
        self._output = output

    def read(self, offset: int, size: int) -> int:
        return self.PRESENT

    def write(self, offset: int, size: int, value: int) -> None:
        self._output(value.to_bytes(size, "little"))
