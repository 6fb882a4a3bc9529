"""SSE and SSE2 data movement and bitwise logic, MXCSR, FXSAVE, and the little of x87 that set-up code uses.

SDM volume 2; volume 1, 10.5 (FXSAVE area). XMM registers are 128-bit integers in a list.
What has no row in `opcodes.TABLE` is reported as not implemented, never executed wrongly.
"""

from __future__ import annotations

from pykvm.emulator.decode import MEM, REG, XMM, Instruction, Operand
from pykvm.emulator.faults import GP, NM, UD, Fault
from pykvm.emulator.flags import MASK
from pykvm.registers import CR0_EM, CR0_TS, CR4_OSFXSR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.emulator.cpu import Cpu
    from pykvm.emulator.translate import Get, Op, Put, Translator

LOW64 = MASK[8]
ALL128 = (1 << 128) - 1
MXCSR_MASK = 0xFFFF
MASK128 = {**MASK, 16: ALL128}


def _check(cpu: Cpu) -> None:
    """Raise #UD or #NM unless the system enabled SSE (SDM volume 3, table 13-1)."""
    if cpu.cr0 & CR0_EM or not cpu.cr4 & CR4_OSFXSR:
        raise Fault(UD)
    if cpu.cr0 & CR0_TS:
        raise Fault(NM)


def _get(t: Translator, i: Instruction, operand: Operand, *, aligned: bool = False) -> Get:
    """A reader of an XMM register's lowest bytes, memory, or a general register."""
    number, mask = operand.number, MASK128[operand.size]
    if operand.kind == XMM:
        xmm = t.cpu.xmm
        return lambda: xmm[number] & mask
    if operand.size < 16 or operand.kind == REG:
        return t.get(i, operand)
    load, address, mmu = t.load[8], t.address(i, 16, write=False), t.cpu.mmu

    def get() -> int:
        where = address()
        if aligned and where & 15:
            raise mmu.misaligned(where)
        return load(where) | load((where + 8) & mmu.linear_mask) << 64

    return get


def _put(
    t: Translator, i: Instruction, operand: Operand, *, aligned: bool = False, merge: bool = False
) -> Put:
    """A writer; XMM registers are cleared above the operand unless `merge`."""
    number = operand.number
    if operand.kind == XMM:
        xmm = t.cpu.xmm
        keep = ALL128 ^ MASK128[operand.size] if merge else 0

        def put_register(value: int) -> None:
            xmm[number] = xmm[number] & keep | value

        return put_register
    if operand.size < 16 or operand.kind == REG:
        return t.put(i, operand)
    store, address = t.store[8], t.address(i, 16, write=True)
    access, mmu = t.access, t.cpu.mmu

    def put(value: int) -> None:
        where = address()
        if aligned and where & 15:
            raise mmu.misaligned(where)
        access.probe_write(where, 16)
        store(where, value & LOW64)
        store((where + 8) & mmu.linear_mask, value >> 64)

    return put


def _move(*, aligned: bool) -> Callable[[Translator, Instruction], Op]:
    def build(t: Translator, i: Instruction) -> Op:
        dst, src = i.operands
        cpu = t.cpu
        get, put = _get(t, i, src, aligned=aligned), _put(t, i, dst, aligned=aligned)

        def op() -> None:
            _check(cpu)
            put(get())

        return op

    return build


move_aligned = _move(aligned=True)  # MOVAPS, MOVAPD, MOVDQA, MOVNT*
move = _move(aligned=False)  # MOVUPS, MOVUPD, MOVDQU, MOVD, MOVQ, LDDQU


def move_scalar(t: Translator, i: Instruction) -> Op:
    """MOVSS, MOVSD: from memory the rest is cleared, between registers it stays."""
    dst, src = i.operands
    cpu = t.cpu
    get, put = _get(t, i, src), _put(t, i, dst, merge=src.kind == XMM)

    def op() -> None:
        _check(cpu)
        put(get())

    return op


def move_half(high: bool) -> Callable[[Translator, Instruction], Op]:
    """MOVLPS, MOVLPD, MOVHPS, MOVHPD, MOVHLPS, MOVLHPS: one half of a register.

    Between registers, the half that is read is the other one.
    """

    def build(t: Translator, i: Instruction) -> Op:
        dst, src = i.operands
        cpu, xmm = t.cpu, t.cpu.xmm
        shift = 64 if high else 0
        if dst.kind == MEM:
            source, store = src.number, t.put(i, dst)

            def to_memory() -> None:
                _check(cpu)
                store(xmm[source] >> shift & LOW64)

            return to_memory
        target, keep = dst.number, LOW64 << (64 - shift)
        source, other = src.number, 64 - shift
        get = t.get(i, src) if src.kind == MEM else (lambda: xmm[source] >> other & LOW64)

        def to_register() -> None:
            _check(cpu)
            xmm[target] = xmm[target] & keep | get() << shift

        return to_register

    return build


def logic(function: Callable[[int, int], int]) -> Callable[[Translator, Instruction], Op]:
    """PAND, PANDN, POR, PXOR and their PS and PD forms."""

    def build(t: Translator, i: Instruction) -> Op:
        dst, src = i.operands
        cpu, xmm, number = t.cpu, t.cpu.xmm, dst.number
        get = _get(t, i, src, aligned=True)

        def op() -> None:
            _check(cpu)
            xmm[number] = function(xmm[number], get())

        return op

    return build


and_ = logic(int.__and__)
or_ = logic(int.__or__)
xor = logic(int.__xor__)
and_not = logic(lambda a, b: (a ^ ALL128) & b)


def _split(value: int, bits: int) -> list[int]:
    return [value >> at & ((1 << bits) - 1) for at in range(0, 128, bits)]


def _join(lanes: list[int], bits: int) -> int:
    return sum(lane << (bits * index) for index, lane in enumerate(lanes))


def _lanes(bits: int, function: Callable[[int, int, int], int]) -> Callable[[Translator, Instruction], Op]:
    """An operation on lanes of `bits` bits; `function` takes two lanes and the lane's mask."""
    mask = (1 << bits) - 1
    return logic(
        lambda a, b: _join(
            [function(x, y, mask) for x, y in zip(_split(a, bits), _split(b, bits), strict=True)], bits
        )
    )


def padd(bits: int) -> Callable[[Translator, Instruction], Op]:
    """PADDB, PADDW, PADDD, PADDQ."""
    return _lanes(bits, lambda x, y, mask: (x + y) & mask)


def psub(bits: int) -> Callable[[Translator, Instruction], Op]:
    """PSUBB, PSUBW, PSUBD, PSUBQ."""
    return _lanes(bits, lambda x, y, mask: (x - y) & mask)


def pcmpeq(bits: int) -> Callable[[Translator, Instruction], Op]:
    """PCMPEQB, PCMPEQW, PCMPEQD."""
    return _lanes(bits, lambda x, y, mask: mask if x == y else 0)


def unpack(bits: int, *, high: bool) -> Callable[[Translator, Instruction], Op]:
    """PUNPCKL and PUNPCKH: interleave the lanes of one half of both operands."""
    count = 64 // bits

    def interleave(a: int, b: int) -> int:
        part = slice(count, None) if high else slice(0, count)
        pairs = zip(_split(a, bits)[part], _split(b, bits)[part], strict=True)
        return _join([lane for pair in pairs for lane in pair], bits)

    return logic(interleave)


def pshufd(t: Translator, i: Instruction) -> Op:
    """PSHUFD: each lane from any lane of the source."""
    dst, src, order = i.operands
    cpu, xmm, number = t.cpu, t.cpu.xmm, dst.number
    get = _get(t, i, src, aligned=True)
    choice = [order.number >> at & 3 for at in (0, 2, 4, 6)]

    def op() -> None:
        _check(cpu)
        lanes = _split(get(), 32)
        xmm[number] = _join([lanes[index] for index in choice], 32)

    return op


def pmovmskb(t: Translator, i: Instruction) -> Op:
    """PMOVMSKB: the top bits of the 16 bytes."""
    dst, src = i.operands
    cpu, xmm, number, put = t.cpu, t.cpu.xmm, src.number, t.put(i, dst)

    def op() -> None:
        _check(cpu)
        put(sum((lane >> 7) << index for index, lane in enumerate(_split(xmm[number], 8))))

    return op


# Control


def ldmxcsr(t: Translator, i: Instruction) -> Op:
    """LDMXCSR."""
    cpu, get = t.cpu, t.get(i, i.operands[0])

    def op() -> None:
        _check(cpu)
        value = get()
        if value & ~MXCSR_MASK:
            raise Fault(GP, 0)
        cpu.mxcsr = value

    return op


def stmxcsr(t: Translator, i: Instruction) -> Op:
    """STMXCSR."""
    cpu, put = t.cpu, t.put(i, i.operands[0])

    def op() -> None:
        _check(cpu)
        put(cpu.mxcsr)

    return op


def fxsave(t: Translator, i: Instruction) -> Op:
    """FXSAVE: 512 bytes; in legacy modes XMM8..15 are left out."""
    cpu, address, store = t.cpu, t.address(i, 512, write=True), t.store[8]
    count = 16 if t.bits == 64 else 8
    access = t.access

    def op() -> None:
        where = _fx_address(cpu, address)
        access.probe_write(where, 512)
        store(where, cpu.fcw | cpu.fsw << 16 | cpu.ftw << 32)
        store(where + 8, 0)
        store(where + 16, 0)
        store(where + 24, cpu.mxcsr | MXCSR_MASK << 32)
        for index in range(8):
            _store16(store, where + 32 + 16 * index, int.from_bytes(cpu.st[index], "little"))
        for index in range(count):
            _store16(store, where + 160 + 16 * index, cpu.xmm[index])

    return op


def fxrstor(t: Translator, i: Instruction) -> Op:
    """FXRSTOR."""
    cpu, address, load = t.cpu, t.address(i, 512, write=False), t.load[8]
    count = 16 if t.bits == 64 else 8

    def op() -> None:
        where = _fx_address(cpu, address)
        control = load(where)
        mxcsr = load(where + 24) & 0xFFFF_FFFF
        if mxcsr & ~MXCSR_MASK:
            raise Fault(GP, 0)
        values = [load(where + 32 + 8 * index) for index in range(16 + 2 * count)]
        words = [low | high << 64 for low, high in zip(values[::2], values[1::2], strict=True)]
        cpu.fcw, cpu.fsw, cpu.ftw = control & 0xFFFF, control >> 16 & 0xFFFF, control >> 32 & 0xFF
        cpu.mxcsr = mxcsr
        cpu.st[:] = [word.to_bytes(16, "little") for word in words[:8]]
        cpu.xmm[:count] = words[8 : 8 + count]

    return op


def _fx_address(cpu: Cpu, address: Get) -> int:
    if cpu.cr0 & (CR0_EM | CR0_TS):
        raise Fault(NM)
    where = address()
    if where & 15:
        raise cpu.mmu.misaligned(where)
    return where


def _store16(store: Callable[[int, int], None], where: int, value: int) -> None:
    store(where, value & LOW64)
    store(where + 8, value >> 64)


# x87


def _x87(action: Callable[[Cpu, Get, Put], None]) -> Callable[[Translator, Instruction], Op]:
    def build(t: Translator, i: Instruction) -> Op:
        cpu = t.cpu
        operand = i.operands[0] if i.operands else None
        get = t.get(i, operand) if operand else (lambda: 0)
        put = t.put(i, operand) if operand else _ignore

        def op() -> None:
            if cpu.cr0 & (CR0_EM | CR0_TS):
                raise Fault(NM)
            action(cpu, get, put)

        return op

    return build


FCW_WRITABLE = 0x1F3F  # masks, precision, rounding, infinity
FCW_FIXED = 0x40  # reserved, and always set


def _ignore(value: int) -> None:
    pass


def _fninit(cpu: Cpu, get: Get, put: Put) -> None:
    cpu.fcw, cpu.fsw, cpu.ftw = 0x37F, 0, 0


def _fldcw(cpu: Cpu, get: Get, put: Put) -> None:
    cpu.fcw = get() & FCW_WRITABLE | FCW_FIXED


def _fnclex(cpu: Cpu, get: Get, put: Put) -> None:
    cpu.fsw &= 0x7F00


def _fnstcw(cpu: Cpu, get: Get, put: Put) -> None:
    put(cpu.fcw)


def _fnstsw(cpu: Cpu, get: Get, put: Put) -> None:
    put(cpu.fsw)


fninit = _x87(_fninit)
fldcw = _x87(_fldcw)
fnclex = _x87(_fnclex)
fnstcw = _x87(_fnstcw)
fnstsw = _x87(_fnstsw)


def fwait(t: Translator, i: Instruction) -> Op:
    """FWAIT: #NM with CR0.MP and CR0.TS; no x87 exception is ever pending."""
    cpu = t.cpu

    def op() -> None:
        if cpu.cr0 & 0b1010 == 0b1010:
            raise Fault(NM)

    return op
