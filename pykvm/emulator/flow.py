"""Control flow within and between code segments: jumps, calls, returns, loops, interrupts."""

from __future__ import annotations

from pykvm.emulator import interrupts, transfer
from pykvm.emulator.decode import MEM, Instruction
from pykvm.emulator.faults import BP, DB, GP, OF, Fault
from pykvm.emulator.flags import CC_O, CC_Z, MASK
from pykvm.emulator.segments import load as load_segment
from pykvm.emulator.translate import M16, M64, RCX, RIP, RSP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.emulator.translate import Get, Op, Translator


def jmp(t: Translator, i: Instruction) -> Op:
    """JMP to a constant."""
    r, target = t.r, i.operands[0].number

    def op() -> None:
        r[RIP] = target

    return op


def jcc(t: Translator, i: Instruction) -> Op:
    """Jcc: conditional jump."""
    r, test = t.r, t.test(i.opcode >> 1 & 7)
    taken, otherwise = i.operands[0].number, i.next
    if i.opcode & 1:
        taken, otherwise = otherwise, taken

    def op() -> None:
        r[RIP] = taken if test() else otherwise

    return op


def loop(t: Translator, i: Instruction) -> Op:
    """LOOP, LOOPE, LOOPNE: count rCX, of the address size, down to 0."""
    r, mask = t.r, MASK[i.address_size]
    put = t.put_register(RCX, i.address_size)
    test, target, otherwise = t.test(CC_Z), i.operands[0].number, i.next
    wanted = {0xE0: False, 0xE1: True}.get(i.opcode)

    def op() -> None:
        count = (r[RCX] - 1) & mask
        put(count)
        go_on = count and (wanted is None or bool(test()) == wanted)
        r[RIP] = target if go_on else otherwise

    return op


def jcxz(t: Translator, i: Instruction) -> Op:
    """JCXZ, JECXZ, JRCXZ."""
    r, mask = t.r, MASK[i.address_size]
    target, otherwise = i.operands[0].number, i.next

    def op() -> None:
        r[RIP] = otherwise if r[RCX] & mask else target

    return op


def _checked_target(t: Translator, get: Get) -> Get:
    """`get`, with the check that a computed target in 64-bit mode is canonical."""
    if t.bits != 64:
        return get
    canonical = t.cpu.mmu.canonical

    def target() -> int:
        value = get()
        if not canonical(value):
            raise Fault(GP, 0)
        return value

    return target


def jmp_indirect(t: Translator, i: Instruction) -> Op:
    """JMP to a register's or memory's value."""
    r, get = t.r, _checked_target(t, t.get(i, i.operands[0]))

    def op() -> None:
        r[RIP] = get()

    return op


def call(t: Translator, i: Instruction) -> Op:
    """CALL to a constant."""
    r, push = t.r, t.push(i.size)
    target, following = i.operands[0].number, i.next & MASK[i.size]

    def op() -> None:
        push(following)
        r[RIP] = target

    return op


def call_indirect(t: Translator, i: Instruction) -> Op:
    """CALL to a register's or memory's value."""
    r, push, get = t.r, t.push(i.size), _checked_target(t, t.get(i, i.operands[0]))
    following = i.next & MASK[i.size]

    def op() -> None:
        target = get()
        push(following)
        r[RIP] = target

    return op


def ret(t: Translator, i: Instruction) -> Op:
    """RET, with or without parameters to drop."""
    r, pop = t.r, t.pop(i.size)
    release = i.operands[0].number if i.operands else 0
    mask = t.environment.stack_mask
    keep = M64 ^ mask if mask == M16 else 0
    canonical = t.cpu.mmu.canonical if t.bits == 64 else None

    def op() -> None:
        top = r[RSP]
        target = pop()
        if canonical is not None and not canonical(target):
            r[RSP] = top
            raise Fault(GP, 0)
        if release:
            r[RSP] = r[RSP] & keep | (r[RSP] + release) & mask
        r[RIP] = target

    return op


# Far transfers


def _far_pointer(t: Translator, i: Instruction) -> tuple[Get, Get]:
    """Readers of the offset and the selector of a far pointer, immediate or in memory."""
    if i.operands[-1].kind != MEM:
        offset, selector = i.operands
        return (lambda: offset.number), (lambda: selector.number)
    size = i.size
    address = t.address(i, size + 2, write=False)
    load, load_selector = t.load[size], t.load[2]
    mmu = t.cpu.mmu
    return (lambda: load(address())), (lambda: load_selector((address() + size) & mmu.linear_mask))


def jmp_far(t: Translator, i: Instruction) -> Op:
    """JMP FAR."""
    cpu, (offset, selector) = t.cpu, _far_pointer(t, i)

    def op() -> None:
        target = offset()
        transfer.jump_far(cpu, selector(), target)

    return op


def call_far(t: Translator, i: Instruction) -> Op:
    """CALL FAR."""
    cpu, (offset, selector) = t.cpu, _far_pointer(t, i)
    size, following = i.size, i.next

    def op() -> None:
        target = offset()
        transfer.call_far(cpu, selector(), target, size, following)

    return op


def ret_far(t: Translator, i: Instruction) -> Op:
    """RETF, with or without parameters to drop."""
    cpu, size = t.cpu, i.size
    release = i.operands[0].number if i.operands else 0

    def op() -> None:
        transfer.return_far(cpu, size, release)

    return op


def load_far_pointer(number: int) -> Callable[[Translator, Instruction], Op]:
    """LES, LDS, LSS, LFS, LGS: a segment register and a general register from memory."""

    def build(t: Translator, i: Instruction) -> Op:
        cpu, r, following = t.cpu, t.r, i.next
        offset, selector = _far_pointer(t, i)
        put = t.put(i, i.operands[0])

        def op() -> None:
            value = offset()
            load_segment(cpu, number, selector())
            put(value)
            r[RIP] = following

        return op

    return build


# Interrupts


def _software_interrupt(t: Translator, i: Instruction, vector: int) -> Op:
    cpu, r, start, following = t.cpu, t.r, i.start, i.next
    mask = MASK[2] if t.bits == 16 else M64

    def op() -> None:
        r[RIP] = following & mask
        try:
            interrupts.deliver(cpu, vector, None, software=True, is_fault=False)
        except BaseException:
            r[RIP] = start
            raise

    return op


def int_n(t: Translator, i: Instruction) -> Op:
    """INT n."""
    return _software_interrupt(t, i, i.operands[0].number)


def int3(t: Translator, i: Instruction) -> Op:
    """INT3."""
    return _software_interrupt(t, i, BP)


def int1(t: Translator, i: Instruction) -> Op:
    """INT1."""
    return _software_interrupt(t, i, DB)


def into(t: Translator, i: Instruction) -> Op:
    """INTO: an interrupt if OF is set."""
    r, test, following = t.r, t.test(CC_O), i.next
    interrupt = _software_interrupt(t, i, OF)

    def op() -> None:
        if test():
            interrupt()
        else:
            r[RIP] = following

    return op


def iret(t: Translator, i: Instruction) -> Op:
    """IRET."""
    cpu, size = t.cpu, i.size

    def op() -> None:
        transfer.iret(cpu, size)

    return op


def syscall(t: Translator, i: Instruction) -> Op:
    """SYSCALL."""
    cpu, following = t.cpu, i.next

    def op() -> None:
        transfer.syscall(cpu, following)

    return op


def sysret(t: Translator, i: Instruction) -> Op:
    """SYSRET."""
    cpu, size = t.cpu, i.size

    def op() -> None:
        transfer.sysret(cpu, size)

    return op


def sysenter(t: Translator, i: Instruction) -> Op:
    """SYSENTER."""
    cpu = t.cpu

    def op() -> None:
        transfer.sysenter(cpu)

    return op


def sysexit(t: Translator, i: Instruction) -> Op:
    """SYSEXIT."""
    cpu, size = t.cpu, i.size

    def op() -> None:
        transfer.sysexit(cpu, size)

    return op
