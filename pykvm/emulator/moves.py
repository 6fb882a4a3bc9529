"""Data movement: MOV and its variants, PUSH and POP, XCHG, LEA, sign extension, CMOVcc, SETcc."""

from __future__ import annotations

from pykvm.emulator.decode import IMM, MEM, REG, Instruction
from pykvm.emulator.faults import BR, UD, Fault
from pykvm.emulator.flags import EAGER, MASK, SIGN, arithmetic
from pykvm.emulator.paging import READ
from pykvm.emulator.translate import RAX, RBP, RBX, RCX, RDX, RSP
from pykvm.registers import RFLAGS_ZF

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.emulator.translate import Op, Translator


def mov(t: Translator, i: Instruction) -> Op:
    """MOV and MOVZX between general registers, memory and immediates: the source may be smaller."""
    dst, src = i.operands
    r = t.r
    d, s = dst.number, src.number
    if dst.kind == REG and dst.size >= 4:
        if src.kind == IMM:

            def mov_immediate() -> None:
                r[d] = s

            return mov_immediate
        if src.kind == MEM:
            load, address = t.load[src.size], t.address(i, src.size, write=False)

            def mov_load() -> None:
                r[d] = load(address())

            return mov_load
        if src.size >= 4:
            mask = MASK[dst.size]

            def mov_register() -> None:
                r[d] = r[s] & mask

            return mov_register
    if dst.kind == MEM and src.kind == REG and dst.size >= 4:
        store, where = t.store[dst.size], t.address(i, dst.size, write=True)
        mask = MASK[dst.size]

        def mov_store() -> None:
            store(where(), r[s] & mask)

        return mov_store
    get, put = t.get(i, src), t.put(i, dst)

    def op() -> None:
        put(get())

    return op


movzx = mov  # the reader extends with zeros


def movsx(t: Translator, i: Instruction) -> Op:
    """MOVSX, MOVSXD: sign-extend."""
    dst, src = i.operands
    mask, sign = MASK[dst.size], SIGN[src.size]
    get, put = t.get(i, src), t.put(i, dst)

    def op() -> None:
        value = get()
        put((value - ((value & sign) << 1)) & mask)

    return op


def movbe(t: Translator, i: Instruction) -> Op:
    """MOVBE: move with the bytes reversed."""
    dst, src = i.operands
    size = dst.size
    get, put = t.get(i, src), t.put(i, dst)

    def op() -> None:
        put(int.from_bytes(get().to_bytes(size, "little"), "big"))

    return op


def bswap(t: Translator, i: Instruction) -> Op:
    """BSWAP: reverse the bytes; a 16-bit operand is undefined and becomes 0, as on real ones."""
    dst = i.operands[0]
    size = dst.size
    get, put = t.get(i, dst), t.put(i, dst)

    def op() -> None:
        put(int.from_bytes(get().to_bytes(size, "little"), "big") if size > 2 else 0)

    return op


def lea(t: Translator, i: Instruction) -> Op:
    """LEA: the effective address, cut to the operand size."""
    dst = i.operands[0]
    r, d, mask = t.r, dst.number, MASK[dst.size]
    offset = t.offset(i)
    if dst.size == i.address_size and dst.size >= 4:

        def lea_whole() -> None:
            r[d] = offset()

        return lea_whole
    put = t.put(i, dst)

    def op() -> None:
        put(offset() & mask)

    return op


def xchg(t: Translator, i: Instruction) -> Op:
    """XCHG: with memory it reads as a write would."""
    first, second = i.operands
    get_first, put_first = t.modify(i, first)
    get_second, put_second = t.get(i, second), t.put(i, second)

    def op() -> None:
        a, b = get_first(), get_second()
        put_first(b)
        put_second(a)

    return op


def nop(t: Translator, i: Instruction) -> Op:
    """NOP, PAUSE, ENDBR, PREFETCH, fences: nothing to do on one in-order processor."""

    def op() -> None:
        pass

    return op


def clflush(t: Translator, i: Instruction) -> Op:
    """CLFLUSH: there is no cache to flush, but the operand faults as a byte that is read would."""
    address, translate, user = t.address(i, 1, write=False), t.cpu.mmu.translate, t.environment.user

    def op() -> None:
        translate(address(), READ, user=user)

    return op


def nop_or_xchg(t: Translator, i: Instruction) -> Op:
    """90: NOP, unless REX.B makes it an exchange with R8. PAUSE is the same with F3."""
    return xchg(t, i) if i.operands[0].number else nop(t, i)


def xlat(t: Translator, i: Instruction) -> Op:
    """XLAT: AL = DS:[rBX + AL]."""
    r, mask = t.r, MASK[i.address_size]
    segment = i.segment if i.segment >= 0 else 3
    address = t.linear(segment, lambda: (r[RBX] + (r[RAX] & 0xFF)) & mask, 1, write=False)
    load, put = t.load[1], t.put_register(RAX, 1)

    def op() -> None:
        put(load(address()))

    return op


def extend_accumulator(t: Translator, i: Instruction) -> Op:
    """CBW, CWDE, CDQE: sign-extend the lower half of rAX into all of it."""
    half = i.size // 2
    mask, sign = MASK[i.size], SIGN[half]
    get, put = t.get_register(RAX, half), t.put_register(RAX, i.size)

    def op() -> None:
        value = get()
        put((value - ((value & sign) << 1)) & mask)

    return op


def extend_into_rdx(t: Translator, i: Instruction) -> Op:
    """CWD, CDQ, CQO: fill rDX with the sign of rAX."""
    r, sign, mask = t.r, SIGN[i.size], MASK[i.size]
    put = t.put_register(RDX, i.size)

    def op() -> None:
        put(mask if r[RAX] & sign else 0)

    return op


def cmov(t: Translator, i: Instruction) -> Op:
    """CMOVcc: the source is read in any case, and a 4-byte destination is zero-extended."""
    dst, src = i.operands
    test, negate = t.test(i.opcode >> 1 & 7), i.opcode & 1
    get, put = t.get(i, src), t.put(i, dst)
    old = t.get(i, dst)

    def op() -> None:
        value = get()
        put(value if bool(test()) != negate else old())

    return op


def setcc(t: Translator, i: Instruction) -> Op:
    """SETcc: a byte, 1 if the condition holds, else 0."""
    test, negate = t.test(i.opcode >> 1 & 7), i.opcode & 1
    put = t.put(i, i.operands[0])

    def op() -> None:
        put(1 if bool(test()) != negate else 0)

    return op


# The stack


def push(t: Translator, i: Instruction) -> Op:
    """PUSH of a register, memory or an immediate. PUSH rSP pushes the old value."""
    src = i.operands[0]
    push_value = t.push(i.size)
    get = t.get(i, src)
    if src.size < i.size:  # an 8-bit immediate
        sign, mask = SIGN[src.size], MASK[i.size]

        def push_extended() -> None:
            value = get()
            push_value((value - ((value & sign) << 1)) & mask)

        return push_extended

    def op() -> None:
        push_value(get())

    return op


def pop(t: Translator, i: Instruction) -> Op:
    """POP. An address based on rSP is computed after the increment; a fault there undoes it."""
    r, dst = t.r, i.operands[0]
    pop_value, put = t.pop(i.size), t.put(i, dst)
    if dst.kind == REG:

        def pop_register() -> None:
            put(pop_value())

        return pop_register

    def op() -> None:
        top = r[RSP]
        value = pop_value()
        try:
            put(value)
        except BaseException:
            r[RSP] = top
            raise

    return op


def pusha(t: Translator, i: Instruction) -> Op:
    """PUSHA: AX CX DX BX, the old SP, BP SI DI."""
    r, mask = t.r, MASK[i.size]
    push_value = t.push(i.size)

    def op() -> None:
        top = r[RSP]
        try:
            for number in range(8):
                push_value((top if number == RSP else r[number]) & mask)
        except BaseException:
            r[RSP] = top
            raise

    return op


def popa(t: Translator, i: Instruction) -> Op:
    """POPA: the reverse of PUSHA; the stored SP is skipped."""
    r, size = t.r, i.size
    pop_value = t.pop(size)
    puts = [t.put_register(number, size) for number in range(8)]

    def op() -> None:
        top = r[RSP]
        try:
            values = [pop_value() for _ in range(8)]
        except BaseException:
            r[RSP] = top
            raise
        for number, value in zip(range(7, -1, -1), values, strict=True):
            if number != RSP:
                puts[number](value)

    return op


def enter(t: Translator, i: Instruction) -> Op:
    """ENTER: push rBP, copy frame pointers of enclosing levels, reserve locals."""
    r, size = t.r, i.size
    frame, level = i.operands[0].number, i.operands[1].number & 31
    stack_mask = t.environment.stack_mask
    push_value, put_bp, put_sp = t.push(size), t.put_register(RBP, size), _put_stack_pointer(t)
    load = t.load[size]
    pointer = 0
    address = t.linear(2, lambda: pointer, size, write=False)
    touch = t.linear(2, lambda: r[RSP] & stack_mask, 1, write=True)

    def op() -> None:
        nonlocal pointer
        top = r[RSP]
        try:
            push_value(r[RBP] & MASK[size])
            base = r[RSP] & MASK[size]
            for depth in range(1, level):
                pointer = (r[RBP] - depth * size) & stack_mask
                push_value(load(address()))
            if level:
                push_value(base)
            put_sp(r[RSP] - frame)
            t.access.probe_write(touch(), 1)  # the manual: a write there must be possible
        except BaseException:
            r[RSP] = top
            raise
        put_bp(base)

    return op


def leave(t: Translator, i: Instruction) -> Op:
    """LEAVE: rSP = rBP, pop rBP."""
    r, stack_mask = t.r, t.environment.stack_mask
    keep = MASK[8] ^ stack_mask
    pop_value, put = t.pop(i.size), t.put_register(RBP, i.size)

    def op() -> None:
        top = r[RSP]
        r[RSP] = top & keep | r[RBP] & stack_mask
        try:
            value = pop_value()
        except BaseException:
            r[RSP] = top
            raise
        put(value)

    return op


def _put_stack_pointer(t: Translator) -> Callable[[int], None]:
    r, mask = t.r, t.environment.stack_mask
    keep = MASK[8] ^ mask if mask == 0xFFFF else 0

    def put(value: int) -> None:
        r[RSP] = r[RSP] & keep | value & mask

    return put


# The rest


def bound(t: Translator, i: Instruction) -> Op:
    """BOUND: #BR unless the two words in memory enclose the signed index."""
    index = i.operands[0]
    size, sign = index.size, SIGN[index.size]
    get = t.get(i, index)
    address = t.address(i, 2 * size, write=False)
    load = t.load[size]
    wrap = t.cpu.mmu

    def op() -> None:
        where = address()
        value, lower, upper = get(), load(where), load((where + size) & wrap.linear_mask)
        if not lower ^ sign <= value ^ sign <= upper ^ sign:
            raise Fault(BR)

    return op


def cmpxchg_wide(t: Translator, i: Instruction) -> Op:
    """CMPXCHG8B, CMPXCHG16B: compare rDX:rAX with memory; store rCX:rBX or load rDX:rAX."""
    half = 8 if i.size == 8 else 4
    r, f, mask = t.r, t.f, MASK[half]
    address = t.address(i, 2 * half, write=True)
    load, store = t.modify_load[half], t.store[half]
    access, linear = t.access, t.cpu.mmu
    t.new_kind = EAGER << 2

    def op() -> None:
        where = address()
        if half == 8 and where & 15:
            raise linear.misaligned(where)
        access.probe_write(where, 2 * half)
        second = (where + half) & linear.linear_mask
        low, high = load(where), load(second)
        flags = arithmetic(f) & ~RFLAGS_ZF
        if low == r[RAX] & mask and high == r[RDX] & mask:
            flags |= RFLAGS_ZF
            store(where, r[RBX] & mask)
            store(second, r[RCX] & mask)
        else:
            store(where, low)
            store(second, high)
            r[RAX], r[RDX] = low, high
        f[0] = EAGER << 2
        f[1] = flags

    return op


def undefined(t: Translator, i: Instruction) -> Op:
    """UD0, UD1, UD2: #UD on purpose."""

    def op() -> None:
        raise Fault(UD)

    return op
