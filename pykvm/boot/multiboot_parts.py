"""Multiboot, what both versions share: the kernel's pieces, modules, symbols and the memory map."""

from __future__ import annotations

from pykvm import layout
from pykvm.boot import ELF_MAGIC, Module, elf
from pykvm.boot.placement import Piece, Placement, ram_ranges
from pykvm.errors import ConfigurationError, ImageError
from pykvm.values import Value, replace

TYPE_CHECKING = False  # typing costs milliseconds at start-up; type checkers know this name
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pykvm.memory import Memory

BOOT_LOADER_NAME = b"pykvm\0"

AVAILABLE, RESERVED = 1, 2  # memory map entry types
LOW_MEMORY_END = 0xA_0000  # conventional memory; then, up to 1 MiB, video and ROM on a PC
HIGH_MEMORY = 0x10_0000

SECTION_TABLE_MAX = 0x4000  # bytes; a longer one is left out, to leave room for the rest
SYMBOL_ALIGN = 16


class Addresses(Value):
    """The address fields of a header, for kernels in no format the loader knows; all physical."""

    header: int
    load: int
    load_end: int  # 0: to the end of the file
    bss_end: int  # 0: no bss


class Kernel(Value):
    """A kernel's pieces and its entry point, physical; `elf` if that is its format."""

    pieces: tuple[Piece, ...]
    entry: int
    elf: elf.Elf | None = None

    @property
    def start(self) -> int:
        """The lowest address of the kernel."""
        return min(piece.address for piece in self.pieces)

    @property
    def end(self) -> int:
        """The first address behind the kernel."""
        return max(piece.end for piece in self.pieces)

    def moved(self, distance: int) -> Kernel:
        """The same kernel `distance` bytes higher."""
        pieces = tuple(replace(piece, address=piece.address + distance) for piece in self.pieces)
        return replace(self, pieces=pieces, entry=self.entry + distance)


class PlacedModule(Value):
    """Where a module went: start..end, physical, and its NUL-terminated string."""

    start: int
    end: int
    command_line: bytes


def elf_kernel(image: bytes, entry: int | None = None) -> Kernel:
    """The kernel in an ELF file, entered at the physical `entry` or where the file says.

    Raises ImageError if it is not an ELF file, or damaged.
    """
    if not image.startswith(ELF_MAGIC):
        raise ImageError("Multiboot: the image is not ELF and its header has no load addresses")
    parsed = elf.parse(image)
    return Kernel(parsed.pieces(), parsed.physical_entry() if entry is None else entry, parsed)


def addressed_kernel(image: bytes, offset: int, fields: Addresses, entry: int) -> Kernel:
    """The kernel at the addresses that its header, at `offset` in the file, gives.

    Raises ImageError if they contradict each other or the file.
    """
    start = offset - (fields.header - fields.load)
    if not 0 <= fields.load <= fields.header or start < 0:
        raise ImageError(
            f"Multiboot: load address {fields.load:#x} and header address {fields.header:#x}"
            f" do not fit a header at file offset {offset:#x}"
        )
    size = fields.load_end - fields.load if fields.load_end else len(image) - start
    if not 0 < size <= len(image) - start:
        raise ImageError(
            f"Multiboot: truncated: the header loads {fields.load:#x}..{fields.load_end:#x}"
            f" from file offset {start:#x}, the file has {len(image):#x} bytes"
        )
    end = fields.bss_end or fields.load + size
    if end < fields.load + size:
        raise ImageError(f"Multiboot: the bss ends at {end:#x}, inside the loaded {size:#x} bytes")
    data = memoryview(image)[start : start + size]
    return Kernel((Piece(fields.load, data, end - fields.load, "the kernel"),), entry)


def place_kernel(placement: Placement, kernel: Kernel) -> None:
    """Add the kernel's pieces. Raises ImageError if its entry point is in none of them."""
    if not any(piece.address <= kernel.entry < piece.end for piece in kernel.pieces):
        raise ImageError(f"Multiboot: the entry point {kernel.entry:#x} is outside the kernel")
    for piece in kernel.pieces:
        placement.add(piece)


def place_modules(placement: Placement, modules: Sequence[Module], start: int) -> list[PlacedModule]:
    """Add the modules at the lowest free pages from `start` on, below the device hole."""
    placed = []
    for index, module in enumerate(modules):
        what = f"module {index} ({module.command_line!r})"
        size = len(module.data)
        address = placement.find(size, what, start=start, end=layout.HOLE_START)
        placement.add(Piece(address, module.data, size, what))
        placed.append(PlacedModule(address, address + size, c_string(module.command_line, what)))
    return placed


def place_symbols(placement: Placement, kernel: Kernel, start: int) -> bytes:
    """Add the sections that are no part of the memory image: symbols, strings, debug information.

    Returns the section headers with their addresses filled in; nothing if the kernel has none.
    """
    if kernel.elf is None or len(kernel.elf.section_table({})) > SECTION_TABLE_MAX:
        return b""
    addresses = {}
    for index, section in enumerate(kernel.elf.sections):
        size = len(section.data)
        if size == 0 or section.address != 0:
            continue
        what = f"ELF section {index}"
        addresses[index] = placement.find(size, what, start=start, end=layout.HOLE_START, align=SYMBOL_ALIGN)
        placement.add(Piece(addresses[index], section.data, size, what))
    return kernel.elf.section_table(addresses)


def place_information(placement: Placement, information: bytes) -> None:
    """Add the boot information at BOOT_INFO. Raises ImageError if it is too long."""
    room = layout.BOOT_INFO_END - layout.BOOT_INFO
    if len(information) > room:
        raise ImageError(
            f"Multiboot: command line, modules and memory map take {len(information)} bytes, {room} fit"
        )
    placement.add(Piece(layout.BOOT_INFO, information, len(information), "the boot information"))


def c_string(text: str, what: str) -> bytes:
    """Return `text` as NUL-terminated UTF-8. Raises ConfigurationError if that cannot be."""
    if "\0" in text:
        raise ConfigurationError(f"the string of {what} contains a NUL")
    try:
        return text.encode("utf-8", "surrogateescape") + b"\0"
    except UnicodeEncodeError as error:
        raise ConfigurationError(f"the string of {what} is not text: {error}") from error


def memory_map(memory: Memory) -> list[tuple[int, int, int]]:
    """Return (address, bytes, type) of all memory, ascending, as a PC's firmware would report it."""
    areas = (
        (0, LOW_MEMORY_END, AVAILABLE),
        (LOW_MEMORY_END, HIGH_MEMORY, RESERVED),
        (HIGH_MEMORY, 1 << 64, AVAILABLE),
    )
    ranges = [(slot.address, slot.size, RESERVED) for slot in memory if slot.readonly]
    for start, end in ram_ranges(memory):
        for low, high, kind in areas:
            base, top = max(start, low), min(end, high)
            if base < top:
                ranges.append((base, top - base, kind))
    return sorted(ranges)


def basic_memory(ranges: Sequence[tuple[int, int, int]]) -> tuple[int, int]:
    """Return the KiB of memory that begin at 0 and at 1 MiB, up to the first gap."""
    sizes = {address: size >> 10 for address, size, kind in ranges if kind == AVAILABLE}
    return sizes.get(0, 0), sizes.get(HIGH_MEMORY, 0)
