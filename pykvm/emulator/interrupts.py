"""Delivers interrupts and exceptions through the IVT or IDT (SDM volume 3, chapter 6).

`deliver` raises Fault when delivery itself faults; `raise_exception` turns such a sequence
into the next exception, a double fault, or a triple fault (SDM volume 3, table 6-5).
"""

from __future__ import annotations

from pykvm.emulator.decode import CS, SS
from pykvm.emulator.faults import (
    CONTRIBUTORY,
    DB,
    DF,
    EXTERNAL,
    GP,
    IN_IDT,
    NP,
    PF,
    SELECTOR,
    TS,
    Fault,
    TripleFault,
)
from pykvm.emulator.segments import (
    INTERRUPT_GATE,
    INTERRUPT_GATE16,
    TASK_GATE,
    TRAP_GATE,
    TRAP_GATE16,
    SegmentCache,
    check_code_size,
    check_stack,
    mark_accessed,
    null_stack,
    read_descriptor,
)
from pykvm.emulator.stack import Stack, task_stack
from pykvm.emulator.transfer import set_ip
from pykvm.emulator.translate import RIP, RSP
from pykvm.registers import RFLAGS_AC, RFLAGS_IF, RFLAGS_NT, RFLAGS_RF, RFLAGS_TF, RFLAGS_VM

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.emulator.cpu import Cpu

DR6_BS = 1 << 14


def raise_exception(cpu: Cpu, fault: Fault) -> None:
    """Deliver `fault`, whose instruction RIP points at. Raises TripleFault."""
    while True:
        if fault.vector == PF:
            cpu.cr2 = fault.cr2
        try:
            deliver(cpu, fault.vector, fault.code)
            return
        except Fault as second:
            fault = _combine(fault, second)


def _combine(first: Fault, second: Fault) -> Fault:
    if first.vector == DF:
        raise TripleFault
    benign = second.vector not in CONTRIBUTORY and second.vector != PF
    if first.vector == PF:
        double = not benign
    else:
        double = first.vector in CONTRIBUTORY and second.vector in CONTRIBUTORY
    return Fault(DF, 0) if double else second


def raise_interrupt(cpu: Cpu, vector: int) -> None:
    """Deliver an external interrupt. Raises TripleFault."""
    try:
        deliver(cpu, vector, None, external=True)
    except Fault as fault:
        raise_exception(cpu, fault)


def raise_single_step(cpu: Cpu) -> None:
    """Deliver the #DB trap of RFLAGS.TF, after the instruction."""
    cpu.dr6 |= DR6_BS
    try:
        deliver(cpu, DB, None, is_fault=False)
    except Fault as fault:
        raise_exception(cpu, fault)


def deliver(
    cpu: Cpu,
    vector: int,
    code: int | None,
    *,
    software: bool = False,
    external: bool = False,
    is_fault: bool = True,
) -> None:
    """Enter the handler of `vector`, with RIP as the return address. Raises Fault, changing nothing.

    `software` (INT n, INT3, INTO) makes the gate's DPL count; `external` marks what is not
    the instruction's doing, in error codes of faults on the way; faults push RF.
    """
    flags = cpu.flags()
    cpu.delivered = True
    if not cpu.is_protected:
        _deliver_real(cpu, vector, flags)
        return
    if is_fault and not software and not external and vector != DF:
        flags |= RFLAGS_RF
    source = 0 if software else EXTERNAL
    in_idt = vector * 8 | IN_IDT | source
    selector, offset, kind, ist = _read_gate(cpu, vector, in_idt, software)
    if not selector & SELECTOR:
        raise Fault(GP, source)
    cache = read_descriptor(cpu, selector, GP, source)
    if not cache.is_code or cache.dpl > cpu.cpl or (cpu.is_long and not cache.l):
        raise Fault(GP, selector & SELECTOR | source)
    if not cache.present:
        raise Fault(NP, selector & SELECTOR | source)
    check_code_size(cpu, cache, True)
    set_ip(cpu, cache, offset)
    inner = not cache.is_conforming and cache.dpl < cpu.cpl
    if cpu.is_long:
        stack, new_ss = _enter_long(cpu, cache, ist, inner, flags, source)
        size = 8
    else:
        size = 2 if kind in (INTERRUPT_GATE16, TRAP_GATE16) else 4
        stack, new_ss = _enter_protected(cpu, cache, size, inner, flags, source)
    if code is not None:
        stack.push(code, size)
    _commit(cpu, cache, offset, new_ss)
    stack.commit()
    is_gate = kind in (INTERRUPT_GATE, INTERRUPT_GATE16)
    cpu.set_flags(0, RFLAGS_TF | RFLAGS_NT | RFLAGS_RF | RFLAGS_VM | (RFLAGS_IF if is_gate else 0))


def _deliver_real(cpu: Cpu, vector: int, flags: int) -> None:
    if vector * 4 + 3 > cpu.idt_limit:
        raise Fault(GP, 0)
    entry = cpu.mmu.supervisor.load[4](cpu.idt_base + vector * 4)
    stack = Stack.current(cpu)
    for value in (flags, cpu.segments[CS].selector, cpu.r[RIP]):
        stack.push(value, 2)
    stack.commit()
    cpu.set_flags(0, RFLAGS_IF | RFLAGS_TF | RFLAGS_AC | RFLAGS_RF)
    cpu.set_real_segment(CS, entry >> 16)
    cpu.r[RIP] = entry & 0xFFFF


def _read_gate(cpu: Cpu, vector: int, in_idt: int, software: bool) -> tuple[int, int, int, int]:
    """(selector, offset, type, IST index) of a gate (SDM volume 3, figures 6-2 and 6-8)."""
    size = 16 if cpu.is_long else 8
    if vector * size + size - 1 > cpu.idt_limit:
        raise Fault(GP, in_idt)
    load = cpu.mmu.supervisor.load
    address = (cpu.idt_base + vector * size) & cpu.mmu.linear_mask
    raw = load[8](address)
    kind, dpl, present = raw >> 40 & 0x1F, raw >> 45 & 3, raw >> 47 & 1
    offset = raw & 0xFFFF | (raw >> 48 & 0xFFFF) << 16
    if cpu.is_long:
        offset |= load[4](address + 8) << 32
        valid = kind in (INTERRUPT_GATE, TRAP_GATE)
    else:
        valid = kind in (INTERRUPT_GATE, TRAP_GATE, INTERRUPT_GATE16, TRAP_GATE16, TASK_GATE)
    if not valid or (software and dpl < cpu.cpl):
        raise Fault(GP, in_idt)
    if not present:
        raise Fault(NP, in_idt)
    if kind == TASK_GATE:
        raise cpu.unsupported("interrupt through a task gate")
    if kind in (INTERRUPT_GATE16, TRAP_GATE16):
        offset &= 0xFFFF
    return raw >> 16 & 0xFFFF, offset, kind, raw >> 32 & 7


def _enter_long(
    cpu: Cpu, cache: SegmentCache, ist: int, inner: bool, flags: int, source: int
) -> tuple[Stack, SegmentCache | None]:
    top, new_ss = cpu.r[RSP], None
    if inner:
        new_ss = null_stack(cache.dpl)
    if inner or ist:
        _, top = task_stack(cpu, cache.dpl, ist)
    level = cache.dpl if inner else cpu.cpl
    segment = new_ss or cpu.segments[SS]
    stack = Stack(cpu, segment, top & ~15, user=level == 3, code64=True, error_code=source)
    saved = (cpu.segments[SS].selector, cpu.r[RSP], flags, cpu.segments[CS].selector, cpu.r[RIP])
    for value in saved:
        stack.push(value, 8)
    return stack, new_ss


def _enter_protected(
    cpu: Cpu, cache: SegmentCache, size: int, inner: bool, flags: int, source: int
) -> tuple[Stack, SegmentCache | None]:
    saved: tuple[int, ...] = (flags, cpu.segments[CS].selector, cpu.r[RIP])
    if not inner:
        stack, new_ss = Stack.current(cpu, error_code=source), None
    else:
        selector, top = task_stack(cpu, cache.dpl)
        new_ss = check_stack(cpu, selector, cache.dpl, TS, source)
        code = selector & SELECTOR | source
        stack = Stack(cpu, new_ss, top, user=cache.dpl == 3, error_code=code)
        saved = (cpu.segments[SS].selector, cpu.r[RSP], *saved)
    for value in saved:
        stack.push(value, size)
    return stack, new_ss


def _commit(cpu: Cpu, cache: SegmentCache, offset: int, new_ss: SegmentCache | None) -> None:
    mark_accessed(cpu, cache)
    if not cache.is_conforming:
        cpu.cpl = cache.dpl
    cache.selector = cache.selector & SELECTOR | cpu.cpl
    if new_ss is not None:
        cpu.set_segment(SS, new_ss)
    cpu.set_segment(CS, cache)
    cpu.r[RIP] = offset
