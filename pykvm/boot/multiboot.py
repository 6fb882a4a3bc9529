"""Multiboot kernels, version 0.6.96: 32-bit protected mode with a boot information structure.

ELF files of both classes and kernels with address fields in their header. There is no video mode
to set up, so a kernel that demands one is refused.
"""

from __future__ import annotations

import struct

from pykvm import layout
from pykvm.boot import Entry, LoadOptions, modes
from pykvm.boot.multiboot_magic import MULTIBOOT_HEADER_SIZE, MULTIBOOT_SEARCH, find_multiboot
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
from pykvm.values import replace

TYPE_CHECKING = False  # typing costs milliseconds at start-up; type checkers know this name
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pykvm.memory import Memory

# Header flags (3.1.2). The loader must refuse a kernel whose lower 16 bits it does not all know.
HEADER_PAGE_ALIGN = 1 << 0
HEADER_MEMORY_INFO = 1 << 1
HEADER_VIDEO_MODE = 1 << 2
HEADER_ADDRESSES = 1 << 16
HEADER_REQUIRED = 0xFFFF
HEADER_SUPPORTED = HEADER_PAGE_ALIGN | HEADER_MEMORY_INFO

LOADED_BY = 0x2BADB002  # EAX at entry

# Boot information flags (3.3)
INFO_MEMORY = 1 << 0
INFO_COMMAND_LINE = 1 << 2
INFO_MODULES = 1 << 3
INFO_ELF_SECTIONS = 1 << 5
INFO_MEMORY_MAP = 1 << 6
INFO_BOOT_LOADER_NAME = 1 << 9

_ADDRESSES = struct.Struct("<5I")  # header, load, load end, bss end, entry
_INFO_SIZE = 116
_INFO = struct.Struct("<17I")
"""flags, mem_lower, mem_upper, boot_device, cmdline, mods_count, mods_addr, syms[4], mmap_length,
mmap_addr, drives_length, drives_addr, config_table, boot_loader_name; the rest is not used."""
_MODULE = struct.Struct("<4I")  # start, end, string, reserved
_MEMORY_RANGE = struct.Struct("<IQQI")  # size of what follows, address, length, type


def load_multiboot(image: bytes, memory: Memory, system: SystemRegisters, options: LoadOptions) -> Entry:
    """Load a Multiboot kernel with its modules, and the boot information at BOOT_INFO.

    EAX holds the magic number, EBX the address of the boot information. Modules follow the
    kernel, page-aligned. Raises ImageError if the kernel needs what is not supported.
    """
    kernel = _kernel(image)
    placement = Placement(memory)
    modes.reserve_structures(placement, "protected")
    place_kernel(placement, kernel)
    behind = max(kernel.end, layout.FLAT_IMAGE)
    modules = place_modules(placement, options.modules, behind)
    symbols = place_symbols(placement, kernel, behind)
    place_information(placement, _information(kernel, memory, options.command_line, modules, symbols))
    registers, system_registers = modes.enter("protected", kernel.entry, memory, system)
    placement.write()
    return Entry("multiboot", replace(registers, rax=LOADED_BY, rbx=layout.BOOT_INFO), system_registers)


def _kernel(image: bytes) -> Kernel:
    offset = find_multiboot(image)
    if offset is None:
        raise ImageError(f"Multiboot: no valid header in the first {MULTIBOOT_SEARCH} bytes")
    (flags,) = struct.unpack_from("<I", image, offset + 4)
    if flags & HEADER_VIDEO_MODE:
        raise ImageError("Multiboot: the kernel demands a video mode (flag 2), and there is no video")
    unknown = flags & HEADER_REQUIRED & ~HEADER_SUPPORTED
    if unknown:
        raise ImageError(f"Multiboot: the kernel demands unknown features (flags {unknown:#x})")
    if not flags & HEADER_ADDRESSES:
        return elf_kernel(image)
    fields = offset + MULTIBOOT_HEADER_SIZE
    if fields + _ADDRESSES.size > len(image):
        raise ImageError("Multiboot: the file ends inside the header's address fields")
    *addresses, entry = _ADDRESSES.unpack_from(image, fields)
    return addressed_kernel(image, offset, Addresses(*addresses), entry)


class _Information:
    """The boot information while it is put together: the structure, then what it points to."""

    def __init__(self) -> None:
        self.data = bytearray(_INFO_SIZE)

    def put(self, data: bytes) -> int:
        """Append `data`, 8-byte aligned; return the address it will have in the guest."""
        self.data += bytes(align_up(len(self.data), 8) - len(self.data))
        address = layout.BOOT_INFO + len(self.data)
        self.data += data
        return address


def _information(
    kernel: Kernel,
    memory: Memory,
    command_line: str,
    modules: Sequence[PlacedModule],
    symbols: bytes,
) -> bytes:
    info = _Information()
    flags = INFO_MEMORY | INFO_COMMAND_LINE | INFO_MODULES | INFO_MEMORY_MAP | INFO_BOOT_LOADER_NAME
    ranges = memory_map(memory)
    lower, upper = basic_memory(ranges)
    mmap = b"".join(_MEMORY_RANGE.pack(_MEMORY_RANGE.size - 4, *entry) for entry in ranges)
    mods = b"".join(_MODULE.pack(m.start, m.end, info.put(m.command_line), 0) for m in modules)
    sections = (0, 0, 0, 0)
    if symbols and kernel.elf is not None:
        flags |= INFO_ELF_SECTIONS
        count = len(kernel.elf.sections)
        sections = (count, len(symbols) // count, info.put(symbols), kernel.elf.section_names)
    _INFO.pack_into(
        info.data,
        0,
        flags,
        lower,
        upper,
        0,
        info.put(c_string(command_line, "the kernel")),
        len(modules),
        info.put(mods),
        *sections,
        len(mmap),
        info.put(mmap),
        0,
        0,
        0,
        info.put(BOOT_LOADER_NAME),
    )
    return bytes(info.data)
