"""System instructions: flags, control registers, descriptor tables, MSRs, CPUID, HLT (SDM volume 2)."""

from __future__ import annotations

from pykvm.emulator import msr, segments
from pykvm.emulator.cpuid import cpuid as query_cpuid
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
from pykvm.emulator.transfer import writable_flags
from pykvm.emulator.translate import M32, RAX, RBX, RCX, RDX, RIP
from pykvm.errors import UnsupportedInstruction
from pykvm.registers import (
    CR0_TS,
    CR4_DE,
    CR4_FSGSBASE,
    CR4_TSD,
    CR4_UMIP,
    RFLAGS_DF,
    RFLAGS_IF,
    RFLAGS_IOPL,
    RFLAGS_RF,
    RFLAGS_VM,
    RFLAGS_ZF,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.emulator.cpu import Cpu
    from pykvm.emulator.translate import Op, Put, Translator

CR0_LOW = 0xF  # what LMSW can change
DR6_FIXED = 0xFFFF_0FF0
DR7_FIXED = 0x400
DR7_ENABLES = 0xFF


def _then(t: Translator, i: Instruction, action: Callable[[], None]) -> Op:
    """`action`, then on to the next instruction: for what ends a block without being a jump."""
    r, following = t.r, i.next

    def op() -> None:
        action()
        r[RIP] = following

    return op


def _privileged(t: Translator, i: Instruction, action: Callable[[], None]) -> Op:
    """As `_then`, at privilege 0 only."""
    cpu, r, following = t.cpu, t.r, i.next

    def op() -> None:
        cpu.require_cpl0()
        action()
        r[RIP] = following

    return op


# Flags


def pushf(t: Translator, i: Instruction) -> Op:
    """PUSHF: RF and VM are pushed as 0."""
    cpu, push, mask = t.cpu, t.push(i.size), MASK[i.size] & ~(RFLAGS_RF | RFLAGS_VM)

    def op() -> None:
        push(cpu.flags() & mask)

    return op


def popf(t: Translator, i: Instruction) -> Op:
    """POPF: IF and IOPL change only as far as privilege allows; RF is cleared."""
    cpu, pop, size = t.cpu, t.pop(i.size), i.size

    def action() -> None:
        value = pop()
        cpu.set_flags(value & ~RFLAGS_RF, writable_flags(cpu, size) | (RFLAGS_RF if size > 2 else 0))
        cpu.recheck()

    return _then(t, i, action)


def _require_io_privilege(cpu: Cpu) -> None:
    if cpu.is_protected and cpu.cpl > (cpu.eflags & RFLAGS_IOPL) >> 12:
        raise Fault(GP, 0)


def cli(t: Translator, i: Instruction) -> Op:
    """CLI."""
    cpu = t.cpu

    def action() -> None:
        _require_io_privilege(cpu)
        cpu.eflags &= ~RFLAGS_IF

    return _then(t, i, action)


def sti(t: Translator, i: Instruction) -> Op:
    """STI: interrupts come after the next instruction."""
    cpu = t.cpu

    def action() -> None:
        _require_io_privilege(cpu)
        if not cpu.eflags & RFLAGS_IF:
            cpu.eflags |= RFLAGS_IF
            cpu.block_interrupts()

    return _then(t, i, action)


def cld(t: Translator, i: Instruction) -> Op:
    """CLD."""
    cpu = t.cpu

    def op() -> None:
        cpu.eflags &= ~RFLAGS_DF

    return op


def std(t: Translator, i: Instruction) -> Op:
    """STD."""
    cpu = t.cpu

    def op() -> None:
        cpu.eflags |= RFLAGS_DF

    return op


def hlt(t: Translator, i: Instruction) -> Op:
    """HLT: the run loop sees to the waiting."""
    cpu = t.cpu

    def action() -> None:
        cpu.halted = True
        cpu.recheck()

    return _privileged(t, i, action)


# Segment registers


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

    return _then(t, i, action)


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

        return _then(t, i, action)

    return build


# Descriptor tables


def _forbid_user(cpu: Cpu) -> None:
    """SGDT, SIDT, SLDT, STR and SMSW with CR4.UMIP."""
    if cpu.cr4 & CR4_UMIP and cpu.cpl:
        raise Fault(GP, 0)


def _store_table(t: Translator, i: Instruction, read: Callable[[], tuple[int, int]]) -> Op:
    cpu, size = t.cpu, 8 if t.bits == 64 else 4
    address = t.address(i, size + 2, write=True)
    store_limit, store_base = t.store[2], t.store[size]

    def op() -> None:
        _forbid_user(cpu)
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

    return _privileged(t, i, action)


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
        _forbid_user(cpu)
        put(read())

    return op


def lldt(t: Translator, i: Instruction) -> Op:
    """LLDT."""
    cpu, get = t.cpu, t.get(i, i.operands[0])

    def action() -> None:
        selector = get()
        cpu.ldt = _load_system(cpu, selector, (LDT,)) if selector & SELECTOR else SegmentCache(selector)

    return _privileged(t, i, action)


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

    return _privileged(t, i, action)


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


# Control and debug registers


def mov_from_control(t: Translator, i: Instruction) -> Op:
    """MOV r, CRn."""
    cpu, number = t.cpu, i.operands[1].number
    put = t.put(i, i.operands[0])
    name = {0: "cr0", 2: "cr2", 3: "cr3", 4: "cr4", 8: "cr8"}.get(number)
    if name is None:
        raise Fault(UD)

    def op() -> None:
        cpu.require_cpl0()
        put(getattr(cpu, name))

    return op


def mov_to_control(t: Translator, i: Instruction) -> Op:
    """MOV CRn, r."""
    cpu, number = t.cpu, i.operands[0].number
    get = t.get(i, i.operands[1])

    def set_cr2(value: int) -> None:
        cpu.cr2 = value

    def set_cr8(value: int) -> None:
        if value >> 4:
            raise Fault(GP, 0)
        cpu.cr8 = value

    setter: Put | None = {0: cpu.set_cr0, 2: set_cr2, 3: cpu.set_cr3, 4: cpu.set_cr4, 8: set_cr8}.get(number)
    if setter is None:
        raise Fault(UD)
    put = setter
    return _privileged(t, i, lambda: put(get()))


def _debug_number(cpu: Cpu, number: int) -> int:
    """DR4 and DR5 are DR6 and DR7 unless CR4.DE is set."""
    if number in (4, 5):
        if cpu.cr4 & CR4_DE:
            raise Fault(UD)
        return number + 2
    return number


def mov_from_debug(t: Translator, i: Instruction) -> Op:
    """MOV r, DRn."""
    cpu, number = t.cpu, i.operands[1].number
    put = t.put(i, i.operands[0])
    if number > 7:
        raise Fault(UD)

    def op() -> None:
        cpu.require_cpl0()
        which = _debug_number(cpu, number)
        put(cpu.debug[which] if which < 4 else (cpu.dr6 if which == 6 else cpu.dr7))

    return op


def mov_to_debug(t: Translator, i: Instruction) -> Op:
    """MOV DRn, r. Enabling a breakpoint is not implemented; the registers otherwise work."""
    cpu, number = t.cpu, i.operands[0].number
    get = t.get(i, i.operands[1])
    if number > 7:
        raise Fault(UD)

    def action() -> None:
        which, value = _debug_number(cpu, number), get()
        if which < 4:
            cpu.debug[which] = value
        elif value >> 32:
            raise Fault(GP, 0)
        elif which == 6:
            cpu.dr6 = value & 0xE00F | DR6_FIXED
        elif value & DR7_ENABLES:
            raise UnsupportedInstruction(cpu.linear_ip(), i.code, "mov to dr7 that enables a breakpoint")
        else:
            cpu.dr7 = value | DR7_FIXED

    return _privileged(t, i, action)


def smsw(t: Translator, i: Instruction) -> Op:
    """SMSW: the lower part of CR0."""
    cpu, dst = t.cpu, i.operands[0]
    put, mask = t.put(i, dst), MASK[dst.size]

    def op() -> None:
        _forbid_user(cpu)
        put(cpu.cr0 & mask)

    return op


def lmsw(t: Translator, i: Instruction) -> Op:
    """LMSW: the four lowest bits of CR0; PE can be set but not cleared."""
    cpu, get = t.cpu, t.get(i, i.operands[0])

    def action() -> None:
        value = get() & CR0_LOW | cpu.cr0 & 1
        cpu.set_cr0(cpu.cr0 & ~CR0_LOW | value)

    return _privileged(t, i, action)


def clts(t: Translator, i: Instruction) -> Op:
    """CLTS: clear CR0.TS."""
    cpu = t.cpu

    def action() -> None:
        cpu.cr0 &= ~CR0_TS

    return _privileged(t, i, action)


def invlpg(t: Translator, i: Instruction) -> Op:
    """INVLPG: all translations go, which is more than needed and allowed."""
    return _privileged(t, i, t.cpu.mmu.flush)


def wbinvd(t: Translator, i: Instruction) -> Op:
    """WBINVD, INVD: there is no cache."""
    return _privileged(t, i, lambda: None)


# MSRs, CPUID, time


def _put_pair(r: list[int], value: int) -> None:
    r[RAX], r[RDX] = value & M32, value >> 32 & M32


def rdmsr(t: Translator, i: Instruction) -> Op:
    """RDMSR."""
    cpu, r = t.cpu, t.r
    return _privileged(t, i, lambda: _put_pair(r, msr.read(cpu, r[RCX] & M32)))


def wrmsr(t: Translator, i: Instruction) -> Op:
    """WRMSR."""
    cpu, r = t.cpu, t.r
    return _privileged(t, i, lambda: msr.write(cpu, r[RCX] & M32, r[RAX] & M32 | (r[RDX] & M32) << 32))


def rdtsc(t: Translator, i: Instruction) -> Op:
    """RDTSC: at privilege 0 only if CR4.TSD is set."""
    cpu, r = t.cpu, t.r

    def op() -> None:
        if cpu.cr4 & CR4_TSD:
            cpu.require_cpl0()
        _put_pair(r, msr.read_tsc(cpu))

    return op


def rdtscp(t: Translator, i: Instruction) -> Op:
    """RDTSCP: RDTSC, and TSC_AUX in ECX."""
    cpu, r = t.cpu, t.r
    read = rdtsc(t, i)

    def op() -> None:
        read()
        r[RCX] = cpu.msrs.tsc_aux & M32

    return op


def rdpid(t: Translator, i: Instruction) -> Op:
    """RDPID: TSC_AUX."""
    cpu, put = t.cpu, t.put_register(i.modrm & 7 | (i.rex & 1) << 3, 8)

    def op() -> None:
        put(cpu.msrs.tsc_aux & M32)

    return op


def cpuid(t: Translator, i: Instruction) -> Op:
    """CPUID."""
    r = t.r

    def op() -> None:
        r[RAX], r[RBX], r[RCX], r[RDX] = query_cpuid(r[RAX] & M32, r[RCX] & M32)

    return op


def swapgs(t: Translator, i: Instruction) -> Op:
    """SWAPGS: exchange the base of GS with KERNEL_GS_BASE."""
    cpu = t.cpu

    def action() -> None:
        base = cpu.segments[GS].base
        msr.set_segment_base(cpu, GS, cpu.msrs.kernel_gs_base)
        cpu.msrs.kernel_gs_base = base

    return _privileged(t, i, action)


def segment_base(t: Translator, i: Instruction) -> Op:
    """RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE."""
    cpu, operand, field = t.cpu, i.operands[0], i.reg
    number, mask = 4 + (field & 1), MASK[operand.size]
    get, put = t.get(i, operand), t.put(i, operand)

    def action() -> None:
        if not cpu.cr4 & CR4_FSGSBASE:
            raise Fault(UD)
        if field < 2:
            put(cpu.segments[number].base & mask)
        else:
            msr.set_segment_base(cpu, number, get())

    return _then(t, i, action)
