"""Segment registers and descriptors: parsing, loading with the usual checks, limits.

SDM volume 3, chapters 3 and 5 and volume 2, MOV to Sreg. In real mode a load only sets the
selector and the base; limit and rights stay as they are (hence "unreal" mode).
"""

from __future__ import annotations

from pykvm.emulator.decode import CS, SS
from pykvm.emulator.faults import GP, NP, SELECTOR, Fault
from pykvm.emulator.faults import SS as STACK_FAULT
from pykvm.registers import Segment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.emulator.cpu import Cpu

# Descriptor types of code and data segments (SDM volume 3, table 3-1)
TYPE_ACCESSED = 1 << 0
TYPE_WRITABLE = 1 << 1  # data; for code: readable
TYPE_EXPAND_DOWN = 1 << 2  # data; for code: conforming
TYPE_CODE = 1 << 3
TYPE_READABLE = TYPE_WRITABLE
TYPE_CONFORMING = TYPE_EXPAND_DOWN

# System descriptor types (SDM volume 3, table 3-2)
LDT = 2
TSS16, TSS16_BUSY = 1, 3
CALL_GATE16 = 4
TASK_GATE = 5
INTERRUPT_GATE16, TRAP_GATE16 = 6, 7
TSS32, TSS32_BUSY = 9, 11
CALL_GATE32 = 12
INTERRUPT_GATE, TRAP_GATE = 14, 15

RPL = 3
TABLE_INDICATOR = 4


class SegmentCache:
    """A segment register with its hidden part; fields as in `pykvm.registers.Segment`."""

    __slots__ = (
        "avl",
        "base",
        "db",
        "dpl",
        "g",
        "l",
        "limit",
        "present",
        "s",
        "selector",
        "type",
        "unusable",
    )

    def __init__(self, selector: int = 0) -> None:
        self.selector = selector
        self.base = 0
        self.limit = 0
        self.type = 0
        self.s = 0
        self.dpl = 0
        self.present = 0
        self.avl = 0
        self.l = 0
        self.db = 0
        self.g = 0
        self.unusable = 1

    def save(self) -> Segment:
        """As a frozen value."""
        return Segment(**{name: getattr(self, name) for name in self.__slots__})

    def restore(self, value: Segment) -> None:
        """From a frozen value."""
        for name in self.__slots__:
            setattr(self, name, getattr(value, name))

    @property
    def is_code(self) -> bool:
        """Whether this is a code segment."""
        return bool(self.s and self.type & TYPE_CODE)

    @property
    def is_conforming(self) -> bool:
        """Whether this is a conforming code segment."""
        return self.is_code and bool(self.type & TYPE_CONFORMING)

    @property
    def is_writable(self) -> bool:
        """Whether this is a writable data segment."""
        return bool(self.s and not self.type & TYPE_CODE and self.type & TYPE_WRITABLE)

    @property
    def is_readable(self) -> bool:
        """Whether this is a data segment or readable code."""
        return bool(self.s and (not self.type & TYPE_CODE or self.type & TYPE_READABLE))


def parse(selector: int, raw: int) -> SegmentCache:
    """The 8 bytes of a descriptor (SDM volume 3, figure 3-8)."""
    cache = SegmentCache(selector)
    cache.base = raw >> 16 & 0xFF_FFFF | (raw >> 56 & 0xFF) << 24
    limit = raw & 0xFFFF | raw >> 32 & 0xF_0000
    cache.g = raw >> 55 & 1
    cache.limit = limit << 12 | 0xFFF if cache.g else limit
    cache.type = raw >> 40 & 0xF
    cache.s = raw >> 44 & 1
    cache.dpl = raw >> 45 & 3
    cache.present = raw >> 47 & 1
    cache.avl = raw >> 52 & 1
    cache.l = raw >> 53 & 1
    cache.db = raw >> 54 & 1
    cache.unusable = 0
    return cache


def descriptor_address(cpu: Cpu, selector: int, size: int = 8) -> int | None:
    """The linear address of a descriptor of `size` bytes, None beyond the table's limit."""
    if selector & TABLE_INDICATOR:
        base, limit = cpu.ldt.base, -1 if cpu.ldt.unusable else cpu.ldt.limit
    else:
        base, limit = cpu.gdt_base, cpu.gdt_limit
    offset = selector & ~7
    if offset + size - 1 > limit:
        return None
    return (base + offset) & cpu.mmu.linear_mask


def read_descriptor(cpu: Cpu, selector: int, vector: int = GP, external: int = 0) -> SegmentCache:
    """Fetch and parse a descriptor. Raises `vector` with the selector beyond the table's limit."""
    address = descriptor_address(cpu, selector)
    if address is None:
        raise Fault(vector, selector & SELECTOR | external)
    return parse(selector, cpu.mmu.supervisor.load[8](address))


def mark_accessed(cpu: Cpu, cache: SegmentCache) -> None:
    """Set the accessed bit of a code or data descriptor, in its table and in `cache`."""
    if cache.type & TYPE_ACCESSED:
        return
    address = descriptor_address(cpu, cache.selector)
    if address is not None:
        cache.type |= TYPE_ACCESSED
        cpu.mmu.supervisor.store[1](address + 5, cache.type | cache.s << 4 | cache.dpl << 5 | 0x80)


def load(cpu: Cpu, number: int, selector: int) -> None:
    """MOV, POP or Lxs to a segment register other than CS. Raises Fault, loading nothing."""
    if not cpu.is_protected:
        cpu.set_real_segment(number, selector)
        return
    if number == SS:
        cpu.set_segment(SS, check_stack(cpu, selector, cpu.cpl, GP))
        return
    if not selector & SELECTOR:
        cpu.set_segment(number, SegmentCache(selector))
        return
    cache = read_descriptor(cpu, selector)
    if not cache.is_readable:
        raise Fault(GP, selector & SELECTOR)
    if not cache.is_conforming and max(selector & RPL, cpu.cpl) > cache.dpl:
        raise Fault(GP, selector & SELECTOR)
    if not cache.present:
        raise Fault(NP, selector & SELECTOR)
    mark_accessed(cpu, cache)
    cpu.set_segment(number, cache)


def check_stack(cpu: Cpu, selector: int, cpl: int, vector: int, external: int = 0) -> SegmentCache:
    """A stack segment for privilege `cpl`. Raises `vector` if unsuitable, #SS if not present."""
    if not selector & SELECTOR:
        if cpu.is_long and cpl != 3 and selector & RPL == cpl:
            return null_stack(selector)
        raise Fault(vector, external)
    cache = read_descriptor(cpu, selector, vector, external)
    if selector & RPL != cpl or not cache.is_writable or cache.dpl != cpl:
        raise Fault(vector, selector & SELECTOR | external)
    if not cache.present:
        raise Fault(STACK_FAULT, selector & SELECTOR | external)
    mark_accessed(cpu, cache)
    return cache


def null_stack(selector: int) -> SegmentCache:
    """SS as 64-bit mode leaves it when it loads a null selector: its DPL is the new CPL."""
    cache = SegmentCache(selector)
    cache.dpl = selector & RPL
    return cache


def check_access(cpu: Cpu, number: int, offset: int, size: int, write: bool) -> None:
    """Decide on an access that the fast limit check did not pass. Raises Fault if it is not allowed."""
    cache = cpu.segments[number]
    last = offset + size - 1
    if cpu.is_protected:
        allowed = not cache.unusable and (cache.is_writable if write else cache.is_readable)
        if cache.type & TYPE_EXPAND_DOWN and not cache.type & TYPE_CODE:
            inside = cache.limit < offset and last <= (0xFFFF_FFFF if cache.db else 0xFFFF)
        else:
            inside = last <= cache.limit
    else:
        allowed, inside = True, last <= cache.limit
    if not (allowed and inside):
        raise Fault(STACK_FAULT if number == SS else GP, 0)


def limits(cpu: Cpu, cache: SegmentCache) -> tuple[int, int]:
    """The last offset that may be read and written without further checks, -1 for none."""
    if not cpu.is_protected:
        return cache.limit, cache.limit
    if cache.unusable or (cache.type & TYPE_EXPAND_DOWN and not cache.type & TYPE_CODE):
        return -1, -1
    return (cache.limit if cache.is_readable else -1), (cache.limit if cache.is_writable else -1)


def is_flat(cpu: Cpu, cache: SegmentCache) -> bool:
    """Whether the segment is all 32-bit addresses, for reading and writing."""
    return cache.base == 0 and cache.limit == 0xFFFF_FFFF and limits(cpu, cache)[1] == 0xFFFF_FFFF


def check_code(cpu: Cpu, selector: int, cpl: int) -> SegmentCache:
    """A code segment for a direct far jump or call, which keeps the privilege. Raises Fault."""
    if not selector & SELECTOR:
        raise Fault(GP, 0)
    cache = read_descriptor(cpu, selector)
    if not cache.is_code:
        raise Fault(GP, selector & SELECTOR)
    if cache.is_conforming:
        allowed = cache.dpl <= cpl
    else:
        allowed = cache.dpl == cpl and selector & RPL <= cpl
    check_code_size(cpu, cache, allowed)
    mark_accessed(cpu, cache)
    cache.selector = selector & SELECTOR | cpl
    return cache


def check_code_size(cpu: Cpu, cache: SegmentCache, allowed: bool, vector: int = GP) -> None:
    """The last checks on any new code segment: privilege (`allowed`), L with D, presence."""
    if not allowed or (cpu.is_long and cache.l and cache.db):
        raise Fault(vector, cache.selector & SELECTOR)
    if not cache.present:
        raise Fault(NP, cache.selector & SELECTOR)


def drop_privileged_data(cpu: Cpu) -> None:
    """On a return to an outer privilege: data segments that it could not load become null."""
    for number, cache in enumerate(cpu.segments):
        if number in (CS, SS) or cache.unusable:
            continue
        if cache.dpl < cpu.cpl and not cache.is_conforming:
            cpu.set_segment(number, SegmentCache(0))
