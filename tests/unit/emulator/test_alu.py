"""Integer instructions: results and flags, against a model that knows no lazy flags."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pykvm.exits import Halt
from tests.unit.emulator.guest import Guest

CF, PF, AF, ZF, SF, OF = 1, 4, 0x10, 0x40, 0x80, 0x800
ALL = CF | PF | AF | ZF | SF | OF
HLT = b"\xf4"
M64 = (1 << 64) - 1

# operand size -> (prefix, opcode offset): the byte forms are even opcodes
FORMS = {1: (b"", 0), 2: (b"\x66", 1), 4: (b"", 1), 8: (b"\x48", 1)}

fast = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
sizes = st.sampled_from((1, 2, 4, 8))
words = st.one_of(
    st.integers(0, M64), st.sampled_from((0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 1 << 31, 1 << 63, M64))
)


def flags_of(condition_by_flag: dict[int, bool]) -> int:
    return sum(flag for flag, is_set in condition_by_flag.items() if is_set)


def signed(value: int, size: int) -> int:
    half = 1 << (8 * size - 1)
    return (value ^ half) - half


def model(exact: int, exact_signed: int, result: int, size: int, low: int) -> int:
    """Flags by definition: `exact` is the unbounded result, `low` that of the lowest four bits."""
    return flags_of(
        {
            CF: not 0 <= exact < 1 << 8 * size,
            OF: signed(result, size) != exact_signed,
            ZF: result == 0,
            SF: signed(result, size) < 0,
            PF: bin(result & 0xFF).count("1") % 2 == 0,
            AF: not 0 <= low <= 15,
        }
    )


def merged(old: int, result: int, size: int) -> int:
    """A register after a write of `size` bytes."""
    return result if size >= 4 else old & ~((1 << 8 * size) - 1) & M64 | result


@fast
@given(a=words, b=words, size=sizes, carry=st.booleans())
def test_addition_sets_flags_as_defined(guest: Guest, a: int, b: int, size: int, carry: int) -> None:
    guest.long()
    prefix, offset = FORMS[size]
    mask = (1 << 8 * size) - 1
    x, y = a & mask, b & mask
    # adc al/ax/eax/rax, cl/cx/ecx/rcx
    code = prefix + bytes([0x10 + offset, 0xC8]) + HLT

    guest.run(code, rax=a, rcx=b, rflags=2 | carry)

    result = (x + y + carry) & mask
    expected = model(
        x + y + carry, signed(x, size) + signed(y, size) + carry, result, size, (x & 15) + (y & 15) + carry
    )
    assert guest.registers.rax == merged(a, result, size)
    assert guest.registers.rflags & ALL == expected


@fast
@given(a=words, b=words, size=sizes, opcode=st.sampled_from((0x00, 0x28, 0x38)))
def test_add_sub_and_cmp_set_flags_as_defined(guest: Guest, a: int, b: int, size: int, opcode: int) -> None:
    guest.long()
    prefix, offset = FORMS[size]
    mask = (1 << 8 * size) - 1
    x, y = a & mask, b & mask
    sign = 1 if opcode == 0x00 else -1
    code = prefix + bytes([opcode + offset, 0xC8]) + HLT

    guest.run(code, rax=a, rcx=b)

    result = (x + sign * y) & mask
    expected = model(
        x + sign * y, signed(x, size) + sign * signed(y, size), result, size, (x & 15) + sign * (y & 15)
    )
    assert guest.registers.rax == (a if opcode == 0x38 else merged(a, result, size))
    assert guest.registers.rflags & ALL == expected


@fast
@given(a=words, b=words, size=sizes, borrow=st.booleans())
def test_sbb_sets_flags_as_defined(guest: Guest, a: int, b: int, size: int, borrow: int) -> None:
    guest.long()
    prefix, offset = FORMS[size]
    mask = (1 << 8 * size) - 1
    x, y = a & mask, b & mask

    guest.run(prefix + bytes([0x18 + offset, 0xC8]) + HLT, rax=a, rcx=b, rflags=2 | borrow)

    result = (x - y - borrow) & mask
    expected = model(
        x - y - borrow, signed(x, size) - signed(y, size) - borrow, result, size, (x & 15) - (y & 15) - borrow
    )
    assert guest.registers.rax == merged(a, result, size)
    assert guest.registers.rflags & ALL == expected


@fast
@given(a=words, count=st.integers(0, 255), size=sizes, field=st.sampled_from((4, 5, 7)))
def test_shifts_agree_with_shifting_one_bit_at_a_time(
    guest: Guest, a: int, count: int, size: int, field: int
) -> None:
    guest.long()
    prefix, offset = FORMS[size]
    bits = 8 * size
    value, carry = a & ((1 << bits) - 1), 0
    for _ in range(count & (63 if size == 8 else 31)):
        if field == 4:
            value, carry = value << 1 & ((1 << bits) - 1), value >> (bits - 1)
        else:
            top = value >> (bits - 1) if field == 7 else 0
            value, carry = value >> 1 | top << (bits - 1), value & 1
    code = prefix + bytes([0xD2 + offset, 0xC0 | field << 3]) + HLT

    guest.run(code, rax=a, rcx=count)

    assert guest.registers.rax == merged(a, value, size)
    assert guest.registers.rflags & CF == carry


@fast
@given(a=words, count=st.integers(0, 255), size=sizes, field=st.sampled_from((0, 1, 2, 3)))
def test_rotates_agree_with_rotating_one_bit_at_a_time(
    guest: Guest, a: int, count: int, size: int, field: int
) -> None:
    guest.long()
    prefix, offset = FORMS[size]
    bits = 8 * size
    value, carry = a & ((1 << bits) - 1), 1
    for _ in range(count & (63 if size == 8 else 31)):
        out = value >> (bits - 1) if field in (0, 2) else value & 1
        into = carry if field >= 2 else out
        value = (
            (value << 1 | into) & ((1 << bits) - 1) if field in (0, 2) else value >> 1 | into << (bits - 1)
        )
        carry = out
    code = prefix + bytes([0xD2 + offset, 0xC0 | field << 3]) + HLT

    guest.run(code, rax=a, rcx=count, rflags=3)

    assert guest.registers.rax == merged(a, value, size)
    assert guest.registers.rflags & CF == carry


@fast
@given(a=words, b=words.filter(bool))
def test_division_undoes_multiplication(guest: Guest, a: int, b: int) -> None:
    guest.long()
    # mul rcx; div rcx; hlt
    code = bytes.fromhex("48 f7 e1 48 f7 f1 f4")

    guest.run(code, rax=a, rcx=b)

    assert (guest.registers.rax, guest.registers.rdx) == (a, 0)


@fast
@given(a=st.integers(-(1 << 63), (1 << 63) - 1), b=st.integers(-(1 << 31), (1 << 31) - 1).filter(bool))
def test_signed_division_rounds_to_zero(guest: Guest, a: int, b: int) -> None:
    guest.long()
    # cqo; idiv rcx; hlt
    code = bytes.fromhex("48 99 48 f7 f9 f4")
    quotient = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)

    guest.run(code, rax=a & M64, rcx=b & M64)

    overflow = quotient == 1 << 63
    expected = (a & M64, (a >> 63) & M64) if overflow else (quotient & M64, (a - quotient * b) & M64)
    assert (guest.registers.rax, guest.registers.rdx) == expected


@pytest.mark.parametrize("condition", range(16))
@pytest.mark.parametrize("a", [0, 1, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF])
@pytest.mark.parametrize("producer", ["39c8", "01c8", "21c8", "ffc0", "ffc8", "9d50"])
def test_conditions_follow_the_flags_whatever_instruction_set_them(
    guest: Guest, condition: int, a: int, producer: str
) -> None:
    """The test of a lazy condition equals the definition applied to RFLAGS."""
    guest.long()
    guest.put(0x7000, 0x8D5)
    code = bytes.fromhex(producer) + bytes([0x0F, 0x90 | condition, 0xC2]) + b"\x9c\x5b" + HLT

    guest.run(code, rax=a, rcx=0x7FFF_FFFF)

    f = guest.registers.rbx
    less = bool(f & SF) != bool(f & OF)
    truths = (f & OF, f & CF, f & ZF, f & (CF | ZF), f & SF, f & PF, less, less or f & ZF)
    assert guest.registers.rdx == (bool(truths[condition >> 1]) != bool(condition & 1))


def test_inc_and_dec_keep_the_carry(guest: Guest) -> None:
    guest.long()
    # stc; inc eax; setc bl; clc; dec eax; setc cl; hlt
    code = bytes.fromhex("f9 ff c0 0f 92 c3 f8 ff c8 0f 92 c1 f4")

    guest.run(code, rbx=0, rcx=0xFF)

    assert (guest.registers.rbx, guest.registers.rcx) == (1, 0)


def test_writing_32_bits_clears_the_upper_half_and_fewer_leave_it(guest: Guest) -> None:
    guest.long()
    # mov eax, ebx; mov cx, bx; mov dl, bl; mov ah, bl; hlt
    code = bytes.fromhex("89 d8 66 89 d9 88 da 88 dc f4")

    guest.run(code, rax=M64, rbx=0x1234, rcx=M64, rdx=M64)

    assert guest.registers.rax == 0x3434
    assert guest.registers.rcx == 0xFFFF_FFFF_FFFF_1234
    assert guest.registers.rdx == 0xFFFF_FFFF_FFFF_FF34


def test_rex_makes_spl_of_what_was_ah(guest: Guest) -> None:
    guest.long()
    code = bytes.fromhex("40 88 e0 f4")  # mov al, spl; hlt

    guest.run(code, rax=0xAB00, rsp=0x7012)

    assert guest.registers.rax == 0xAB12


@pytest.mark.parametrize(
    ("code", "before", "after"),
    [
        ("0fb6 05 00000000 f4", {}, {"rax": 0xF4}),  # movzx eax, byte [rip]; hlt
        ("0fbe c1 f4", {"rcx": 0x80}, {"rax": 0xFFFF_FF80}),  # movsx eax, cl
        ("48 63 c1 f4", {"rcx": 0x8000_0000}, {"rax": 0xFFFF_FFFF_8000_0000}),  # movsxd rax, ecx
        ("0f c8 f4", {"rax": 0x1122_3344}, {"rax": 0x4433_2211}),  # bswap eax
        ("f3 0f b8 c1 f4", {"rcx": 0xF0F0}, {"rax": 8}),  # popcnt eax, ecx
        ("0f bc c1 f4", {"rcx": 0x28}, {"rax": 3}),  # bsf eax, ecx
        ("0f bd c1 f4", {"rcx": 0x28}, {"rax": 5}),  # bsr eax, ecx
        (
            "0f a4 d0 08 f4",
            {"rax": 0x1234_5678, "rdx": 0xAB00_0000},
            {"rax": 0x3456_78AB},
        ),  # shld eax, edx, 8
        ("0f ac d0 08 f4", {"rax": 0x1234_5678, "rdx": 0xAB}, {"rax": 0xAB12_3456}),  # shrd eax, edx, 8
        ("0f c1 c8 f4", {"rax": 5, "rcx": 3}, {"rax": 8, "rcx": 5}),  # xadd eax, ecx
        ("0f b1 ca f4", {"rax": 7, "rdx": 7, "rcx": 9}, {"rdx": 9, "rax": 7}),  # cmpxchg edx, ecx: equal
        ("0f b1 ca f4", {"rax": 1, "rdx": 7, "rcx": 9}, {"rdx": 7, "rax": 7}),  # cmpxchg edx, ecx: not equal
        ("6b c1 fd f4", {"rcx": 5}, {"rax": 0xFFFF_FFF1}),  # imul eax, ecx, -3
        ("98 f4", {"rax": 0x8000}, {"rax": 0xFFFF_8000}),  # cwde
        ("41 90 f4", {"rax": 1, "r8": 2}, {"rax": 2, "r8": 1}),  # xchg r8d, eax
        ("90 f4", {"rax": M64}, {"rax": M64}),  # nop keeps the upper half of rax
        ("d7 f4", {"rbx": 0x8000, "rax": 1}, {"rax": 0xF4}),  # xlat
        ("e3 01 40 f4", {"rcx": 0, "rax": 1}, {"rax": 1}),  # jrcxz past a prefix
    ],
)
def test_instruction_gives_result(
    guest: Guest, code: str, before: dict[str, int], after: dict[str, int]
) -> None:
    guest.long()

    ended = guest.run(bytes.fromhex(code), **before)

    assert isinstance(ended, Halt)
    assert {name: getattr(guest.registers, name) for name in after} == after


@pytest.mark.parametrize(
    ("code", "ax", "expected"),
    [
        ("27", 0x7F, 0x85),  # daa
        ("2f", 0x7F, 0x79),  # das
        ("37", 0x000F, 0x0105),  # aaa
        ("3f", 0x020F, 0x0109),  # aas
        ("d40a", 0x0063, 0x0909),  # aam
        ("d50a", 0x0909, 0x0063),  # aad
    ],
)
def test_decimal_adjustment(guest: Guest, code: str, ax: int, expected: int) -> None:
    guest.real()

    guest.run(bytes.fromhex(code) + HLT, rax=ax)

    assert guest.registers.rax == expected


def test_cmpxchg16b_exchanges_16_bytes(guest: Guest) -> None:
    guest.long()
    guest.put(0x9000, 1)
    guest.put(0x9008, 2)
    # cmpxchg16b [rsi]; setz r8b; cmpxchg16b [rsi]; setz r9b; hlt
    code = bytes.fromhex("48 0f c7 0e 41 0f 94 c0 48 0f c7 0e 41 0f 94 c1 f4")

    guest.run(code, rsi=0x9000, rax=1, rdx=2, rbx=3, rcx=4)

    assert (guest.get(0x9000), guest.get(0x9008)) == (3, 4)
    assert (guest.registers.rax, guest.registers.rdx) == (3, 4)
    assert (guest.registers.r8, guest.registers.r9) == (1, 0)


def test_bit_test_on_memory_reaches_beyond_the_operand(guest: Guest) -> None:
    guest.long()
    # bts [rsi], rcx; bts [rsi], rdx; hlt
    code = bytes.fromhex("48 0f ab 0e 48 0f ab 16 f4")

    guest.run(code, rsi=0x9000, rcx=(-1) & M64, rdx=65)

    assert (guest.get(0x8FF8), guest.get(0x9008)) == (1 << 63, 2)
