"""Boot: guest images and the processor state they start in. Memory in, registers out.

`load` puts an image into guest memory and returns an `Entry`: the registers of the first
processor. Nothing here knows a backend. Each format's loader is imported when it is needed.

=============  ==========================================  =======================
format         told by                                     mode at entry
=============  ==========================================  =======================
multiboot2     header in the first 32 KiB (Multiboot2 3.1)  protected
multiboot      header in the first 8 KiB (0.6.96, 3.1)      protected
elf            0x7f "ELF"                                  protected (32), long (64)
linux          "HdrS" at 0x202 (not loadable yet)
boot-sector    512 bytes that end in 0x55 0xaa             real
flat           everything else                             real
=============  ==========================================  =======================

A Multiboot kernel is usually an ELF file too, and may carry both headers: the newer protocol wins.
A larger image that starts with a boot sector is flat, because nothing here could read the rest of
the disk for it. `LoadOptions.format` overrides all of this.
"""

from __future__ import annotations

from pykvm.errors import ConfigurationError, ImageError
from pykvm.registers import Registers, SystemRegisters
from pykvm.values import Value

TYPE_CHECKING = False  # typing costs milliseconds at start-up; type checkers know this name
if TYPE_CHECKING:
    import os

    from pykvm.memory import Memory

__all__ = ["FORMATS", "Entry", "LoadOptions", "Module", "Rom", "detect", "load", "read_image"]

FORMATS = ("flat", "boot-sector", "elf", "multiboot", "multiboot2")
"""The formats that `load` knows."""

IMAGE_MAX = 1 << 30
"""Largest file that `read_image` takes, in bytes."""

BOOT_SECTOR_SIZE = 512
BOOT_SIGNATURE = b"\x55\xaa"

ELF_MAGIC = b"\x7fELF"
LINUX_MAGIC = b"HdrS"
LINUX_MAGIC_OFFSET = 0x202  # Documentation/arch/x86/boot.rst


class Module(Value):
    """A file handed to a Multiboot kernel, with the string that names it."""

    data: bytes
    command_line: str = ""


class LoadOptions(Value):
    """How to load an image; None means what the image itself asks for.

    `format` is one of `FORMATS`; `mode` is the processor mode at entry: ``"real"``,
    ``"protected"`` or ``"long"``; `load_address` is guest-physical and for flat images only;
    `command_line` and `modules` go to kernels whose boot protocol has a place for them.
    """

    format: str | None = None
    mode: str | None = None
    load_address: int | None = None
    command_line: str = ""
    modules: tuple[Module, ...] = ()


class Rom(Value):
    """Read-only memory that the machine must map at guest-physical `address`."""

    address: int
    data: bytes


class Entry(Value):
    """Where and how the first processor starts, and the ROMs that the image brings."""

    format: str
    registers: Registers
    system_registers: SystemRegisters
    roms: tuple[Rom, ...] = ()


_RESET = SystemRegisters()
_DEFAULTS = LoadOptions()


def detect(image: bytes) -> str:
    """Return the format of `image` by its magic numbers (see the table above)."""
    from pykvm.boot import multiboot_magic

    if multiboot_magic.find_multiboot2(image) is not None:
        return "multiboot2"
    if multiboot_magic.find_multiboot(image) is not None:
        return "multiboot"
    if image.startswith(ELF_MAGIC):
        return "elf"
    if image.startswith(LINUX_MAGIC, LINUX_MAGIC_OFFSET):
        return "linux"
    if len(image) == BOOT_SECTOR_SIZE and image.endswith(BOOT_SIGNATURE):
        return "boot-sector"
    return "flat"


def load(
    image: bytes,
    memory: Memory,
    *,
    system: SystemRegisters = _RESET,
    options: LoadOptions = _DEFAULTS,
) -> Entry:
    """Load `image` into `memory` and return the state in which it starts.

    `system` is the processor's state after RESET, which everything the format leaves open keeps.
    Nothing is written unless everything fits.

    Raises ImageError if the image is damaged or asks for what this machine lacks, and
    ConfigurationError if the options or the memory do not fit the image.
    """
    if not image:
        raise ImageError("the image is empty")
    chosen = options.format or detect(image)
    _check_options(chosen, options)
    if chosen == "elf":
        from pykvm.boot.elf import load_elf as loader
    elif chosen == "multiboot":
        from pykvm.boot.multiboot import load_multiboot as loader
    elif chosen == "multiboot2":
        from pykvm.boot.multiboot2 import load_multiboot2 as loader
    elif chosen == "boot-sector":
        from pykvm.boot.flat import load_boot_sector as loader
    else:
        from pykvm.boot.flat import load_flat as loader
    return loader(image, memory, system, options)


def _check_options(chosen: str, options: LoadOptions) -> None:
    """Refuse options that the chosen format would silently ignore."""
    if chosen == "linux":
        raise ImageError("this is a Linux bzImage, for which there is no loader yet")
    if chosen not in FORMATS:
        raise ConfigurationError(f"unknown image format {chosen!r}: choose one of {', '.join(FORMATS)}")
    if options.mode not in (None, "real", "protected", "long"):
        raise ConfigurationError(f"unknown mode {options.mode!r}: choose real, protected or long")
    forced = {"multiboot": "protected", "multiboot2": "protected", "boot-sector": "real"}.get(chosen)
    if forced is not None and options.mode not in (None, forced):
        raise ConfigurationError(f"a {chosen} image starts in {forced} mode, not {options.mode} mode")
    if options.load_address is not None and chosen != "flat":
        raise ConfigurationError(f"a {chosen} image says itself where it goes: drop the load address")
    if (options.command_line or options.modules) and not chosen.startswith("multiboot"):
        raise ConfigurationError(f"a {chosen} image has no place for a command line or modules")


def read_image(path: str | os.PathLike[str]) -> bytes:
    """Return the contents of the image file at `path`.

    Raises ImageError if it is missing, unreadable, not a file, empty, or over `IMAGE_MAX` bytes.
    """
    import os
    import stat

    name = os.fspath(path)
    try:
        status = os.stat(path)
        loadable = stat.S_ISREG(status.st_mode) and status.st_size <= IMAGE_MAX
        image = b""
        if loadable:
            with open(path, "rb") as file:
                image = file.read()
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        raise ImageError(f"{name!r}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{name!r}: not a regular file")
    if not loadable:
        raise ImageError(f"{name!r}: {status.st_size >> 20} MiB; images go up to {IMAGE_MAX >> 20} MiB")
    if not image:
        raise ImageError(f"{name!r}: the file is empty")
    return image
