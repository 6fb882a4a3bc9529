"""Registers: the processor state that every run needs, as frozen values, and its named bits.

The rarer state (FPU, debug registers, pending events) is in `pykvm.state`.
Sources: Intel SDM volume 3, chapters 2 (control registers), 3 (segmentation); Linux
``struct kvm_regs`` and ``struct kvm_sregs``, whose field names these are.
"""

from __future__ import annotations

from pykvm.values import Value

# RFLAGS (SDM volume 1, 3.4.3)
RFLAGS_CF = 1 << 0
RFLAGS_FIXED = 1 << 1  # reads as one, always
RFLAGS_PF = 1 << 2
RFLAGS_AF = 1 << 4
RFLAGS_ZF = 1 << 6
RFLAGS_SF = 1 << 7
RFLAGS_TF = 1 << 8
RFLAGS_IF = 1 << 9
RFLAGS_DF = 1 << 10
RFLAGS_OF = 1 << 11
RFLAGS_IOPL = 3 << 12
RFLAGS_NT = 1 << 14
RFLAGS_RF = 1 << 16
RFLAGS_VM = 1 << 17
RFLAGS_AC = 1 << 18
RFLAGS_VIF = 1 << 19
RFLAGS_VIP = 1 << 20
RFLAGS_ID = 1 << 21

# CR0 (SDM volume 3, 2.5)
CR0_PE = 1 << 0
CR0_MP = 1 << 1
CR0_EM = 1 << 2
CR0_TS = 1 << 3
CR0_ET = 1 << 4
CR0_NE = 1 << 5
CR0_WP = 1 << 16
CR0_AM = 1 << 18
CR0_NW = 1 << 29
CR0_CD = 1 << 30
CR0_PG = 1 << 31

# CR4
CR4_VME = 1 << 0
CR4_PVI = 1 << 1
CR4_TSD = 1 << 2
CR4_DE = 1 << 3
CR4_PSE = 1 << 4
CR4_PAE = 1 << 5
CR4_MCE = 1 << 6
CR4_PGE = 1 << 7
CR4_PCE = 1 << 8
CR4_OSFXSR = 1 << 9
CR4_OSXMMEXCPT = 1 << 10
CR4_UMIP = 1 << 11
CR4_LA57 = 1 << 12
CR4_FSGSBASE = 1 << 16
CR4_PCIDE = 1 << 17
CR4_OSXSAVE = 1 << 18
CR4_SMEP = 1 << 20
CR4_SMAP = 1 << 21

# EFER (SDM volume 3, 2.2.1)
EFER_SCE = 1 << 0
EFER_LME = 1 << 8
EFER_LMA = 1 << 10
EFER_NXE = 1 << 11

# Page-table entries (SDM volume 3, 4.5)
PTE_P = 1 << 0
PTE_RW = 1 << 1
PTE_US = 1 << 2
PTE_PWT = 1 << 3
PTE_PCD = 1 << 4
PTE_A = 1 << 5
PTE_D = 1 << 6
PTE_PS = 1 << 7
PTE_G = 1 << 8
PTE_NX = 1 << 63


class Registers(Value):
    """The general-purpose registers, RIP and RFLAGS (``struct kvm_regs``); 64-bit unsigned each."""

    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    rsp: int = 0
    rbp: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0
    rflags: int = RFLAGS_FIXED


class Segment(Value):
    """A segment register with its hidden part (``struct kvm_segment``).

    `limit` is in bytes, already scaled by the granularity; `type` is the 4-bit descriptor type;
    `s` is 1 for code and data, 0 for system segments; `db`, `l`, `g`, `avl` are descriptor bits.
    """

    base: int = 0
    limit: int = 0xFFFF
    selector: int = 0
    type: int = 0x3
    present: int = 1
    dpl: int = 0
    db: int = 0
    s: int = 1
    l: int = 0  # noqa: E741 - the SDM's name
    g: int = 0
    avl: int = 0
    unusable: int = 0


class DescriptorTable(Value):
    """GDTR or IDTR: linear base address and limit in bytes (size minus one)."""

    base: int = 0
    limit: int = 0xFFFF


class SystemRegisters(Value):
    """Segments, tables and control registers (``struct kvm_sregs``).

    The defaults are the state after RESET (SDM volume 3, table 10-1): the first instruction
    is fetched at 0xffff_fff0. `interrupt_bitmap` holds 4 x 64 bits, at most one of them set.
    """

    cs: Segment = Segment(base=0xFFFF_0000, selector=0xF000, type=0xB)
    ds: Segment = Segment()
    es: Segment = Segment()
    fs: Segment = Segment()
    gs: Segment = Segment()
    ss: Segment = Segment()
    tr: Segment = Segment(type=0xB, s=0)
    ldt: Segment = Segment(type=0x2, s=0)
    gdt: DescriptorTable = DescriptorTable()
    idt: DescriptorTable = DescriptorTable()
    cr0: int = CR0_ET | CR0_NW | CR0_CD
    cr2: int = 0
    cr3: int = 0
    cr4: int = 0
    cr8: int = 0
    efer: int = 0
    apic_base: int = 0xFEE0_0900
    interrupt_bitmap: tuple[int, int, int, int] = (0, 0, 0, 0)


RESET_REGISTERS = Registers(rip=0xFFF0, rdx=0x600)
"""General registers after RESET; EDX holds the processor signature."""
