"""Multiplication, division, and decimal adjustment (SDM volume 2)."""

from __future__ import annotations

from pykvm.emulator.decode import Instruction
from pykvm.emulator.faults import DE, Fault
from pykvm.emulator.flags import EAGER, MASK, SIGN, arithmetic, result_flags
from pykvm.emulator.translate import RAX, RDX
from pykvm.registers import RFLAGS_AF, RFLAGS_CF, RFLAGS_OF

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.emulator.translate import Get, Op, Translator


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
