"""ELF executables: what is loaded where, and what is refused."""

from __future__ import annotations

import struct
import time

import pytest

from pykvm import layout
from pykvm.boot import LoadOptions, load
from pykvm.errors import ConfigurationError, ImageError
from pykvm.memory import Memory
from tests.unit.boot.images import CODE, Load, describe, elf


def patched(image: bytes, offset: int, value: bytes) -> bytes:
    return image[:offset] + value + image[offset + len(value) :]


@pytest.mark.parametrize(("bits", "selector"), [(32, layout.SELECTOR_CODE32), (64, layout.SELECTOR_CODE64)])
def test_the_class_decides_the_mode(memory: Memory, bits: int, selector: int) -> None:
    entry = load(elf(bits=bits, entry=0x10_0004), memory)

    assert entry.format == "elf"
    assert entry.system_registers.cs.selector == selector
    assert (entry.registers.rip, entry.registers.rsp) == (0x10_0004, layout.BOOT_STACK_TOP)
    assert memory.read(0x10_0000, len(CODE)) == CODE


@pytest.mark.parametrize(
    ("mode", "selector"),
    [("real", 0), ("protected", layout.SELECTOR_CODE32), ("long", layout.SELECTOR_CODE64)],
)
@pytest.mark.parametrize("bits", [32, 64])
def test_a_chosen_mode_overrides_the_class(memory: Memory, bits: int, mode: str, selector: int) -> None:
    entry = load(elf((Load(0x9000),), bits=bits), memory, options=LoadOptions(mode=mode))

    assert entry.system_registers.cs.selector == selector
    assert entry.registers.rip == 0x9000


def test_every_segment_goes_to_its_physical_address(memory: Memory) -> None:
    load(elf((Load(0x10_0000, b"text"), Load(0x20_0000, b"data"), Load(0x30_0001, b"odd"))), memory)

    assert memory.read(0x10_0000, 4) == b"text"
    assert memory.read(0x20_0000, 4) == b"data"
    assert memory.read(0x30_0000, 5) == b"\0odd\0"


def test_bss_is_zeroed_and_what_follows_it_is_not(memory: Memory) -> None:
    memory.write(0x10_0000, b"\xcc" * 0x4000)

    load(elf((Load(0x10_0000, CODE, memsz=0x3000),)), memory)

    assert memory.read(0x10_0000, 0x3000) == CODE.ljust(0x3000, b"\0")
    assert memory.read(0x10_3000, 1) == b"\xcc"


def test_a_virtual_entry_point_is_translated_to_its_physical_address(memory: Memory) -> None:
    high = 0xFFFF_FFFF_8000_0000
    image = elf(
        (Load(0x10_0000, virtual=high), Load(0x20_0000, virtual=high + 0x10_0000)),
        bits=64,
        entry=high + 0x10_0008,
    )

    assert load(image, memory).registers.rip == 0x20_0008


def test_a_physical_entry_point_of_a_high_kernel_is_taken_as_it_is(memory: Memory) -> None:
    image = elf((Load(0x10_0000, virtual=0xC010_0000),), entry=0x10_0004)

    assert load(image, memory).registers.rip == 0x10_0004


def test_headers_of_other_types_and_empty_segments_load_nothing(memory: Memory) -> None:
    image = elf((Load(0x10_0000), Load(0xFFFF_0000, b"", memsz=0), Load(0xFFFF_0000, b"note", type=4)))

    assert load(image, memory).registers.rip == 0x10_0000


def test_a_static_position_independent_file_is_loaded_where_it_is_linked(memory: Memory) -> None:
    assert load(elf(type=3), memory).registers.rip == 0x10_0000


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (elf()[:4], "ends inside its header"),
        (elf()[:51], "ends inside its header"),
        (elf(bits=64)[:63], "ends inside its header"),
        (patched(elf(), 4, b"\x03"), "class 3"),
        (patched(elf(), 5, b"\x02"), "not little-endian"),
        (elf(machine=40), "machine 40"),
        (elf(bits=64, machine=183), "machine 183"),
        (elf(bits=64, machine=3), "machine 3"),
        (patched(elf(), 20, b"\x02"), "version 2"),
        (elf(type=1), "type 1 is not an executable"),
        (elf(type=4), "type 4 is not an executable"),
        (elf(()), "nothing to load"),
        (elf((Load(0x10_0000, type=6),)), "nothing to load"),
        (elf((Load(0x10_0000), Load(0, b"/lib/ld.so", type=3))), "dynamically linked"),
        (patched(elf(), 44, b"\xff\xff"), "65535 program headers"),
        (patched(elf(), 44, b"\xfe\xff"), "truncated: 65534 program headers"),
        (patched(elf(), 42, b"\x1f\x00"), "program headers of 31 bytes, not 32"),
        (patched(elf(), 28, b"\xff\xff\xff\xff"), "truncated: 1 program headers at 0xffffffff"),
        (elf()[:-1], "truncated: program header 0 wants bytes"),
        (elf((Load(0x10_0000, CODE, filesz=0xFFFF_FFFF),)), "truncated: program header 0"),
        (elf((Load(0x10_0000, CODE, memsz=15),)), "16 bytes in the file, 15 in memory"),
        (elf((Load(0xFFFF_FFF8),)), "beyond the 32-bit address space"),
        (elf((Load(0xFFFF_FFFF_FFFF_FFF8),), bits=64), "beyond the 64-bit address space"),
        (elf((Load(0x10_0000), Load(0x10_0008))), "ELF segment 1 .* overlaps ELF segment 0"),
        (elf((Load(0x20_0000, memsz=0x1000), Load(0x10_0000, memsz=0x10_0001))), "overlaps"),
        (elf((Load(0x500),)), "overlaps the boot GDT"),
        (elf((Load(0x2000),), bits=64), "overlaps the boot page tables"),
        (elf((Load(0xF000_0000),)), "belongs to devices"),
        (elf((Load(1 << 61),), bits=64), "52 bits"),
        (elf(entry=0x10), "entry point 0x10 is not in any loaded segment"),
        (elf((Load(0x10_0000, memsz=0x1000),), entry=0x10_0800), "not in any loaded segment"),
    ],
    ids=describe,
)
def test_damaged_and_foreign_files_are_refused_and_leave_memory_alone(
    memory: Memory, image: bytes, message: str
) -> None:
    with pytest.raises(ImageError, match=message):
        load(image, memory)

    assert memory.read(0, 4 << 20) == bytes(4 << 20)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (elf((Load(0x10_0000, memsz=0x100_0000),)), "ELF segment 0: give the machine at least 17 MiB"),
        (elf((Load(0x10_0000), Load(0x5000_0000))), "ELF segment 1: give the machine at least 1281 MiB"),
        (elf((Load(0x1_4000_0000),), bits=64), "at least 4097 MiB"),
        (elf((Load(0x10_0000, memsz=0x8000_0000),)), "at least 2049 MiB"),
    ],
    ids=describe,
)
def test_a_segment_outside_memory_says_how_much_memory_it_takes(
    memory: Memory, image: bytes, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load(image, memory)


def test_a_real_mode_entry_point_above_1_mib_is_refused(memory: Memory) -> None:
    with pytest.raises(ImageError, match="out of reach of real mode"):
        load(elf(), memory, options=LoadOptions(mode="real"))


def test_tens_of_thousands_of_segments_load_in_a_moment(memory: Memory) -> None:
    image = elf(tuple(Load(0x10_0000 + 16 * index, b"\xf4") for index in range(30_000)))
    start = time.monotonic()

    load(image, memory)

    assert memory.read(0x10_0000 + 16 * 29_999, 1) == b"\xf4"
    assert time.monotonic() - start < 5


def test_a_damaged_section_table_does_not_matter(memory: Memory) -> None:
    image = patched(elf(), 32, struct.pack("<I", 0x7FFF_FFFF))

    assert load(image, memory).registers.rip == 0x10_0000
