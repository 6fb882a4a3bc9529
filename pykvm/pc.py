"""The PC platform: the devices that software written for a PC expects, attached to a machine.

======  =====================================  ======  =====================================
port    device                                 port    device
======  =====================================  ======  =====================================
0x60    i8042 data (reset, A20, self-test)     0xf4    debug exit: ends the run
0x64    i8042 command                          0x3f8   COM1, IRQ 4
0x70    CMOS RAM and clock, IRQ 8              0x600   ACPI power management, IRQ 9
0xe9    debug console                          0xcf9   reset control
======  =====================================  ======  =====================================

Interrupt controllers and the interval timer are the backend's: make the machine with `irqchip=True`,
or the devices here work without interrupts.
"""

from __future__ import annotations

from pykvm.devices.acpi import AcpiPm
from pykvm.devices.cmos import Cmos
from pykvm.devices.debug import DebugConsole, DebugExit
from pykvm.devices.i8042 import I8042, ResetControl
from pykvm.devices.serial import Serial
from pykvm.layout import (
    ACPI_PM_BASE,
    CMOS,
    COM1,
    DEBUG_CONSOLE,
    DEBUG_EXIT,
    HOLE_END,
    HOLE_START,
    I8042_COMMAND,
    I8042_DATA,
    IRQ_ACPI,
    IRQ_COM1,
    IRQ_RTC,
    RESET_CONTROL,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from pykvm.interfaces import IrqLine
    from pykvm.vm import VM

    Output = Callable[[bytes], object]

__all__ = ["Pc"]


def _ignore(data: bytes) -> None:
    """Where output goes that nobody wants."""


class Pc:
    """The devices of a PC on `vm`.

    `output` gets what the guest sends to COM1, `debug_output` what it writes to port 0xe9, byte for byte
    as it comes. `debug_port` is a second port for the latter (firmware uses 0x402). With `qemu_exit` the
    debug-exit port follows QEMU's isa-debug-exit: the status is ``(value << 1) | 1``. Close it before `vm`.

    Raises BusError if something else is attached at one of these ports.
    """

    def __init__(
        self,
        vm: VM,
        *,
        output: Output = _ignore,
        debug_output: Output = _ignore,
        debug_port: int | None = None,
        qemu_exit: bool = False,
    ) -> None:
        def irq(gsi: int) -> IrqLine | None:
            return vm.irq(gsi) if vm.irqchip else None

        self.serial = Serial(irq=irq(IRQ_COM1), output=output)
        self.debug_console = DebugConsole(debug_output)
        self.debug_exit = DebugExit(vm.stop, qemu=qemu_exit)
        self.i8042 = I8042(vm.stop)
        self.reset_control = ResetControl(vm.stop)
        self.acpi = AcpiPm(vm.stop, irq=irq(IRQ_ACPI))
        ram = [(slot.address, slot.size) for slot in vm.memory if slot.name.startswith("ram")]
        self.cmos = Cmos(
            irq=irq(IRQ_RTC),
            memory_below_4g=sum(size for address, size in ram if address < HOLE_START),
            memory_above_4g=sum(size for address, size in ram if address >= HOLE_END),
            cpus=len(vm.vcpus),
        )
        vm.attach(self.serial, port=COM1, size=8)
        vm.attach(self.debug_exit, port=DEBUG_EXIT, size=4)
        vm.attach(self.debug_console, port=DEBUG_CONSOLE, size=1)
        vm.attach(self.i8042.data, port=I8042_DATA, size=1)
        vm.attach(self.i8042.command, port=I8042_COMMAND, size=1)
        vm.attach(self.cmos, port=CMOS, size=2)
        vm.attach(self.acpi, port=ACPI_PM_BASE, size=AcpiPm.SIZE)
        vm.attach(self.reset_control, port=RESET_CONTROL, size=1)
        if debug_port is not None:
            vm.attach(self.debug_console, port=debug_port, size=1)

    def close(self) -> None:
        """Stop the devices' own timers. Twice is fine."""
        self.cmos.close()

    def __enter__(self) -> Pc:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
