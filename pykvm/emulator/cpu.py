"""The state of one emulated x86-64 processor, and the rules for changing it.

Execution is elsewhere: `blocks` holds translated code, `execution` runs it. Here are the
registers, and everything that must follow when one changes: flat segments, address sizes,
the environment that code is translated for, the paging unit's mode.
"""

from __future__ import annotations

from operator import length_hint

from pykvm.emulator.blocks import Block, CodeCache, Context
from pykvm.emulator.decode import CS, ES, SS
from pykvm.emulator.faults import GP, Fault
from pykvm.emulator.flags import ARITHMETIC, EAGER, arithmetic, tests
from pykvm.emulator.msr import Msrs
from pykvm.emulator.paging import Mmu
from pykvm.emulator.segments import SegmentCache, check_access, is_flat, limits
from pykvm.emulator.translate import M16, M32, M64, RIP
from pykvm.errors import UnsupportedInstruction
from pykvm.registers import (
    CR0_CD,
    CR0_ET,
    CR0_NW,
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_DE,
    CR4_FSGSBASE,
    CR4_LA57,
    CR4_MCE,
    CR4_OSFXSR,
    CR4_OSXMMEXCPT,
    CR4_PAE,
    CR4_PCE,
    CR4_PGE,
    CR4_PSE,
    CR4_SMEP,
    CR4_TSD,
    CR4_UMIP,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    EFER_SCE,
    RFLAGS_AC,
    RFLAGS_DF,
    RFLAGS_FIXED,
    RFLAGS_ID,
    RFLAGS_IF,
    RFLAGS_IOPL,
    RFLAGS_NT,
    RFLAGS_RF,
    RFLAGS_TF,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from pykvm.emulator.accesses import Accesses
    from pykvm.emulator.physical import PhysicalMemory
    from pykvm.emulator.ports import PortSpace
    from pykvm.emulator.translate import Op

SYSTEM_FLAGS = RFLAGS_TF | RFLAGS_IF | RFLAGS_DF | RFLAGS_IOPL | RFLAGS_NT | RFLAGS_RF | RFLAGS_AC | RFLAGS_ID
CR4_SUPPORTED = (
    CR4_TSD
    | CR4_DE
    | CR4_PSE
    | CR4_PAE
    | CR4_MCE
    | CR4_PGE
    | CR4_PCE
    | CR4_OSFXSR
    | CR4_OSXMMEXCPT
    | CR4_UMIP
    | CR4_LA57
    | CR4_FSGSBASE
    | CR4_SMEP
)
EFER_SUPPORTED = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE

NANOSECONDS = 100
"""Virtual time that one instruction takes: a processor of 10 MHz that executes one each cycle."""


class Clock:
    """Virtual time: instructions executed, plus what HLT skipped.

    `count` is exact between blocks. Within one, `block` and `position` (the iterator over its
    operations) tell how far it got. The run loop stops for attention once `count` would pass
    `limit`; setting `limit` to 0 asks for attention now.
    """

    __slots__ = ("block", "count", "limit", "position", "skipped")

    def __init__(self) -> None:
        self.count = 0
        self.limit = 0
        self.skipped = 0
        self.block: Block | None = None
        self.position: Iterator[Op] = iter(())

    def done(self) -> int:
        """How many instructions of the current block are complete."""
        block = self.block
        return 0 if block is None else len(block.ops) - length_hint(self.position) - 1

    def ticks(self) -> int:
        """Processor cycles since the machine was made."""
        return self.count + self.done() + self.skipped

    def nanoseconds(self) -> int:
        """Virtual time since the machine was made."""
        return self.ticks() * NANOSECONDS


class Cpu:
    """Registers and modes of one processor."""

    def __init__(self, memory: PhysicalMemory, ports: PortSpace, accesses: Accesses) -> None:
        self.clock = Clock()
        self.memory = memory
        self.mmu = Mmu(memory, accesses)
        self.ports = ports
        self.r = [0] * 17
        self.f = [EAGER << 2, 0, 0]
        self.tests = tests(self.f)
        self.eflags = 0  # the flags that are not arithmetic, without the fixed bit
        self.cr0 = CR0_ET | CR0_NW | CR0_CD
        self.cr2 = self.cr3 = self.cr4 = self.cr8 = self.efer = 0
        self.debug = [0, 0, 0, 0]
        self.dr6, self.dr7 = 0xFFFF_0FF0, 0x400
        self.segments = [SegmentCache() for _ in range(6)]
        self.segment_base = [0] * 6
        self.read_limit = [0] * 6
        self.write_limit = [0] * 6
        self.tr, self.ldt = SegmentCache(), SegmentCache()
        self.gdt_base = self.gdt_limit = self.idt_base = self.idt_limit = 0
        self.msrs = Msrs()
        self.xmm = [0] * 16
        self.mxcsr = 0x1F80
        self.fcw = 0x37F
        self.fsw = 0
        self.ftw = 0
        self.st = [bytes(16)] * 8
        self.cpl = 0
        self.is_protected = self.is_long = self.is_code64 = False
        self.halted = False
        self.shadow_until = -1  # no interrupts before this many instructions (STI, MOV SS)
        self.nmi_masked = self.nmi_pending = False
        self.injected: int | None = None  # vector of an interrupt that was acknowledged but not delivered
        self.delivered = False  # set when a handler is entered, for single-stepping
        self.code = CodeCache(self)
        self.context: Context
        self.blocks: dict[int, Block] = {}
        memory.changed = self.mmu.flush
        self.mmu.flushed = self.code.forget_translations
        self.mmu.after_io = self.after_io

    # Flags

    def flags(self) -> int:
        """RFLAGS."""
        return self.eflags | arithmetic(self.f) | RFLAGS_FIXED

    def set_flags(self, value: int, mask: int) -> None:
        """Set those bits of RFLAGS that `mask` selects."""
        if mask & ARITHMETIC:
            self.f[1] = arithmetic(self.f) & ~mask | value & mask & ARITHMETIC
            self.f[0] = EAGER << 2
        system = mask & SYSTEM_FLAGS
        self.eflags = self.eflags & ~system | value & system

    # Segments and modes

    def set_segment(self, number: int, cache: SegmentCache) -> None:
        """Put a loaded and checked segment into a segment register."""
        self.segments[number] = cache
        self.segment_base[number] = cache.base
        self.read_limit[number], self.write_limit[number] = limits(self, cache)
        self.update_environment()

    def set_real_segment(self, number: int, selector: int) -> None:
        """A segment load of real mode: selector and base, nothing else."""
        cache = self.segments[number]
        cache.selector = selector
        cache.base = self.segment_base[number] = selector << 4
        if number == CS:
            self.update_environment()

    def update_mode(self) -> None:
        """After CR0, EFER or several segments changed: everything that follows from them."""
        self.is_protected = bool(self.cr0 & CR0_PE)
        self.is_long = bool(self.efer & EFER_LMA)
        for number, cache in enumerate(self.segments):
            self.segment_base[number] = cache.base
            self.read_limit[number], self.write_limit[number] = limits(self, cache)
        self.update_environment()

    def update_environment(self) -> None:
        """Select the translated code that fits the current mode, privilege and segments."""
        segments = self.segments
        code, stack = segments[CS], segments[SS]
        self.is_code64 = self.is_long and bool(code.l)
        flat = 0
        base = code.base
        if self.is_code64:
            bits, stack_mask, base = 64, M64, 0
        else:
            bits = 32 if code.db else 16
            stack_mask = M32 if stack.db else M16
            if self.is_protected:
                for number in range(ES, 6):
                    if number != CS and is_flat(self, segments[number]):
                        flat |= 1 << number
        self.context = self.code.context((bits, self.cpl == 3, stack_mask, flat, self.is_protected, base))
        self.blocks = self.context.blocks

    def check_segment(self, number: int, offset: int, size: int, write: bool) -> None:
        """Decide on a segmented access beyond the fast limit. Raises Fault."""
        check_access(self, number, offset, size, write)

    # Control registers (SDM volume 3, 2.5)

    def set_cr0(self, value: int) -> None:
        """MOV to CR0. Raises #GP for combinations that the processor refuses."""
        if value >> 32 or (value & CR0_PG and not value & CR0_PE) or (value & CR0_NW and not value & CR0_CD):
            raise Fault(GP, 0)
        if value & CR0_PG and not self.cr0 & CR0_PG and self.efer & EFER_LME:
            if not self.cr4 & CR4_PAE or self.segments[CS].l:
                raise Fault(GP, 0)
            self.efer |= EFER_LMA
        elif not value & CR0_PG and self.cr0 & CR0_PG and self.is_long:
            if self.is_code64:
                raise Fault(GP, 0)
            self.efer &= ~EFER_LMA
        changed = self.cr0 ^ value
        self.cr0 = value | CR0_ET
        if changed & (CR0_PG | CR0_PE | CR0_WP):
            self.configure_paging()
            self.update_mode()

    def set_cr3(self, value: int) -> None:
        """MOV to CR3."""
        if value >> 52:
            raise Fault(GP, 0)
        self.cr3 = value
        self.configure_paging()

    def set_cr4(self, value: int) -> None:
        """MOV to CR4. Raises #GP for bits that CPUID does not offer."""
        if value & ~CR4_SUPPORTED:
            raise Fault(GP, 0)
        if self.is_long and (not value & CR4_PAE or (value ^ self.cr4) & CR4_LA57):
            raise Fault(GP, 0)
        self.cr4 = value
        self.configure_paging()

    def set_efer(self, value: int) -> None:
        """WRMSR to EFER. LME cannot change while paging is on."""
        if value & ~EFER_SUPPORTED or (self.cr0 & CR0_PG and (value ^ self.efer) & EFER_LME):
            raise Fault(GP, 0)
        self.efer = value & ~EFER_LMA | self.efer & EFER_LMA
        self.configure_paging()

    def configure_paging(self) -> None:
        """Tell the paging unit about new control registers; translations are flushed."""
        self.mmu.configure(self.cr0, self.cr3, self.cr4, self.efer)

    # Execution

    def linear_ip(self) -> int:
        """The linear address of the next instruction."""
        if self.is_code64:
            return self.r[RIP]
        return (self.segments[CS].base + self.r[RIP]) & M32

    def require_cpl0(self) -> None:
        """Raise #GP(0) unless at privilege 0."""
        if self.cpl:
            raise Fault(GP, 0)

    def forbid_user(self) -> None:
        """SGDT, SIDT, SLDT, STR and SMSW with CR4.UMIP: raise #GP(0) outside privilege 0."""
        if self.cr4 & CR4_UMIP and self.cpl:
            raise Fault(GP, 0)

    def recheck(self) -> None:
        """Look for interrupts after this block: something may have enabled them."""
        self.clock.limit = 0

    def block_interrupts(self) -> None:
        """No interrupts before the next instruction is complete (STI, MOV SS, POP SS)."""
        clock = self.clock
        self.shadow_until = clock.count + clock.done() + 2
        clock.limit = 0

    def after_io(self) -> None:
        """After a device was accessed in mid-block: end the block here if attention is asked for."""
        if self.clock.limit == 0:
            self.code.cut()

    def unsupported(self, mnemonic: str) -> UnsupportedInstruction:
        """The error for the current instruction, which is valid but not implemented."""
        return UnsupportedInstruction(self.linear_ip(), b"", mnemonic)
