"""Integer arithmetic and logic: ADD to CMP, TEST, INC, DEC, NEG, NOT, XADD, CMPXCHG, flag instructions.

SDM volume 2. Each function takes a decoded instruction and returns the closure that executes
it. The ones with register destinations of 4 and 8 bytes, which make up most of any program,
have closures of their own; all others go through readers and writers.
"""

from __future__ import annotations

from pykvm.emulator.decode import IMM, REG, Instruction, Operand
from pykvm.emulator.flags import (
    ADD,
    ARITHMETIC,
    CC_B,
    DEC,
    EAGER,
    INC,
    LOG2,
    MASK,
    RESULT,
    SIGN,
    SUB,
    arithmetic,
)
from pykvm.emulator.translate import RAX
from pykvm.registers import RFLAGS_AF, RFLAGS_CF, RFLAGS_OF

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.emulator.translate import Op, Translator


def _plain_register(operand: Operand) -> bool:
    return operand.kind == REG and operand.size >= 4


def add(t: Translator, i: Instruction) -> Op:
    """ADD: dst += src."""
    dst, src = i.operands
    mask = MASK[dst.size]
    kind = t.new_kind = ADD << 2 | LOG2[dst.size]
    f = t.f
    if _plain_register(dst):
        return _add_register(t, i, kind)
    get, put = t.modify(i, dst)
    source = t.get(i, src)

    def op() -> None:
        b = source()
        a = get()
        put((a + b) & mask)
        f[0] = kind
        f[1] = a
        f[2] = b

    return op


def _add_register(t: Translator, i: Instruction, kind: int) -> Op:
    dst, src = i.operands
    r, f = t.r, t.f
    d, s = dst.number, src.number
    mask = MASK[dst.size]
    if src.kind == IMM:

        def add_immediate() -> None:
            a = r[d] & mask
            r[d] = (a + s) & mask
            f[0] = kind
            f[1] = a
            f[2] = s

        return add_immediate
    if src.kind == REG:

        def add_registers() -> None:
            a = r[d] & mask
            b = r[s] & mask
            r[d] = (a + b) & mask
            f[0] = kind
            f[1] = a
            f[2] = b

        return add_registers
    source = t.get(i, src)

    def add_memory() -> None:
        b = source()
        a = r[d] & mask
        r[d] = (a + b) & mask
        f[0] = kind
        f[1] = a
        f[2] = b

    return add_memory


def sub(t: Translator, i: Instruction) -> Op:
    """SUB: dst -= src."""
    dst, src = i.operands
    mask = MASK[dst.size]
    kind = t.new_kind = SUB << 2 | LOG2[dst.size]
    f = t.f
    if _plain_register(dst):
        return _sub_register(t, i, kind)
    get, put = t.modify(i, dst)
    source = t.get(i, src)

    def op() -> None:
        b = source()
        a = get()
        put((a - b) & mask)
        f[0] = kind
        f[1] = a
        f[2] = b

    return op


def _sub_register(t: Translator, i: Instruction, kind: int) -> Op:
    dst, src = i.operands
    r, f = t.r, t.f
    d, s = dst.number, src.number
    mask = MASK[dst.size]
    if src.kind == IMM:

        def sub_immediate() -> None:
            a = r[d] & mask
            r[d] = (a - s) & mask
            f[0] = kind
            f[1] = a
            f[2] = s

        return sub_immediate
    source = t.get(i, src)

    def sub_any() -> None:
        b = source()
        a = r[d] & mask
        r[d] = (a - b) & mask
        f[0] = kind
        f[1] = a
        f[2] = b

    return sub_any


def cmp(t: Translator, i: Instruction) -> Op:
    """CMP: the flags of dst - src."""
    dst, src = i.operands
    r, f = t.r, t.f
    kind = t.new_kind = SUB << 2 | LOG2[dst.size]
    if _plain_register(dst) and src.kind in (REG, IMM):
        d, s = dst.number, src.number
        mask = MASK[dst.size]
        if src.kind == IMM:

            def cmp_immediate() -> None:
                f[0] = kind
                f[1] = r[d] & mask
                f[2] = s

            return cmp_immediate

        def cmp_registers() -> None:
            f[0] = kind
            f[1] = r[d] & mask
            f[2] = r[s] & mask

        return cmp_registers
    first, second = t.get(i, dst), t.get(i, src)

    def op() -> None:
        a = first()
        f[2] = second()
        f[1] = a
        f[0] = kind

    return op


def _logic(function: Callable[[int, int], int]) -> Callable[[Translator, Instruction], Op]:
    """AND, OR or XOR: dst = function(dst, src), CF and OF cleared."""

    def build(t: Translator, i: Instruction) -> Op:
        dst, src = i.operands
        f = t.f
        kind = t.new_kind = RESULT << 2 | LOG2[dst.size]
        if _plain_register(dst):
            return _logic_register(t, i, function, kind)
        source = t.get(i, src)
        get, put = t.modify(i, dst)

        def op() -> None:
            b = source()
            value = function(get(), b)
            put(value)
            f[0] = kind
            f[1] = value
            f[2] = 0

        return op

    return build


def _logic_register(t: Translator, i: Instruction, function: Callable[[int, int], int], kind: int) -> Op:
    dst, src = i.operands
    r, f = t.r, t.f
    d, s = dst.number, src.number
    mask = MASK[dst.size]
    if src.kind == IMM:

        def logic_immediate() -> None:
            value = function(r[d] & mask, s)
            r[d] = value
            f[0] = kind
            f[1] = value
            f[2] = 0

        return logic_immediate
    if src.kind == REG:

        def logic_registers() -> None:
            value = function(r[d], r[s]) & mask
            r[d] = value
            f[0] = kind
            f[1] = value
            f[2] = 0

        return logic_registers
    source = t.get(i, src)

    def logic_any() -> None:
        value = function(r[d] & mask, source())
        r[d] = value
        f[0] = kind
        f[1] = value
        f[2] = 0

    return logic_any


and_ = _logic(int.__and__)
or_ = _logic(int.__or__)
xor = _logic(int.__xor__)


def test(t: Translator, i: Instruction) -> Op:
    """TEST: the flags of dst & src."""
    dst, src = i.operands
    r, f = t.r, t.f
    kind = t.new_kind = RESULT << 2 | LOG2[dst.size]
    if _plain_register(dst) and src.kind == REG:
        d, s = dst.number, src.number
        mask = MASK[dst.size]

        def test_registers() -> None:
            f[0] = kind
            f[1] = r[d] & r[s] & mask
            f[2] = 0

        return test_registers
    first, second = t.get(i, dst), t.get(i, src)

    def op() -> None:
        value = first() & second()
        f[0] = kind
        f[1] = value
        f[2] = 0

    return op


def adc(t: Translator, i: Instruction) -> Op:
    """ADC: dst += src + CF."""
    dst, src = i.operands
    f, mask, sign = t.f, MASK[dst.size], SIGN[dst.size]
    kind = t.new_kind = RESULT << 2 | LOG2[dst.size]
    get, put = t.modify(i, dst)
    source, carry = t.get(i, src), t.test(CC_B)

    def op() -> None:
        b = source()
        a = get()
        value = (a + b + (1 if carry() else 0)) & mask
        # With a carry in, equal counts as wrapped too, but only if b was all ones.
        extra = (a ^ b ^ value) & RFLAGS_AF
        if value < a or (value == a and b):
            extra |= RFLAGS_CF
        if (a ^ value) & (b ^ value) & sign:
            extra |= RFLAGS_OF
        put(value)
        f[0] = kind
        f[1] = value
        f[2] = extra

    return op


def sbb(t: Translator, i: Instruction) -> Op:
    """SBB: dst -= src + CF."""
    dst, src = i.operands
    f, mask, sign = t.f, MASK[dst.size], SIGN[dst.size]
    kind = t.new_kind = RESULT << 2 | LOG2[dst.size]
    get, put = t.modify(i, dst)
    source, carry = t.get(i, src), t.test(CC_B)

    def op() -> None:
        b = source()
        a = get()
        borrow = 1 if carry() else 0
        value = (a - b - borrow) & mask
        extra = (a ^ b ^ value) & RFLAGS_AF
        if a < b or (borrow and a == b):
            extra |= RFLAGS_CF
        if (a ^ b) & (a ^ value) & sign:
            extra |= RFLAGS_OF
        put(value)
        f[0] = kind
        f[1] = value
        f[2] = extra

    return op


def inc(t: Translator, i: Instruction) -> Op:
    """INC: dst += 1; CF stays."""
    return _count(t, i, INC, 1)


def dec(t: Translator, i: Instruction) -> Op:
    """DEC: dst -= 1; CF stays."""
    return _count(t, i, DEC, -1)


def _count(t: Translator, i: Instruction, operation: int, step: int) -> Op:
    dst = i.operands[0]
    r, f, mask = t.r, t.f, MASK[dst.size]
    kind = t.new_kind = operation << 2 | LOG2[dst.size]
    carry = t.test(CC_B)
    if _plain_register(dst):
        d = dst.number

        def count_register() -> None:
            f[2] = 1 if carry() else 0
            value = (r[d] + step) & mask
            r[d] = value
            f[0] = kind
            f[1] = value

        return count_register
    get, put = t.modify(i, dst)

    def op() -> None:
        value = (get() + step) & mask
        put(value)
        f[2] = 1 if carry() else 0
        f[0] = kind
        f[1] = value

    return op


def neg(t: Translator, i: Instruction) -> Op:
    """NEG: dst = 0 - dst."""
    dst = i.operands[0]
    f, mask = t.f, MASK[dst.size]
    kind = t.new_kind = SUB << 2 | LOG2[dst.size]
    get, put = t.modify(i, dst)

    def op() -> None:
        value = get()
        put(-value & mask)
        f[0] = kind
        f[1] = 0
        f[2] = value

    return op


def not_(t: Translator, i: Instruction) -> Op:
    """NOT: dst = ~dst."""
    mask = MASK[i.operands[0].size]
    get, put = t.modify(i, i.operands[0])

    def op() -> None:
        put(get() ^ mask)

    return op


# Exchanges with addition and comparison


def xadd(t: Translator, i: Instruction) -> Op:
    """XADD: src, dst = dst, dst + src."""
    dst, src = i.operands
    f, mask = t.f, MASK[dst.size]
    kind = t.new_kind = ADD << 2 | LOG2[dst.size]
    get, put = t.modify(i, dst)
    source, put_source = t.get(i, src), t.put(i, src)

    def op() -> None:
        b = source()
        a = get()
        total = (a + b) & mask
        if dst.kind == REG:
            put_source(a)
            put(total)  # last: with equal registers the sum stays
        else:
            put(total)
            put_source(a)
        f[0] = kind
        f[1] = a
        f[2] = b

    return op


def cmpxchg(t: Translator, i: Instruction) -> Op:
    """CMPXCHG: if dst == rAX, dst = src, else rAX = dst. Memory is written either way."""
    dst, src = i.operands
    f = t.f
    kind = t.new_kind = SUB << 2 | LOG2[dst.size]
    get, put = t.modify(i, dst)
    source = t.get(i, src)
    accumulator, put_accumulator = t.get_register(RAX, dst.size), t.put_register(RAX, dst.size)

    def op() -> None:
        expected = accumulator()
        found = get()
        if found == expected:
            put(source())
        else:
            if dst.kind != REG:
                put(found)
            put_accumulator(found)
        f[0] = kind
        f[1] = expected
        f[2] = found

    return op


def compare_flags(f: list[int], a: int, b: int, size: int) -> None:
    """Leave the flags of a - b, for instructions that compare on their way."""
    f[0] = SUB << 2 | LOG2[size]
    f[1] = a
    f[2] = b


# Flag instructions


def _set_carry(change: Callable[[int], int]) -> Callable[[Translator, Instruction], Op]:
    def build(t: Translator, i: Instruction) -> Op:
        f = t.f
        t.new_kind = EAGER << 2

        def op() -> None:
            f[1] = change(arithmetic(f))
            f[0] = EAGER << 2

        return op

    return build


clc = _set_carry(lambda flags: flags & ~RFLAGS_CF)
stc = _set_carry(lambda flags: flags | RFLAGS_CF)
cmc = _set_carry(lambda flags: flags ^ RFLAGS_CF)


def lahf(t: Translator, i: Instruction) -> Op:
    """LAHF: AH = SF ZF 0 AF 0 PF 1 CF."""
    f, put = t.f, t.put_register(4, 1)

    def op() -> None:
        put(arithmetic(f) & 0xFF | 2)

    return op


def sahf(t: Translator, i: Instruction) -> Op:
    """SAHF: SF, ZF, AF, PF and CF from AH; OF stays."""
    r, f = t.r, t.f
    t.new_kind = EAGER << 2

    def op() -> None:
        f[1] = arithmetic(f) & RFLAGS_OF | r[RAX] >> 8 & ARITHMETIC & 0xFF
        f[0] = EAGER << 2

    return op
