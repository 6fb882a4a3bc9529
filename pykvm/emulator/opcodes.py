"""The opcode table: for each opcode its name, operands, builder and rules (SDM volume 2, appendix A).

Keys are the opcode byte, with 0x100 for 0F, 0x200 for 0F 38 and 0x300 for 0F 3A. An entry is a
row, or a dictionary that branches: on ModRM's reg field (keys 0..7), on its rm field (``"rm"``),
on memory or register (``"memory"``, ``"register"``), on mode (``"long"``, ``"legacy"``), or on
the mandatory prefix (``"prefix"``; then 0, 0x66, 0xF2, 0xF3). What is missing is #UD.
"""

from __future__ import annotations

from pykvm.emulator import alu, bits, descriptors, flow, moves, multiply, ports, sse, strings, system
from pykvm.emulator.decode import CS as CODE
from pykvm.emulator.decode import (
    DEFAULT64,
    DS,
    END,
    ES,
    FORCE64,
    FS,
    GS,
    KEEP,
    LOCK,
    NOT64,
    ONLY64,
    PROTECTED,
    SS,
    Instruction,
)
from pykvm.errors import UnsupportedInstruction

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.emulator.translate import Op, Translator

    Build = Callable[[Translator, Instruction], Op]


class Row:
    """One instruction form."""

    __slots__ = ("build", "flags", "modrm", "name", "operands")

    def __init__(
        self, name: str, operands: str, build: Build, flags: int = 0, *, modrm: bool = False
    ) -> None:
        self.name = name
        self.operands = tuple(operands.split())
        self.build = build
        self.flags = flags
        self.modrm = modrm or any(
            text[0] in "EGMRSCDVW" and text not in ("CL", "DX") for text in self.operands
        )


Entry = Row | dict[str | int, "Entry"]


def _unsupported(name: str, operands: str = "", *, modrm: bool = False, protected: bool = False) -> Row:
    """A valid instruction that is not implemented: an error of ours, not the guest's."""

    def build(t: Translator, i: Instruction) -> Op:
        raise UnsupportedInstruction(t.cpu.linear_ip(), i.code, name)

    return Row(name, operands, build, PROTECTED if protected else 0, modrm=modrm)


def _group(rows: list[Entry | None]) -> Entry:
    return {number: row for number, row in enumerate(rows) if row is not None}


def _prefixed(**rows: Entry) -> Entry:
    """Branch on the mandatory prefix: np (none), p66, pf3, pf2."""
    names = {"np": 0, "p66": 0x66, "pf3": 0xF3, "pf2": 0xF2}
    return {"prefix": _NOTHING, **{names[name]: row for name, row in rows.items()}}


def _moded(legacy: Entry, long: Entry) -> Entry:
    return {"legacy": legacy, "long": long}


_NOTHING = Row("", "", moves.nop)
_VEX = _unsupported("AVX instruction", protected=True)
NOP = Row("nop", "", moves.nop, KEEP)
NOP_MODRM = Row("nop", "Ev", moves.nop, KEEP)


def _arithmetic() -> dict[int, Entry]:
    """00..3F in steps of 8, and group 1."""
    table: dict[int, Entry] = {}
    operations: list[tuple[str, Build, int]] = [
        ("add", alu.add, LOCK),
        ("or", alu.or_, LOCK),
        ("adc", alu.adc, LOCK),
        ("sbb", alu.sbb, LOCK),
        ("and", alu.and_, LOCK),
        ("sub", alu.sub, LOCK),
        ("xor", alu.xor, LOCK),
        ("cmp", alu.cmp, 0),
    ]
    forms = ("Eb Gb", "Ev Gv", "Gb Eb", "Gv Ev", "Ab Ib", "Av Iz")
    for number, (name, build, flags) in enumerate(operations):
        for form, operands in enumerate(forms):
            table[8 * number + form] = Row(name, operands, build, flags)
    for opcode, operands, extra in (
        (0x80, "Eb Ib", 0),
        (0x81, "Ev Iz", 0),
        (0x82, "Eb Ib", NOT64),
        (0x83, "Ev Is", 0),
    ):
        table[opcode] = _group(
            [Row(name, operands, build, flags | extra) for name, build, flags in operations]
        )
    return table


def _shifts() -> dict[int, Entry]:
    """Group 2."""
    operations: list[tuple[str, Build]] = [
        ("rol", bits.rol),
        ("ror", bits.ror),
        ("rcl", bits.rcl),
        ("rcr", bits.rcr),
        ("shl", bits.shl),
        ("shr", bits.shr),
        ("shl", bits.shl),
        ("sar", bits.sar),
    ]
    forms = (
        (0xC0, "Eb Ib"),
        (0xC1, "Ev Ib"),
        (0xD0, "Eb 1"),
        (0xD1, "Ev 1"),
        (0xD2, "Eb CL"),
        (0xD3, "Ev CL"),
    )
    return {
        opcode: _group([Row(name, operands, build) for name, build in operations])
        for opcode, operands in forms
    }


def _one_byte() -> dict[int, Entry]:
    push, pop = Row("push", "Zv", moves.push, DEFAULT64 | KEEP), Row("pop", "Zv", moves.pop, DEFAULT64 | KEEP)
    table: dict[int, Entry] = {}
    for number, opcode in ((ES, 0x06), (CODE, 0x0E), (SS, 0x16), (DS, 0x1E)):
        table[opcode] = Row("push", "", descriptors.push_segment(number), NOT64 | KEEP)
        if number != CODE:
            table[opcode + 1] = Row("pop", "", descriptors.pop_segment(number), NOT64 | END)
    for low in range(8):
        table[0x40 + low] = Row("inc", "Zv", alu.inc, NOT64)
        table[0x48 + low] = Row("dec", "Zv", alu.dec, NOT64)
        table[0x50 + low] = push
        table[0x58 + low] = pop
        table[0x90 + low] = Row("xchg", "Zv Av", moves.xchg, KEEP)
        table[0xB0 + low] = Row("mov", "Zb Ib", moves.mov, KEEP)
        table[0xB8 + low] = Row("mov", "Zv Iv", moves.mov, KEEP)
    for low in range(16):
        table[0x70 + low] = Row("jcc", "Jb", flow.jcc, FORCE64 | END)
    table |= {
        0x90: Row("nop", "Zv Av", moves.nop_or_xchg, KEEP),
        0x27: Row("daa", "", multiply.daa, NOT64),
        0x2F: Row("das", "", multiply.das, NOT64),
        0x37: Row("aaa", "", multiply.aaa, NOT64),
        0x3F: Row("aas", "", multiply.aas, NOT64),
        0x60: Row("pusha", "", moves.pusha, NOT64 | KEEP),
        0x61: Row("popa", "", moves.popa, NOT64 | KEEP),
        0x62: _moded(Row("bound", "Gv Mv", moves.bound, KEEP), _VEX),
        0x63: _moded(
            Row("arpl", "Ew Gw", descriptors.arpl, PROTECTED), Row("movsxd", "Gv Ez", moves.movsx, KEEP)
        ),
        0x68: Row("push", "Iz", moves.push, DEFAULT64 | KEEP),
        0x69: Row("imul", "Gv Ev Iz", multiply.imul),
        0x6A: Row("push", "Is", moves.push, DEFAULT64 | KEEP),
        0x6B: Row("imul", "Gv Ev Is", multiply.imul),
        0x6C: Row("insb", "", ports.ins, END),
        0x6D: Row("ins", "", ports.ins, END),
        0x6E: Row("outsb", "", ports.outs, END),
        0x6F: Row("outs", "", ports.outs, END),
        0x84: Row("test", "Eb Gb", alu.test),
        0x85: Row("test", "Ev Gv", alu.test),
        0x86: Row("xchg", "Eb Gb", moves.xchg, LOCK | KEEP),
        0x87: Row("xchg", "Ev Gv", moves.xchg, LOCK | KEEP),
        0x88: Row("mov", "Eb Gb", moves.mov, KEEP),
        0x89: Row("mov", "Ev Gv", moves.mov, KEEP),
        0x8A: Row("mov", "Gb Eb", moves.mov, KEEP),
        0x8B: Row("mov", "Gv Ev", moves.mov, KEEP),
        0x8C: Row("mov", "Rv Sw", descriptors.mov_from_segment, KEEP),
        0x8D: Row("lea", "Gv Mv", moves.lea, KEEP),
        0x8E: Row("mov", "Sw Ew", descriptors.mov_to_segment, END),
        0x8F: _group([Row("pop", "Ev", moves.pop, DEFAULT64 | KEEP)]),
        0x98: Row("cbw", "", moves.extend_accumulator, KEEP),
        0x99: Row("cwd", "", moves.extend_into_rdx, KEEP),
        0x9A: Row("call", "Ip", flow.call_far, NOT64 | END),
        0x9B: Row("fwait", "", sse.fwait, KEEP),
        0x9C: Row("pushf", "", system.pushf, DEFAULT64 | KEEP),
        0x9D: Row("popf", "", system.popf, DEFAULT64 | END),
        0x9E: Row("sahf", "", alu.sahf),
        0x9F: Row("lahf", "", alu.lahf, KEEP),
        0xA0: Row("mov", "Ab Ob", moves.mov, KEEP),
        0xA1: Row("mov", "Av Ov", moves.mov, KEEP),
        0xA2: Row("mov", "Ob Ab", moves.mov, KEEP),
        0xA3: Row("mov", "Ov Av", moves.mov, KEEP),
        0xA8: Row("test", "Ab Ib", alu.test),
        0xA9: Row("test", "Av Iz", alu.test),
    }
    for opcode, name, build in (
        (0xA4, "movs", strings.movs),
        (0xA6, "cmps", strings.cmps),
        (0xAA, "stos", strings.stos),
        (0xAC, "lods", strings.lods),
        (0xAE, "scas", strings.scas),
    ):
        table[opcode] = Row(name + "b", "", build)
        table[opcode + 1] = Row(name, "", build)
    return table | _one_byte_high()


def _one_byte_high() -> dict[int, Entry]:
    """C0..FF."""
    test_b, test_v = Row("test", "Eb Ib", alu.test), Row("test", "Ev Iz", alu.test)
    return {
        0xC2: Row("ret", "Iw", flow.ret, FORCE64 | END),
        0xC3: Row("ret", "", flow.ret, FORCE64 | END),
        0xC4: _moded(_les(ES, "les"), _VEX),
        0xC5: _moded(_les(DS, "lds"), _VEX),
        0xC6: _group([Row("mov", "Eb Ib", moves.mov, KEEP)]),
        0xC7: _group([Row("mov", "Ev Iz", moves.mov, KEEP)]),
        0xC8: Row("enter", "Iw Ib", moves.enter, DEFAULT64 | KEEP),
        0xC9: Row("leave", "", moves.leave, DEFAULT64 | KEEP),
        0xCA: Row("retf", "Iw", flow.ret_far, END),
        0xCB: Row("retf", "", flow.ret_far, END),
        0xCC: Row("int3", "", flow.int3, END),
        0xCD: Row("int", "Ib", flow.int_n, END),
        0xCE: Row("into", "", flow.into, NOT64 | END),
        0xCF: Row("iret", "", flow.iret, END),
        0xD4: Row("aam", "Ib", multiply.aam, NOT64),
        0xD5: Row("aad", "Ib", multiply.aad, NOT64),
        0xD6: Row("salc", "", bits.salc, NOT64 | KEEP),
        0xD7: Row("xlat", "", moves.xlat, KEEP),
        **_x87(),
        0xE0: Row("loopne", "Jb", flow.loop, FORCE64 | END),
        0xE1: Row("loope", "Jb", flow.loop, FORCE64 | END),
        0xE2: Row("loop", "Jb", flow.loop, FORCE64 | END),
        0xE3: Row("jcxz", "Jb", flow.jcxz, FORCE64 | END),
        0xE4: Row("in", "Ab Ib", ports.in_, END),
        0xE5: Row("in", "Az Ib", ports.in_, END),
        0xE6: Row("out", "Ib Ab", ports.out, END),
        0xE7: Row("out", "Ib Az", ports.out, END),
        0xE8: Row("call", "Jz", flow.call, FORCE64 | END),
        0xE9: Row("jmp", "Jz", flow.jmp, FORCE64 | END),
        0xEA: Row("jmp", "Ip", flow.jmp_far, NOT64 | END),
        0xEB: Row("jmp", "Jb", flow.jmp, FORCE64 | END),
        0xEC: Row("in", "Ab DX", ports.in_, END),
        0xED: Row("in", "Az DX", ports.in_, END),
        0xEE: Row("out", "DX Ab", ports.out, END),
        0xEF: Row("out", "DX Az", ports.out, END),
        0xF1: Row("int1", "", flow.int1, END),
        0xF4: Row("hlt", "", system.hlt, END),
        0xF5: Row("cmc", "", alu.cmc),
        0xF6: _group([test_b, test_b, *_group3("Eb")]),
        0xF7: _group([test_v, test_v, *_group3("Ev")]),
        0xF8: Row("clc", "", alu.clc),
        0xF9: Row("stc", "", alu.stc),
        0xFA: Row("cli", "", system.cli, END),
        0xFB: Row("sti", "", system.sti, END),
        0xFC: Row("cld", "", system.cld, KEEP),
        0xFD: Row("std", "", system.std, KEEP),
        0xFE: _group([Row("inc", "Eb", alu.inc, LOCK), Row("dec", "Eb", alu.dec, LOCK)]),
        0xFF: _group(
            [
                Row("inc", "Ev", alu.inc, LOCK),
                Row("dec", "Ev", alu.dec, LOCK),
                Row("call", "Ev", flow.call_indirect, FORCE64 | END),
                Row("call", "Mv", flow.call_far, END),
                Row("jmp", "Ev", flow.jmp_indirect, FORCE64 | END),
                Row("jmp", "Mv", flow.jmp_far, END),
                Row("push", "Ev", moves.push, DEFAULT64 | KEEP),
            ]
        ),
    }


def _group3(operand: str) -> list[Entry | None]:
    return [
        Row("not", operand, alu.not_, LOCK | KEEP),
        Row("neg", operand, alu.neg, LOCK),
        Row("mul", operand, multiply.mul),
        Row("imul", operand, multiply.imul1),
        Row("div", operand, multiply.div),
        Row("idiv", operand, multiply.idiv),
    ]


def _les(number: int, name: str) -> Entry:
    """LES and LDS; with a register operand the byte is a VEX prefix instead."""
    return {"memory": Row(name, "Gv Mv", flow.load_far_pointer(number), END), "register": _VEX}


def _x87() -> dict[int, Entry]:
    """The escape opcodes D8..DF: set-up instructions only."""
    other = _unsupported("x87 instruction", "Ev")
    table: dict[int, Entry] = {0xD8 + low: other for low in range(8)}
    memory = [other] * 8
    memory[5], memory[7] = Row("fldcw", "Ew", sse.fldcw, KEEP), Row("fnstcw", "Ew", sse.fnstcw, KEEP)
    table[0xD9] = {"memory": _group([*memory]), "register": other}
    table[0xDB] = {
        "memory": other,
        "register": _group(
            [
                other,
                other,
                other,
                other,
                {
                    "rm": NOP,
                    **dict.fromkeys(range(8), other),
                    2: Row("fnclex", "", sse.fnclex, KEEP),
                    3: Row("fninit", "", sse.fninit, KEEP),
                },
                other,
                other,
                other,
            ]
        ),
    }
    status = [other] * 8
    status[7] = Row("fnstsw", "Ew", sse.fnstsw, KEEP)
    table[0xDD] = {"memory": _group([*status]), "register": other}
    status_register: Entry = {
        "rm": NOP,
        **dict.fromkeys(range(8), other),
        0: Row("fnstsw", "Aw", sse.fnstsw, KEEP),
    }
    table[0xDF] = {
        "memory": other,
        "register": _group([other, other, other, other, status_register, other, other, other]),
    }
    return table


def _two_byte() -> dict[int, Entry]:
    table: dict[int, Entry] = {}
    for low in range(16):
        table[0x140 + low] = Row("cmovcc", "Gv Ev", moves.cmov, KEEP)
        table[0x180 + low] = Row("jcc", "Jz", flow.jcc, FORCE64 | END)
        table[0x190 + low] = Row("setcc", "Eb", moves.setcc, KEEP)
    for low in range(8):
        table[0x1C8 + low] = Row("bswap", "Zv", moves.bswap, KEEP)
    for low in range(0x18, 0x20):
        table[0x100 + low] = NOP_MODRM
    table |= {
        0x100: _group(
            [
                Row("sldt", "Rv", descriptors.sldt, PROTECTED | KEEP),
                Row("str", "Rv", descriptors.str_, PROTECTED | KEEP),
                Row("lldt", "Ew", descriptors.lldt, PROTECTED | END),
                Row("ltr", "Ew", descriptors.ltr, PROTECTED | END),
                Row("verr", "Ew", descriptors.verr, PROTECTED),
                Row("verw", "Ew", descriptors.verw, PROTECTED),
            ]
        ),
        0x101: _group7(),
        0x102: Row("lar", "Gv Ev", descriptors.lar, PROTECTED),
        0x103: Row("lsl", "Gv Ev", descriptors.lsl, PROTECTED),
        0x105: Row("syscall", "", flow.syscall, END | ONLY64),
        0x106: Row("clts", "", system.clts, END),
        0x107: Row("sysret", "", flow.sysret, END | ONLY64),
        0x108: Row("invd", "", system.wbinvd, END),
        0x109: Row("wbinvd", "", system.wbinvd, END),
        0x10B: Row("ud2", "", moves.undefined),
        0x10D: NOP_MODRM,
        0x120: Row("mov", "En Cn", system.mov_from_control, KEEP),
        0x121: Row("mov", "En Dn", system.mov_from_debug, KEEP),
        0x122: Row("mov", "Cn En", system.mov_to_control, END),
        0x123: Row("mov", "Dn En", system.mov_to_debug, END),
        0x130: Row("wrmsr", "", system.wrmsr, END),
        0x131: Row("rdtsc", "", system.rdtsc, KEEP),
        0x132: Row("rdmsr", "", system.rdmsr, END),
        0x134: Row("sysenter", "", flow.sysenter, END),
        0x135: Row("sysexit", "", flow.sysexit, END),
        0x1A0: Row("push", "", descriptors.push_segment(FS), DEFAULT64 | KEEP),
        0x1A1: Row("pop", "", descriptors.pop_segment(FS), DEFAULT64 | END),
        0x1A2: Row("cpuid", "", system.cpuid, KEEP),
        0x1A3: Row("bt", "Ev Gv", bits.bt),
        0x1A4: Row("shld", "Ev Gv Ib", bits.shld),
        0x1A5: Row("shld", "Ev Gv CL", bits.shld),
        0x1A8: Row("push", "", descriptors.push_segment(GS), DEFAULT64 | KEEP),
        0x1A9: Row("pop", "", descriptors.pop_segment(GS), DEFAULT64 | END),
        0x1AB: Row("bts", "Ev Gv", bits.bts, LOCK),
        0x1AC: Row("shrd", "Ev Gv Ib", bits.shrd),
        0x1AD: Row("shrd", "Ev Gv CL", bits.shrd),
        0x1AE: _group15(),
        0x1AF: Row("imul", "Gv Ev", multiply.imul),
        0x1B0: Row("cmpxchg", "Eb Gb", alu.cmpxchg, LOCK),
        0x1B1: Row("cmpxchg", "Ev Gv", alu.cmpxchg, LOCK),
        0x1B2: Row("lss", "Gv Mv", flow.load_far_pointer(SS), END),
        0x1B3: Row("btr", "Ev Gv", bits.btr, LOCK),
        0x1B4: Row("lfs", "Gv Mv", flow.load_far_pointer(FS), END),
        0x1B5: Row("lgs", "Gv Mv", flow.load_far_pointer(GS), END),
        0x1B6: Row("movzx", "Gv Eb", moves.movzx, KEEP),
        0x1B7: Row("movzx", "Gv Ew", moves.movzx, KEEP),
        0x1B8: _prefixed(pf3=Row("popcnt", "Gv Ev", bits.popcnt)),
        0x1B9: Row("ud1", "Gv Ev", moves.undefined),
        0x1BA: _group(
            [
                None,
                None,
                None,
                None,
                Row("bt", "Ev Ib", bits.bt),
                Row("bts", "Ev Ib", bits.bts, LOCK),
                Row("btr", "Ev Ib", bits.btr, LOCK),
                Row("btc", "Ev Ib", bits.btc, LOCK),
            ]
        ),
        0x1BB: Row("btc", "Ev Gv", bits.btc, LOCK),
        0x1BC: Row("bsf", "Gv Ev", bits.bsf),
        0x1BD: Row("bsr", "Gv Ev", bits.bsr),
        0x1BE: Row("movsx", "Gv Eb", moves.movsx, KEEP),
        0x1BF: Row("movsx", "Gv Ew", moves.movsx, KEEP),
        0x1C0: Row("xadd", "Eb Gb", alu.xadd, LOCK),
        0x1C1: Row("xadd", "Ev Gv", alu.xadd, LOCK),
        0x1C3: _prefixed(np=Row("movnti", "My Gy", moves.mov, KEEP)),
        0x1C7: _group9(),
        0x1FF: Row("ud0", "Gv Ev", moves.undefined),
        0x2F0: _prefixed(
            np=Row("movbe", "Gv Mv", moves.movbe, KEEP),
            p66=Row("movbe", "Gv Mv", moves.movbe, KEEP),
            pf2=_unsupported("crc32", "Gv Eb"),
        ),
        0x2F1: _prefixed(
            np=Row("movbe", "Mv Gv", moves.movbe, KEEP),
            p66=Row("movbe", "Mv Gv", moves.movbe, KEEP),
            pf2=_unsupported("crc32", "Gv Ev"),
        ),
    }
    return table


def _group7() -> Entry:
    """0F 01: descriptor tables, machine status word, and what hides in the register forms."""
    smsw, lmsw = Row("smsw", "Rv", system.smsw, KEEP), Row("lmsw", "Ew", system.lmsw, END)
    memory = [
        Row("sgdt", "Mv", descriptors.sgdt, KEEP),
        Row("sidt", "Mv", descriptors.sidt, KEEP),
        Row("lgdt", "Mv", descriptors.lgdt, END),
        Row("lidt", "Mv", descriptors.lidt, END),
        smsw,
        None,
        lmsw,
        Row("invlpg", "Mb", system.invlpg, END),
    ]
    seven: Entry = {
        "rm": NOP,
        0: Row("swapgs", "", system.swapgs, END | ONLY64),
        1: Row("rdtscp", "", system.rdtscp, KEEP),
    }
    return {"memory": _group([*memory]), "register": {4: smsw, 6: lmsw, 7: seven}}


def _group9() -> Entry:
    """0F C7: CMPXCHG8B, CMPXCHG16B, RDPID."""
    return {
        "memory": {1: Row("cmpxchg8b", "Mv", moves.cmpxchg_wide, LOCK)},
        "register": {7: _prefixed(pf3=Row("rdpid", "", system.rdpid, KEEP))},
    }


def _group15() -> Entry:
    """0F AE: FXSAVE and the like, fences, FS and GS bases."""
    memory: Entry = {
        0: _prefixed(np=Row("fxsave", "Mv", sse.fxsave, KEEP)),
        1: _prefixed(np=Row("fxrstor", "Mv", sse.fxrstor, KEEP)),
        2: _prefixed(np=Row("ldmxcsr", "Md", sse.ldmxcsr, KEEP)),
        3: _prefixed(np=Row("stmxcsr", "Md", sse.stmxcsr, KEEP)),
        7: _prefixed(np=Row("clflush", "Mb", moves.clflush, KEEP)),
    }
    register: dict[str | int, Entry] = {}
    for field in range(4):
        register[field] = _prefixed(pf3=Row("fsgsbase", "Ey", system.segment_base, END | ONLY64))
    for field, name in ((5, "lfence"), (6, "mfence"), (7, "sfence")):
        register[field] = _prefixed(np=Row(name, "", moves.nop, KEEP))
    return {"memory": memory, "register": register}


def _simd() -> dict[int, Entry]:
    """SSE and SSE2 moves, logic and a few integer operations; MMX is not implemented."""
    aligned_load, aligned_store = (
        Row("movaps", "Vx Wx", sse.move_aligned, KEEP),
        Row("movaps", "Wx Vx", sse.move_aligned, KEEP),
    )
    load, store = Row("movups", "Vx Wx", sse.move, KEEP), Row("movups", "Wx Vx", sse.move, KEEP)
    table: dict[int, Entry] = {
        0x110: _prefixed(
            np=load,
            p66=load,
            pf3=Row("movss", "Vd Wd", sse.move_scalar, KEEP),
            pf2=Row("movsd", "Vq Wq", sse.move_scalar, KEEP),
        ),
        0x111: _prefixed(
            np=store,
            p66=store,
            pf3=Row("movss", "Wd Vd", sse.move_scalar, KEEP),
            pf2=Row("movsd", "Wq Vq", sse.move_scalar, KEEP),
        ),
        0x112: _half("Vq Wq", high=False),
        0x113: _half("Mq Vq", high=False),
        0x116: _half("Vq Wq", high=True),
        0x117: _half("Mq Vq", high=True),
        0x128: _prefixed(np=aligned_load, p66=aligned_load),
        0x129: _prefixed(np=aligned_store, p66=aligned_store),
        0x12B: _prefixed(
            np=Row("movntps", "Mx Vx", sse.move_aligned, KEEP),
            p66=Row("movntpd", "Mx Vx", sse.move_aligned, KEEP),
        ),
        0x16E: _prefixed(p66=Row("movd", "Vy Ey", sse.move, KEEP)),
        0x17E: _prefixed(p66=Row("movd", "Ey Vy", sse.move, KEEP), pf3=Row("movq", "Vq Wq", sse.move, KEEP)),
        0x16F: _prefixed(p66=aligned_load, pf3=load),
        0x17F: _prefixed(p66=aligned_store, pf3=store),
        0x170: _prefixed(p66=Row("pshufd", "Vx Wx Ib", sse.pshufd, KEEP)),
        0x1D6: _prefixed(p66=Row("movq", "Wq Vq", sse.move, KEEP)),
        0x1D7: _prefixed(p66={"register": Row("pmovmskb", "Gd Wx", sse.pmovmskb, KEEP)}),
        0x1E7: _prefixed(p66=Row("movntdq", "Mx Vx", sse.move_aligned, KEEP)),
        0x1F0: _prefixed(pf2=Row("lddqu", "Vx Mx", sse.move, KEEP)),
    }
    for opcode, name, build in (
        (0x154, "and", sse.and_),
        (0x155, "andn", sse.and_not),
        (0x156, "or", sse.or_),
        (0x157, "xor", sse.xor),
    ):
        row = Row(name + "ps", "Vx Wx", build, KEEP)
        table[opcode] = _prefixed(np=row, p66=row)
    integer: list[tuple[int, str, Build]] = [
        (0x1DB, "pand", sse.and_),
        (0x1DF, "pandn", sse.and_not),
        (0x1EB, "por", sse.or_),
        (0x1EF, "pxor", sse.xor),
        (0x1FC, "paddb", sse.padd(8)),
        (0x1FD, "paddw", sse.padd(16)),
        (0x1FE, "paddd", sse.padd(32)),
        (0x1D4, "paddq", sse.padd(64)),
        (0x1F8, "psubb", sse.psub(8)),
        (0x1F9, "psubw", sse.psub(16)),
        (0x1FA, "psubd", sse.psub(32)),
        (0x1FB, "psubq", sse.psub(64)),
        (0x174, "pcmpeqb", sse.pcmpeq(8)),
        (0x175, "pcmpeqw", sse.pcmpeq(16)),
        (0x176, "pcmpeqd", sse.pcmpeq(32)),
    ]
    for index, (name, width) in enumerate((("bw", 8), ("wd", 16), ("dq", 32))):
        integer.append((0x160 + index, "punpckl" + name, sse.unpack(width, high=False)))
        integer.append((0x168 + index, "punpckh" + name, sse.unpack(width, high=True)))
    integer.append((0x16C, "punpcklqdq", sse.unpack(64, high=False)))
    integer.append((0x16D, "punpckhqdq", sse.unpack(64, high=True)))
    for opcode, name, build in integer:
        table[opcode] = _prefixed(p66=Row(name, "Vx Wx", build, KEEP))
    return table


def _half(operands: str, *, high: bool) -> Entry:
    """MOVLPS and MOVHPS; the PD forms take memory only."""
    build, name = sse.move_half(high), "movhps" if high else "movlps"
    return _prefixed(
        np=Row(name, operands, build, KEEP), p66=Row(name, operands.replace("W", "M"), build, KEEP)
    )


def _complete(table: dict[int, Entry]) -> dict[int, Entry]:
    """Name what real processors have and this one lacks, so that it is not mistaken for #UD."""
    simd = _unsupported("SIMD instruction", modrm=True)
    extension = _unsupported("instruction of an extension", modrm=True)
    for opcode in (
        *range(0x110, 0x118),
        *range(0x128, 0x130),
        *range(0x150, 0x180),
        *range(0x1C2, 0x1C7),
        *range(0x1D0, 0x1FF),
    ):
        entry = table.setdefault(opcode, _prefixed())
        if isinstance(entry, dict) and "prefix" in entry:
            for prefix in (0, 0x66, 0xF2, 0xF3):
                entry.setdefault(prefix, simd)
    for opcode in (*range(0x200, 0x400), 0x137, 0x133, 0x177):
        table.setdefault(opcode, extension)
    return table


TABLE: dict[int, Entry] = _complete({**_arithmetic(), **_shifts(), **_one_byte(), **_two_byte(), **_simd()})
"""All opcodes."""
