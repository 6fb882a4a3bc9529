"""Multiboot2 kernels, version 2.0: 32-bit protected mode with boot information in tags."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from pykvm import layout
from pykvm.boot import Entry, LoadOptions, modes
from pykvm.boot.multiboot_magic import MULTIBOOT2_HEADER_SIZE, MULTIBOOT2_SEARCH, find_multiboot2
from pykvm.boot.multiboot_parts import (
    BOOT_LOADER_NAME,
    Addresses,
    Kernel,
    PlacedModule,
    addressed_kernel,
    basic_memory,
    c_string,
    elf_kernel,
    memory_map,
    place_information,
    place_kernel,
    place_modules,
    place_symbols,
)
from pykvm.boot.placement import Placement, align_up
from pykvm.errors import ImageError
from pykvm.registers import SystemRegisters
from pykvm.values import Value, replace

TYPE_CHECKING = False  # typing costs milliseconds at start-up; type checkers know this name
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pykvm.memory import Memory

ARCHITECTURE_I386 = 0
LOADED_BY = 0x36D76289  # EAX at entry

# Header tags (3.1.3 to 3.1.13)
TAG_END = 0
TAG_INFORMATION_REQUEST = 1
TAG_ADDRESS = 2
TAG_ENTRY = 3
TAG_CONSOLE = 4
TAG_FRAMEBUFFER = 5
TAG_MODULE_ALIGN = 6
TAG_EFI_BOOT_SERVICES = 7
TAG_ENTRY_EFI32 = 8
TAG_ENTRY_EFI64 = 9
TAG_RELOCATABLE = 10
TAG_OPTIONAL = 1  # flag: the loader may ignore a tag that it cannot serve

# Modules are page-aligned anyway; the EFI entries count on EFI machines only (3.1.10, 3.1.11)
_HARMLESS = (TAG_MODULE_ALIGN, TAG_ENTRY_EFI32, TAG_ENTRY_EFI64)

CONSOLE_REQUIRED = 1
LOAD_FROM_FILE_START = 0xFFFF_FFFF  # load_addr of the address tag

# Boot information tags (3.6)
INFO_END = 0
INFO_COMMAND_LINE = 1
INFO_BOOT_LOADER_NAME = 2
INFO_MODULE = 3
INFO_BASIC_MEMORY = 4
INFO_MEMORY_MAP = 6
INFO_ELF_SECTIONS = 9
INFO_LOAD_BASE = 21
INFO_LAST = 21
"""A kernel may ask for any tag up to this one. Those missing from this file describe hardware and
firmware (video, EFI, APM, SMBIOS, network boot) that the machine does not have: nothing to tell."""

_TAG = struct.Struct("<HHI")  # type, flags, size with this header
_MEMORY_RANGE = struct.Struct("<QQII")  # address, length, type, reserved


class _Range(Value):
    """The relocatable tag: where a kernel may be put. `last` is the last address it may use."""

    first: int
    last: int
    align: int
    preference: int  # 1: as low as possible, 2: as high as possible; a wish that is not granted


@dataclass(slots=True)
class _Header:
    """What the header's tags ask for."""

    addresses: Addresses | None = None
    entry: int | None = None
    range: _Range | None = None


def load_multiboot2(image: bytes, memory: Memory, system: SystemRegisters, options: LoadOptions) -> Entry:
    """Load a Multiboot2 kernel with its modules, and the boot information at BOOT_INFO.

    EAX holds the magic number, EBX the address of the boot information. A relocatable kernel
    stays where it is linked if that is possible, and else goes to the lowest free place. Modules
    follow the kernel, page-aligned. Raises ImageError if the kernel needs what is not supported.
    """
    offset = find_multiboot2(image)
    if offset is None:
        raise ImageError(f"Multiboot2: no valid header in the first {MULTIBOOT2_SEARCH} bytes")
    header = _parse(image, offset)
    placement = Placement(memory)
    modes.reserve_structures(placement, "protected")
    kernel = _relocated(placement, _kernel(image, offset, header), header.range)
    place_kernel(placement, kernel)
    behind = max(kernel.end, layout.FLAT_IMAGE)
    modules = place_modules(placement, options.modules, behind)
    symbols = place_symbols(placement, kernel, behind)
    base = None if header.range is None else kernel.start
    tags = _information(kernel, memory, options.command_line, modules, symbols, base)
    place_information(placement, tags)
    registers, system_registers = modes.enter("protected", kernel.entry, memory, system)
    placement.write()
    return Entry("multiboot2", replace(registers, rax=LOADED_BY, rbx=layout.BOOT_INFO), system_registers)


def _tags(image: bytes, offset: int) -> Iterator[tuple[int, bool, bytes]]:
    """Yield (type, optional, contents) of each tag of the header at `offset`, before the end tag."""
    architecture, length = struct.unpack_from("<II", image, offset + 4)
    if architecture != ARCHITECTURE_I386:
        raise ImageError(f"Multiboot2: the kernel is for architecture {architecture}, not for x86 (0)")
    end = offset + length
    if end > min(len(image), MULTIBOOT2_SEARCH):
        raise ImageError(f"Multiboot2: truncated: the header of {length} bytes at {offset:#x} is incomplete")
    position = offset + MULTIBOOT2_HEADER_SIZE
    while position + _TAG.size <= end:
        tag, flags, size = _TAG.unpack_from(image, position)
        if tag == TAG_END:
            return
        if size < _TAG.size or position + size > end:
            raise ImageError(f"Multiboot2: header tag {tag} claims {size} bytes, which do not fit")
        yield tag, bool(flags & TAG_OPTIONAL), image[position + _TAG.size : position + size]
        position += align_up(size, 8)
    raise ImageError("Multiboot2: the header has no end tag")


def _words(tag: int, body: bytes, count: int) -> tuple[int, ...]:
    if len(body) < 4 * count:
        raise ImageError(f"Multiboot2: header tag {tag} is too short ({len(body) + _TAG.size} bytes)")
    return struct.unpack_from(f"<{count}I", body)


def _parse(image: bytes, offset: int) -> _Header:
    """Collect what the header asks for. Raises ImageError where that cannot be had."""
    header = _Header()
    for tag, optional, body in _tags(image, offset):
        if tag == TAG_ADDRESS:
            header.addresses = Addresses(*_words(tag, body, 4))
        elif tag == TAG_ENTRY:
            (header.entry,) = _words(tag, body, 1)
        elif tag == TAG_RELOCATABLE:
            header.range = _Range(*_words(tag, body, 4))
        elif not optional:
            _refuse_unsupported(tag, body)
    return header


def _refuse_unsupported(tag: int, body: bytes) -> None:
    """Raise ImageError if the required `tag` asks for something that cannot be provided."""
    if tag == TAG_INFORMATION_REQUEST:
        unknown = [request for request in _words(tag, body, len(body) // 4) if request > INFO_LAST]
        if unknown:
            raise ImageError(f"Multiboot2: the kernel requests unknown information (tag {unknown[0]})")
    elif tag == TAG_CONSOLE:
        if _words(tag, body, 1)[0] & CONSOLE_REQUIRED:
            raise ImageError("Multiboot2: the kernel demands a console (tag 4), and there is no video")
    elif tag == TAG_FRAMEBUFFER:
        raise ImageError("Multiboot2: the kernel demands a framebuffer (tag 5), and there is no video")
    elif tag == TAG_EFI_BOOT_SERVICES:
        raise ImageError("Multiboot2: the kernel demands EFI boot services (tag 7), and there is no EFI")
    elif tag not in _HARMLESS:
        raise ImageError(f"Multiboot2: the kernel demands an unknown feature (header tag {tag})")


def _kernel(image: bytes, offset: int, header: _Header) -> Kernel:
    fields = header.addresses
    if fields is None:
        return elf_kernel(image, header.entry)
    if header.entry is None:
        raise ImageError("Multiboot2: the header has an address tag (2) but no entry address tag (3)")
    if fields.load == LOAD_FROM_FILE_START:
        fields = replace(fields, load=fields.header - offset)
    return addressed_kernel(image, offset, fields, header.entry)


def _relocated(placement: Placement, kernel: Kernel, allowed: _Range | None) -> Kernel:
    """The kernel where it is linked, or moved into `allowed` if it cannot stay."""
    if allowed is None:
        return kernel
    size = kernel.end - kernel.start
    stays = allowed.first <= kernel.start and kernel.end - 1 <= allowed.last
    if stays and placement.is_free(kernel.start, size):
        return kernel
    address = placement.find(
        size,
        "the relocatable kernel",
        start=allowed.first,
        end=min(allowed.last + 1, layout.HOLE_START),
        align=max(allowed.align, 1),
    )
    return kernel.moved(address - kernel.start)


def _tag(kind: int, body: bytes) -> bytes:
    """A boot information tag, padded to 8 bytes (the padding does not count in its size)."""
    size = 8 + len(body)
    return struct.pack("<II", kind, size) + body + bytes(align_up(size, 8) - size)


def _information(
    kernel: Kernel,
    memory: Memory,
    command_line: str,
    modules: Sequence[PlacedModule],
    symbols: bytes,
    load_base: int | None,
) -> bytes:
    ranges = memory_map(memory)
    entries = b"".join(_MEMORY_RANGE.pack(*entry, 0) for entry in ranges)
    tags = [
        _tag(INFO_COMMAND_LINE, c_string(command_line, "the kernel")),
        _tag(INFO_BOOT_LOADER_NAME, BOOT_LOADER_NAME),
        *(_tag(INFO_MODULE, struct.pack("<II", m.start, m.end) + m.command_line) for m in modules),
        _tag(INFO_BASIC_MEMORY, struct.pack("<II", *basic_memory(ranges))),
        _tag(INFO_MEMORY_MAP, struct.pack("<II", _MEMORY_RANGE.size, 0) + entries),
    ]
    if symbols and kernel.elf is not None:
        count = len(kernel.elf.sections)
        head = struct.pack("<III", count, len(symbols) // count, kernel.elf.section_names)
        tags.append(_tag(INFO_ELF_SECTIONS, head + symbols))
    if load_base is not None:
        tags.append(_tag(INFO_LOAD_BASE, struct.pack("<I", load_base)))
    body = b"".join(tags) + _tag(INFO_END, b"")
    return struct.pack("<II", 8 + len(body), 0) + body
