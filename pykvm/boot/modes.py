"""Processor modes: the tables and registers that real, protected and long mode start with.

Sources: Intel SDM volume 3, chapters 3 (segmentation), 4 (paging), 8.7 (64-bit TSS) and 27.3
(what VT-x demands of the guest's segments). Every function takes the state after RESET and
returns a new one; the tables go to the fixed places in `pykvm.layout`.

The IDT stays empty in protected and long mode (limit 0): a fault before the guest has loaded its
own is a triple fault at once, where it happened.
"""

from __future__ import annotations

import struct

from pykvm import layout
from pykvm.boot.placement import Placement
from pykvm.errors import ConfigurationError, ImageError
from pykvm.registers import (
    CR0_ET,
    CR0_MP,
    CR0_NE,
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_LA57,
    CR4_OSFXSR,
    CR4_OSXMMEXCPT,
    CR4_PAE,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    EFER_SCE,
    PTE_P,
    PTE_PS,
    PTE_RW,
    PTE_US,
    DescriptorTable,
    Registers,
    Segment,
    SystemRegisters,
)
from pykvm.values import replace

TYPE_CHECKING = False  # typing costs milliseconds at start-up; type checkers know this name
if TYPE_CHECKING:
    from pykvm.memory import Memory

# Descriptor types (SDM volume 3, tables 3-1 and 3-2). VT-x wants the accessed and busy bits set.
TYPE_DATA = 0x3  # read/write, accessed
TYPE_CODE = 0xB  # execute/read, accessed
TYPE_TSS_BUSY = 0xB  # 32-bit or 64-bit, busy
TYPE_LDT = 0x2

RING3 = 3

_FLAT = Segment(limit=0xFFFF_FFFF, g=1)
CODE32 = replace(_FLAT, selector=layout.SELECTOR_CODE32, type=TYPE_CODE, db=1)
DATA = replace(_FLAT, selector=layout.SELECTOR_DATA, type=TYPE_DATA, db=1)
CODE64 = replace(_FLAT, selector=layout.SELECTOR_CODE64, type=TYPE_CODE, l=1)
USER_DATA = replace(DATA, selector=layout.SELECTOR_USER_DATA | RING3, dpl=3)
USER_CODE64 = replace(CODE64, selector=layout.SELECTOR_USER_CODE64 | RING3, dpl=3)
REAL_CODE = Segment(type=TYPE_CODE)
REAL_DATA = Segment(type=TYPE_DATA)
REAL_VECTORS = DescriptorTable(base=0, limit=0x3FF)  # of 4 bytes each (SDM volume 3, 21.1.4)
NO_LDT = Segment(limit=0, type=TYPE_LDT, s=0, present=0, unusable=1)
NO_TSS = Segment(type=TYPE_TSS_BUSY, s=0)  # VT-x has no "none": a busy TSS that is never used

# The 64-bit TSS (SDM volume 3, figure 8-11), then one bit a port: 0 lets ring 3 use it
TSS_SIZE = 104
IO_BITMAP_PORTS = 0x4000  # all ports of `layout`; those above are closed, being beyond the limit
IO_BITMAP_SIZE = IO_BITMAP_PORTS // 8 + 1  # the processor reads one byte more, of ones
TSS = Segment(
    base=layout.BOOT_TSS,
    limit=TSS_SIZE + IO_BITMAP_SIZE - 1,
    selector=layout.SELECTOR_TSS,
    type=TYPE_TSS_BUSY,
    s=0,
)

GDT_SEGMENTS = (CODE32, DATA, CODE64, USER_DATA, USER_CODE64)  # in the order of their selectors
GDT_SIZE = layout.SELECTOR_TSS + 16  # the TSS descriptor takes two entries

LARGE_PAGE = 2 << 20
MAP_MAX = 4 << 30
PAGE_TABLES_SIZE = 7 * layout.PAGE_SIZE
_ENTRIES = 512

_STRUCTURES = {
    "real": (),
    "protected": ((layout.BOOT_GDT, GDT_SIZE, "the boot GDT"),),
    "long": (
        (layout.BOOT_GDT, GDT_SIZE, "the boot GDT"),
        (layout.BOOT_TSS, TSS.limit + 1, "the boot TSS"),
        (layout.BOOT_PAGE_TABLES, PAGE_TABLES_SIZE, "the boot page tables"),
    ),
}


def reserve_structures(placement: Placement, mode: str) -> None:
    """Take the memory that the set-up of `mode` writes, so that no image lands on it."""
    for address, size, what in _STRUCTURES[mode]:
        placement.reserve(address, size, what)


def enter(
    mode: str, address: int, memory: Memory, system: SystemRegisters
) -> tuple[Registers, SystemRegisters]:
    """Set up `mode` in ring 0 with the first instruction at the physical `address`, and a stack.

    Raises ImageError if the mode cannot reach that address, and ConfigurationError if there is no
    memory for its tables or, but for real mode, its stack.
    """
    reach = layout.FLAT_IMAGE if mode == "real" else MAP_MAX
    if address >= reach:
        raise ImageError(f"the entry point {address:#x} is out of reach of {mode} mode (below {reach:#x})")
    if mode == "real":
        segment = address >> 4 if address > 0xFFFF else 0
        registers = Registers(rip=address - (segment << 4), rsp=layout.REAL_MODE_STACK_TOP)
        return registers, real_mode(system, segment=segment)
    stack = layout.BOOT_STACK_TOP - layout.PAGE_SIZE
    Placement(memory).require(stack, layout.PAGE_SIZE, "the boot stack")
    set_up = protected_mode if mode == "protected" else long_mode
    return Registers(rip=address, rsp=layout.BOOT_STACK_TOP), set_up(memory, system)


def real_mode(system: SystemRegisters, *, segment: int = 0) -> SystemRegisters:
    """Return the state of real mode with caches on and the vector table at 0.

    `segment` goes to CS and the data segments, so that an image's own offsets work in both;
    SS stays 0.
    """
    code, data = REAL_CODE, REAL_DATA
    if segment != 0:
        code, data = (replace(each, base=segment << 4, selector=segment) for each in (code, data))
    return replace(
        system, cs=code, ds=data, es=data, fs=data, gs=data, ss=REAL_DATA, idt=REAL_VECTORS, cr0=CR0_ET
    )


def protected_mode(memory: Memory, system: SystemRegisters) -> SystemRegisters:
    """Write the boot GDT and return the state of flat 32-bit protected mode, ring 0, unpaged.

    Raises ConfigurationError if there is no memory for the GDT.
    """
    reserve_structures(Placement(memory), "protected")
    _write_gdt(memory)
    return replace(
        _flat_segments(system, CODE32, DATA),
        tr=NO_TSS,
        cr0=CR0_PE | CR0_MP | CR0_ET | CR0_NE,
        cr4=0,
        efer=0,
    )


def long_mode(
    memory: Memory,
    system: SystemRegisters,
    *,
    levels: int = 4,
    ring: int = 0,
    user: bool = False,
    map_bytes: int = MAP_MAX,
) -> SystemRegisters:
    """Write GDT, TSS and page tables and return the state of 64-bit mode.

    The first `map_bytes` (a multiple of 2 MiB, up to 4 GiB) are mapped to themselves through
    `levels` (4 or 5) levels of tables. `ring` is 0 or 3; `user` opens the pages to ring 3, which
    entering in ring 3 implies. The TSS lets ring 3 use the ports below `IO_BITMAP_PORTS` and
    brings interrupts from ring 3 to the stack at BOOT_INTERRUPT_STACK_TOP; IST1 is a second one.

    Raises ConfigurationError for other values, or if there is no memory for the tables.
    """
    if levels not in (4, 5):
        raise ConfigurationError(f"long mode has 4 or 5 levels of page tables, not {levels}")
    if ring not in (0, RING3):
        raise ConfigurationError(f"long mode starts in ring 0 or 3, not {ring}")
    if not 0 < map_bytes <= MAP_MAX or map_bytes % LARGE_PAGE:
        raise ConfigurationError(f"map_bytes must be a multiple of 2 MiB up to 4 GiB, not {map_bytes:#x}")
    reserve_structures(Placement(memory), "long")
    _write_gdt(memory)
    _write_tss(memory)
    cr3 = _write_page_tables(memory, levels=levels, user=user or ring == RING3, map_bytes=map_bytes)
    code, data = (USER_CODE64, USER_DATA) if ring == RING3 else (CODE64, DATA)
    return replace(
        _flat_segments(system, code, data),
        tr=TSS,
        cr0=CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG,
        cr3=cr3,
        cr4=CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT | (CR4_LA57 if levels == 5 else 0),
        efer=EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE,
    )


def descriptor(segment: Segment) -> int:
    """Return the 8 bytes of a GDT entry that loads as `segment` (SDM volume 3, figure 3-8)."""
    limit = segment.limit >> 12 if segment.g else segment.limit
    return (
        (limit & 0xFFFF)
        | (segment.base & 0xFF_FFFF) << 16
        | segment.type << 40
        | segment.s << 44
        | segment.dpl << 45
        | segment.present << 47
        | (limit >> 16 & 0xF) << 48
        | segment.avl << 52
        | segment.l << 53
        | segment.db << 54
        | segment.g << 55
        | (segment.base >> 24 & 0xFF) << 56
    )


def _flat_segments(system: SystemRegisters, code: Segment, data: Segment) -> SystemRegisters:
    return replace(
        system,
        cs=code,
        ds=data,
        es=data,
        fs=data,
        gs=data,
        ss=data,
        ldt=NO_LDT,
        gdt=DescriptorTable(base=layout.BOOT_GDT, limit=GDT_SIZE - 1),
        idt=DescriptorTable(base=0, limit=0),
    )


def _write_gdt(memory: Memory) -> None:
    entries = [0, *map(descriptor, GDT_SEGMENTS), descriptor(TSS), TSS.base >> 32]
    memory.write(layout.BOOT_GDT, struct.pack(f"<{len(entries)}Q", *entries))


def _write_tss(memory: Memory) -> None:
    rsp = (layout.BOOT_INTERRUPT_STACK_TOP, 0, 0)
    ist = (layout.BOOT_IST1_STACK_TOP, 0, 0, 0, 0, 0, 0)
    # reserved, RSP0..2, reserved, IST1..7, reserved, reserved, offset of the I/O bitmap
    tss = struct.pack("<I3QQ7QQHH", 0, *rsp, 0, *ist, 0, 0, TSS_SIZE)
    memory.write(layout.BOOT_TSS, tss + bytes(IO_BITMAP_SIZE - 1) + b"\xff")


def _write_page_tables(memory: Memory, *, levels: int, user: bool, map_bytes: int) -> int:
    """Map the first `map_bytes` to themselves in 2 MiB pages. Returns the value for CR3.

    ::

        BOOT_PAGE_TABLES +0x0000  PML5  entry 0 -> PML4       (5 levels only)
                         +0x1000  PML4  entry 0 -> PDPT
                         +0x2000  PDPT  entries 0..3 -> PD0..PD3
                         +0x3000  PD0..PD3  2 MiB pages
    """
    pml5 = layout.BOOT_PAGE_TABLES
    pml4, pdpt, directories = (pml5 + i * layout.PAGE_SIZE for i in (1, 2, 3))
    flags = PTE_P | PTE_RW | (PTE_US if user else 0)
    page = flags | PTE_PS  # below 2 MiB, so that address | page is address + page
    table = struct.Struct(f"<{_ENTRIES}Q")
    unused = (0,) * _ENTRIES
    pages = [*range(page, page + map_bytes, LARGE_PAGE), *unused * 4][: _ENTRIES * 4]
    links = [directories + i * layout.PAGE_SIZE | flags for i in range(4)]
    memory.write(
        pml5,
        table.pack(pml4 | flags, *unused[1:])
        + table.pack(pdpt | flags, *unused[1:])
        + table.pack(*links, *unused[4:])
        + struct.pack(f"<{len(pages)}Q", *pages),
    )
    return pml5 if levels == 5 else pml4
