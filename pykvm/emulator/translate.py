"""Turns decoded instructions into Python closures: operands, addresses and the stack.

A `Translator` belongs to one execution environment (`Environment`): code size, privilege,
stack size, and which segments are flat. Whatever is fixed in an environment is decided while
translating, so that a closure for ``mov eax, [ebx+8]`` with flat segments adds, masks and loads.

Registers live in one list: 0..15 are RAX..R15 by encoding, then RIP. They hold 64 bits each.
"""

from __future__ import annotations

from pykvm.emulator.decode import (
    DS,
    END,
    ES,
    FS,
    IMM,
    KEEP,
    PROTECTED,
    REG,
    SS,
    Instruction,
    Operand,
)
from pykvm.emulator.faults import UD, Fault
from pykvm.emulator.flags import MASK
from pykvm.values import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.emulator.cpu import Cpu
    from pykvm.emulator.flags import Test

    Op = Callable[[], None]
    Get = Callable[[], int]
    Put = Callable[[int], None]
    Check = Callable[[int, int, int, bool], None]

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
RIP = 16

M16 = 0xFFFF
M32 = 0xFFFF_FFFF
M64 = 0xFFFF_FFFF_FFFF_FFFF
HIGH48 = M64 ^ M16
HIGH56 = M64 ^ 0xFF
NOT_AH = M64 ^ 0xFF00


class Environment(Value):
    """What translated code depends on besides its bytes."""

    bits: int  # 16, 32 or 64: the code segment's size
    user: bool  # current privilege level 3
    stack_mask: int  # how much of RSP the stack uses
    flat: int  # bit n: segment register n covers all 4 GiB from 0 and is writable
    protected: bool  # CR0.PE set and not virtual-8086 mode
    code_base: int  # linear address of offset 0 of the code segment


class Translator:
    """Makes the closures of one environment."""

    def __init__(self, cpu: Cpu, environment: Environment) -> None:
        self.cpu = cpu
        self.environment = environment
        self.bits = environment.bits
        self.r = cpu.r
        self.f = cpu.f
        access = cpu.mmu.user if environment.user else cpu.mmu.supervisor
        self.access = access
        self.load = access.load
        self.modify_load = access.modify
        self.store = access.store
        self.tests = cpu.tests
        self.kind: int | None = None  # of the lazy flags before this instruction, where known
        self.new_kind: int | None = None  # and after it
        self.ended = False  # the instruction sets RIP, so nothing may follow it in its block

    def translate(self, i: Instruction) -> tuple[Op, bool]:
        """The closure for `i`, and whether it ends its block by setting RIP itself."""
        flags = i.row.flags
        self.new_kind = None
        self.ended = bool(flags & END)
        if flags & PROTECTED and not self.environment.protected:
            raise Fault(UD)
        op = i.row.build(self, i)
        if not flags & KEEP:
            self.kind = self.new_kind
        return op, self.ended

    def flat(self, segment: int) -> bool:
        """Whether `segment` needs neither base nor limit in this environment."""
        if self.bits == 64:
            return segment < FS
        return bool(self.environment.flat >> segment & 1)

    # Flags

    def test(self, condition: int) -> Test:
        """A test of one of the eight conditions of `flags`, direct where the flags' kind is known."""
        if self.kind is not None:
            return self.tests[self.kind][condition]
        f, tests = self.f, self.tests
        return lambda: tests[f[0]][condition]()

    # Registers

    def get_register(self, number: int, size: int, rex: int = 0) -> Get:
        """A reader of a general register. Without REX, byte registers 4..7 are AH, CH, DH, BH."""
        r = self.r
        if size == 8:
            return lambda: r[number]
        if size == 4:
            return lambda: r[number] & 0xFFFF_FFFF
        if size == 2:
            return lambda: r[number] & 0xFFFF
        if rex or number < 4:
            return lambda: r[number] & 0xFF
        high = number - 4
        return lambda: r[high] >> 8 & 0xFF

    def put_register(self, number: int, size: int, rex: int = 0) -> Put:
        """A writer of a general register: 4 bytes clear the upper half, fewer leave the rest."""
        r = self.r

        def put_all(value: int) -> None:
            r[number] = value

        def put2(value: int) -> None:
            r[number] = r[number] & HIGH48 | value

        def put1(value: int) -> None:
            r[number] = r[number] & HIGH56 | value

        high = number - 4

        def put_high(value: int) -> None:
            r[high] = r[high] & NOT_AH | value << 8

        if size >= 4:
            return put_all
        if size == 2:
            return put2
        return put1 if rex or number < 4 else put_high

    # Addresses

    def offset(self, i: Instruction) -> Get:
        """The effective address of the memory operand, before segmentation."""
        r = self.r
        mask = MASK[i.address_size]
        base, index, scale = i.base, i.index, i.scale
        disp = i.displacement & mask
        if base < 0 and index < 0:
            return lambda: disp
        if index < 0:
            if disp == 0:
                return (lambda: r[base]) if mask == M64 else lambda: r[base] & mask
            return lambda: (r[base] + disp) & mask
        if base < 0:
            return lambda: ((r[index] << scale) + disp) & mask
        if disp == 0:
            return lambda: (r[base] + (r[index] << scale)) & mask
        return lambda: (r[base] + (r[index] << scale) + disp) & mask

    def address(self, i: Instruction, size: int, *, write: bool) -> Get:
        """The linear address of the memory operand, checked for an access of `size` bytes."""
        return self.linear(i.segment, self.offset(i), size, write=write)

    def linear(self, segment: int, offset: Get, size: int, *, write: bool) -> Get:
        """Add `segment` to `offset`, with the checks of an access of `size` bytes."""
        if self.flat(segment):
            return offset
        base = self.cpu.segment_base
        if self.bits == 64:
            return lambda: (base[segment] + offset()) & 0xFFFF_FFFF_FFFF_FFFF
        limit = self.cpu.write_limit if write else self.cpu.read_limit
        check: Check = self.cpu.check_segment
        span = size - 1

        def linear() -> int:
            where = offset()
            if where + span > limit[segment]:
                check(segment, where, size, write)
            return (base[segment] + where) & 0xFFFF_FFFF

        return linear

    # Operands

    def get(self, i: Instruction, operand: Operand) -> Get:
        """A reader of `operand`."""
        number, size = operand.number, operand.size
        if operand.kind == REG:
            return self.get_register(number, size, i.rex)
        if operand.kind == IMM:
            return lambda: number
        load = self.load[size]
        address = self.address(i, size, write=False)
        return lambda: load(address())

    def put(self, i: Instruction, operand: Operand) -> Put:
        """A writer of `operand`."""
        if operand.kind == REG:
            return self.put_register(operand.number, operand.size, i.rex)
        store = self.store[operand.size]
        address = self.address(i, operand.size, write=True)
        return lambda value: store(address(), value)

    def modify(self, i: Instruction, operand: Operand) -> tuple[Get, Put]:
        """A reader and a writer for read-modify-write: the reader faults as the writer would."""
        if operand.kind == REG:
            return self.get(i, operand), self.put(i, operand)
        load, store = self.modify_load[operand.size], self.store[operand.size]
        address = self.address(i, operand.size, write=True)
        where = 0

        def get() -> int:
            nonlocal where
            where = address()
            return load(where)

        def put(value: int) -> None:
            store(where, value)

        return get, put

    # The stack

    def push(self, size: int) -> Put:
        """A push of `size` bytes: RSP changes only after the store succeeded."""
        r, store = self.r, self.store[size]
        mask = self.environment.stack_mask
        if self.flat(SS) and mask != M16:

            def push(value: int) -> None:
                top = (r[4] - size) & mask
                store(top, value)
                r[4] = top

            return push

        top = 0
        address = self.linear(SS, lambda: top, size, write=True)
        keep = M64 ^ mask

        def push_checked(value: int) -> None:
            nonlocal top
            top = (r[4] - size) & mask
            store(address(), value)
            r[4] = r[4] & keep | top

        return push_checked

    def pop(self, size: int) -> Get:
        """A pop of `size` bytes."""
        r, load = self.r, self.load[size]
        mask = self.environment.stack_mask
        if self.flat(SS) and mask != M16:

            def pop() -> int:
                top = r[4]
                value = load(top & mask)
                r[4] = (top + size) & mask
                return value

            return pop

        address = self.linear(SS, lambda: r[4] & mask, size, write=False)
        keep = M64 ^ mask

        def pop_checked() -> int:
            value = load(address())
            top = r[4]
            r[4] = top & keep | (top + size) & mask
            return value

        return pop_checked

    def string_source(self, i: Instruction, size: int) -> Get:
        """The linear address of DS:rSI, DS replaceable."""
        r, mask = self.r, MASK[i.address_size]
        segment = i.segment if i.segment >= 0 else DS
        return self.linear(segment, lambda: r[RSI] & mask, size, write=False)

    def string_destination(self, i: Instruction, size: int, *, write: bool) -> Get:
        """The linear address of ES:rDI."""
        r, mask = self.r, MASK[i.address_size]
        return self.linear(ES, lambda: r[RDI] & mask, size, write=write)


def then(t: Translator, i: Instruction, action: Callable[[], None]) -> Op:
    """`action`, then on to the next instruction: for what ends a block without being a jump."""
    r, following = t.r, i.next

    def op() -> None:
        action()
        r[RIP] = following

    return op


def privileged(t: Translator, i: Instruction, action: Callable[[], None]) -> Op:
    """As `then`, at privilege 0 only."""
    cpu, r, following = t.cpu, t.r, i.next

    def op() -> None:
        cpu.require_cpl0()
        action()
        r[RIP] = following

    return op
