"""pykvm: virtual machines inside the Python process.

The public names, each imported when it is first used, so that importing the package costs nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.boot import Entry as Entry
    from pykvm.boot import LoadOptions as LoadOptions
    from pykvm.boot import Module as Module
    from pykvm.bus import Bus as Bus
    from pykvm.devices.registerfile import Register as Register
    from pykvm.devices.registerfile import RegisterFile as RegisterFile
    from pykvm.errors import BackendUnavailable as BackendUnavailable
    from pykvm.errors import BusError as BusError
    from pykvm.errors import ConfigurationError as ConfigurationError
    from pykvm.errors import ImageError as ImageError
    from pykvm.errors import KvmError as KvmError
    from pykvm.errors import MemoryAccessError as MemoryAccessError
    from pykvm.errors import MemoryInUseError as MemoryInUseError
    from pykvm.errors import PykvmError as PykvmError
    from pykvm.errors import SnapshotError as SnapshotError
    from pykvm.errors import UnsupportedInstruction as UnsupportedInstruction
    from pykvm.exits import Debug as Debug
    from pykvm.exits import EmulationFailure as EmulationFailure
    from pykvm.exits import Exit as Exit
    from pykvm.exits import Halt as Halt
    from pykvm.exits import Interrupted as Interrupted
    from pykvm.exits import Shutdown as Shutdown
    from pykvm.exits import Stopped as Stopped
    from pykvm.exits import Unhandled as Unhandled
    from pykvm.interfaces import Device as Device
    from pykvm.memory import Memory as Memory
    from pykvm.pc import Pc as Pc
    from pykvm.registers import Registers as Registers
    from pykvm.registers import SystemRegisters as SystemRegisters
    from pykvm.vm import VM as VM

_MODULES = {
    "boot": ("Entry", "LoadOptions", "Module"),
    "bus": ("Bus",),
    "devices.registerfile": ("Register", "RegisterFile"),
    "errors": (
        "BackendUnavailable",
        "BusError",
        "ConfigurationError",
        "ImageError",
        "KvmError",
        "MemoryAccessError",
        "MemoryInUseError",
        "PykvmError",
        "SnapshotError",
        "UnsupportedInstruction",
    ),
    "exits": ("Debug", "EmulationFailure", "Exit", "Halt", "Interrupted", "Shutdown", "Stopped", "Unhandled"),
    "interfaces": ("Device",),
    "memory": ("Memory",),
    "pc": ("Pc",),
    "registers": ("Registers", "SystemRegisters"),
    "vm": ("VM",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted([*_HOME, "__version__"])

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f"pykvm.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
