"""Processor modes: the registers and tables that guests start with."""

from __future__ import annotations

import struct

import pytest

from pykvm import layout
from pykvm.boot import modes
from pykvm.errors import ConfigurationError
from pykvm.memory import Memory
from pykvm.registers import (
    CR0_PE,
    CR0_PG,
    CR4_LA57,
    CR4_PAE,
    EFER_LMA,
    EFER_LME,
    PTE_P,
    PTE_PS,
    PTE_RW,
    PTE_US,
    Segment,
    SystemRegisters,
)

RESET = SystemRegisters()
ADDRESS = 0x000F_FFFF_FFFF_F000


def walk(memory: Memory, cr3: int, address: int, levels: int) -> list[int]:
    """The page-table entries that translate `address`, top level first; stops at a large page."""
    entries = []
    table = cr3
    for level in range(levels, 1, -1):
        index = address >> (12 + 9 * (level - 1)) & 0x1FF
        entries.append(memory.read_u64(table + 8 * index))
        table = entries[-1] & ADDRESS
    return entries


def segments(system: SystemRegisters) -> tuple[Segment, ...]:
    return system.cs, system.ds, system.es, system.fs, system.gs, system.ss


def decode(descriptor: int) -> tuple[int, int]:
    """Base and limit in bytes of a descriptor, taken apart as SDM figure 3-8 draws it."""
    base = descriptor >> 16 & 0xFF_FFFF | (descriptor >> 56) << 24
    limit = descriptor & 0xFFFF | (descriptor >> 48 & 0xF) << 16
    granular = descriptor >> 55 & 1
    return base, (limit << 12 | 0xFFF) if granular else limit


def test_real_mode_has_segments_of_64_kib_and_no_protection() -> None:
    system = modes.real_mode(RESET, segment=0x1234)

    assert (system.cs.base, system.cs.selector) == (0x12340, 0x1234)
    assert (system.ds.base, system.ss.base) == (0x12340, 0)
    assert {segment.limit for segment in segments(system)} == {0xFFFF}
    assert not system.cr0 & (CR0_PE | CR0_PG)
    assert (system.idt.base, system.idt.limit) == (0, 0x3FF)


def test_protected_mode_is_flat_and_unpaged(memory: Memory) -> None:
    system = modes.protected_mode(memory, RESET)

    assert {(segment.base, segment.limit, segment.g, segment.db) for segment in segments(system)} == {
        (0, 0xFFFF_FFFF, 1, 1)
    }
    assert system.cs.selector == layout.SELECTOR_CODE32
    assert system.ss.selector == layout.SELECTOR_DATA
    assert system.cr0 & CR0_PE
    assert not system.cr0 & CR0_PG
    assert system.efer == 0


def test_long_mode_has_paging_and_64_bit_code(memory: Memory) -> None:
    system = modes.long_mode(memory, RESET)

    assert (system.cs.l, system.cs.db, system.cs.selector) == (1, 0, layout.SELECTOR_CODE64)
    assert system.cr0 & CR0_PG
    assert system.cr4 & CR4_PAE
    assert system.efer & (EFER_LME | EFER_LMA) == EFER_LME | EFER_LMA


@pytest.mark.parametrize("ring", [0, 3])
def test_long_mode_gives_all_segments_the_privilege_of_its_ring(memory: Memory, ring: int) -> None:
    system = modes.long_mode(memory, RESET, ring=ring)

    assert {(segment.dpl, segment.selector & 3) for segment in segments(system)} == {(ring, ring)}


def test_an_empty_idt_makes_the_first_fault_a_triple_fault(memory: Memory) -> None:
    assert modes.protected_mode(memory, RESET).idt.limit == 0
    assert modes.long_mode(memory, RESET).idt.limit == 0


def test_segment_registers_equal_their_descriptors(memory: Memory) -> None:
    system = modes.long_mode(memory, RESET, ring=3)

    for segment in (system.cs, system.ss, system.tr):
        descriptor = memory.read_u64(layout.BOOT_GDT + (segment.selector & ~7))
        assert decode(descriptor) == (segment.base, segment.limit)
        assert descriptor >> 40 & 0xF == segment.type
        assert descriptor >> 45 & 3 == segment.dpl
        assert descriptor >> 47 & 1 == 1


def test_the_gdt_starts_with_a_null_descriptor_and_ends_with_the_tss(memory: Memory) -> None:
    system = modes.long_mode(memory, RESET)

    assert system.gdt.base == layout.BOOT_GDT
    assert memory.read_u64(system.gdt.base) == 0
    assert system.gdt.limit == layout.SELECTOR_TSS + 16 - 1


def test_every_selector_of_the_layout_has_its_kind_of_descriptor(memory: Memory) -> None:
    modes.long_mode(memory, RESET)

    access = {
        selector: memory.read_u64(layout.BOOT_GDT + selector) >> 40 & 0xFF
        for selector in range(layout.SELECTOR_CODE32, layout.SELECTOR_TSS + 1, 8)
    }

    assert access == {
        layout.SELECTOR_CODE32: 0x9B,
        layout.SELECTOR_DATA: 0x93,
        layout.SELECTOR_CODE64: 0x9B,
        layout.SELECTOR_USER_DATA: 0xF3,
        layout.SELECTOR_USER_CODE64: 0xFB,
        layout.SELECTOR_TSS: 0x8B,
    }


def test_vt_x_accepts_the_task_register_and_the_ldt(memory: Memory) -> None:
    states = modes.protected_mode(memory, RESET), modes.long_mode(memory, RESET)

    assert {(system.tr.type, system.tr.s, system.tr.unusable) for system in states} == {(0xB, 0, 0)}
    assert {system.ldt.unusable for system in states} == {1}


def test_the_tss_has_ring_0_stacks_and_opens_every_port_of_the_layout_to_ring_3(memory: Memory) -> None:
    system = modes.long_mode(memory, RESET, ring=3)

    (bitmap_offset,) = struct.unpack("<H", memory.read(layout.BOOT_TSS + 102, 2))
    bitmap = memory.read(layout.BOOT_TSS + bitmap_offset, system.tr.limit + 1 - bitmap_offset)
    assert memory.read_u64(layout.BOOT_TSS + 4) == layout.BOOT_INTERRUPT_STACK_TOP
    assert memory.read_u64(layout.BOOT_TSS + 36) == layout.BOOT_IST1_STACK_TOP
    assert bitmap == bytes(0x4000 // 8) + b"\xff"
    assert layout.BOOT_TSS + system.tr.limit < layout.BOOT_PAGE_TABLES


@pytest.mark.parametrize("levels", [4, 5])
@pytest.mark.parametrize("address", [0, 0x20_0000, 0x3FFF_FFFF, 0x4000_0000, 0xFFFF_FFFF])
def test_long_mode_maps_the_first_4_gib_to_themselves(memory: Memory, levels: int, address: int) -> None:
    system = modes.long_mode(memory, RESET, levels=levels)

    entries = walk(memory, system.cr3, address, levels)

    assert entries[-1] & ADDRESS == address & ~0x1F_FFFF
    assert entries[-1] & PTE_PS
    assert all(entry & (PTE_P | PTE_RW) == PTE_P | PTE_RW for entry in entries)
    assert bool(system.cr4 & CR4_LA57) == (levels == 5)


@pytest.mark.parametrize(
    ("options", "open_to_ring_3"),
    [({}, False), ({"user": True}, True), ({"ring": 3}, True)],
)
def test_pages_belong_to_ring_0_unless_ring_3_is_wanted(
    memory: Memory, options: dict[str, int], open_to_ring_3: bool
) -> None:
    system = modes.long_mode(memory, RESET, levels=5, **options)  # type: ignore[arg-type]

    entries = walk(memory, system.cr3, 0x1234_5678, 5)

    assert {bool(entry & PTE_US) for entry in entries} == {open_to_ring_3}


def test_addresses_above_map_bytes_are_not_mapped(memory: Memory) -> None:
    system = modes.long_mode(memory, RESET, map_bytes=0x40_0000)

    assert walk(memory, system.cr3, 0x3F_FFFF, 4)[-1] & PTE_P
    assert walk(memory, system.cr3, 0x40_0000, 4)[-1] == 0


@pytest.mark.parametrize(
    "options",
    [
        {"levels": 3},
        {"ring": 1},
        {"map_bytes": 0},
        {"map_bytes": 0x1000},
        {"map_bytes": (4 << 30) + (2 << 20)},
    ],
)
def test_long_mode_refuses_impossible_options_and_writes_nothing(
    memory: Memory, options: dict[str, int]
) -> None:
    with pytest.raises(ConfigurationError):
        modes.long_mode(memory, RESET, **options)  # type: ignore[arg-type]

    assert memory.read(0, 0x8000) == bytes(0x8000)


def test_missing_memory_for_the_page_tables_says_how_much_is_needed() -> None:
    with Memory() as memory:
        memory.add(0, 0x4000)

        with pytest.raises(ConfigurationError, match=r"0x1000\.\.0x8000 for the boot page tables.*32 KiB"):
            modes.long_mode(memory, RESET)


def test_read_only_memory_does_not_count_as_memory_for_tables() -> None:
    with Memory() as memory:
        memory.add(0, 0x1_0000, readonly=True)

        with pytest.raises(ConfigurationError, match="boot GDT"):
            modes.protected_mode(memory, RESET)


def test_what_a_mode_does_not_define_stays_as_it_was(memory: Memory) -> None:
    system = modes.long_mode(memory, SystemRegisters(apic_base=0xFEE0_0800))

    assert system.apic_base == 0xFEE0_0800
