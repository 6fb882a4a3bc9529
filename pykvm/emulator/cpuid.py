"""What CPUID says about the emulated processor: plain x86-64, only what is implemented.

SDM volume 2, CPUID; leaf 0x4000_0000 is the hypervisors' convention (Linux cpuid.rst).
"""

from __future__ import annotations

from pykvm.emulator.paging import PHYSICAL_BITS

VENDOR = b"PykvmEmulate"
HYPERVISOR = b"pykvmpykvm  "
BRAND = b"pykvm emulated x86-64 processor"

SIGNATURE = 0x600
"""Family 6, model 0, stepping 0; EDX after RESET."""

# Leaf 1, EDX
FPU, PSE, TSC, MSR, PAE, CX8, SEP, PGE, CMOV = (1 << bit for bit in (0, 3, 4, 5, 6, 8, 11, 13, 15))
PAT, PSE36, FXSR, SSE, SSE2 = (1 << bit for bit in (16, 17, 24, 25, 26))
# Leaf 1, ECX
CX16, MOVBE, POPCNT, HYPERVISOR_PRESENT = 1 << 13, 1 << 22, 1 << 23, 1 << 31
# Leaf 7, EBX and ECX
FSGSBASE, SMEP = 1 << 0, 1 << 7
UMIP, LA57, RDPID = 1 << 2, 1 << 16, 1 << 22
# Leaf 0x8000_0001, EDX and ECX
SYSCALL, NX, PAGE1GB, RDTSCP, LM = 1 << 11, 1 << 20, 1 << 26, 1 << 27, 1 << 29
LAHF64 = 1 << 0

FEATURES_EDX = FPU | PSE | TSC | MSR | PAE | CX8 | SEP | PGE | CMOV | PAT | PSE36 | FXSR | SSE | SSE2
FEATURES_ECX = CX16 | MOVBE | POPCNT | HYPERVISOR_PRESENT

Leaf = tuple[int, int, int, int]


def _words(text: bytes) -> tuple[int, ...]:
    return tuple(int.from_bytes(text[at : at + 4], "little") for at in range(0, len(text), 4))


def _vendor_leaf(highest: int, text: bytes) -> Leaf:
    first, second, third = _words(text)
    return highest, first, third, second


def _brand_leaf(part: int) -> Leaf:
    a, b, c, d = _words(BRAND.ljust(48, b"\0")[16 * part : 16 * part + 16])
    return a, b, c, d


def cpuid(leaf: int, subleaf: int) -> Leaf:
    """(EAX, EBX, ECX, EDX). Leaves beyond the highest are those of the highest, as on Intel."""
    if leaf == 0x4000_0000:
        a, b, c = _words(HYPERVISOR)
        return 0x4000_0000, a, b, c
    if leaf >= 0x8000_0000:
        return EXTENDED.get(leaf, (0, 0, 0, 0))
    if leaf in BASIC and (leaf != 7 or subleaf == 0):
        return BASIC[leaf]
    return (0, 0, 0, 0)


BASIC: dict[int, Leaf] = {
    0: _vendor_leaf(7, VENDOR),
    1: (SIGNATURE, 1 << 16 | 8 << 8, FEATURES_ECX, FEATURES_EDX),
    7: (0, FSGSBASE | SMEP, UMIP | LA57 | RDPID, 0),
}
EXTENDED: dict[int, Leaf] = {
    0x8000_0000: (0x8000_0008, 0, 0, 0),
    0x8000_0001: (0, 0, LAHF64, SYSCALL | NX | PAGE1GB | RDTSCP | LM),
    0x8000_0002: _brand_leaf(0),
    0x8000_0003: _brand_leaf(1),
    0x8000_0004: _brand_leaf(2),
    0x8000_0008: (57 << 8 | PHYSICAL_BITS, 0, 0, 0),
}
