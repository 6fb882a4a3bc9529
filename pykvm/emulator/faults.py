"""Exceptions of the emulated processor, as Python exceptions (SDM volume 3, chapter 6)."""

from __future__ import annotations

# Vectors (SDM volume 3, table 6-1)
DE = 0
DB = 1
NMI = 2
BP = 3
OF = 4
BR = 5
UD = 6
NM = 7
DF = 8
TS = 10
NP = 11
SS = 12
GP = 13
PF = 14
MF = 16
AC = 17
XM = 19

NAMES = {
    DE: "#DE",
    DB: "#DB",
    NMI: "NMI",
    BP: "#BP",
    OF: "#OF",
    BR: "#BR",
    UD: "#UD",
    NM: "#NM",
    DF: "#DF",
    TS: "#TS",
    NP: "#NP",
    SS: "#SS",
    GP: "#GP",
    PF: "#PF",
    MF: "#MF",
    AC: "#AC",
    XM: "#XM",
}

# Two of these in a row make a double fault (SDM volume 3, table 6-5)
CONTRIBUTORY = frozenset((DE, TS, NP, SS, GP))

# Error code of a page fault (SDM volume 3, 4.7)
PF_PRESENT = 1 << 0
PF_WRITE = 1 << 1
PF_USER = 1 << 2
PF_RESERVED = 1 << 3
PF_FETCH = 1 << 4

# Error code of a descriptor fault (SDM volume 3, 6.13)
EXTERNAL = 1 << 0
IN_IDT = 1 << 1
SELECTOR = 0xFFFC


class Fault(Exception):
    """A fault of the current instruction: it has had no effect and RIP still points at it.

    `code` is the error code, None for vectors that push none; `cr2` the linear address of a
    page fault.
    """

    def __init__(self, vector: int, code: int | None = None, cr2: int = 0) -> None:
        super().__init__(vector, code)
        self.vector = vector
        self.code = code
        self.cr2 = cr2

    def __str__(self) -> str:
        name = NAMES.get(self.vector, f"vector {self.vector}")
        return name if self.code is None else f"{name}({self.code:#x})"


class NonCanonical(Fault):
    """A 64-bit address whose upper bits are not all equal: #GP(0), and #SS(0) for the stack's addresses."""

    def __init__(self, address: int) -> None:
        super().__init__(GP, 0)
        self.address = address


class TripleFault(Exception):
    """A fault while a double fault was being delivered: the processor shuts down."""
