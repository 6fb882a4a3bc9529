"""Interfaces: what the parts of a machine expect of each other.

Dispatch goes *inward*: a backend calls `IO` from within `Vcpu.run`, and the bus calls the device.
Nothing here imports a backend, a device or NumPy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import DTypeLike, NDArray
    from typing_extensions import Buffer

    from pykvm.bus import DeviceLock, Served
    from pykvm.exits import Exit
    from pykvm.registers import Registers, SystemRegisters
    from pykvm.state import DebugRegisters, FpuState, VcpuEvents
    from pykvm.statistics import Statistics

S = TypeVar("S")


class Device(Protocol):
    """A device model. It sees offsets into its own range, never addresses, threads or backends.

    `size` is 1, 2, 4 or 8 bytes; `value` is little-endian and unsigned. A value that is too
    wide is cut to `size` by the bus. The bus holds the device's lock during each call.

    A device may raise. The exception leaves `run` as itself and the access counts as not
    done: the next run offers the same access again.
    """

    def read(self, offset: int, size: int) -> int:
        """Return the value at `offset`. The default claims nothing: all ones."""
        return (1 << (8 * size)) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Take `value`. The default ignores it."""


class IO(Protocol):
    """Where a backend sends the accesses that memory does not answer: the VM's two buses.

    Any size from 1 to 8 may arrive (a guest's misaligned access is split by the backend or
    not, as the processor does). A port access is 1, 2 or 4 bytes.
    """

    def port_read(self, port: int, size: int) -> int: ...
    def port_write(self, port: int, size: int, value: int) -> None: ...
    def mmio_read(self, address: int, size: int) -> int: ...
    def mmio_write(self, address: int, size: int, value: int) -> None: ...


class Memory(Protocol):
    """Guest-physical memory. Accesses may cross slots; a short access raises, never truncates."""

    def read(self, address: int, size: int) -> bytes: ...
    def write(self, address: int, data: Buffer) -> None: ...
    def view(self, address: int, count: int, dtype: DTypeLike = ...) -> NDArray[Any]: ...


class IrqLine(Protocol):
    """One input of the interrupt controller. May be driven from any thread."""

    def set(self, level: bool) -> None:
        """Drive the line to `level`."""

    def pulse(self) -> None:
        """Raise and lower the line: one edge."""


class Vcpu(Protocol):
    """One virtual processor. All calls but `kick` belong to the thread that runs it."""

    index: int

    def registers(self) -> Registers: ...
    def set_registers(self, value: Registers) -> None: ...
    def system_registers(self) -> SystemRegisters: ...
    def set_system_registers(self, value: SystemRegisters) -> None: ...
    def fpu(self) -> FpuState: ...
    def set_fpu(self, value: FpuState) -> None: ...
    def debug_registers(self) -> DebugRegisters: ...
    def set_debug_registers(self, value: DebugRegisters) -> None: ...
    def events(self) -> VcpuEvents: ...
    def set_events(self, value: VcpuEvents) -> None: ...
    def msrs(self, indices: Sequence[int]) -> dict[int, int]:
        """Read MSRs by index. Raises KvmError (kvm) or ConfigurationError naming an unknown one."""

    def set_msrs(self, values: Mapping[int, int]) -> None: ...
    def set_breakpoints(self, addresses: Sequence[int]) -> None:
        """Make `run` return `Debug` before executing any of these linear addresses (at most 4)."""

    def run(self, io: IO) -> Exit:
        """Execute until something ends it."""

    def step(self, io: IO) -> Exit:
        """Execute one instruction and return `Debug(kind="step")`, or another exit."""

    def kick(self) -> None:
        """Make the current or else the next `run` return `Interrupted`.

        The only call allowed from another thread. Sticky, so it cannot be lost.
        """

    def clear_kick(self) -> None:
        """Forget a kick that no run has returned for. Only between runs."""

    def statistics(self) -> Statistics:
        """Exits and instructions so far, and times since `measure_time`."""

    def measure_time(self) -> None:
        """Measure how long the guest runs, from now on."""

    def recent_exits(self) -> list[str]:
        """The last exits or accesses in words, oldest first."""

    def close(self) -> None: ...


class Region(Protocol):
    """Host memory behind one slot: `buffer` is writable and exactly `size` bytes."""

    @property
    def buffer(self) -> Buffer: ...
    @property
    def size(self) -> int: ...


class Machine(Protocol):
    """One machine of a backend: memory map, processors, interrupt lines."""

    def map(
        self,
        slot: int,
        address: int,
        region: Region,
        *,
        readonly: bool = False,
        log_dirty: bool = False,
    ) -> None:
        """Put `region` at guest-physical `address`. A write to a read-only slot goes to `IO`."""

    def unmap(self, slot: int) -> None: ...
    def dirty(self, slot: int) -> NDArray[np.bool_]:
        """Which pages of a `log_dirty` slot were written since the last call, one bool a page.

        KVM on AMD-V also reports pages that were only read, when that was the first access to them.
        """

    def vcpu(self, index: int) -> Vcpu: ...
    def irq(self, gsi: int) -> IrqLine:
        """The interrupt line `gsi`. Raises ConfigurationError without an interrupt controller."""

    def devices(self) -> Sequence[tuple[Device, int, int]]:
        """Devices of the backend's own that belong on the port bus: (device, port, size)."""

    def serve(self, space: str, entries: Served) -> None:
        """Offer the devices of a bus (`space` is "port" or "mmio"), in place of all that it offered before.

        The backend may call them itself, by the rules of `pykvm.bus`; what it leaves comes through `IO`.
        """

    def new_lock(self) -> DeviceLock:
        """A re-entrant lock for a device, of the kind that this backend takes fastest."""

    def close(self) -> None: ...


class Backend(Protocol):
    """A way to run machines."""

    name: str

    def why_unavailable(self) -> str | None:
        """None if it works here, or a sentence that says what is missing and what to do."""

    def prepare(self) -> None:
        """Begin to make the next machine in the background, if the backend works and that helps."""

    def machine(self, *, irqchip: bool = False, cpus: int = 1) -> Machine:
        """A new, empty machine for up to `cpus` processors.

        With `irqchip` it has PIC, PIT and, on KVM, local and I/O APICs.
        """


class Persistent(Protocol[S]):
    """Something whose state can be taken out and put back; `S` is a frozen dataclass."""

    def save(self) -> S: ...
    def restore(self, state: S) -> None: ...
