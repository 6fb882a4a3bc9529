"""Shifts, rotates, and instructions on single bits (SDM volume 2).

Where the manual leaves a flag undefined, these follow what the arithmetic yields: OF after
multi-bit shifts as if after the last single one, AF cleared by shifts.
"""

from __future__ import annotations

from pykvm.emulator.decode import IMM, MEM, REG, Instruction
from pykvm.emulator.flags import (
    CC_B,
    EAGER,
    LOG2,
    MASK,
    RESULT,
    SIGN,
    arithmetic,
)
from pykvm.registers import RFLAGS_CF, RFLAGS_OF, RFLAGS_ZF

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.emulator.translate import Get, Op, Translator

    # value, count (not 0), size, carry in -> result, CF, OF
    Shift = Callable[[int, int, int, int], tuple[int, int, int]]


def _shl(value: int, count: int, size: int, carry: int) -> tuple[int, int, int]:
    bits, mask = 8 * size, MASK[size]
    if count > bits:
        return 0, 0, 0
    carry = value >> (bits - count) & 1
    result = (value & mask >> count) << count
    return result, carry, result >> (bits - 1) ^ carry


def _shr(value: int, count: int, size: int, carry: int) -> tuple[int, int, int]:
    top = value >> (8 * size - 1) if count == 1 else 0
    return value >> count, value >> (count - 1) & 1, top


def _sar(value: int, count: int, size: int, carry: int) -> tuple[int, int, int]:
    value -= (value & SIGN[size]) << 1
    return value >> count & MASK[size], value >> (count - 1) & 1, 0


def _rol(value: int, count: int, size: int, carry: int) -> tuple[int, int, int]:
    bits = 8 * size
    count &= bits - 1
    result = (value << count | value >> (bits - count)) & MASK[size]
    return result, result & 1, result >> (bits - 1) ^ result & 1


def _ror(value: int, count: int, size: int, carry: int) -> tuple[int, int, int]:
    bits = 8 * size
    count &= bits - 1
    result = (value >> count | value << (bits - count)) & MASK[size]
    top = result >> (bits - 1)
    return result, top, top ^ result >> (bits - 2) & 1


def _rcl(value: int, count: int, size: int, carry: int) -> tuple[int, int, int]:
    bits, mask = 8 * size, MASK[size]
    for _ in range(count % (bits + 1)):
        value, carry = (value << 1 | carry) & mask, value >> (bits - 1)
    return value, carry, value >> (bits - 1) ^ carry


def _rcr(value: int, count: int, size: int, carry: int) -> tuple[int, int, int]:
    bits = 8 * size
    for _ in range(count % (bits + 1)):
        value, carry = value >> 1 | carry << (bits - 1), value & 1
    return value, carry, value >> (bits - 1) ^ value >> (bits - 2) & 1


def _shift(function: Shift, *, rotate: bool) -> Callable[[Translator, Instruction], Op]:
    """A shift or rotate by immediate or CL. A count of 0 changes nothing, flags included."""

    def build(t: Translator, i: Instruction) -> Op:
        dst, src = i.operands
        size = dst.size
        count_mask = 0x3F if size == 8 else 0x1F
        if not rotate and src.kind == IMM and src.number & count_mask and dst.kind == REG and size >= 4:
            return _fixed_shift(t, i, function, src.number & count_mask)
        f = t.f
        kind = RESULT << 2 | LOG2[size]
        get, put = t.modify(i, dst)
        source, carry = t.get(i, src), t.test(CC_B)

        def op() -> None:
            count = source() & count_mask
            if not count:
                put(get())
                return
            value, carry_out, overflow = function(get(), count, size, 1 if carry() else 0)
            put(value)
            extra = (RFLAGS_CF if carry_out else 0) | (RFLAGS_OF if overflow else 0)
            if rotate:
                f[1] = arithmetic(f) & ~(RFLAGS_CF | RFLAGS_OF) | extra
                f[0] = EAGER << 2
            else:
                f[0] = kind
                f[1] = value
                f[2] = extra

        return op

    return build


def _fixed_shift(t: Translator, i: Instruction, function: Shift, count: int) -> Op:
    dst = i.operands[0]
    d, size = dst.number, dst.size
    r, f, mask = t.r, t.f, MASK[size]
    kind = t.new_kind = RESULT << 2 | LOG2[size]

    def op() -> None:
        value, carry, overflow = function(r[d] & mask, count, size, 0)
        r[d] = value
        f[0] = kind
        f[1] = value
        f[2] = (RFLAGS_CF if carry else 0) | (RFLAGS_OF if overflow else 0)

    return op


shl = _shift(_shl, rotate=False)
shr = _shift(_shr, rotate=False)
sar = _shift(_sar, rotate=False)
rol = _shift(_rol, rotate=True)
ror = _shift(_ror, rotate=True)
rcl = _shift(_rcl, rotate=True)
rcr = _shift(_rcr, rotate=True)


def _double_left(high: int, low: int, count: int, size: int) -> tuple[int, int]:
    bits = 8 * size
    return (high << count | low >> (bits - count)) & MASK[size], high >> (bits - count) & 1


def _double_right(low: int, high: int, count: int, size: int) -> tuple[int, int]:
    bits = 8 * size
    return (low >> count | high << (bits - count)) & MASK[size], low >> (count - 1) & 1


def _double_shift(
    function: Callable[[int, int, int, int], tuple[int, int]],
) -> Callable[[Translator, Instruction], Op]:
    def build(t: Translator, i: Instruction) -> Op:
        dst, src, amount = i.operands
        size = dst.size
        count_mask = 0x3F if size == 8 else 0x1F
        f, sign, bits = t.f, SIGN[size], 8 * size
        kind = RESULT << 2 | LOG2[size]
        get, put = t.modify(i, dst)
        source, counter = t.get(i, src), t.get(i, amount)

        def op() -> None:
            count = counter() & count_mask
            value = get()
            if not count:
                put(value)
                return
            # 16-bit operands with counts beyond 16 are undefined: taken modulo 16, as a rotation
            result, carry = function(value, source(), count if count <= bits else count - bits, size)
            put(result)
            f[0] = kind
            f[1] = result
            f[2] = (RFLAGS_CF if carry else 0) | (RFLAGS_OF if (value ^ result) & sign else 0)

        return op

    return build


shld = _double_shift(_double_left)
shrd = _double_shift(_double_right)


# Bit tests


def bt(t: Translator, i: Instruction) -> Op:
    """BT: CF = the bit."""
    return _bit_test(t, i, None)


def bts(t: Translator, i: Instruction) -> Op:
    """BTS: CF = the bit, which is then set."""
    return _bit_test(t, i, int.__or__)


def btr(t: Translator, i: Instruction) -> Op:
    """BTR: CF = the bit, which is then cleared."""
    return _bit_test(t, i, lambda value, bit: value & ~bit)


def btc(t: Translator, i: Instruction) -> Op:
    """BTC: CF = the bit, which is then inverted."""
    return _bit_test(t, i, int.__xor__)


def _bit_test(t: Translator, i: Instruction, change: Callable[[int, int], int] | None) -> Op:
    dst, src = i.operands
    f, low = t.f, 8 * dst.size - 1
    source = t.get(i, src)
    if dst.kind == MEM and src.kind == REG:
        get, put = _bit_string(t, i, source, write=change is not None)
    elif change is None:
        get, put = t.get(i, dst), None
    else:
        get, put = t.modify(i, dst)
    t.new_kind = EAGER << 2

    def op() -> None:
        value = get()
        bit = 1 << (source() & low)
        if change is not None and put is not None:
            put(change(value, bit))
        f[1] = arithmetic(f) & ~RFLAGS_CF | (RFLAGS_CF if value & bit else 0)
        f[0] = EAGER << 2

    return op


def _bit_string(
    t: Translator, i: Instruction, source: Get, *, write: bool
) -> tuple[Get, Callable[[int], None] | None]:
    """Memory with the bit offset in a register: the signed offset selects the word, too."""
    size = i.operands[0].size
    sign, shift = SIGN[size], 3 + LOG2[size]
    mask = MASK[i.address_size]
    offset = t.offset(i)

    def word() -> int:
        bit = source()
        bit -= (bit & sign) << 1
        return (offset() + (bit >> shift) * size) & mask

    address = t.linear(i.segment, word, size, write=write)
    if not write:
        load = t.load[size]
        return (lambda: load(address())), None
    load, store = t.modify_load[size], t.store[size]
    return (lambda: load(address())), (lambda value: store(address(), value))


def bsf(t: Translator, i: Instruction) -> Op:
    """BSF: dst = index of the lowest bit set; ZF if there is none, and then dst stays."""
    return _scan(t, i, lambda value: (value & -value).bit_length() - 1)


def bsr(t: Translator, i: Instruction) -> Op:
    """BSR: dst = index of the highest bit set; ZF if there is none, and then dst stays."""
    return _scan(t, i, lambda value: value.bit_length() - 1)


def _scan(t: Translator, i: Instruction, find: Callable[[int], int]) -> Op:
    f = t.f
    get, put = t.get(i, i.operands[1]), t.put(i, i.operands[0])
    t.new_kind = EAGER << 2

    def op() -> None:
        value = get()
        flags = arithmetic(f) & ~RFLAGS_ZF
        if value:
            put(find(value))
        else:
            flags |= RFLAGS_ZF
        f[0] = EAGER << 2
        f[1] = flags

    return op


def popcnt(t: Translator, i: Instruction) -> Op:
    """POPCNT: dst = number of bits set; ZF if none, the other flags cleared."""
    f = t.f
    get, put = t.get(i, i.operands[1]), t.put(i, i.operands[0])
    t.new_kind = EAGER << 2

    def op() -> None:
        value = get()
        put(value.bit_count())
        f[0] = EAGER << 2
        f[1] = 0 if value else RFLAGS_ZF

    return op


def salc(t: Translator, i: Instruction) -> Op:
    """SALC (undocumented): AL = all ones if CF, else 0."""
    carry, put = t.test(CC_B), t.put_register(0, 1)

    def op() -> None:
        put(0xFF if carry() else 0)

    return op
