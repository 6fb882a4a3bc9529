"""Decodes x86 instructions: prefixes, opcode, ModRM, SIB, displacement, immediates (SDM volume 2, 2).

`decode` knows lengths and operands, not meanings: those are rows of `opcodes.TABLE`, whose
operand codes are those of SDM volume 2, appendix A::

    E  register or memory of ModRM       G  register of ModRM      M  memory only
    I  immediate   J  branch target      O  memory at an immediate address
    Z  register in the opcode's low bits A  accumulator            S  segment register
    C  control register  D  debug register  V  XMM register  W  XMM register or memory
    b 1 byte, w 2, d 4, q 8, x 16; v operand size; z operand size but at most 4; y 8 or 4
    1  the constant one     CL, DX  that register     P  far pointer immediate
    R  as E, but registers are full-size where memory is 16 bits (SLDT, STR, SMSW, MOV from Sreg)
"""

from __future__ import annotations

from pykvm.emulator.faults import UD, Fault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from pykvm.emulator.opcodes import Entry, Row

MAX_LENGTH = 15

# Kinds of operand
REG, MEM, IMM, SEG, CONTROL, DEBUG, XMM = range(7)

# Segment registers by their encoding
ES, CS, SS, DS, FS, GS = range(6)

# Row flags
LOCK = 1 << 0  # LOCK is allowed if the first operand is memory
END = 1 << 1  # may change RIP, mode or segments: nothing follows it in a block
DEFAULT64 = 1 << 2  # in 64-bit mode the operand size is 8, or 2 with prefix 66
FORCE64 = 1 << 3  # in 64-bit mode the operand size is 8, whatever the prefix
NOT64 = 1 << 4  # #UD in 64-bit mode
ONLY64 = 1 << 5  # #UD outside 64-bit mode
KEEP = 1 << 6  # leaves the arithmetic flags alone
PROTECTED = 1 << 7  # #UD in real mode and virtual-8086 mode

PREFIX_SEGMENT = {0x26: ES, 0x2E: CS, 0x36: SS, 0x3E: DS, 0x64: FS, 0x65: GS}
OPERAND_SIZE, ADDRESS_SIZE, LOCK_PREFIX, REPNE, REPE = 0x66, 0x67, 0xF0, 0xF2, 0xF3
PREFIXES = frozenset((*PREFIX_SEGMENT, OPERAND_SIZE, ADDRESS_SIZE, LOCK_PREFIX, REPNE, REPE))

REX_B, REX_X, REX_R, REX_W = 1, 2, 4, 8
RBX, RSP, RBP, RSI, RDI = 3, 4, 5, 6, 7

# 16-bit ModRM forms: base and index registers
FORMS16 = ((RBX, RSI), (RBX, RDI), (RBP, RSI), (RBP, RDI), (RSI, -1), (RDI, -1), (RBP, -1), (RBX, -1))

# MOV to and from control and debug registers: whatever ModRM's mod field says, it means a register
REGISTER_FORMS = frozenset((0x120, 0x121, 0x122, 0x123))

SIZES = {"b": 1, "w": 2, "d": 4, "q": 8, "x": 16}


class Operand:
    """One operand: a register, memory (described in the instruction), or an immediate."""

    __slots__ = ("kind", "number", "size")

    def __init__(self, kind: int, number: int, size: int) -> None:
        self.kind = kind
        self.number = number  # register number or immediate value
        self.size = size


class Instruction:
    """A decoded instruction. `start` and `next` are instruction pointers, not linear addresses."""

    __slots__ = (
        "address_size",
        "base",
        "bits",
        "code",
        "displacement",
        "index",
        "modrm",
        "next",
        "opcode",
        "operands",
        "prefixes",
        "repeat",
        "rex",
        "row",
        "scale",
        "segment",
        "size",
        "start",
    )

    row: Row
    code: bytes

    def __init__(self, start: int, bits: int) -> None:
        self.start = start
        self.next = start
        self.bits = bits
        self.opcode = 0  # map << 8 | opcode byte
        self.modrm = -1
        self.rex = 0
        self.prefixes: set[int] = set()
        self.repeat = 0  # REPE, REPNE or 0
        self.size = 0  # operand size in bytes
        self.address_size = 0
        self.segment = -1  # of the memory operand; before ModRM: the override
        self.base = -1
        self.index = -1
        self.scale = 0
        self.displacement = 0
        self.operands: list[Operand] = []

    @property
    def reg(self) -> int:
        """The reg field of ModRM, without REX."""
        return self.modrm >> 3 & 7

    @property
    def has_memory(self) -> bool:
        """Whether ModRM names memory."""
        return self.modrm >= 0 and self.modrm < 0xC0


class _Reader:
    """Bytes of one instruction, taken in order; running out raises IndexError."""

    __slots__ = ("code", "position")

    def __init__(self, code: bytes) -> None:
        self.code = code
        self.position = 0

    def unsigned(self, size: int) -> int:
        end = self.position + size
        if end > len(self.code):
            raise IndexError("instruction goes on")
        value = int.from_bytes(self.code[self.position : end], "little")
        self.position = end
        return value

    def signed(self, size: int) -> int:
        value = self.unsigned(size)
        return value - (1 << 8 * size) if value >> (8 * size - 1) else value


def decode(code: bytes, start: int, bits: int, table: Mapping[int, Entry]) -> Instruction:
    """Decode the instruction at the beginning of `code`.

    `bits` is 16, 32 or 64: the code segment's default. Raises IndexError if `code` ends
    before the instruction does, Fault(#UD) if there is no such instruction.
    """
    i = Instruction(start, bits)
    reader = _Reader(code)
    opcode = _prefixes(i, reader)
    _sizes(i)
    i.opcode = _opcode(reader, opcode)
    row = _row(i, reader, table)
    i.row = row
    _apply_row_flags(i, row.flags)
    for text in row.operands:
        i.operands.append(_operand(i, reader, text))
    length = reader.position
    i.code = code[:length]
    i.next = (start + length) & (0xFFFF_FFFF_FFFF_FFFF if bits == 64 else 0xFFFF_FFFF)
    if bits == 64 and i.has_memory and i.base == -1 and i.modrm & 0xC7 == 0x05:
        i.displacement = i.next + i.displacement  # RIP-relative
    if LOCK_PREFIX in i.prefixes and not (row.flags & LOCK and i.operands[0].kind == MEM):
        raise Fault(UD)
    return i


def _prefixes(i: Instruction, reader: _Reader) -> int:
    """Consume prefixes; return the first byte that is none."""
    while True:
        byte = reader.unsigned(1)
        if i.bits == 64 and 0x40 <= byte <= 0x4F:
            following = reader.unsigned(1)
            if following in PREFIXES or 0x40 <= following <= 0x4F:  # REX counts only right before the opcode
                reader.position -= 1
                continue
            i.rex = byte
            return following
        if byte not in PREFIXES:
            return byte
        if byte in PREFIX_SEGMENT:
            if i.bits != 64 or byte in (0x64, 0x65):
                i.segment = PREFIX_SEGMENT[byte]
        elif byte in (REPE, REPNE):
            i.repeat = byte
        i.prefixes.add(byte)


def _sizes(i: Instruction) -> None:
    other = OPERAND_SIZE in i.prefixes
    if i.bits == 64:
        i.size = 8 if i.rex & REX_W else (2 if other else 4)
        i.address_size = 4 if ADDRESS_SIZE in i.prefixes else 8
    else:
        i.size = 2 if other == (i.bits == 32) else 4
        i.address_size = 2 if (ADDRESS_SIZE in i.prefixes) == (i.bits == 32) else 4


def _opcode(reader: _Reader, byte: int) -> int:
    if byte != 0x0F:
        return byte
    byte = reader.unsigned(1)
    if byte == 0x38:
        return 0x200 | reader.unsigned(1)
    if byte == 0x3A:
        return 0x300 | reader.unsigned(1)
    return 0x100 | byte


def _row(i: Instruction, reader: _Reader, table: Mapping[int, Entry]) -> Row:
    """Find the table row: an entry may branch on mode, on prefix, and on ModRM's reg field."""
    entry = table.get(i.opcode)
    while True:
        if entry is None:
            raise Fault(UD)
        if isinstance(entry, dict):
            entry = _branch(i, reader, entry)
            continue
        if i.modrm < 0 and entry.modrm:
            _modrm(i, reader)
        return entry


def _branch(i: Instruction, reader: _Reader, entry: dict[str | int, Entry]) -> Entry | None:
    """Follow one level of a branching entry; its keys say what it branches on."""
    if "long" in entry:
        return entry["long" if i.bits == 64 else "legacy"]
    if "prefix" in entry:
        prefix = i.repeat or (OPERAND_SIZE if OPERAND_SIZE in i.prefixes else 0)
        return entry.get(prefix)
    if i.modrm < 0:
        _modrm(i, reader)
    if "register" in entry:
        return entry.get("memory" if i.has_memory else "register")
    return entry.get(i.modrm & 7 if "rm" in entry else i.reg)


def _apply_row_flags(i: Instruction, flags: int) -> None:
    if i.bits == 64:
        if flags & NOT64:
            raise Fault(UD)
        if flags & FORCE64 or (flags & DEFAULT64 and i.size != 2):
            i.size = 8
    elif flags & ONLY64:
        raise Fault(UD)


def _modrm(i: Instruction, reader: _Reader) -> None:
    modrm = reader.unsigned(1)
    if i.opcode in REGISTER_FORMS:
        modrm |= 0xC0
    i.modrm = modrm
    if modrm >= 0xC0:
        return
    override = i.segment
    if i.address_size == 2:
        _memory16(i, reader, modrm >> 6, modrm & 7)
    else:
        _memory32(i, reader, modrm >> 6, modrm & 7)
    if override >= 0:
        i.segment = override
    else:
        i.segment = SS if i.base in (RSP, RBP) else DS


def _memory16(i: Instruction, reader: _Reader, mod: int, rm: int) -> None:
    if mod == 0 and rm == 6:
        i.displacement = reader.signed(2)
        return
    i.base, i.index = FORMS16[rm]
    if mod:
        i.displacement = reader.signed(mod)


def _memory32(i: Instruction, reader: _Reader, mod: int, rm: int) -> None:
    base = rm | (i.rex & REX_B) << 3
    if rm == 4:
        sib = reader.unsigned(1)
        i.scale = sib >> 6
        index = sib >> 3 & 7 | (i.rex & REX_X) << 2
        i.index = index if index != 4 else -1
        base = sib & 7 | (i.rex & REX_B) << 3
        if sib & 7 == 5 and mod == 0:
            i.displacement = reader.signed(4)
            return
    elif rm == 5 and mod == 0:
        i.displacement = reader.signed(4)
        return
    i.base = base
    if mod:
        i.displacement = reader.signed(1 if mod == 1 else 4)


def _operand(i: Instruction, reader: _Reader, text: str) -> Operand:
    letter = text[0]
    if text in FIXED:
        kind, number, size = FIXED[text]
        return Operand(kind, number, size)
    size = _operand_size(i, text[1:])
    if letter in "EMWR":
        return _modrm_operand(i, letter, size)
    if letter == "G":
        return Operand(REG, i.reg | (i.rex & REX_R) << 1, size)
    if letter == "Z":
        return Operand(REG, i.opcode & 7 | (i.rex & REX_B) << 3, size)
    if letter == "A":
        return Operand(REG, 0, size)
    if letter == "I":
        return _immediate(i, reader, text, size)
    if letter == "J":
        target = reader.signed(1 if text == "Jb" else min(i.size, 4)) + i.start + reader.position
        return Operand(IMM, target & ((1 << 8 * i.size) - 1), i.size)
    if letter == "O":
        i.displacement = reader.unsigned(i.address_size)
        i.segment = i.segment if i.segment >= 0 else DS
        return Operand(MEM, 0, size)
    kind = {"S": SEG, "C": CONTROL, "D": DEBUG, "V": XMM}[letter]
    number = i.reg if letter == "S" else i.reg | (i.rex & REX_R) << 1
    return Operand(kind, number, size)


FIXED = {"CL": (REG, 1, 1), "DX": (REG, 2, 2), "1": (IMM, 1, 1)}


def _operand_size(i: Instruction, text: str) -> int:
    if text in SIZES:
        return SIZES[text]
    if text == "z":
        return min(i.size, 4)
    if text == "y":
        return 8 if i.size == 8 else 4
    if text == "n":  # control and debug registers: the natural size
        return 8 if i.bits == 64 else 4
    return i.size


def _modrm_operand(i: Instruction, letter: str, size: int) -> Operand:
    if i.has_memory:
        return Operand(MEM, 0, 2 if letter == "R" else size)
    if letter == "M":
        raise Fault(UD)
    return Operand(XMM if letter == "W" else REG, i.modrm & 7 | (i.rex & REX_B) << 3, size)


def _immediate(i: Instruction, reader: _Reader, text: str, size: int) -> Operand:
    """Ib, Iw: as they are. Is, Iz: sign-extended to the operand size. Iv: full size. Ip: offset, selector."""
    if text == "Ip":
        offset = reader.unsigned(i.size)
        i.operands.append(Operand(IMM, offset, i.size))
        return Operand(IMM, reader.unsigned(2), 2)
    if text == "Is":
        return Operand(IMM, reader.signed(1) & ((1 << 8 * i.size) - 1), i.size)
    if text == "Iz":
        return Operand(IMM, reader.signed(size) & ((1 << 8 * i.size) - 1), i.size)
    return Operand(IMM, reader.unsigned(size), size)
