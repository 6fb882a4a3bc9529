"""Multiboot2 kernels: header tags, boot information tags, relocation."""

from __future__ import annotations

import struct

import pytest

from pykvm import layout
from pykvm.boot import Entry, LoadOptions, Module, load
from pykvm.errors import ConfigurationError, ImageError
from pykvm.memory import Memory
from pykvm.registers import CR0_PE, CR0_PG
from tests.unit.boot.images import CODE, Part, describe, multiboot2_elf, multiboot2_header, tag, words

LOAD = 0x20_0000


def addressed(*tags: bytes, header: int = LOAD, load_at: int = LOAD, end: int = 0, bss: int = 0) -> bytes:
    """A kernel in no format: a header with an address tag, then code."""
    return multiboot2_header(tag(2, words(header, load_at, end, bss)), *tags) + CODE


def entry_tag(address: int) -> bytes:
    return tag(3, words(address))


def relocatable(first: int, last: int, align: int = 0x1000, preference: int = 0) -> bytes:
    return tag(10, words(first, last, align, preference))


def information(memory: Memory, entry: Entry) -> dict[int, list[bytes]]:
    """The bodies of the boot information tags by type, walked as a kernel walks them."""
    address = entry.registers.rbx
    total, reserved = memory.read_struct(address, "II")
    assert (reserved, total % 8) == (0, 0)
    end = address + total
    address += 8
    found: dict[int, list[bytes]] = {}
    while True:
        kind, size = memory.read_struct(address, "II")
        found.setdefault(kind, []).append(memory.read(address + 8, size - 8))
        address += -(-size // 8) * 8
        if kind == 0:
            break
    assert address == end
    return found


def test_a_kernel_starts_in_protected_mode_with_the_magic_number(memory: Memory) -> None:
    entry = load(multiboot2_elf(), memory)

    assert entry.format == "multiboot2"
    assert (entry.registers.rax, entry.registers.rbx) == (0x36D76289, layout.BOOT_INFO)
    assert entry.system_registers.cr0 & (CR0_PE | CR0_PG) == CR0_PE
    assert memory.read(entry.registers.rip, len(CODE)) == CODE


def test_the_kernel_learns_command_line_loader_and_memory(memory: Memory) -> None:
    info = information(memory, load(multiboot2_elf(), memory, options=LoadOptions(command_line="quiet")))

    assert info[1] == [b"quiet\0"]
    assert info[2] == [b"pykvm\0"]
    assert info[4] == [words(640, 15 * 1024)]
    assert info[6] == [
        words(24, 0)
        + struct.pack("<QQII", 0, 0xA_0000, 1, 0)
        + struct.pack("<QQII", 0xA_0000, 0x6_0000, 2, 0)
        + struct.pack("<QQII", 0x10_0000, 0xF0_0000, 1, 0)
    ]
    assert 21 not in info


def test_modules_are_page_aligned_and_named(memory: Memory) -> None:
    modules = (Module(b"A" * 5000, "one"), Module(b"B", "two"))

    info = information(memory, load(multiboot2_elf(tag(6)), memory, options=LoadOptions(modules=modules)))

    placed = [(*struct.unpack_from("<II", body), body[8:]) for body in info[3]]
    assert [(memory.read(start, end - start), text) for start, end, text in placed] == [
        (b"A" * 5000, b"one\0"),
        (b"B", b"two\0"),
    ]
    assert all(start % 0x1000 == 0 for start, _, _ in placed)


def test_symbols_come_with_the_section_headers(memory: Memory) -> None:
    info = information(memory, load(multiboot2_elf(parts=(Part(b"\0names\0"),)), memory))

    (body,) = info[9]
    count, size, names = struct.unpack_from("<III", body)
    (address,) = struct.unpack_from("<I", body, 12 + size + 12)
    assert (count, size, names, len(body)) == (2, 40, 1, 12 + 2 * 40)
    assert memory.read(address, 7) == b"\0names\0"


def test_address_and_entry_tags_load_a_kernel_of_no_format(memory: Memory) -> None:
    image = addressed(entry_tag(LOAD + 56))

    entry = load(image, memory)

    assert memory.read(LOAD, len(image)) == image
    assert entry.registers.rip == LOAD + 56


def test_a_load_address_of_minus_one_means_the_start_of_the_file(memory: Memory) -> None:
    image = b"8 bytes " + addressed(entry_tag(LOAD + 64), header=LOAD + 8, load_at=0xFFFF_FFFF)

    load(image, memory)

    assert memory.read(LOAD, len(image)) == image


def test_an_entry_tag_overrides_the_entry_point_of_the_elf_file(memory: Memory) -> None:
    assert load(multiboot2_elf(entry_tag(0x10_0008)), memory).registers.rip == 0x10_0008


@pytest.mark.parametrize(
    "tags",
    [
        (tag(1, words(1, 2, 3, 4, 5, 6, 8, 9, 15, 21)),),
        (tag(1, words(77), optional=True),),
        (tag(4, words(2)),),
        (tag(4, words(1), optional=True),),
        (tag(5, words(1024, 768, 32), optional=True),),
        (tag(7, optional=True),),
        (tag(8, words(0)),),
        (tag(9, words(0)),),
        (tag(99, optional=True),),
    ],
)
def test_tags_that_can_be_served_or_ignored_do_not_hinder(memory: Memory, tags: tuple[bytes, ...]) -> None:
    assert load(multiboot2_elf(*tags), memory).format == "multiboot2"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (multiboot2_elf(tag(1, words(77))), r"unknown information \(tag 77\)"),
        (multiboot2_elf(tag(4, words(1))), "demands a console"),
        (multiboot2_elf(tag(5, words(1024, 768, 32))), "demands a framebuffer"),
        (multiboot2_elf(tag(7)), "demands EFI boot services"),
        (multiboot2_elf(tag(99)), "header tag 99"),
        (multiboot2_elf(tag(2, words(1, 2))), "tag 2 is too short"),
        (multiboot2_elf(tag(3)), "tag 3 is too short"),
        (multiboot2_elf(tag(4)), "tag 4 is too short"),
        (multiboot2_elf(tag(99, size=7)), "tag 99 claims 7 bytes"),
        (multiboot2_elf(tag(99, size=0)), "tag 99 claims 0 bytes"),
        (multiboot2_elf(tag(99, size=0xFFFF_FFFF)), "tag 99 claims 4294967295 bytes"),
        (multiboot2_header(end=False) + CODE, "no end tag"),
        (multiboot2_header(architecture=4) + CODE, "architecture 4"),
        (multiboot2_header(tag(6))[:-8], "truncated: the header of 32 bytes"),
        (multiboot2_header() + CODE, "not ELF and its header has no load addresses"),
        (addressed(), "no entry address tag"),
        (addressed(entry_tag(LOAD - 1)), "outside the kernel"),
        (addressed(entry_tag(LOAD), load_at=LOAD + 1), "do not fit a header"),
        (addressed(entry_tag(LOAD), end=LOAD + 0x1000), "truncated"),
        (addressed(entry_tag(LOAD), bss=LOAD + 1), "bss ends at"),
        (bytes(8) + addressed(entry_tag(0), header=4, load_at=0xFFFF_FFFF), "do not fit a header"),
        (multiboot2_elf(at=0x9_0000), "boot information .* overlaps ELF segment 0"),
        (multiboot2_elf(relocatable(0x30_0000, 0x30_0010)), "does not fit between 0x300000 and 0x300011"),
        (multiboot2_elf(relocatable(0x30_0000, 0x20_0000)), "does not fit"),
    ],
    ids=describe,
)
def test_kernels_that_cannot_start_are_refused_and_leave_memory_alone(
    memory: Memory, image: bytes, message: str
) -> None:
    with pytest.raises(ImageError, match=message):
        load(image, memory, options=LoadOptions(format="multiboot2"))

    assert memory.read(0, 4 << 20) == bytes(4 << 20)


@pytest.mark.parametrize(
    ("linked", "first", "last", "align", "expected"),
    [
        (0x10_0000, 0x10_0000, 0xFFFF_FFFF, 0x1000, 0x10_0000),
        (0x10_0000, 0x30_0001, 0xFFFF_FFFF, 0x20_0000, 0x40_0000),
        (0x10_0000, 0x30_0001, 0xFFFF_FFFF, 0, 0x30_0001),
        (0x4000_0000, 0x10_0000, 0xFFFF_FFFF, 0x1000, 0x10_0000),
        (0x1000, 0x500, 0xFFFF_FFFF, 0x10, 0x1000),
        (0x500, 0x500, 0xFFFF_FFFF, 0x100, 0x600),
    ],
)
def test_a_relocatable_kernel_stays_or_moves_to_the_lowest_free_place_of_its_range(
    memory: Memory, linked: int, first: int, last: int, align: int, expected: int
) -> None:
    image = multiboot2_elf(relocatable(first, last, align), at=linked)

    entry = load(image, memory)

    assert information(memory, entry)[21] == [words(expected)]
    assert memory.read(entry.registers.rip, len(CODE)) == CODE
    assert expected <= entry.registers.rip < expected + 0x100


def test_a_relocatable_kernel_that_finds_no_memory_says_how_much_it_takes(memory: Memory) -> None:
    image = multiboot2_elf(relocatable(0x200_0000, 0xFFFF_FFFF))

    with pytest.raises(
        ConfigurationError, match="for the relocatable kernel: give the machine at least 33 MiB"
    ):
        load(image, memory)
