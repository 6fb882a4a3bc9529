"""Multiboot kernels: headers, boot information, modules."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from pykvm import layout
from pykvm.boot import Entry, LoadOptions, Module, load
from pykvm.errors import ConfigurationError, ImageError
from pykvm.memory import Memory
from pykvm.registers import CR0_PE, CR0_PG, RFLAGS_IF
from tests.unit.boot.images import CODE, Load, Part, describe, elf, multiboot_header, words

LOAD = 0x20_0000
CODE_AT = 32  # behind a header with addresses


def kernel_elf(flags: int = 0, *, bits: int = 32, parts: tuple[Part, ...] = (), at: int = LOAD) -> bytes:
    """An ELF kernel: header, then code at the entry point."""
    header = multiboot_header(flags)
    return elf((Load(at, header + CODE, memsz=0x1000),), bits=bits, entry=at + len(header), parts=parts)


def kernel_addressed(
    *, header: int = LOAD, load_at: int = LOAD, end: int = 0, bss: int = 0, entry: int = LOAD + CODE_AT
) -> bytes:
    """A kernel in no format, with address fields."""
    return multiboot_header(1 << 16, (header, load_at, end, bss, entry)) + CODE


def information(memory: Memory, entry: Entry) -> dict[str, int]:
    """The fields of the boot information structure (Multiboot 3.3)."""
    names = (
        "flags mem_lower mem_upper boot_device cmdline mods_count mods_addr elf_num elf_size elf_addr"
        " elf_shndx mmap_length mmap_addr drives_length drives_addr config_table boot_loader_name"
    )
    return dict(zip(names.split(), memory.read_struct(entry.registers.rbx, "17I"), strict=True))


def memory_ranges(memory: Memory, info: dict[str, int]) -> Iterator[tuple[int, int, int]]:
    """(address, length, type) of each memory map entry, walked as a kernel walks it."""
    address = info["mmap_addr"]
    while address < info["mmap_addr"] + info["mmap_length"]:
        yield memory.read_struct(address + 4, "QQI")
        address += memory.read_u32(address) + 4


@pytest.mark.parametrize("bits", [32, 64])
def test_a_kernel_starts_in_protected_mode_with_the_magic_number(memory: Memory, bits: int) -> None:
    entry = load(kernel_elf(bits=bits), memory)

    assert entry.format == "multiboot"
    assert (entry.registers.rax, entry.registers.rbx) == (0x2BADB002, layout.BOOT_INFO)
    assert entry.registers.rip == LOAD + 12
    assert not entry.registers.rflags & RFLAGS_IF
    assert entry.system_registers.cr0 & (CR0_PE | CR0_PG) == CR0_PE
    assert (entry.system_registers.cs.base, entry.system_registers.cs.limit) == (0, 0xFFFF_FFFF)
    assert memory.read(LOAD + 12, len(CODE)) == CODE


def test_address_fields_load_the_whole_file_without_any_format(memory: Memory) -> None:
    image = kernel_addressed()

    entry = load(image, memory)

    assert memory.read(LOAD, len(image)) == image
    assert entry.registers.rip == LOAD + CODE_AT


def test_address_fields_may_leave_out_the_start_and_the_end_of_the_file(memory: Memory) -> None:
    image = bytes(16) + kernel_addressed(header=LOAD + 8, load_at=LOAD, end=LOAD + 48) + b"tail"

    load(image, memory)

    assert memory.read(LOAD, 48) == image[8:56]
    assert memory.read(LOAD + 48, 16) == bytes(16)


def test_address_fields_win_over_the_elf_headers(memory: Memory) -> None:
    header = multiboot_header(1 << 16, (LOAD, LOAD, 0, 0, LOAD + CODE_AT))

    load(elf((Load(0x30_0000, header + CODE),)), memory)

    assert memory.read(LOAD, 4) == words(0x1BADB002)
    assert memory.read(0x30_0000, 4) == bytes(4)


def test_the_bss_of_the_address_fields_is_zeroed(memory: Memory) -> None:
    image = kernel_addressed(end=LOAD + 48, bss=LOAD + 0x1000)
    memory.fill(LOAD, 0x1001, 0xCC)

    load(image, memory)

    assert memory.read(LOAD + 48, 0x1000 - 48) == bytes(0x1000 - 48)
    assert memory.read(LOAD + 0x1000, 1) == b"\xcc"


def test_the_kernel_learns_its_command_line_and_loader(memory: Memory) -> None:
    info = information(memory, load(kernel_elf(3), memory, options=LoadOptions(command_line="root=é")))

    assert info["flags"] & (1 << 2) and info["flags"] & (1 << 9)  # noqa: PT018 - one claim
    assert memory.read_cstring(info["cmdline"]) == "root=é".encode()
    assert memory.read_cstring(info["boot_loader_name"]) == b"pykvm"


def test_the_kernel_learns_the_size_of_memory(memory: Memory) -> None:
    info = information(memory, load(kernel_elf(), memory))

    assert info["flags"] & 1
    assert (info["mem_lower"], info["mem_upper"]) == (640, 15 * 1024)


def test_the_memory_map_covers_all_memory_and_reserves_video_and_roms(memory: Memory) -> None:
    memory.add(1 << 32, 0x1000)
    memory.add(0xFFFF_F000, 0x1000, readonly=True)

    info = information(memory, load(kernel_elf(), memory))

    assert info["flags"] & (1 << 6)
    assert list(memory_ranges(memory, info)) == [
        (0, 0xA_0000, 1),
        (0xA_0000, 0x6_0000, 2),
        (0x10_0000, 0xF0_0000, 1),
        (0xFFFF_F000, 0x1000, 2),
        (1 << 32, 0x1000, 1),
    ]


def test_modules_follow_the_kernel_on_pages_of_their_own(memory: Memory) -> None:
    modules = (Module(b"A" * 5000, "initrd one"), Module(b"", "empty"), Module(b"B", ""))

    info = information(memory, load(kernel_elf(), memory, options=LoadOptions(modules=modules)))

    assert info["flags"] & (1 << 3)
    assert info["mods_count"] == 3
    table = [memory.read_struct(info["mods_addr"] + 16 * index, "4I") for index in range(3)]
    loaded = [(memory.read(start, end - start), memory.read_cstring(text)) for start, end, text, _ in table]
    assert loaded == [(module.data, module.command_line.encode()) for module in modules]
    assert table[0][0] == LOAD + 0x1000
    assert all(start % 0x1000 == 0 for start, _, _, _ in table)


def test_modules_avoid_a_kernel_that_is_in_several_pieces(memory: Memory) -> None:
    image = elf((Load(LOAD, multiboot_header() + CODE), Load(LOAD + 0x4000, b"data")), entry=LOAD + 12)

    info = information(memory, load(image, memory, options=LoadOptions(modules=(Module(bytes(0x8000)),))))

    assert memory.read_u32(info["mods_addr"]) == LOAD + 0x5000


@pytest.mark.parametrize("bits", [32, 64])
def test_symbols_come_with_the_section_headers(memory: Memory, bits: int) -> None:
    parts = (
        Part(b"symbol table", type=2),
        Part(b"\0strings\0"),
        Part(CODE, address=LOAD),
        Part(b"bss", type=8),
    )

    info = information(memory, load(kernel_elf(bits=bits, parts=parts), memory))

    assert info["flags"] & (1 << 5)
    assert (info["elf_num"], info["elf_size"], info["elf_shndx"]) == (5, 40 if bits == 32 else 64, 1)
    offset, width = (12, "I") if bits == 32 else (16, "Q")
    headers = [info["elf_addr"] + index * info["elf_size"] for index in range(5)]
    addresses = [memory.read_struct(header + offset, width)[0] for header in headers]
    assert memory.read(addresses[1], 12) == b"symbol table"
    assert memory.read(addresses[2], 9) == b"\0strings\0"
    assert (addresses[0], addresses[3], addresses[4]) == (0, LOAD, 0)


def test_a_kernel_without_sections_gets_no_section_headers(memory: Memory) -> None:
    info = information(memory, load(kernel_elf(), memory))

    assert not info["flags"] & (1 << 5)
    assert info["elf_num"] == 0


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (kernel_elf(1 << 2), "demands a video mode"),
        (kernel_elf(1 << 3), r"unknown features \(flags 0x8\)"),
        (kernel_elf(1 << 15), r"flags 0x8000"),
        (multiboot_header() + CODE, "not ELF and its header has no load addresses"),
        (kernel_addressed()[:31], "ends inside the header's address fields"),
        (kernel_addressed(header=LOAD - 4), "do not fit a header"),
        (kernel_addressed(header=LOAD + 4), "do not fit a header"),
        (kernel_addressed(end=LOAD + 0x1000), "truncated"),
        (kernel_addressed(end=LOAD - 1), "truncated"),
        (kernel_addressed(bss=LOAD + 8), "bss ends at"),
        (kernel_addressed(entry=LOAD - 1), "entry point 0x1fffff is outside the kernel"),
        (kernel_addressed(entry=LOAD + 48), "outside the kernel"),
        (kernel_elf(at=0x9_0000), "boot information .* overlaps ELF segment 0"),
        (kernel_elf()[:100], "truncated"),
    ],
    ids=describe,
)
def test_kernels_that_cannot_start_are_refused_and_leave_memory_alone(
    memory: Memory, image: bytes, message: str
) -> None:
    with pytest.raises(ImageError, match=message):
        load(image, memory, options=LoadOptions(format="multiboot"))

    assert memory.read(0, 4 << 20) == bytes(4 << 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (LoadOptions(modules=(Module(bytes(15 << 20), "big"),)), r"module 0 \('big'\).* at least 18 MiB"),
        (LoadOptions(command_line="a\0b"), "contains a NUL"),
        (LoadOptions(command_line="\ud800"), "not text"),
        (LoadOptions(modules=(Module(b"x", "\0"),)), "module 0 .*contains a NUL"),
    ],
)
def test_options_that_do_not_fit_are_refused(memory: Memory, options: LoadOptions, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load(kernel_elf(), memory, options=options)


def test_a_command_line_that_is_too_long_says_how_much_fits(memory: Memory) -> None:
    with pytest.raises(ImageError, match=r"take \d+ bytes, 65536 fit"):
        load(kernel_elf(), memory, options=LoadOptions(command_line="x" * 65536))


def test_memory_without_room_for_the_boot_information_is_refused() -> None:
    with Memory() as memory:
        memory.add(0, 0x9_0000)
        image = kernel_elf(at=0x1_0000)

        with pytest.raises(ConfigurationError, match="for the boot information"):
            load(image, memory)


def test_unknown_optional_header_flags_are_ignored(memory: Memory) -> None:
    assert load(kernel_elf(1 << 17 | 1 << 31), memory).format == "multiboot"


def test_the_information_structure_has_the_size_of_the_specification(memory: Memory) -> None:
    info = information(memory, load(kernel_elf(), memory))

    first = min(info[name] for name in ("cmdline", "mods_addr", "mmap_addr", "boot_loader_name"))
    assert first >= layout.BOOT_INFO + 116
    assert memory.read_struct(layout.BOOT_INFO + 68, "12I") == struct.unpack("12I", bytes(48))
