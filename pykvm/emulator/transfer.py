"""Far jumps, calls and returns, IRET, and the fast system calls (SDM volume 2; volume 3, 5.8).

Each function checks everything that can fault before it changes any register.
"""

from __future__ import annotations

from pykvm.emulator.decode import CS, SS
from pykvm.emulator.faults import GP, NP, SELECTOR, TS, UD, Fault
from pykvm.emulator.flags import ARITHMETIC
from pykvm.emulator.segments import (
    CALL_GATE16,
    CALL_GATE32,
    RPL,
    SegmentCache,
    check_code,
    check_code_size,
    check_stack,
    descriptor_address,
    drop_privileged_data,
    mark_accessed,
    null_stack,
    read_descriptor,
)
from pykvm.emulator.stack import Stack, task_stack
from pykvm.emulator.translate import M32, M64, RCX, RDX, RIP, RSP
from pykvm.registers import (
    CR0_PE,
    EFER_SCE,
    RFLAGS_AC,
    RFLAGS_DF,
    RFLAGS_ID,
    RFLAGS_IF,
    RFLAGS_IOPL,
    RFLAGS_NT,
    RFLAGS_RF,
    RFLAGS_TF,
    RFLAGS_VM,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.emulator.cpu import Cpu

R11 = 11

# Flags that IRET and POPF set from the stack at any privilege
ALWAYS = ARITHMETIC | RFLAGS_TF | RFLAGS_DF | RFLAGS_NT | RFLAGS_AC | RFLAGS_ID


def writable_flags(cpu: Cpu, size: int) -> int:
    """The RFLAGS bits that IRET or POPF may change at this privilege and operand size."""
    mask = ALWAYS
    if cpu.cpl == 0:
        mask |= RFLAGS_IOPL
    if not cpu.is_protected or cpu.cpl <= (cpu.eflags & RFLAGS_IOPL) >> 12:
        mask |= RFLAGS_IF
    return mask & 0xFFFF if size == 2 else mask


def set_ip(cpu: Cpu, cache: SegmentCache, offset: int) -> None:
    """Check that `offset` may be executed in code segment `cache`. Raises #GP(0)."""
    if cpu.is_long and cache.l:
        if not cpu.mmu.canonical(offset):
            raise Fault(GP, 0)
    elif offset > cache.limit:
        raise Fault(GP, 0)


def jump_far(cpu: Cpu, selector: int, offset: int) -> None:
    """JMP ptr16:16, ptr16:32, m16:16 and so on."""
    if not cpu.is_protected:
        cpu.set_real_segment(CS, selector)
        cpu.r[RIP] = offset
        return
    gate = _gate(cpu, selector)
    if gate is not None:
        selector, offset, _, _ = gate
    cache = check_code(cpu, selector, cpu.cpl)
    set_ip(cpu, cache, offset)
    cpu.set_segment(CS, cache)
    cpu.r[RIP] = offset


def call_far(cpu: Cpu, selector: int, offset: int, size: int, return_ip: int) -> None:
    """CALL ptr16:16 and so on; through a call gate possibly to an inner privilege."""
    stack = Stack.current(cpu)
    old = cpu.segments[CS].selector
    if not cpu.is_protected:
        stack.push(old, size)
        stack.push(return_ip, size)
        stack.commit()
        cpu.set_real_segment(CS, selector)
        cpu.r[RIP] = offset
        return
    gate = _gate(cpu, selector)
    count = 0
    if gate is not None:
        selector, offset, size, count = gate
        cache = read_descriptor(cpu, selector)
        if cache.is_code and not cache.is_conforming and cache.dpl < cpu.cpl:
            _call_inner(cpu, cache, offset, size, count, return_ip)
            return
    cache = check_code(cpu, selector, cpu.cpl)
    set_ip(cpu, cache, offset)
    stack.push(old, size)
    stack.push(return_ip, size)
    stack.commit()
    cpu.set_segment(CS, cache)
    cpu.r[RIP] = offset


def _gate(cpu: Cpu, selector: int) -> tuple[int, int, int, int] | None:
    """(selector, offset, operand size, parameters) of a call gate; None if it is a code segment."""
    if not selector & SELECTOR:
        raise Fault(GP, 0)
    cache = read_descriptor(cpu, selector)
    if cache.s:
        return None
    address = descriptor_address(cpu, selector, 16 if cpu.is_long else 8)
    if cache.type not in (CALL_GATE32, CALL_GATE16) or address is None:
        if cache.type in (1, 5, 9) and not cpu.is_long:
            raise cpu.unsupported("task switch")
        raise Fault(GP, selector & SELECTOR)
    if cache.dpl < max(cpu.cpl, selector & RPL):
        raise Fault(GP, selector & SELECTOR)
    if not cache.present:
        raise Fault(NP, selector & SELECTOR)
    raw = cpu.mmu.supervisor.load[8](address)
    target, offset = raw >> 16 & 0xFFFF, raw & 0xFFFF
    if cpu.is_long:
        high = cpu.mmu.supervisor.load[4](address + 8)
        offset |= (raw >> 48 & 0xFFFF) << 16 | high << 32
        if cache.type != CALL_GATE32 or not read_descriptor(cpu, target).l:
            raise Fault(GP, target & SELECTOR)
        return target, offset, 8, 0
    if cache.type == CALL_GATE16:
        return target, offset, 2, raw >> 32 & 31
    return target, offset | (raw >> 48 & 0xFFFF) << 16, 4, raw >> 32 & 31


def _call_inner(cpu: Cpu, cache: SegmentCache, offset: int, size: int, count: int, return_ip: int) -> None:
    """A call through a gate to more privilege: a new stack, with `count` parameters copied."""
    check_code_size(cpu, cache, True)
    set_ip(cpu, cache, offset)
    old_stack = Stack.current(cpu)
    parameters = [old_stack.peek(index, size) for index in range(count)]
    selector, top = task_stack(cpu, cache.dpl)
    new_ss = null_stack(cache.dpl) if cpu.is_long else check_stack(cpu, selector, cache.dpl, TS)
    stack = Stack(cpu, new_ss, top, user=False)
    stack.push(cpu.segments[SS].selector, size)
    stack.push(cpu.r[RSP], size)
    for value in reversed(parameters):
        stack.push(value, size)
    stack.push(cpu.segments[CS].selector, size)
    stack.push(return_ip, size)
    mark_accessed(cpu, cache)
    cache.selector = cache.selector & SELECTOR | cache.dpl
    cpu.cpl = cache.dpl
    cpu.set_segment(SS, new_ss)
    cpu.set_segment(CS, cache)
    stack.commit()
    cpu.r[RIP] = offset


def return_far(cpu: Cpu, size: int, release: int) -> None:
    """RETF, with `release` bytes of parameters to drop."""
    stack = Stack.current(cpu)
    offset, selector = stack.pop(size), stack.pop(size) & 0xFFFF
    stack.release(release)
    if not cpu.is_protected:
        stack.commit()
        cpu.set_real_segment(CS, selector)
        cpu.r[RIP] = offset
        return
    cache = _check_return(cpu, selector)
    set_ip(cpu, cache, offset)
    if selector & RPL == cpu.cpl:
        stack.commit()
        cpu.set_segment(CS, cache)
    else:
        top, ss = stack.pop(size), stack.pop(size) & 0xFFFF
        _return_outer(cpu, cache, ss, top)
        cpu.r[RSP] = (cpu.r[RSP] + release) & M64
    cpu.r[RIP] = offset


def _check_return(cpu: Cpu, selector: int) -> SegmentCache:
    """The code segment of a return, to the same or less privilege. Raises Fault."""
    if not selector & SELECTOR:
        raise Fault(GP, 0)
    cache = read_descriptor(cpu, selector)
    rpl = selector & RPL
    if not cache.is_code or rpl < cpu.cpl:
        raise Fault(GP, selector & SELECTOR)
    check_code_size(cpu, cache, cache.dpl <= rpl if cache.is_conforming else cache.dpl == rpl)
    mark_accessed(cpu, cache)
    return cache


def _return_outer(cpu: Cpu, cache: SegmentCache, ss: int, top: int) -> None:
    """Go to `cache` and the stack `ss`:`top` of its privilege."""
    cpl = cache.selector & RPL
    if cpu.is_long and cache.l and not ss & SELECTOR and cpl != 3:
        stack = null_stack(ss)
    else:
        stack = check_stack(cpu, ss, cpl, GP)
    cpu.cpl = cpl
    cpu.set_segment(CS, cache)
    cpu.set_segment(SS, stack)
    if cpu.is_long and cache.l:
        cpu.r[RSP] = top
    elif stack.db:
        cpu.r[RSP] = top & M32
    else:
        cpu.r[RSP] = cpu.r[RSP] & ~0xFFFF | top & 0xFFFF
    drop_privileged_data(cpu)


def iret(cpu: Cpu, size: int) -> None:
    """IRET: return from an interrupt, in every mode but virtual-8086."""
    stack = Stack.current(cpu)
    if cpu.is_protected and cpu.eflags & RFLAGS_NT:
        if cpu.is_long:
            raise Fault(GP, 0)
        raise cpu.unsupported("iret to another task")
    offset, selector, flags = stack.pop(size), stack.pop(size) & 0xFFFF, stack.pop(size)
    mask = writable_flags(cpu, size) | (RFLAGS_RF if size != 2 else 0)
    if not cpu.is_protected:
        stack.commit()
        cpu.set_real_segment(CS, selector)
    else:
        if flags & RFLAGS_VM and size == 4 and cpu.cpl == 0 and not cpu.is_long:
            raise cpu.unsupported("iret to virtual-8086 mode")
        cache = _check_return(cpu, selector)
        set_ip(cpu, cache, offset)
        if cpu.is_code64 or selector & RPL != cpu.cpl:
            top, ss = stack.pop(size), stack.pop(size) & 0xFFFF
            _return_outer(cpu, cache, ss, top)
        else:
            stack.commit()
            cpu.set_segment(CS, cache)
    cpu.r[RIP] = offset
    # RF lasts for one instruction and only holds back instruction breakpoints, which there are none of.
    cpu.set_flags(flags & ~RFLAGS_RF, mask)
    cpu.nmi_masked = False
    cpu.recheck()


# Fast system calls


def syscall(cpu: Cpu, return_ip: int) -> None:
    """SYSCALL, in long mode only (SDM volume 2)."""
    if not cpu.efer & EFER_SCE or not cpu.is_long:
        raise Fault(UD)
    r, msrs = cpu.r, cpu.msrs
    r[RCX] = return_ip
    r[R11] = cpu.flags() & ~RFLAGS_RF
    r[RIP] = msrs.lstar if cpu.is_code64 else msrs.cstar
    cpu.set_flags(r[R11] & ~msrs.fmask, M32)
    selector = msrs.star >> 32 & 0xFFFC
    cpu.cpl = 0
    _set_flat(cpu, CS, selector, 0, long=True)
    _set_flat(cpu, SS, selector + 8, 0, long=False)


def sysret(cpu: Cpu, size: int) -> None:
    """SYSRET, to 64-bit code with REX.W, else to compatibility mode."""
    if not cpu.efer & EFER_SCE or not cpu.is_long:
        raise Fault(UD)
    if cpu.cpl != 0 or (size == 8 and not cpu.mmu.canonical(cpu.r[RCX])):
        raise Fault(GP, 0)
    r = cpu.r
    selector = cpu.msrs.star >> 48
    r[RIP] = r[RCX] if size == 8 else r[RCX] & M32
    cpu.set_flags(r[R11] & ~(RFLAGS_RF | RFLAGS_VM), M32)
    cpu.cpl = 3
    _set_flat(cpu, CS, (selector + 16 if size == 8 else selector) & 0xFFFF | 3, 3, long=size == 8)
    _set_flat(cpu, SS, (selector + 8) & 0xFFFF | 3, 3, long=False)
    cpu.recheck()


def sysenter(cpu: Cpu) -> None:
    """SYSENTER: to CPL 0 at SYSENTER_EIP."""
    msrs = cpu.msrs
    if not cpu.cr0 & CR0_PE or not msrs.sysenter_cs & SELECTOR:
        raise Fault(GP, 0)
    long = cpu.is_long
    mask = M64 if long else M32
    cpu.set_flags(0, RFLAGS_IF | RFLAGS_VM | RFLAGS_RF)
    cpu.r[RSP] = msrs.sysenter_esp & mask
    cpu.r[RIP] = msrs.sysenter_eip & mask
    selector = msrs.sysenter_cs & SELECTOR
    cpu.cpl = 0
    _set_flat(cpu, CS, selector, 0, long=long)
    _set_flat(cpu, SS, selector + 8, 0, long=False)


def sysexit(cpu: Cpu, size: int) -> None:
    """SYSEXIT: to CPL 3 at rDX with the stack rCX."""
    base = cpu.msrs.sysenter_cs
    if not cpu.cr0 & CR0_PE or not base & SELECTOR or cpu.cpl != 0:
        raise Fault(GP, 0)
    r = cpu.r
    if size == 8 and not (cpu.mmu.canonical(r[RDX]) and cpu.mmu.canonical(r[RCX])):
        raise Fault(GP, 0)
    mask = M64 if size == 8 else M32
    r[RIP], r[RSP] = r[RDX] & mask, r[RCX] & mask
    selector = base + (32 if size == 8 else 16)
    cpu.cpl = 3
    _set_flat(cpu, CS, selector & 0xFFFF | 3, 3, long=size == 8)
    _set_flat(cpu, SS, (selector + 8) & 0xFFFF | 3, 3, long=False)


def _set_flat(cpu: Cpu, number: int, selector: int, dpl: int, *, long: bool) -> None:
    """CS or SS as the fast system calls load them: flat, without reading a descriptor."""
    cache = SegmentCache(selector)
    cache.limit = 0xFFFF_FFFF
    cache.type = 0xB if number == CS else 0x3
    cache.s = cache.present = cache.g = 1
    cache.dpl = dpl
    cache.l = int(long)
    cache.db = int(not long)
    cache.unusable = 0
    cpu.set_segment(number, cache)
