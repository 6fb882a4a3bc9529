"""System instructions: flags, HLT, control and debug registers, MSRs, CPUID, time (SDM volume 2)."""

from __future__ import annotations

from pykvm.emulator import msr
from pykvm.emulator.cpuid import cpuid as query_cpuid
from pykvm.emulator.decode import GS, Instruction
from pykvm.emulator.faults import GP, UD, Fault
from pykvm.emulator.flags import MASK
from pykvm.emulator.transfer import writable_flags
from pykvm.emulator.translate import M32, RAX, RBX, RCX, RDX, privileged, then
from pykvm.errors import UnsupportedInstruction
from pykvm.registers import (
    CR0_TS,
    CR4_DE,
    CR4_FSGSBASE,
    CR4_TSD,
    RFLAGS_DF,
    RFLAGS_IF,
    RFLAGS_IOPL,
    RFLAGS_RF,
    RFLAGS_VM,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.emulator.cpu import Cpu
    from pykvm.emulator.translate import Op, Put, Translator

CR0_LOW = 0xF  # what LMSW can change
DR6_FIXED = 0xFFFF_0FF0
DR7_FIXED = 0x400
DR7_ENABLES = 0xFF


# Flags


def pushf(t: Translator, i: Instruction) -> Op:
    """PUSHF: RF and VM are pushed as 0."""
    cpu, push, mask = t.cpu, t.push(i.size), MASK[i.size] & ~(RFLAGS_RF | RFLAGS_VM)

    def op() -> None:
        push(cpu.flags() & mask)

    return op


def popf(t: Translator, i: Instruction) -> Op:
    """POPF: IF and IOPL change only as far as privilege allows; RF is cleared."""
    cpu, pop, size = t.cpu, t.pop(i.size), i.size

    def action() -> None:
        value = pop()
        cpu.set_flags(value & ~RFLAGS_RF, writable_flags(cpu, size) | (RFLAGS_RF if size > 2 else 0))
        cpu.recheck()

    return then(t, i, action)


def _require_io_privilege(cpu: Cpu) -> None:
    if cpu.is_protected and cpu.cpl > (cpu.eflags & RFLAGS_IOPL) >> 12:
        raise Fault(GP, 0)


def cli(t: Translator, i: Instruction) -> Op:
    """CLI."""
    cpu = t.cpu

    def action() -> None:
        _require_io_privilege(cpu)
        cpu.eflags &= ~RFLAGS_IF

    return then(t, i, action)


def sti(t: Translator, i: Instruction) -> Op:
    """STI: interrupts come after the next instruction."""
    cpu = t.cpu

    def action() -> None:
        _require_io_privilege(cpu)
        if not cpu.eflags & RFLAGS_IF:
            cpu.eflags |= RFLAGS_IF
            cpu.block_interrupts()

    return then(t, i, action)


def cld(t: Translator, i: Instruction) -> Op:
    """CLD."""
    cpu = t.cpu

    def op() -> None:
        cpu.eflags &= ~RFLAGS_DF

    return op


def std(t: Translator, i: Instruction) -> Op:
    """STD."""
    cpu = t.cpu

    def op() -> None:
        cpu.eflags |= RFLAGS_DF

    return op


def hlt(t: Translator, i: Instruction) -> Op:
    """HLT: the run loop sees to the waiting."""
    cpu = t.cpu

    def action() -> None:
        cpu.halted = True
        cpu.recheck()

    return privileged(t, i, action)


# Control and debug registers


def mov_from_control(t: Translator, i: Instruction) -> Op:
    """MOV r, CRn."""
    cpu, number = t.cpu, i.operands[1].number
    put = t.put(i, i.operands[0])
    name = {0: "cr0", 2: "cr2", 3: "cr3", 4: "cr4", 8: "cr8"}.get(number)
    if name is None:
        raise Fault(UD)

    def op() -> None:
        cpu.require_cpl0()
        put(getattr(cpu, name))

    return op


def mov_to_control(t: Translator, i: Instruction) -> Op:
    """MOV CRn, r."""
    cpu, number = t.cpu, i.operands[0].number
    get = t.get(i, i.operands[1])

    def set_cr2(value: int) -> None:
        cpu.cr2 = value

    def set_cr8(value: int) -> None:
        if value >> 4:
            raise Fault(GP, 0)
        cpu.cr8 = value

    setter: Put | None = {0: cpu.set_cr0, 2: set_cr2, 3: cpu.set_cr3, 4: cpu.set_cr4, 8: set_cr8}.get(number)
    if setter is None:
        raise Fault(UD)
    put = setter
    return privileged(t, i, lambda: put(get()))


def _debug_number(cpu: Cpu, number: int) -> int:
    """DR4 and DR5 are DR6 and DR7 unless CR4.DE is set."""
    if number in (4, 5):
        if cpu.cr4 & CR4_DE:
            raise Fault(UD)
        return number + 2
    return number


def mov_from_debug(t: Translator, i: Instruction) -> Op:
    """MOV r, DRn."""
    cpu, number = t.cpu, i.operands[1].number
    put = t.put(i, i.operands[0])
    if number > 7:
        raise Fault(UD)

    def op() -> None:
        cpu.require_cpl0()
        which = _debug_number(cpu, number)
        put(cpu.debug[which] if which < 4 else (cpu.dr6 if which == 6 else cpu.dr7))

    return op


def mov_to_debug(t: Translator, i: Instruction) -> Op:
    """MOV DRn, r. Enabling a breakpoint is not implemented; the registers otherwise work."""
    cpu, number = t.cpu, i.operands[0].number
    get = t.get(i, i.operands[1])
    if number > 7:
        raise Fault(UD)

    def action() -> None:
        which, value = _debug_number(cpu, number), get()
        if which < 4:
            cpu.debug[which] = value
        elif value >> 32:
            raise Fault(GP, 0)
        elif which == 6:
            cpu.dr6 = value & 0xE00F | DR6_FIXED
        elif value & DR7_ENABLES:
            raise UnsupportedInstruction(cpu.linear_ip(), i.code, "mov to dr7 that enables a breakpoint")
        else:
            cpu.dr7 = value | DR7_FIXED

    return privileged(t, i, action)


def smsw(t: Translator, i: Instruction) -> Op:
    """SMSW: the lower part of CR0."""
    cpu, dst = t.cpu, i.operands[0]
    put, mask = t.put(i, dst), MASK[dst.size]

    def op() -> None:
        cpu.forbid_user()
        put(cpu.cr0 & mask)

    return op


def lmsw(t: Translator, i: Instruction) -> Op:
    """LMSW: the four lowest bits of CR0; PE can be set but not cleared."""
    cpu, get = t.cpu, t.get(i, i.operands[0])

    def action() -> None:
        value = get() & CR0_LOW | cpu.cr0 & 1
        cpu.set_cr0(cpu.cr0 & ~CR0_LOW | value)

    return privileged(t, i, action)


def clts(t: Translator, i: Instruction) -> Op:
    """CLTS: clear CR0.TS."""
    cpu = t.cpu

    def action() -> None:
        cpu.cr0 &= ~CR0_TS

    return privileged(t, i, action)


def invlpg(t: Translator, i: Instruction) -> Op:
    """INVLPG: all translations go, which is more than needed and allowed."""
    return privileged(t, i, t.cpu.mmu.flush)


def wbinvd(t: Translator, i: Instruction) -> Op:
    """WBINVD, INVD: there is no cache."""
    return privileged(t, i, lambda: None)


# MSRs, CPUID, time


def _put_pair(r: list[int], value: int) -> None:
    r[RAX], r[RDX] = value & M32, value >> 32 & M32


def rdmsr(t: Translator, i: Instruction) -> Op:
    """RDMSR."""
    cpu, r = t.cpu, t.r
    return privileged(t, i, lambda: _put_pair(r, msr.read(cpu, r[RCX] & M32)))


def wrmsr(t: Translator, i: Instruction) -> Op:
    """WRMSR."""
    cpu, r = t.cpu, t.r
    return privileged(t, i, lambda: msr.write(cpu, r[RCX] & M32, r[RAX] & M32 | (r[RDX] & M32) << 32))


def rdtsc(t: Translator, i: Instruction) -> Op:
    """RDTSC: at privilege 0 only if CR4.TSD is set."""
    cpu, r = t.cpu, t.r

    def op() -> None:
        if cpu.cr4 & CR4_TSD:
            cpu.require_cpl0()
        _put_pair(r, msr.read_tsc(cpu))

    return op


def rdtscp(t: Translator, i: Instruction) -> Op:
    """RDTSCP: RDTSC, and TSC_AUX in ECX."""
    cpu, r = t.cpu, t.r
    read = rdtsc(t, i)

    def op() -> None:
        read()
        r[RCX] = cpu.msrs.tsc_aux & M32

    return op


def rdpid(t: Translator, i: Instruction) -> Op:
    """RDPID: TSC_AUX."""
    cpu, put = t.cpu, t.put_register(i.modrm & 7 | (i.rex & 1) << 3, 8)

    def op() -> None:
        put(cpu.msrs.tsc_aux & M32)

    return op


def cpuid(t: Translator, i: Instruction) -> Op:
    """CPUID."""
    r = t.r

    def op() -> None:
        r[RAX], r[RBX], r[RCX], r[RDX] = query_cpuid(r[RAX] & M32, r[RCX] & M32)

    return op


def swapgs(t: Translator, i: Instruction) -> Op:
    """SWAPGS: exchange the base of GS with KERNEL_GS_BASE."""
    cpu = t.cpu

    def action() -> None:
        base = cpu.segments[GS].base
        msr.set_segment_base(cpu, GS, cpu.msrs.kernel_gs_base)
        cpu.msrs.kernel_gs_base = base

    return privileged(t, i, action)


def segment_base(t: Translator, i: Instruction) -> Op:
    """RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE."""
    cpu, operand, field = t.cpu, i.operands[0], i.reg
    number, mask = 4 + (field & 1), MASK[operand.size]
    get, put = t.get(i, operand), t.put(i, operand)

    def action() -> None:
        if not cpu.cr4 & CR4_FSGSBASE:
            raise Fault(UD)
        if field < 2:
            put(cpu.segments[number].base & mask)
        else:
            msr.set_segment_base(cpu, number, get())

    return then(t, i, action)
