"""Instructions on segment registers, descriptor tables and descriptors (SDM volume 2; volume 3, 5.10)."""

from __future__ import annotations

from pykvm.emulator import segments
from pykvm.emulator.decode import CS, GS, SS, Instruction, Operand
from pykvm.emulator.faults import GP, NP, SELECTOR, UD, Fault
from pykvm.emulator.flags import EAGER, MASK, arithmetic
from pykvm.emulator.segments import (
    CALL_GATE16,
    CALL_GATE32,
    LDT,
    RPL,
    TASK_GATE,
    TSS16,
    TSS16_BUSY,
    TSS32,
    TSS32_BUSY,
    SegmentCache,
)
from pykvm.emulator.translate import privileged, then
from pykvm.registers import RFLAGS_ZF

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.emulator.cpu import Cpu
    from pykvm.emulator.translate import Op, Translator


def mov_from_segment(t: Translator, i: Instruction) -> Op:
    """MOV r/m, Sreg: memory takes 16 bits, a register all of its size, zero-extended."""
    dst, src = i.operands
    number, cache = src.number, t.cpu.segments
    if number > GS:
        raise Fault(UD)
    put = t.put(i, dst)

    def op() -> None:
        put(cache[number].selector)

    return op


def mov_to_segment(t: Translator, i: Instruction) -> Op:
    """MOV Sreg, r/m. A load of SS holds interrupts back for one instruction."""
    dst, src = i.operands
    cpu, number, get = t.cpu, dst.number, t.get(i, src)
    if number > GS or number == CS:
        raise Fault(UD)

    def action() -> None:
        segments.load(cpu, number, get())
        if number == SS:
            cpu.block_interrupts()

    return then(t, i, action)


def push_segment(number: int) -> Callable[[Translator, Instruction], Op]:
    """PUSH Sreg."""

    def build(t: Translator, i: Instruction) -> Op:
        cache, push = t.cpu.segments, t.push(i.size)

        def op() -> None:
            push(cache[number].selector)

        return op

    return build


def pop_segment(number: int) -> Callable[[Translator, Instruction], Op]:
    """POP Sreg."""

    def build(t: Translator, i: Instruction) -> Op:
        cpu, r, pop = t.cpu, t.r, t.pop(i.size)

        def action() -> None:
            top = r[4]
            selector = pop() & 0xFFFF
            try:
                segments.load(cpu, number, selector)
            except BaseException:
                r[4] = top
                raise
            if number == SS:
                cpu.block_interrupts()

        return then(t, i, action)

    return build


# Descriptor tables


def _store_table(t: Translator, i: Instruction, read: Callable[[], tuple[int, int]]) -> Op:
    cpu, size = t.cpu, 8 if t.bits == 64 else 4
    address = t.address(i, size + 2, write=True)
    store_limit, store_base = t.store[2], t.store[size]

    def op() -> None:
        cpu.forbid_user()
        base, limit = read()
        where = address()
        store_base((where + 2) & cpu.mmu.linear_mask, base)
        store_limit(where, limit)

    return op


def sgdt(t: Translator, i: Instruction) -> Op:
    """SGDT."""
    cpu = t.cpu
    return _store_table(t, i, lambda: (cpu.gdt_base, cpu.gdt_limit))


def sidt(t: Translator, i: Instruction) -> Op:
    """SIDT."""
    cpu = t.cpu
    return _store_table(t, i, lambda: (cpu.idt_base, cpu.idt_limit))


def _load_table(t: Translator, i: Instruction, write: Callable[[int, int], None]) -> Op:
    cpu, size = t.cpu, 8 if t.bits == 64 else 4
    address = t.address(i, size + 2, write=False)
    load_limit, load_base = t.load[2], t.load[size]
    base_mask = 0xFF_FFFF if i.size == 2 and t.bits != 64 else MASK[size]

    def action() -> None:
        where = address()
        limit = load_limit(where)
        base = load_base((where + 2) & cpu.mmu.linear_mask) & base_mask
        if size == 8 and not cpu.mmu.canonical(base):
            raise Fault(GP, 0)
        write(base, limit)

    return privileged(t, i, action)


def lgdt(t: Translator, i: Instruction) -> Op:
    """LGDT."""
    cpu = t.cpu

    def write(base: int, limit: int) -> None:
        cpu.gdt_base, cpu.gdt_limit = base, limit

    return _load_table(t, i, write)


def lidt(t: Translator, i: Instruction) -> Op:
    """LIDT."""
    cpu = t.cpu

    def write(base: int, limit: int) -> None:
        cpu.idt_base, cpu.idt_limit = base, limit

    return _load_table(t, i, write)


def sldt(t: Translator, i: Instruction) -> Op:
    """SLDT."""
    return _store_selector(t, i, lambda: t.cpu.ldt.selector)


def str_(t: Translator, i: Instruction) -> Op:
    """STR."""
    return _store_selector(t, i, lambda: t.cpu.tr.selector)


def _store_selector(t: Translator, i: Instruction, read: Callable[[], int]) -> Op:
    cpu, put = t.cpu, t.put(i, i.operands[0])

    def op() -> None:
        cpu.forbid_user()
        put(read())

    return op


def lldt(t: Translator, i: Instruction) -> Op:
    """LLDT."""
    cpu, get = t.cpu, t.get(i, i.operands[0])

    def action() -> None:
        selector = get()
        cpu.ldt = _load_system(cpu, selector, (LDT,)) if selector & SELECTOR else SegmentCache(selector)

    return privileged(t, i, action)


def ltr(t: Translator, i: Instruction) -> Op:
    """LTR: the TSS becomes busy, in the GDT, too."""
    cpu, get = t.cpu, t.get(i, i.operands[0])

    def action() -> None:
        selector = get()
        if not selector & SELECTOR:
            raise Fault(GP, 0)
        cache = _load_system(cpu, selector, (TSS32,) if cpu.is_long else (TSS16, TSS32))
        address = segments.descriptor_address(cpu, selector)
        cache.type |= 2
        if address is not None:
            cpu.mmu.supervisor.store[1](address + 5, cache.type | cache.dpl << 5 | 0x80)
        cpu.tr = cache

    return privileged(t, i, action)


def _load_system(cpu: Cpu, selector: int, types: tuple[int, ...]) -> SegmentCache:
    """An LDT or TSS descriptor of the GDT: 8 bytes, in long mode 16."""
    address = segments.descriptor_address(cpu, selector, 16 if cpu.is_long else 8)
    if selector & segments.TABLE_INDICATOR or address is None:
        raise Fault(GP, selector & SELECTOR)
    load = cpu.mmu.supervisor.load
    cache = segments.parse(selector, load[8](address))
    if cache.s or cache.type not in types:
        raise Fault(GP, selector & SELECTOR)
    if not cache.present:
        raise Fault(NP, selector & SELECTOR)
    if cpu.is_long:
        cache.base |= load[4](address + 8) << 32
        if not cpu.mmu.canonical(cache.base):
            raise Fault(GP, selector & SELECTOR)
    return cache


# Descriptor inspection

LAR_SYSTEM = (TSS16, LDT, TSS16_BUSY, CALL_GATE16, TASK_GATE, TSS32, TSS32_BUSY, CALL_GATE32)
LSL_SYSTEM = (TSS16, LDT, TSS16_BUSY, TSS32, TSS32_BUSY)
LONG_SYSTEM = (LDT, TSS32, TSS32_BUSY, CALL_GATE32)


def _visible(cpu: Cpu, selector: int, system: tuple[int, ...]) -> tuple[SegmentCache, int] | None:
    """The descriptor, parsed and raw, if LAR and the like may see it at this privilege."""
    address = segments.descriptor_address(cpu, selector)
    if not selector & SELECTOR or address is None:
        return None
    raw = cpu.mmu.supervisor.load[8](address)
    cache = segments.parse(selector, raw)
    if not cache.s and (cache.type not in system or (cpu.is_long and cache.type not in LONG_SYSTEM)):
        return None
    if not cache.is_conforming and max(cpu.cpl, selector & RPL) > cache.dpl:
        return None
    return cache, raw


def _set_zero(t: Translator) -> Callable[[bool], None]:
    f = t.f
    t.new_kind = EAGER << 2

    def put(value: bool) -> None:
        f[1] = arithmetic(f) & ~RFLAGS_ZF | (RFLAGS_ZF if value else 0)
        f[0] = EAGER << 2

    return put


def _selector_source(i: Instruction) -> Operand:
    operand = i.operands[-1]
    return Operand(operand.kind, operand.number, 2)


def lar(t: Translator, i: Instruction) -> Op:
    """LAR: access rights."""
    return _inspect(t, i, LAR_SYSTEM, lambda cache, raw: raw >> 32 & 0x00F0_FF00)


def lsl(t: Translator, i: Instruction) -> Op:
    """LSL: limit in bytes."""
    return _inspect(t, i, LSL_SYSTEM, lambda cache, raw: cache.limit)


def _inspect(
    t: Translator,
    i: Instruction,
    system: tuple[int, ...],
    value: Callable[[SegmentCache, int], int],
) -> Op:
    cpu, get, put = t.cpu, t.get(i, _selector_source(i)), t.put(i, i.operands[0])
    set_zero, mask = _set_zero(t), MASK[i.size]

    def op() -> None:
        found = _visible(cpu, get(), system)
        if found is not None:
            put(value(*found) & mask)
        set_zero(found is not None)

    return op


def verr(t: Translator, i: Instruction) -> Op:
    """VERR: whether a segment can be read."""
    return _verify(t, i, lambda cache: cache.is_readable)


def verw(t: Translator, i: Instruction) -> Op:
    """VERW: whether a segment can be written."""
    return _verify(t, i, lambda cache: cache.is_writable)


def _verify(t: Translator, i: Instruction, check: Callable[[SegmentCache], bool]) -> Op:
    cpu, get, set_zero = t.cpu, t.get(i, _selector_source(i)), _set_zero(t)

    def op() -> None:
        found = _visible(cpu, get(), ())
        set_zero(found is not None and check(found[0]))

    return op


def arpl(t: Translator, i: Instruction) -> Op:
    """ARPL: raise the RPL of a selector to that of another."""
    get, put = t.modify(i, i.operands[0])
    source, set_zero = t.get(i, i.operands[1]), _set_zero(t)

    def op() -> None:
        value, wanted = get(), source() & RPL
        lower = value & RPL < wanted
        put(value & ~RPL | wanted if lower else value)
        set_zero(lower)

    return op
