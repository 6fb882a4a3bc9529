"""Guest images put together by hand: ELF files, Multiboot and Multiboot2 kernels."""

from __future__ import annotations

import struct
from dataclasses import dataclass

CODE = b"\xf4" * 16  # hlt


@dataclass(frozen=True)
class Load:
    """A PT_LOAD program header and its data; `filesz`, `memsz` and `virtual` may lie."""

    physical: int
    data: bytes = CODE
    virtual: int | None = None
    filesz: int | None = None
    memsz: int | None = None
    type: int = 1


@dataclass(frozen=True)
class Part:
    """A section that is not part of the memory image, such as a symbol table."""

    data: bytes
    type: int = 3
    address: int = 0


def elf(
    loads: tuple[Load, ...] = (Load(0x10_0000),),
    *,
    bits: int = 32,
    entry: int | None = None,
    parts: tuple[Part, ...] = (),
    machine: int | None = None,
    type: int = 2,
) -> bytes:
    """An ELF file: header, program headers, data, sections."""
    wide = bits == 64
    header_size, program_size, section_size = (64, 56, 64) if wide else (52, 32, 40)
    offset = header_size + program_size * len(loads)
    programs, body = b"", b""
    for load in loads:
        filesz = len(load.data) if load.filesz is None else load.filesz
        memsz = max(filesz, len(load.data)) if load.memsz is None else load.memsz
        virtual = load.physical if load.virtual is None else load.virtual
        at = offset + len(body)
        if wide:
            programs += struct.pack("<IIQQQQQQ", load.type, 5, at, virtual, load.physical, filesz, memsz, 16)
        else:
            programs += struct.pack("<8I", load.type, at, virtual, load.physical, filesz, memsz, 5, 16)
        body += load.data
    sections = bytes(section_size) if parts else b""
    for part in parts:
        at = offset + len(body)
        layout = "<IIQQQQIIQQ" if wide else "<10I"
        sections += struct.pack(layout, 0, part.type, 0, part.address, at, len(part.data), 0, 0, 1, 0)
        body += part.data
    first = loads[0].physical if loads else 0
    header = struct.pack(
        "<4sBBB9xHHIQQQIHHHHHH" if wide else "<4sBBB9xHHIIIIIHHHHHH",
        b"\x7fELF",
        2 if wide else 1,
        1,
        1,
        type,
        machine or (62 if wide else 3),
        1,
        first if entry is None else entry,
        header_size,
        offset + len(body) if parts else 0,
        0,
        header_size,
        program_size,
        len(loads),
        section_size,
        len(parts) + 1 if parts else 0,
        1 if parts else 0,
    )
    return header + programs + body + sections


def multiboot_header(flags: int = 0, addresses: tuple[int, ...] = ()) -> bytes:
    """A Multiboot header; `addresses` are header, load, load end, bss end and entry."""
    magic = 0x1BADB002
    return struct.pack("<3I", magic, flags, -(magic + flags) & 0xFFFF_FFFF) + struct.pack(
        f"<{len(addresses)}I", *addresses
    )


def tag(kind: int, body: bytes = b"", *, optional: bool = False, size: int | None = None) -> bytes:
    """A Multiboot2 header tag, padded to 8 bytes."""
    head = struct.pack("<HHI", kind, optional, 8 + len(body) if size is None else size)
    return head + body + bytes(-len(body) % 8)


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def multiboot2_header(*tags: bytes, end: bool = True, architecture: int = 0) -> bytes:
    """A Multiboot2 header with these tags."""
    body = b"".join(tags) + (tag(0) if end else b"")
    magic, length = 0xE85250D6, 16 + len(body)
    return words(magic, architecture, length, -(magic + architecture + length) & 0xFFFF_FFFF) + body


def multiboot2_elf(*tags: bytes, at: int = 0x10_0000, **elf_options: object) -> bytes:
    """A Multiboot2 kernel in ELF format: an aligned header, then code at the entry point."""
    header = multiboot2_header(*tags)
    padding = bytes(-(52 + 32) % 8)  # the header's file offset must be a multiple of 8
    data = padding + header + CODE
    entry = at + len(padding) + len(header)
    return elf((Load(at, data, memsz=len(data) + 0x100),), entry=entry, **elf_options)  # type: ignore[arg-type]


def describe(value: object) -> str | None:
    """A short test id: images have none of their own."""
    return "image" if isinstance(value, bytes) else None
