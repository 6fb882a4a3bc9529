"""Errors: everything pykvm raises on purpose.

::

    Exception
    └── PykvmError                       catch this one to catch all of ours
        ├── KvmError            (OSError)    an ioctl failed: .request names it, .errno says how
        ├── BackendUnavailable               this host cannot run the asked-for backend
        ├── ConfigurationError  (ValueError) a machine that cannot be built as described
        │   └── BusError                     device ranges that overlap or do not fit
        ├── MemoryAccessError   (LookupError) a host access to a guest address that has no memory
        ├── MemoryInUseError    (BufferError) closing memory that NumPy views still point into
        ├── ImageError          (ValueError) a guest image that cannot be loaded
        ├── UnsupportedInstruction           the emulator met an instruction it does not have
        └── SnapshotError       (ValueError) a snapshot that is damaged or does not fit this machine

What a *guest* does wrong is never an exception: it is an `Exit` (see `pykvm.exits`).
"""

from __future__ import annotations

import os

__all__ = [
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
]


class PykvmError(Exception):
    """Base of all errors that pykvm raises on purpose."""


class KvmError(PykvmError, OSError):
    """A call into KVM failed.

    `request` is the ioctl's kernel name (``"KVM_CREATE_VCPU"``), or the name of another
    system call; `errno` is what it returned; `detail` adds what KVM itself cannot say,
    such as which MSR of a list was refused.
    """

    request: str
    detail: str

    def __init__(self, request: str, errno: int, detail: str = "") -> None:
        OSError.__init__(self, errno, os.strerror(errno))
        self.request = request
        self.detail = detail

    def __str__(self) -> str:
        tail = f": {self.detail}" if self.detail else ""
        return f"{self.request}: {self.strerror} (errno {self.errno}){tail}"

    def __reduce__(self) -> tuple[type[KvmError], tuple[str, int, str]]:
        return KvmError, (self.request, self.errno or 0, self.detail)


class BackendUnavailable(PykvmError):
    """The asked-for backend cannot run on this host; the message says why and what to do."""


class ConfigurationError(PykvmError, ValueError):
    """A machine cannot be built as described: sizes, alignment, overlaps, missing parts."""


class BusError(ConfigurationError):
    """A device range overlaps another, is empty, or does not fit the address space."""


class MemoryAccessError(PykvmError, LookupError):
    """The host accessed guest-physical addresses that no memory slot covers."""

    address: int
    size: int

    def __init__(self, address: int, size: int, why: str = "no memory slot covers it") -> None:
        super().__init__(f"guest-physical {address:#x}..{address + size:#x} ({size} bytes): {why}")
        self.address = address
        self.size = size


class MemoryInUseError(PykvmError, BufferError):
    """Guest memory cannot be unmapped because views of it are still alive."""


class ImageError(PykvmError, ValueError):
    """A guest image is missing, damaged, or not something that can be loaded."""


class UnsupportedInstruction(PykvmError):
    """The emulator met an instruction that it does not implement.

    `rip` is its linear address, `code` its bytes (up to 15), `mnemonic` its name where known.
    """

    rip: int
    code: bytes
    mnemonic: str

    def __init__(self, rip: int, code: bytes, mnemonic: str = "") -> None:
        name = f" ({mnemonic})" if mnemonic else ""
        super().__init__(f"unsupported instruction at {rip:#x}: {code.hex(' ')}{name}")
        self.rip = rip
        self.code = code
        self.mnemonic = mnemonic


class SnapshotError(PykvmError, ValueError):
    """A snapshot is damaged, of another version, or does not fit this machine."""
