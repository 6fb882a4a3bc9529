"""The emulator as a backend: machines and vCPUs behind the interfaces of `pykvm.interfaces`."""

from __future__ import annotations

from threading import RLock

from pykvm.emulator.accesses import Accesses
from pykvm.emulator.chipset import Chipset, IrqLine, Ports
from pykvm.emulator.cpu import Cpu
from pykvm.emulator.physical import PhysicalMemory
from pykvm.emulator.vcpu import EmulatorVcpu
from pykvm.errors import ConfigurationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pykvm.bus import DeviceLock, Served
    from pykvm.interfaces import Device, Region

__all__ = ["EmulatorBackend", "EmulatorMachine"]


class EmulatorMachine:
    """One emulated machine with one processor."""

    def __init__(self, *, irqchip: bool) -> None:
        self._memory = PhysicalMemory()
        accesses = Accesses()
        self._ports = Ports(accesses)
        cpu = Cpu(self._memory, self._ports, accesses)
        self._chipset = Chipset(cpu.clock) if irqchip else None
        self._ports.chipset = self._chipset
        self._vcpu = EmulatorVcpu(cpu, self._chipset, accesses)
        self._ports.changed = self._vcpu.attend

    def map(
        self,
        slot: int,
        address: int,
        region: Region,
        *,
        readonly: bool = False,
        log_dirty: bool = False,
    ) -> None:
        """Put `region` at guest-physical `address`. A write to a read-only slot goes to `IO`.

        Raises ConfigurationError if it is not whole pages or overlaps another slot.
        """
        self._memory.map(slot, address, region, readonly=readonly, log_dirty=log_dirty)

    def unmap(self, slot: int) -> None:
        """Remove `slot`; its addresses become device space. Raises ConfigurationError if there is none."""
        self._memory.unmap(slot)

    def dirty(self, slot: int) -> NDArray[np.bool_]:
        """Which pages of a `log_dirty` slot were written since the last call, one bool a page."""
        import numpy as np

        return np.frombuffer(bytearray(self._memory.take_dirty(slot)), dtype=np.bool_)

    def vcpu(self, index: int) -> EmulatorVcpu:
        """The processor. Raises ConfigurationError for any other than number 0."""
        if index != 0:
            raise ConfigurationError(
                f"vCPU {index}: the emulator has one processor, number 0; use one, or the kvm backend"
            )
        return self._vcpu

    def irq(self, gsi: int) -> IrqLine:
        """The interrupt line `gsi`. Raises ConfigurationError without an interrupt controller."""
        if self._chipset is None:
            raise ConfigurationError(f"GSI {gsi}: this machine was made without irqchip=True")
        return self._chipset.line(gsi, self._vcpu.attend)

    def devices(self) -> list[tuple[Device, int, int]]:
        """None: the chipset's ports never come to the bus."""
        return []

    def serve(self, space: str, entries: Served) -> None:
        """Nothing: all accesses come through `IO`."""

    def new_lock(self) -> DeviceLock:
        """An ordinary lock."""
        return RLock()

    def close(self) -> None:
        """Release the memory of all slots."""
        self._vcpu.close()
        self._memory.clear()


class EmulatorBackend:
    """Machines on the pure-Python emulator. Works everywhere."""

    name = "emulator"

    def why_unavailable(self) -> str | None:
        """None: there is nothing that it needs."""
        return None

    def prepare(self) -> None:
        """Nothing: a machine is made in no time."""

    def machine(self, *, irqchip: bool = False, cpus: int = 1) -> EmulatorMachine:
        """A new, empty machine; with `irqchip`, with two 8259As and an 8254.

        Raises ConfigurationError for more than one processor.
        """
        if cpus != 1:
            raise ConfigurationError(f"{cpus} vCPUs: the emulator has one; use cpus=1, or the kvm backend")
        return EmulatorMachine(irqchip=irqchip)
