"""What leaves the processor for a device: counted, timed on demand, and the last ones remembered.

The exits of a KVM machine, so to say: named as KVM names them.
"""

from __future__ import annotations

from collections import deque
from time import perf_counter

from pykvm.errors import ConfigurationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.interfaces import IO

REMEMBERED = 16


class Accesses:
    """Passes accesses on to the machine's buses. Values read are cut to size."""

    def __init__(self) -> None:
        self.io: IO | None = None
        self.busy = False  # a device is being called
        self.timed = False
        self.seconds = 0.0  # spent in devices
        self.port_accesses = 0
        self.mmio_accesses = 0
        self._recent: deque[tuple[str, bool, int, int, int]] = deque(maxlen=REMEMBERED)

    def port_read(self, port: int, size: int) -> int:
        """IN."""
        self.port_accesses += 1
        value = self._call(self._bus().port_read, port, size) & ((1 << 8 * size) - 1)
        self._recent.append(("KVM_EXIT_IO", False, port, size, value))
        return value

    def port_write(self, port: int, size: int, value: int) -> None:
        """OUT."""
        self.port_accesses += 1
        self._recent.append(("KVM_EXIT_IO", True, port, size, value))
        self._call(self._bus().port_write, port, size, value)

    def mmio_read(self, address: int, size: int) -> int:
        """A load from device space."""
        self.mmio_accesses += 1
        value = self._call(self._bus().mmio_read, address, size) & ((1 << 8 * size) - 1)
        self._recent.append(("KVM_EXIT_MMIO", False, address, size, value))
        return value

    def mmio_write(self, address: int, size: int, value: int) -> None:
        """A store to device space."""
        self.mmio_accesses += 1
        self._recent.append(("KVM_EXIT_MMIO", True, address, size, value))
        self._call(self._bus().mmio_write, address, size, value)

    def recent(self) -> list[str]:
        """The last accesses in words, oldest first."""
        return [
            f"{name}: {size}-byte {f'write {value:#x} to' if write else 'read of'} {address:#x}"
            for name, write, address, size, value in self._recent
        ]

    def _bus(self) -> IO:
        if self.io is None:
            raise ConfigurationError("a device is accessed outside of a run")
        return self.io

    def _call(self, access: Callable[..., int | None], *arguments: int) -> int:
        start = perf_counter() if self.timed else 0.0
        self.busy = True
        try:
            return access(*arguments) or 0
        finally:
            self.busy = False
            if self.timed:
                self.seconds += perf_counter() - start
