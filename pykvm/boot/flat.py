"""Flat binaries and boot sectors: bytes without a header, put into memory as they are."""

from __future__ import annotations

from pykvm import layout
from pykvm.boot import BOOT_SECTOR_SIZE, BOOT_SIGNATURE, Entry, LoadOptions, modes
from pykvm.boot.placement import Piece, Placement
from pykvm.errors import ConfigurationError, ImageError
from pykvm.registers import SystemRegisters
from pykvm.values import replace

TYPE_CHECKING = False  # typing costs milliseconds at start-up; type checkers know this name
if TYPE_CHECKING:
    from pykvm.memory import Memory

FIRST_HARD_DISK = 0x80  # the BIOS passes the drive it booted from in DL


def load_flat(image: bytes, memory: Memory, system: SystemRegisters, options: LoadOptions) -> Entry:
    """Load `image` at the load address and start at its first byte.

    Without an address, real-mode images go to REAL_MODE_IMAGE and all others to FLAT_IMAGE. In
    real mode CS is 0 below 64 KiB and the address divided by 16 above.
    """
    mode = options.mode or "real"
    default = layout.REAL_MODE_IMAGE if mode == "real" else layout.FLAT_IMAGE
    address = default if options.load_address is None else options.load_address
    if address < 0:
        raise ConfigurationError(f"the load address cannot be negative ({address})")
    placement = Placement(memory)
    modes.reserve_structures(placement, mode)
    placement.add(Piece(address, image, len(image), "the flat image"))
    registers, system_registers = modes.enter(mode, address, memory, system)
    placement.write()
    return Entry("flat", registers, system_registers)


def load_boot_sector(image: bytes, memory: Memory, system: SystemRegisters, options: LoadOptions) -> Entry:
    """Load the first sector of `image` at 0x7c00, as a BIOS does with a disk.

    There is no BIOS behind it: the sector must not call for one.
    """
    sector = image[:BOOT_SECTOR_SIZE]
    if len(sector) < BOOT_SECTOR_SIZE or not sector.endswith(BOOT_SIGNATURE):
        raise ImageError("a boot sector has 512 bytes and ends in 0x55 0xaa; this image does not")
    placement = Placement(memory)
    placement.add(Piece(layout.BOOT_SECTOR, sector, len(sector), "the boot sector"))
    registers, system_registers = modes.enter("real", layout.BOOT_SECTOR, memory, system)
    placement.write()
    return Entry("boot-sector", replace(registers, rdx=FIRST_HARD_DISK), system_registers)
