"""Integer arithmetic and logic: ADD to CMP, TEST, INC, DEC, NEG, NOT, multiply and divide, BCD.

SDM volume 2. Each function takes a decoded instruction and returns the closure that executes
it. The ones with register destinations of 4 and 8 bytes, which make up most of any program,
have closures of their own; all others go through readers and writers.
"""

from __future__ import annotations

from pykvm.emulator.decode import IMM, REG, Instruction, Operand
from pykvm.emulator.faults import DE, Fault
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
    result_flags,
)
from pykvm.emulator.translate import RAX, RDX
from pykvm.registers import RFLAGS_AF, RFLAGS_CF, RFLAGS_OF

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.emulator.translate import Get, Op, Translator


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


# Multiply and divide


def _set_overflow(f: list[int], overflow: bool) -> None:
    """CF = OF = `overflow`; the other flags, which are undefined, stay."""
    flags = arithmetic(f) & ~(RFLAGS_CF | RFLAGS_OF)
    f[0] = EAGER << 2
    f[1] = flags | (RFLAGS_CF | RFLAGS_OF if overflow else 0)


def _signed(value: int, size: int) -> int:
    return value - ((value & SIGN[size]) << 1)


def _wide_accumulator(t: Translator, size: int) -> tuple[Get, Callable[[int, int], None]]:
    """A reader of rDX:rAX (AX for bytes) and a writer of its (high, low) halves."""
    r, mask, bits = t.r, MASK[size], 8 * size
    if size == 1:
        put_ax = t.put_register(RAX, 2)
        return (lambda: r[RAX] & 0xFFFF), (lambda high, low: put_ax(high << 8 | low))
    put_high, put_low = t.put_register(RDX, size), t.put_register(RAX, size)

    def put(high: int, low: int) -> None:
        put_high(high)
        put_low(low)

    return (lambda: (r[RDX] & mask) << bits | r[RAX] & mask), put


def mul(t: Translator, i: Instruction) -> Op:
    """MUL: rDX:rAX = rAX * src."""
    size = i.operands[0].size
    f, mask, bits = t.f, MASK[size], 8 * size
    source, accumulator = t.get(i, i.operands[0]), t.get_register(RAX, size)
    _, put = _wide_accumulator(t, size)
    t.new_kind = EAGER << 2

    def op() -> None:
        product = accumulator() * source()
        high = product >> bits & mask
        put(high, product & mask)
        _set_overflow(f, high != 0)

    return op


def imul1(t: Translator, i: Instruction) -> Op:
    """IMUL with one operand: rDX:rAX = rAX * src, signed."""
    size = i.operands[0].size
    f, mask, bits = t.f, MASK[size], 8 * size
    source, accumulator = t.get(i, i.operands[0]), t.get_register(RAX, size)
    _, put = _wide_accumulator(t, size)
    t.new_kind = EAGER << 2

    def op() -> None:
        product = _signed(accumulator(), size) * _signed(source(), size)
        put(product >> bits & mask, product & mask)
        _set_overflow(f, product != _signed(product & mask, size))

    return op


def imul(t: Translator, i: Instruction) -> Op:
    """IMUL with two or three operands: dst = the low half of the last two multiplied."""
    dst = i.operands[0]
    size = dst.size
    f, mask = t.f, MASK[size]
    first, second = t.get(i, i.operands[-2]), t.get(i, i.operands[-1])
    put = t.put(i, dst)
    t.new_kind = EAGER << 2

    def op() -> None:
        product = _signed(first(), size) * _signed(second(), size)
        low = product & mask
        put(low)
        _set_overflow(f, product != _signed(low, size))

    return op


def div(t: Translator, i: Instruction) -> Op:
    """DIV: rAX, rDX = divmod(rDX:rAX, src). The flags, which are undefined, stay."""
    size = i.operands[0].size
    mask = MASK[size]
    source = t.get(i, i.operands[0])
    dividend, put = _wide_accumulator(t, size)

    def op() -> None:
        divisor = source()
        if divisor == 0:
            raise Fault(DE)
        quotient, remainder = divmod(dividend(), divisor)
        if quotient > mask:
            raise Fault(DE)
        put(remainder, quotient)

    return op


def idiv(t: Translator, i: Instruction) -> Op:
    """IDIV: signed division that rounds to zero; the remainder has the dividend's sign."""
    size = i.operands[0].size
    mask, sign, wide_sign = MASK[size], SIGN[size], 1 << (16 * size - 1)
    source = t.get(i, i.operands[0])
    dividend, put = _wide_accumulator(t, size)

    def op() -> None:
        divisor = _signed(source(), size)
        if divisor == 0:
            raise Fault(DE)
        value = dividend()
        value -= (value & wide_sign) << 1
        quotient, remainder = divmod(abs(value), abs(divisor))
        if (value < 0) != (divisor < 0):
            quotient = -quotient
        if value < 0:
            remainder = -remainder
        if not -sign <= quotient < sign:
            raise Fault(DE)
        put(remainder & mask, quotient & mask)

    return op


# Decimal adjustment (not in 64-bit mode)


def daa(t: Translator, i: Instruction) -> Op:
    """DAA: make AL two decimal digits after an addition."""
    return _decimal(t, 1)


def das(t: Translator, i: Instruction) -> Op:
    """DAS: make AL two decimal digits after a subtraction."""
    return _decimal(t, -1)


def _decimal(t: Translator, direction: int) -> Op:
    r, f = t.r, t.f
    put = t.put_register(RAX, 1)
    t.new_kind = EAGER << 2

    def op() -> None:
        flags = arithmetic(f)
        old = al = r[RAX] & 0xFF
        carry = flags & RFLAGS_CF
        extra = 0
        if al & 0xF > 9 or flags & RFLAGS_AF:
            al += 6 * direction
            extra = RFLAGS_AF
            if direction < 0 and al < 0:
                extra |= RFLAGS_CF
        if old > 0x99 or carry:
            al += 0x60 * direction
            extra |= RFLAGS_CF
        al &= 0xFF
        put(al)
        f[0] = EAGER << 2
        f[1] = result_flags(al, 1) | extra

    return op


def aaa(t: Translator, i: Instruction) -> Op:
    """AAA: make AX unpacked decimal after an addition."""
    return _ascii(t, 1)


def aas(t: Translator, i: Instruction) -> Op:
    """AAS: make AX unpacked decimal after a subtraction."""
    return _ascii(t, -1)


def _ascii(t: Translator, direction: int) -> Op:
    r, f = t.r, t.f
    put = t.put_register(RAX, 2)
    t.new_kind = EAGER << 2

    def op() -> None:
        ax = r[RAX] & 0xFFFF
        extra = 0
        if ax & 0xF > 9 or arithmetic(f) & RFLAGS_AF:
            ax = (ax + 0x106 * direction) & 0xFFFF
            extra = RFLAGS_AF | RFLAGS_CF
        ax &= 0xFF0F
        put(ax)
        f[0] = EAGER << 2
        f[1] = result_flags(ax & 0xFF, 1) | extra

    return op


def aam(t: Translator, i: Instruction) -> Op:
    """AAM: AH, AL = divmod(AL, immediate)."""
    r, f, base = t.r, t.f, i.operands[0].number
    put = t.put_register(RAX, 2)
    t.new_kind = EAGER << 2

    def op() -> None:
        if base == 0:
            raise Fault(DE)
        high, low = divmod(r[RAX] & 0xFF, base)
        put(high << 8 | low)
        f[0] = EAGER << 2
        f[1] = result_flags(low, 1)

    return op


def aad(t: Translator, i: Instruction) -> Op:
    """AAD: AX = AL + AH * immediate, cut to a byte."""
    r, f, base = t.r, t.f, i.operands[0].number
    put = t.put_register(RAX, 2)
    t.new_kind = EAGER << 2

    def op() -> None:
        ax = r[RAX] & 0xFFFF
        value = (ax + (ax >> 8) * base) & 0xFF
        put(value)
        f[0] = EAGER << 2
        f[1] = result_flags(value, 1)

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
