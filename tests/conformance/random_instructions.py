"""Random instructions for 64-bit mode, ring 3, from the emulator's opcode table.

A `Form` is one row of the table, with what ModRM and the prefixes must be to reach it. A `Case` is one
instruction of a form with everything that it starts from; most memory operands, stacks and targets
are where memory is, the rest fault. Only the encoding is taken from the table, no meaning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from pykvm.emulator.decode import END, FORCE64, LOCK, MEM, Instruction, decode
from pykvm.emulator.faults import Fault
from pykvm.emulator.opcodes import TABLE, Entry, Row, _unsupported
from pykvm.registers import (
    RFLAGS_AF,
    RFLAGS_CF,
    RFLAGS_DF,
    RFLAGS_FIXED,
    RFLAGS_IF,
    RFLAGS_OF,
    RFLAGS_PF,
    RFLAGS_SF,
    RFLAGS_ZF,
)
from pykvm.state import FpuState

CODE = 0x20_0000  # filled with HLT, which is #GP in ring 3: wherever a jump leads, the test ends
CODE_SIZE = 0x1_0000
CODE_PLACES = (CODE + 0x8000, CODE + 0x8FF9)  # the second is at the end of a page
DATA = 0x30_0000
DATA_SIZE = 0x4000
MIDDLE = DATA + DATA_SIZE // 2
HLT = 0xF4

Fields = dict[str, Any]

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
M64 = (1 << 64) - 1
LOWER_HALF = (1 << 47) - 1
ARITHMETIC = RFLAGS_CF | RFLAGS_PF | RFLAGS_AF | RFLAGS_ZF | RFLAGS_SF | RFLAGS_OF
INTERESTING = (
    *(0, 1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF),
    *(0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, M64 >> 1, (M64 >> 1) + 1, M64),
)

IGNORE_LOCK = ("nop", "lfence", "mfence", "sfence")  # on Intel's processors, against the manual
FPU_OPCODES = (*range(0xD8, 0xE0), 0x1AE)  # besides those with XMM operands

# Registers that an instruction uses as addresses, and those that hold a target
STRINGS = ("movs", "cmps", "stos", "lods", "scas")
STACK = ("push", "pop", "call", "ret", "pushf", "popf", "enter", "leave")
POINTERS = {
    "xlat": (RBX,),
    **dict.fromkeys(STACK, (RSP, RBP)),
    **{name + width: (RSI, RDI) for name in STRINGS for width in ("", "b")},
}


# What ring 3 does not do by itself, or not the same everywhere, so that it proves nothing
EXCLUDED = {
    **dict.fromkeys(("cpuid", "rdtsc", "rdtscp", "rdpid"), "tells what this processor is, or the time"),
    **dict.fromkeys(("syscall", "sysenter", "int", "int1", "int3"), "software KVM has no such way to ring 0"),
    **dict.fromkeys(
        ("iret", "retf", "lss", "lfs", "lgs"), "loads segments, which are the host's in software KVM"
    ),
    **dict.fromkeys(
        ("lar", "lsl", "verr", "verw"), "reads descriptors, which are the host's in software KVM"
    ),
    **dict.fromkeys(("sldt", "str", "sgdt", "sidt", "smsw"), "shows the host's registers in software KVM"),
    "fsgsbase": "is enabled by CR4, which is the host's in software KVM",
    **dict.fromkeys(("mov Rv Sw", "0F A0 push", "0F A8 push"), "shows a segment, the host's in software KVM"),
    **dict.fromkeys(("mov Sw Ew", "0F A1 pop", "0F A9 pop"), "loads a segment, the host's in software KVM"),
    **dict.fromkeys(("call Mv", "jmp Mv"), "loads a segment, the host's in software KVM"),
    **dict.fromkeys(("mov En Cn", "mov En Dn", "mov Cn En", "mov Dn En"), "is interpreted by software KVM"),
    **dict.fromkeys(("fxsave", "fxrstor"), "has fields that differ among processors"),
    "ldmxcsr": "leaves a state behind that KVM_SET_FPU does not set",
}


@dataclass(frozen=True)
class Form:
    """A row of the opcode table, and the fields that lead to it (None: any)."""

    opcode: int
    row: Row
    reg: int | None = None
    rm: int | None = None
    memory: bool | None = None
    prefix: int | None = None  # 0: no mandatory prefix

    @property
    def signature(self) -> str:
        """Name and operands."""
        return " ".join((self.row.name, *self.row.operands))

    def __str__(self) -> str:
        opcode = self.opcode.to_bytes(2, "big").lstrip(b"\0") or b"\0"
        escape = {0x1: "0F ", 0x2: "0F 38 ", 0x3: "0F 3A "}.get(self.opcode >> 8, "")
        prefix = f"{self.prefix:02X} " if self.prefix else ""
        reg = f"/{self.reg}" if self.reg is not None else ""
        rm = f"/{self.rm}" if self.rm is not None else ""
        kind = {None: "", True: " memory", False: " register"}[self.memory]
        return f"{prefix}{escape}{opcode[-1]:02X}{reg}{rm} {self.signature}{kind}"


@dataclass(frozen=True)
class Case:
    """One instruction, and the state before it."""

    form: Form
    code: bytes
    address: int
    registers: tuple[int, ...]
    flags: int
    fpu: FpuState | None
    memory: tuple[tuple[int, bytes], ...]  # over the common contents of the data
    undefined: int  # flags
    instruction: Instruction | None  # None: #UD as far as the table knows


def forms() -> list[Form]:
    """All forms that the emulator implements, but for `EXCLUDED`. Those that 64-bit mode lacks are #UD."""
    found: list[Form] = []
    for opcode, entry in sorted(TABLE.items()):
        if not 0x40 <= opcode <= 0x4F:  # REX
            found += [Form(opcode, row, **fields) for row, fields in _rows(entry) if is_implemented(row)]
    return [form for form in found if not EXCLUDED.keys() & {form.row.name, form.signature, str(form)}]


def is_implemented(row: Row) -> bool:
    """Whether the emulator executes this, or else only knows that it exists."""
    return not row.build.__qualname__.startswith(_unsupported.__qualname__)


def _rows(entry: Entry) -> Iterator[tuple[Row, Fields]]:
    """The rows of an entry, with the fields that lead to each."""
    if isinstance(entry, Row):
        yield entry, {}
    elif "long" in entry:
        yield from _rows(entry["long"])
    elif "register" in entry:
        for name in ("register", "memory"):
            for row, fields in _rows(entry.get(name, {})):
                yield row, fields | {"memory": name == "memory"}
    else:
        branch = next((name for name in ("prefix", "rm") if name in entry), "reg")
        for value, child in entry.items():
            if isinstance(value, int):
                for row, fields in _rows(child):
                    yield row, fields | {branch: value}


def make_case(rng: Random, form: Form) -> Case:
    """A random instruction of `form` in a random state, whose result is defined."""
    while True:
        case = _make_case(rng, form)
        if case.instruction is None or not result_is_undefined(case.instruction, case.registers[RCX]):
            return case


def _make_case(rng: Random, form: Form) -> Case:
    address = rng.choice(CODE_PLACES) if rng.random() < 0.2 else CODE_PLACES[0]
    code, i = _encode(rng, form, address)
    registers = _registers(rng, form, i)
    memory = _point_into_data(rng, i, registers) if i is not None else []
    if form.row.name in ("ret", "call", "jmp"):
        _aim(rng, i, registers, memory)
    if form.row.name == "popf":
        popped = rng.getrandbits(12) & (ARITHMETIC | RFLAGS_DF)
        memory.append((registers[RSP], popped.to_bytes(8, "little")))
    flags = RFLAGS_FIXED | RFLAGS_IF | rng.getrandbits(12) & (ARITHMETIC | RFLAGS_DF)
    is_fpu = any(text[0] in "VW" for text in form.row.operands) or form.opcode in FPU_OPCODES
    fpu = _fpu(rng) if is_fpu else None
    inside = tuple((where, data) for where, data in memory if DATA <= where < DATA + DATA_SIZE - 16)
    undefined = undefined_flags(i, registers[RCX]) if i is not None else 0
    return Case(form, code, address, tuple(registers), flags, fpu, inside, undefined, i)


def _registers(rng: Random, form: Form, i: Instruction | None) -> list[int]:
    """Random values, and pointers into the data where the instruction has its own use for a register."""
    registers = [_value(rng) for _ in range(16)]
    registers[RSP] &= LOWER_HALF  # while RSP is not canonical, software KVM interprets ring 3
    pointers = POINTERS.get(form.row.name, ())
    # At most one is wild, so that one fault is due. With 67, a string instruction that faults at once may
    # or may not clear the upper half of a register.
    narrow = i is not None and i.address_size == 4
    wild = rng.choice(pointers) if pointers and not narrow and rng.random() < 0.1 else None
    for number in pointers:
        if number != wild:
            registers[number] = _pointer(rng)
    if form.row.name == "enter":
        # Away from what it pushes: processors differ in when they read what is there.
        registers[RBP] = registers[RBP] + 0x800 & M64
    if form.row.name in ("div", "idiv") and rng.random() < 0.8:
        registers[RDX] = rng.choice((0, 0, 1, M64))
    if i is not None and i.repeat:
        registers[RCX] = rng.randrange(20)
    return registers


# Encoding (SDM volume 2, chapter 2)


def _encode(rng: Random, form: Form, address: int) -> tuple[bytes, Instruction | None]:
    """The bytes of an instruction, and what the emulator's decoder makes of them."""
    prefixes, rex = _prefixes(rng, form)
    escape = (b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a")[form.opcode >> 8]
    head = prefixes + rex + escape + bytes([form.opcode & 0xFF])
    modrm = _modrm(rng, form, address + len(head))
    while True:
        code = (head + modrm + _immediate(rng, form))[:15].ljust(15, bytes([HLT]))
        try:
            i = decode(code, address, 64, TABLE)
        except Fault:
            return code, None
        target = i.operands[0].number if form.row.operands[:1] in (("Jb",), ("Jz",)) else None
        if target is None or not address <= target < i.next:  # never loop
            return code[: len(i.code)], i


def _prefixes(rng: Random, form: Form) -> tuple[bytes, bytes]:
    prefixes = [form.prefix] if form.prefix else []
    is_string = form.row.name.removesuffix("b") in STRINGS
    if is_string and rng.random() < 0.6:
        prefixes.append(rng.choice((0xF2, 0xF3)))
    # With 66 before a near branch Intel's and AMD's processors differ. With SIMD it selects another form.
    if form.prefix is None and not form.row.flags & FORCE64 and rng.random() < 0.25:
        prefixes.append(0x66)
    if rng.random() < 0.1:
        prefixes.append(0x67)
    if rng.random() < 0.05:
        prefixes.append(rng.choice((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65)))
    lock = 0.2 if form.row.flags & LOCK else 0.02
    # What is privileged, which is interpreted by software KVM, has END.
    if form.row.name not in IGNORE_LOCK and not form.row.flags & END and rng.random() < lock:
        prefixes.append(0xF0)
    rng.shuffle(prefixes)
    rex = rng.choice((b"", bytes([0x40 | rng.getrandbits(4)]), bytes([0x48 | rng.getrandbits(3)])))
    return bytes(prefixes), rex


def _modrm(rng: Random, form: Form, address: int) -> bytes:
    """ModRM, SIB and displacement; those without a base point into the data. `address` is ModRM's."""
    if not form.row.modrm and form.reg is None and form.rm is None and form.memory is None:
        return b""
    memory = form.memory if form.memory is not None else rng.random() < 0.5
    if {"V", "M"} <= {text[0] for text in form.row.operands}:
        memory = True  # software KVM executes these with a register, too
    reg = form.reg if form.reg is not None else rng.randrange(8)
    rm = form.rm if form.rm is not None else rng.randrange(8)
    if not memory:
        return bytes([0xC0 | reg << 3 | rm])
    mod = rng.randrange(3)
    sib = rng.getrandbits(8)
    data = MIDDLE + rng.randrange(-0x400, 0x400)
    displacement = rng.getrandbits(8 if mod == 1 else 32)
    if mod == 0 and rm == 5:
        displacement = data - address - 5
    elif mod == 0 and rm == 4 and sib & 7 == 5:
        displacement = data if sib >> 3 & 7 == 4 else rng.getrandbits(32)
    has_displacement = mod or rm == 5 or (rm == 4 and sib & 7 == 5)
    size = (1 if mod == 1 else 4) if has_displacement else 0
    return (
        bytes([mod << 6 | reg << 3 | rm])
        + (bytes([sib]) if rm == 4 else b"")
        + (displacement & 0xFFFF_FFFF).to_bytes(4, "little")[:size]
    )


def _immediate(rng: Random, form: Form) -> bytes:
    if "Jz" in form.row.operands:
        return rng.randrange(-0x4000, 0x4000).to_bytes(4, "little", signed=True)
    if any(text[0] == "O" for text in form.row.operands):
        return (MIDDLE + rng.randrange(-0x400, 0x400)).to_bytes(8, "little")
    return _value(rng).to_bytes(8, "little")


# State


def _value(rng: Random) -> int:
    return rng.choice(INTERESTING) if rng.random() < 0.5 else rng.getrandbits(64)


def _fpu(rng: Random) -> FpuState:
    xmm = [bytes(rng.choice((0, 0xFF, rng.getrandbits(8))) for _ in range(16)) for _ in range(16)]
    return FpuState(xmm=tuple(xmm), fcw=0x37F ^ rng.getrandbits(12) & 0xF3F)


def _pointer(rng: Random) -> int:
    pointer = MIDDLE + rng.randrange(-0x400, 0x400)
    return pointer & ~15 if rng.random() < 0.6 else pointer


def _point_into_data(rng: Random, i: Instruction, registers: list[int]) -> list[tuple[int, bytes]]:
    """Mostly: make the memory operand's base fit, so that it lies in the data."""
    has_memory = i.has_memory or any(operand.kind == MEM for operand in i.operands)
    if not has_memory:
        return []
    target = _pointer(rng)
    if i.base >= 0:
        if i.index == i.base or rng.random() < 0.1:
            return []
        if i.base == RSP and i.index >= 0:
            registers[i.index] = rng.randrange(0x400)
        index = registers[i.index] << i.scale if i.index >= 0 else 0
        registers[i.base] = (target - i.displacement - index) & M64
    elif i.index < 0:
        target = i.displacement & M64
    else:
        return []
    return [(target, _value(rng).to_bytes(8, "little"))]


def _aim(rng: Random, i: Instruction | None, registers: list[int], memory: list[tuple[int, bytes]]) -> None:
    """Put a target where a return or an indirect branch takes it from: into the code, or not canonical."""
    target = CODE + rng.randrange(CODE_SIZE)
    if rng.random() < 0.2 and DATA <= registers[RSP] < DATA + DATA_SIZE:  # else two faults are due
        target = 1 << 47 | rng.getrandbits(47)
    if i is None or not i.operands or i.modrm < 0:
        memory.append((registers[RSP], target.to_bytes(8, "little")))
    elif i.has_memory:
        memory[:] = [(where, target.to_bytes(8, "little")) for where, _ in memory]
    else:
        registers[i.operands[0].number] = target


# What the manual leaves undefined (SDM volume 2, "Flags Affected" of each instruction)


def undefined_flags(i: Instruction, rcx: int) -> int:
    """The arithmetic flags that the manual does not define after `i`."""
    name = i.row.name
    if name in ("and", "or", "xor", "test"):
        return RFLAGS_AF
    if name in ("mul", "imul"):
        return RFLAGS_SF | RFLAGS_ZF | RFLAGS_AF | RFLAGS_PF
    if name in ("div", "idiv"):
        return ARITHMETIC
    if name in ("bt", "bts", "btr", "btc"):
        return RFLAGS_OF | RFLAGS_SF | RFLAGS_AF | RFLAGS_PF
    if name in ("bsf", "bsr"):
        return ARITHMETIC & ~RFLAGS_ZF
    if name in ("rol", "ror", "rcl", "rcr", "shl", "shr", "sar", "shld", "shrd"):
        return _undefined_after_shift(i, rcx)
    return 0


def result_is_undefined(i: Instruction, rcx: int) -> bool:
    """SHLD and SHRD by more bits than the operand has."""
    return i.row.name in ("shld", "shrd") and _shift_count(i, rcx) > 8 * i.operands[0].size


def _shift_count(i: Instruction, rcx: int) -> int:
    count = rcx if i.row.operands[-1] == "CL" else i.operands[-1].number
    return count & (63 if i.operands[0].size == 8 else 31)


def _undefined_after_shift(i: Instruction, rcx: int) -> int:
    size, count = i.operands[0].size, _shift_count(i, rcx)
    if count == 0:
        return 0
    undefined = RFLAGS_AF if i.row.name.startswith("s") else 0
    if count > 1:
        undefined |= RFLAGS_OF
    if count >= 8 * size and i.row.name.startswith("sh"):
        undefined |= RFLAGS_CF
    return undefined
