"""ELF executables for x86: 32-bit and 64-bit, by program headers (System V gABI, chapters 4 and 5)."""

from __future__ import annotations

import struct

from pykvm.boot import ELF_MAGIC, Entry, LoadOptions, modes
from pykvm.boot.placement import Piece, Placement
from pykvm.errors import ImageError
from pykvm.registers import SystemRegisters
from pykvm.values import Value

TYPE_CHECKING = False  # typing costs milliseconds at start-up; type checkers know this name
if TYPE_CHECKING:
    from pykvm.memory import Memory

# e_ident
EI_CLASS, EI_DATA, EI_VERSION = 4, 5, 6
ELFCLASS32, ELFCLASS64 = 1, 2
ELFDATA2LSB = 1
EV_CURRENT = 1

ET_EXEC, ET_DYN = 2, 3
EM_386, EM_X86_64 = 3, 62
PT_LOAD, PT_INTERP = 1, 3
PN_XNUM = 0xFFFF  # "too many for this field"
SHT_NULL, SHT_NOBITS = 0, 8


class _Class(Value):
    """How one ELF class lays out its headers. The program header's fields differ in order too."""

    bits: int
    machine: int
    header: struct.Struct
    program_header: struct.Struct
    program_fields: tuple[int, ...]  # where type, offset, vaddr, paddr, filesz, memsz are
    section_header: struct.Struct


_CLASSES = {
    ELFCLASS32: _Class(
        bits=32,
        machine=EM_386,
        header=struct.Struct("<16sHHIIIIIHHHHHH"),
        program_header=struct.Struct("<8I"),
        program_fields=(0, 1, 2, 3, 4, 5),
        section_header=struct.Struct("<10I"),
    ),
    ELFCLASS64: _Class(
        bits=64,
        machine=EM_X86_64,
        header=struct.Struct("<16sHHIQQQIHHHHHH"),
        program_header=struct.Struct("<IIQQQQQQ"),
        program_fields=(0, 2, 3, 4, 5, 6),
        section_header=struct.Struct("<IIQQQQIIQQ"),
    ),
}


class Segment(Value):
    """A PT_LOAD segment with something in it."""

    virtual: int
    physical: int
    data: memoryview
    memory_size: int


class Section(Value):
    """A section header: its raw fields, in the order of ``Elf32_Shdr``, and what it covers."""

    fields: tuple[int, ...]
    data: memoryview  # empty if it has none in the file

    @property
    def address(self) -> int:
        """``sh_addr``; 0 if the section is not part of the memory image."""
        return self.fields[3]


class Elf(Value):
    """A parsed executable. `sections` is empty if there are none, or if their table is damaged."""

    bits: int
    entry: int
    segments: tuple[Segment, ...]
    sections: tuple[Section, ...]
    section_names: int  # e_shstrndx

    def pieces(self) -> tuple[Piece, ...]:
        """The segments at their physical addresses."""
        return tuple(
            Piece(s.physical, s.data, s.memory_size, f"ELF segment {index}")
            for index, s in enumerate(self.segments)
        )

    def physical_entry(self) -> int:
        """Where the entry point is in physical memory.

        ``e_entry`` is a virtual address by the gABI; a kernel that is linked high but entered
        without paging may give a physical one. Raises ImageError if no segment's data has it.
        """
        for segment in self.segments:
            if segment.virtual <= self.entry < segment.virtual + len(segment.data):
                return self.entry - segment.virtual + segment.physical
        for segment in self.segments:
            if segment.physical <= self.entry < segment.physical + len(segment.data):
                return self.entry
        raise ImageError(f"ELF: the entry point {self.entry:#x} is not in any loaded segment")

    def section_table(self, addresses: dict[int, int]) -> bytes:
        """The section headers, with ``sh_addr`` replaced where `addresses` (by index) says so."""
        layout = _CLASSES[ELFCLASS32 if self.bits == 32 else ELFCLASS64].section_header
        table = bytearray()
        for index, section in enumerate(self.sections):
            address = addresses.get(index, section.address)
            table += layout.pack(*section.fields[:3], address, *section.fields[4:])
        return bytes(table)


def load_elf(image: bytes, memory: Memory, system: SystemRegisters, options: LoadOptions) -> Entry:
    """Load an ELF executable at its physical addresses and start at its entry point.

    A 32-bit file starts in protected mode, a 64-bit one in long mode, unless `options` says
    otherwise. A position-independent file is loaded where it is linked.
    """
    elf = parse(image)
    mode = options.mode or ("protected" if elf.bits == 32 else "long")
    placement = Placement(memory)
    modes.reserve_structures(placement, mode)
    for piece in elf.pieces():
        placement.add(piece)
    registers, system_registers = modes.enter(mode, elf.physical_entry(), memory, system)
    placement.write()
    return Entry("elf", registers, system_registers)


def parse(image: bytes) -> Elf:
    """Parse an x86 executable. Raises ImageError for anything that could not be loaded."""
    if not image.startswith(ELF_MAGIC):
        raise ImageError("ELF: the file does not start with 0x7f 'ELF'")
    if len(image) <= EI_VERSION:
        raise ImageError("ELF: the file ends inside its header")
    kind = _CLASSES.get(image[EI_CLASS])
    if kind is None:
        raise ImageError(f"ELF: class {image[EI_CLASS]} is neither 32-bit (1) nor 64-bit (2)")
    if image[EI_DATA] != ELFDATA2LSB:
        raise ImageError("ELF: the file is not little-endian, so it is not for x86")
    if len(image) < kind.header.size:
        raise ImageError("ELF: the file ends inside its header")
    header = kind.header.unpack_from(image)
    _, file_type, machine, version, entry, phoff, shoff, _, _, phentsize, phnum, shentsize, shnum, names = (
        header
    )
    if machine != kind.machine or version != EV_CURRENT:
        raise ImageError(
            f"ELF: machine {machine}, version {version}; a {kind.bits}-bit x86 file has {kind.machine}, 1"
        )
    if file_type not in (ET_EXEC, ET_DYN):
        raise ImageError(f"ELF: type {file_type} is not an executable (2 or 3); was it linked?")
    segments = _segments(image, kind, phoff, phentsize, phnum)
    sections = _sections(image, kind, shoff, shentsize, shnum)
    return Elf(kind.bits, entry, segments, sections, names)


def _segments(image: bytes, kind: _Class, offset: int, size: int, count: int) -> tuple[Segment, ...]:
    if count == PN_XNUM:
        raise ImageError("ELF: the file claims 65535 program headers or more")
    if count and size != kind.program_header.size:
        raise ImageError(f"ELF: program headers of {size} bytes, not {kind.program_header.size}")
    if offset + count * size > len(image):
        raise ImageError(f"ELF: truncated: {count} program headers at {offset:#x}, {len(image)} bytes in all")
    segments = []
    for index in range(count):
        fields = kind.program_header.unpack_from(image, offset + index * size)
        segment_type, *numbers = (fields[i] for i in kind.program_fields)
        if segment_type == PT_INTERP:
            raise ImageError("ELF: a dynamically linked program, which needs an operating system under it")
        if segment_type == PT_LOAD and numbers[-1]:
            segments.append(_segment(image, kind, index, numbers))
    if not segments:
        raise ImageError("ELF: nothing to load (no PT_LOAD program header)")
    return tuple(segments)


def _segment(image: bytes, kind: _Class, index: int, numbers: list[int]) -> Segment:
    offset, virtual, physical, filesz, memsz = numbers
    if filesz > memsz:
        raise ImageError(f"ELF: program header {index} has {filesz} bytes in the file, {memsz} in memory")
    if offset + filesz > len(image):
        raise ImageError(
            f"ELF: truncated: program header {index} wants bytes {offset:#x}..{offset + filesz:#x},"
            f" the file has {len(image):#x}"
        )
    if max(physical, virtual) + memsz > 1 << kind.bits:
        raise ImageError(f"ELF: program header {index} runs beyond the {kind.bits}-bit address space")
    return Segment(virtual, physical, memoryview(image)[offset : offset + filesz], memsz)


def _sections(image: bytes, kind: _Class, offset: int, size: int, count: int) -> tuple[Section, ...]:
    """The section headers, or none: nothing is loaded by them, so damage to them does not matter."""
    if not offset or size != kind.section_header.size or offset + count * size > len(image):
        return ()
    view = memoryview(image)
    sections = []
    for index in range(count):
        fields = kind.section_header.unpack_from(image, offset + index * size)
        has_data = fields[1] not in (SHT_NULL, SHT_NOBITS)
        start, length = fields[4:6] if has_data else (0, 0)
        if start + length > len(image):
            return ()
        sections.append(Section(fields, view[start : start + length]))
    return tuple(sections)
