"""The arithmetic flags, worked out only when something asks (SDM volume 1, 3.4.3.1).

An instruction that sets flags leaves three numbers in a shared list and nothing else::

    [kind, a, b]        kind = operation << 2 | log2(operand size in bytes)

    EAGER   a: the six flags as RFLAGS bits
    ADD     a, b: the operands of a + b
    SUB     a, b: the operands of a - b
    RESULT  a: the result, from which SF, ZF and PF follow; b: CF, AF and OF as RFLAGS bits
    INC     a: the result; b: CF, which INC keeps
    DEC     a: the result; b: CF, which DEC keeps

All operands and results are cut to the operand size. A consumer that knows the kind when
it is translated tests the operands directly: ``cmp a, b; jb`` becomes ``a < b``.
"""

from __future__ import annotations

from collections.abc import Callable

from pykvm.registers import RFLAGS_AF, RFLAGS_CF, RFLAGS_OF, RFLAGS_PF, RFLAGS_SF, RFLAGS_ZF

EAGER = 0
ADD = 1
SUB = 2
RESULT = 3
INC = 4
DEC = 5
KINDS = 6 << 2

ARITHMETIC = RFLAGS_CF | RFLAGS_PF | RFLAGS_AF | RFLAGS_ZF | RFLAGS_SF | RFLAGS_OF

LOG2 = {1: 0, 2: 1, 4: 2, 8: 3}
MASK = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFF_FFFF, 8: 0xFFFF_FFFF_FFFF_FFFF}
SIGN = {1: 0x80, 2: 0x8000, 4: 0x8000_0000, 8: 0x8000_0000_0000_0000}

PARITY = bytes(RFLAGS_PF if value.bit_count() % 2 == 0 else 0 for value in range(256))
"""PF of each byte value."""

# Condition codes, without the lowest bit, which negates (SDM volume 1, appendix B)
CC_O, CC_B, CC_Z, CC_BE, CC_S, CC_P, CC_L, CC_LE = range(8)

Test = Callable[[], object]


def result_flags(result: int, size: int) -> int:
    """SF, ZF and PF of `result`."""
    flags = PARITY[result & 0xFF]
    if not result:
        flags |= RFLAGS_ZF
    if result & SIGN[size]:
        flags |= RFLAGS_SF
    return flags


def add_flags(a: int, b: int, size: int) -> int:
    """All six flags of a + b."""
    result = (a + b) & MASK[size]
    flags = result_flags(result, size) | (a ^ b ^ result) & RFLAGS_AF
    if result < a:
        flags |= RFLAGS_CF
    if (a ^ result) & (b ^ result) & SIGN[size]:
        flags |= RFLAGS_OF
    return flags


def sub_flags(a: int, b: int, size: int) -> int:
    """All six flags of a - b."""
    result = (a - b) & MASK[size]
    flags = result_flags(result, size) | (a ^ b ^ result) & RFLAGS_AF
    if a < b:
        flags |= RFLAGS_CF
    if (a ^ b) & (a ^ result) & SIGN[size]:
        flags |= RFLAGS_OF
    return flags


def arithmetic(state: list[int]) -> int:
    """The six flags that `state` stands for, as RFLAGS bits."""
    kind, a, b = state
    operation = kind >> 2
    if operation == EAGER:
        return a
    size = 1 << (kind & 3)
    if operation == ADD:
        return add_flags(a, b, size)
    if operation == SUB:
        return sub_flags(a, b, size)
    flags = result_flags(a, size) | b
    if operation == INC:
        if not a & 0xF:
            flags |= RFLAGS_AF
        if a == SIGN[size]:
            flags |= RFLAGS_OF
    elif operation == DEC:
        if a & 0xF == 0xF:
            flags |= RFLAGS_AF
        if a == SIGN[size] - 1:
            flags |= RFLAGS_OF
    return flags


def tests(state: list[int]) -> list[list[Test]]:
    """For each kind, the eight condition tests over `state`: ``tests(state)[kind][CC_Z]()``."""
    table: list[list[Test]] = []
    for kind in range(KINDS):
        operation = kind >> 2
        sign = SIGN[1 << (kind & 3)]
        if operation == SUB:
            table.append(_sub_tests(state, sign))
        elif operation == RESULT:
            table.append(_result_tests(state, sign))
        elif operation == EAGER:
            table.append(_eager_tests(state))
        elif operation == ADD:
            table.append(_add_tests(state, sign))
        else:
            table.append(_count_tests(state, sign, sign if operation == INC else sign - 1))
    return table


def _sub_tests(f: list[int], sign: int) -> list[Test]:
    mask = sign * 2 - 1
    return [
        lambda: (f[1] ^ f[2]) & (f[1] ^ (f[1] - f[2])) & sign,
        lambda: f[1] < f[2],
        lambda: f[1] == f[2],
        lambda: f[1] <= f[2],
        lambda: (f[1] - f[2]) & mask & sign,
        lambda: PARITY[(f[1] - f[2]) & 0xFF],
        lambda: f[1] ^ sign < f[2] ^ sign,
        lambda: f[1] ^ sign <= f[2] ^ sign,
    ]


def _result_tests(f: list[int], sign: int) -> list[Test]:
    return [
        lambda: f[2] & RFLAGS_OF,
        lambda: f[2] & RFLAGS_CF,
        lambda: not f[1],
        lambda: not f[1] or f[2] & RFLAGS_CF,
        lambda: f[1] & sign,
        lambda: PARITY[f[1] & 0xFF],
        lambda: (f[1] & sign == 0) != (f[2] & RFLAGS_OF == 0),
        lambda: not f[1] or (f[1] & sign == 0) != (f[2] & RFLAGS_OF == 0),
    ]


def _eager_tests(f: list[int]) -> list[Test]:
    return [
        lambda: f[1] & RFLAGS_OF,
        lambda: f[1] & RFLAGS_CF,
        lambda: f[1] & RFLAGS_ZF,
        lambda: f[1] & (RFLAGS_ZF | RFLAGS_CF),
        lambda: f[1] & RFLAGS_SF,
        lambda: f[1] & RFLAGS_PF,
        lambda: (f[1] & RFLAGS_SF == 0) != (f[1] & RFLAGS_OF == 0),
        lambda: f[1] & RFLAGS_ZF or (f[1] & RFLAGS_SF == 0) != (f[1] & RFLAGS_OF == 0),
    ]


def _add_tests(f: list[int], sign: int) -> list[Test]:
    mask = sign * 2 - 1

    def less() -> bool:
        flags = arithmetic(f)
        return (flags & RFLAGS_SF == 0) != (flags & RFLAGS_OF == 0)

    return [
        lambda: arithmetic(f) & RFLAGS_OF,
        lambda: (f[1] + f[2]) & mask < f[1],
        lambda: not (f[1] + f[2]) & mask,
        lambda: arithmetic(f) & (RFLAGS_ZF | RFLAGS_CF),
        lambda: (f[1] + f[2]) & sign,
        lambda: PARITY[(f[1] + f[2]) & 0xFF],
        less,
        lambda: not (f[1] + f[2]) & mask or less(),
    ]


def _count_tests(f: list[int], sign: int, overflowed: int) -> list[Test]:
    """INC and DEC: OF is set by one result only, `overflowed`."""
    return [
        lambda: f[1] == overflowed,
        lambda: f[2],
        lambda: not f[1],
        lambda: not f[1] or f[2],
        lambda: f[1] & sign,
        lambda: PARITY[f[1] & 0xFF],
        lambda: (f[1] & sign == 0) != (f[1] != overflowed),
        lambda: not f[1] or (f[1] & sign == 0) != (f[1] != overflowed),
    ]
