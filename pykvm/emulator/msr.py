"""Model-specific registers (SDM volume 4; APM volume 2, appendix A)."""

from __future__ import annotations

from pykvm.emulator.decode import FS, GS
from pykvm.emulator.faults import GP, Fault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.emulator.cpu import Cpu

IA32_TSC = 0x10
IA32_APIC_BASE = 0x1B
IA32_MTRRCAP = 0xFE
IA32_SYSENTER_CS = 0x174
IA32_SYSENTER_ESP = 0x175
IA32_SYSENTER_EIP = 0x176
IA32_MCG_CAP = 0x179
IA32_MISC_ENABLE = 0x1A0
IA32_PAT = 0x277
IA32_MTRR_DEF_TYPE = 0x2FF
IA32_EFER = 0xC000_0080
IA32_STAR = 0xC000_0081
IA32_LSTAR = 0xC000_0082
IA32_CSTAR = 0xC000_0083
IA32_FMASK = 0xC000_0084
IA32_FS_BASE = 0xC000_0100
IA32_GS_BASE = 0xC000_0101
IA32_KERNEL_GS_BASE = 0xC000_0102
IA32_TSC_AUX = 0xC000_0103

ADDRESSES = {
    IA32_SYSENTER_ESP: "sysenter_esp",
    IA32_SYSENTER_EIP: "sysenter_eip",
    IA32_LSTAR: "lstar",
    IA32_CSTAR: "cstar",
    IA32_KERNEL_GS_BASE: "kernel_gs_base",
}
"""MSRs that hold a linear address, which must be canonical."""

VALUES = {
    IA32_APIC_BASE: "apic_base",
    IA32_SYSENTER_CS: "sysenter_cs",
    IA32_MISC_ENABLE: "misc_enable",
    IA32_PAT: "pat",
    IA32_MTRR_DEF_TYPE: "mtrr_def_type",
    IA32_STAR: "star",
    IA32_FMASK: "fmask",
    IA32_TSC_AUX: "tsc_aux",
}
"""MSRs that just hold a value."""

CONSTANTS = {IA32_MTRRCAP: 0, IA32_MCG_CAP: 0}
"""Capability MSRs: no variable or fixed MTRRs, no machine-check banks."""


class Msrs:
    """The values of those MSRs that are kept nowhere else."""

    __slots__ = (
        "apic_base",
        "cstar",
        "fmask",
        "kernel_gs_base",
        "lstar",
        "misc_enable",
        "mtrr_def_type",
        "pat",
        "star",
        "sysenter_cs",
        "sysenter_eip",
        "sysenter_esp",
        "tsc_aux",
        "tsc_offset",
    )

    def __init__(self) -> None:
        self.apic_base = 0xFEE0_0900
        self.star = self.lstar = self.cstar = self.fmask = self.kernel_gs_base = 0
        self.sysenter_cs = self.sysenter_esp = self.sysenter_eip = 0
        self.misc_enable = 1
        self.pat = 0x0007_0406_0007_0406
        self.mtrr_def_type = 0
        self.tsc_aux = 0
        self.tsc_offset = 0  # added to the clock's ticks


def read(cpu: Cpu, index: int) -> int:
    """RDMSR. Raises #GP(0) for MSRs that are not there."""
    name = VALUES.get(index) or ADDRESSES.get(index)
    if name is not None:
        value: int = getattr(cpu.msrs, name)
        return value
    if index in CONSTANTS:
        return CONSTANTS[index]
    if index == IA32_TSC:
        return read_tsc(cpu)
    if index == IA32_EFER:
        return cpu.efer
    if index == IA32_FS_BASE:
        return cpu.segments[FS].base
    if index == IA32_GS_BASE:
        return cpu.segments[GS].base
    raise Fault(GP, 0)


def write(cpu: Cpu, index: int, value: int) -> None:
    """WRMSR. Raises #GP(0) for MSRs that are not there or values that do not fit."""
    if index in ADDRESSES:
        _require_canonical(value)
        setattr(cpu.msrs, ADDRESSES[index], value)
    elif index in VALUES:
        setattr(cpu.msrs, VALUES[index], value)
    elif index == IA32_TSC:
        cpu.msrs.tsc_offset = (value - cpu.clock.ticks()) & 0xFFFF_FFFF_FFFF_FFFF
    elif index == IA32_EFER:
        cpu.set_efer(value)
    elif index in (IA32_FS_BASE, IA32_GS_BASE):
        set_segment_base(cpu, FS if index == IA32_FS_BASE else GS, value)
    else:
        raise Fault(GP, 0)


def set_segment_base(cpu: Cpu, number: int, value: int) -> None:
    """Set the base of FS or GS alone (WRFSBASE, WRGSBASE, SWAPGS). Raises #GP(0)."""
    _require_canonical(value)
    cpu.segments[number].base = cpu.segment_base[number] = value
    cpu.update_environment()


def read_tsc(cpu: Cpu) -> int:
    """The time-stamp counter: one cycle an instruction."""
    return (cpu.clock.ticks() + cpu.msrs.tsc_offset) & 0xFFFF_FFFF_FFFF_FFFF


def _require_canonical(value: int) -> None:
    if value >> 47 not in (0, 0x1FFFF):
        raise Fault(GP, 0)
