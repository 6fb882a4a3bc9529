"""Firmware: a PC BIOS image, mapped where the processor and the PC architecture look for it.

The image ends at 4 GiB, where the processor fetches its first instruction (SDM volume 3, 10.1.4),
as ROM. A second copy ends at 1 MiB, in RAM: on a PC the chipset shadows the ROM there, and
firmware writes to it. SeaBIOS fills its shadow through the chipset's PAM registers, beyond the
last 128 KiB that a PC shows there by itself. This machine has no such registers, so that the
whole image is copied at once; without this a 256 KiB SeaBIOS stops before POST.
"""

from __future__ import annotations

from pykvm import layout
from pykvm.boot import Entry, Rom
from pykvm.boot.placement import Piece, Placement
from pykvm.errors import ImageError
from pykvm.registers import RESET_REGISTERS, SystemRegisters

TYPE_CHECKING = False  # typing costs milliseconds at start-up; type checkers know this name
if TYPE_CHECKING:
    from pykvm.memory import Memory


def load_firmware(image: bytes, memory: Memory) -> Entry:
    """Copy firmware below 1 MiB and return the state after RESET, with the ROM to map below 4 GiB.

    Raises ImageError unless the size is a multiple of 4 KiB up to FIRMWARE_MAX, and
    ConfigurationError if there is no memory for the copy.
    """
    size = len(image)
    if not 0 < size <= layout.FIRMWARE_MAX or size % layout.PAGE_SIZE:
        raise ImageError(
            f"firmware is a multiple of 4 KiB, up to {layout.FIRMWARE_MAX >> 10} KiB; this has {size} bytes"
        )
    placement = Placement(memory)
    placement.add(Piece(layout.FIRMWARE_LOW_END - size, image, size, "the firmware's copy below 1 MiB"))
    placement.write()
    rom = Rom(layout.HOLE_END - size, image)
    return Entry("firmware", RESET_REGISTERS, SystemRegisters(), roms=(rom,))
