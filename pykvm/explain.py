"""Explain why a guest died: registers, descriptors, page walks and code, as lines of text.

Reads a vCPU and its memory through their interfaces only, so it serves every backend. A dead guest has often
wrecked its own tables: nothing here trusts them, each walk has a fixed depth, and memory that is not there
becomes a sentence, not an exception.

Sources: Intel SDM volume 3, chapters 3 (segments), 4 (paging), 6 (interrupts), 7 (task state).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pykvm import registers as bits
from pykvm.errors import MemoryAccessError
from pykvm.exits import Failure
from pykvm.registers import (
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_LA57,
    CR4_PAE,
    CR4_PSE,
    CR4_SMEP,
    EFER_LMA,
    EFER_NXE,
    PTE_NX,
    PTE_P,
    PTE_PS,
    PTE_RW,
    PTE_US,
    RFLAGS_IOPL,
    Registers,
    Segment,
    SystemRegisters,
)
from pykvm.values import Value, replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.interfaces import Memory, Vcpu
    from pykvm.state import VcpuEvents

__all__ = ["PageStep", "PageWalk", "describe_gate", "describe_segment", "failure", "page_walk"]

VECTORS = {
    0: "#DE",
    1: "#DB",
    2: "NMI",
    3: "#BP",
    4: "#OF",
    5: "#BR",
    6: "#UD",
    7: "#NM",
    8: "#DF",
    10: "#TS",
    11: "#NP",
    12: "#SS",
    13: "#GP",
    14: "#PF",
    16: "#MF",
    17: "#AC",
    18: "#MC",
    19: "#XM",
    20: "#VE",
    21: "#CP",
}
"""Exceptions by vector (SDM volume 3, table 6-1)."""

_DF, _GP, _PF = 8, 13, 14
_CODE_BEFORE, _CODE_AFTER = 24, 48  # bytes around RIP
_INSTRUCTIONS_BEFORE, _INSTRUCTIONS_AFTER = 3, 8
_INSTRUCTION_MAX = 15


# --- Paging -----------------------------------------------------------------------------------------------


class PageStep(Value):
    """One entry that a page walk read: `entry` from guest-physical `address`, None if there is no memory."""

    level: str
    index: int
    address: int
    entry: int | None

    def __str__(self) -> str:
        if self.entry is None:
            return f"{self.level}[{self.index}] at {self.address:#x}: no memory there"
        return f"{self.level}[{self.index}] at {self.address:#x} = {self.entry:#018x} [{_entry_flags(self)}]"


class PageWalk(Value):
    """How a linear address translates.

    `physical` is None where the tables do not map it. `why` says why an access faults, with the entry that
    is to blame; empty if it does not. `mode` names the kind of paging.
    """

    linear: int
    mode: str
    steps: tuple[PageStep, ...]
    physical: int | None
    why: str


class _Level(Value):
    """One table of the hierarchy: the address bits that index it and what its entries may hold."""

    name: str
    shift: int
    index_bits: int = 9
    large: bool = False  # PS may be set: the entry maps a page
    reserved: int = 0  # must be zero in every entry
    has_rights: bool = True  # the PDPTEs of PAE paging have no RW and US


class _Paging(Value):
    """One kind of paging (SDM volume 3, table 4-1)."""

    name: str
    levels: tuple[_Level, ...]
    linear_bits: int
    entry_size: int = 8
    root: int = 0x000F_FFFF_FFFF_F000  # bits of CR3 that hold the address of the first table

    @property
    def frame(self) -> int:
        """Bits of an entry that hold the address of the next table or page."""
        return 0xFFFF_F000 if self.entry_size == 4 else 0x000F_FFFF_FFFF_F000


_PAE_HIGH = 0x7FF0_0000_0000_0000  # bits 52..62 are ignored by 4-level paging, reserved by PAE paging
_PDPT_PD_PT = (_Level("PDPT", 30, large=True), _Level("PD", 21, large=True), _Level("PT", 12))
_LEVEL4 = _Paging("4-level paging", (_Level("PML4", 39, reserved=PTE_PS), *_PDPT_PD_PT), 48)
_LEVEL5 = _Paging("5-level paging", (_Level("PML5", 48, reserved=PTE_PS), *_LEVEL4.levels), 57)
_PAE = _Paging(
    "PAE paging",
    (
        _Level("PDPT", 30, 2, reserved=_PAE_HIGH | PTE_NX | 0x1E6, has_rights=False),
        _Level("PD", 21, large=True, reserved=_PAE_HIGH),
        _Level("PT", 12, reserved=_PAE_HIGH),
    ),
    32,
    root=0xFFFF_FFE0,
)
_PSE = _Paging("32-bit paging", (_Level("PD", 22, 10, large=True), _Level("PT", 12, 10)), 32, 4, 0xFFFF_F000)
_NO_PSE = replace(_PSE, levels=(_Level("PD", 22, 10), _Level("PT", 12, 10)))


def _paging(system: SystemRegisters) -> _Paging | None:
    """The kind of paging in force; None if off."""
    if not system.cr0 & CR0_PG:
        return None
    if system.efer & EFER_LMA:
        return _LEVEL5 if system.cr4 & CR4_LA57 else _LEVEL4
    if system.cr4 & CR4_PAE:
        return _PAE
    return _PSE if system.cr4 & CR4_PSE else _NO_PSE


def page_walk(
    memory: Memory,
    system_registers: SystemRegisters,
    linear: int,
    *,
    access: str = "read",
    user: bool = False,
) -> PageWalk:
    """Translate `linear` as the processor would (SDM volume 3, chapter 4) and say what stops it.

    `access` is ``"read"``, ``"write"`` or ``"execute"``; `user` means at privilege level 3. SMAP and
    protection keys are not looked at. Never raises for what the tables hold.
    """
    paging = _paging(system_registers)
    if paging is None:
        return PageWalk(linear, "no paging", (), linear & 0xFFFF_FFFF, "")
    if paging.linear_bits == 32:
        linear &= 0xFFFF_FFFF
    elif not _canonical(linear, paging.linear_bits):
        why = f"not canonical: bits 63 to {paging.linear_bits - 1} differ"
        return PageWalk(linear, paging.name, (), None, why)
    steps: list[PageStep] = []
    table = system_registers.cr3 & paging.root
    for level in paging.levels:
        step = _step(memory, paging, level, table, linear)
        steps.append(step)
        entry, why = step.entry, _broken(step, level, system_registers)
        if entry is None or why:
            return PageWalk(linear, paging.name, tuple(steps), None, why)
        if level.shift == 12 or (level.large and entry & PTE_PS):
            physical = _page_base(paging, level, entry) | linear & ((1 << level.shift) - 1)
            break
        table = entry & paging.frame
    rights = [step for step, level in zip(steps, paging.levels, strict=False) if level.has_rights]
    why = _denied(rights, system_registers, access, user)
    return PageWalk(linear, paging.name, tuple(steps), physical, why)


def _canonical(linear: int, width: int) -> bool:
    return linear >> (width - 1) in (0, (1 << (65 - width)) - 1)


def _step(memory: Memory, paging: _Paging, level: _Level, table: int, linear: int) -> PageStep:
    index = linear >> level.shift & ((1 << level.index_bits) - 1)
    address = table + index * paging.entry_size
    try:
        entry = int.from_bytes(memory.read(address, paging.entry_size), "little")
    except MemoryAccessError:
        return PageStep(level.name, index, address, None)
    return PageStep(level.name, index, address, entry)


def _broken(step: PageStep, level: _Level, system: SystemRegisters) -> str:
    """Why this entry ends the walk; empty if it does not."""
    where = f"{step.level}[{step.index}]"
    if step.entry is None:
        return f"{where} lies at {step.address:#x}, where there is no memory"
    if not step.entry & PTE_P:
        return f"{where} is not present"
    reserved = level.reserved
    if not system.efer & EFER_NXE and step.entry.bit_length() == 64:
        reserved |= PTE_NX
    if level.large and step.entry & PTE_PS:
        reserved |= 1 << 21 if level.index_bits == 10 else (1 << level.shift) - (1 << 13)
    if step.entry & reserved:
        return f"{where} has reserved bits set: {step.entry & reserved:#x}"
    return ""


def _page_base(paging: _Paging, level: _Level, entry: int) -> int:
    """The physical address of the page that `entry` maps."""
    if paging.entry_size == 4 and level.shift == 22:  # PSE-36: bits 13..20 are address bits 32..39
        return entry & 0xFFC0_0000 | (entry >> 13 & 0xFF) << 32
    return entry & paging.frame & ~((1 << level.shift) - 1)


def _denied(steps: list[PageStep], system: SystemRegisters, access: str, user: bool) -> str:
    """Why a mapped page refuses an access (SDM volume 3, 4.6); empty if it does not."""

    def lacking(bit: int) -> str:
        return next((f"{s.level}[{s.index}]" for s in steps if not (s.entry or 0) & bit), "")

    def having(bit: int) -> str:
        return next((f"{s.level}[{s.index}]" for s in steps if (s.entry or 0) & bit), "")

    if user and lacking(PTE_US):
        return f"{lacking(PTE_US)} is supervisor only"
    if access == "write" and (user or system.cr0 & CR0_WP) and lacking(PTE_RW):
        return f"{lacking(PTE_RW)} is read-only"
    if access == "execute" and system.efer & EFER_NXE and having(PTE_NX):
        return f"{having(PTE_NX)} is no-execute"
    if access == "execute" and not user and system.cr4 & CR4_SMEP and not lacking(PTE_US):
        return "a user page, and SMEP keeps the supervisor from executing it"
    return ""


def _entry_flags(step: PageStep) -> str:
    names = _names("PTE_", step.entry or 0) or "nothing"
    return names.replace("PS", "PAT") if step.level == "PT" else names


# --- Names of bits ----------------------------------------------------------------------------------------


def _names(prefix: str, value: int) -> str:
    """The single bits of `value` by the names that `pykvm.registers` gives them."""
    return " ".join(
        name.removeprefix(prefix)
        for name, bit in vars(bits).items()
        if name.startswith(prefix) and bit.bit_count() == 1 and value & bit
    )


def _mode(system: SystemRegisters) -> str:
    if not system.cr0 & CR0_PE:
        return "real mode"
    ring = f"ring {system.ss.dpl}"
    if not system.efer & EFER_LMA:
        return f"protected mode, {_code_bits(system)}-bit code, {ring}"
    return f"long mode, {_code_bits(system)}-bit code, {ring}"


def _code_bits(system: SystemRegisters) -> int:
    """How wide the code at CS:RIP is: 16, 32 or 64."""
    if system.efer & EFER_LMA and system.cs.l:
        return 64
    return 32 if system.cs.db else 16


def _register_dump(registers: Registers, system: SystemRegisters) -> Iterator[str]:
    yield _mode(system)
    names = [name for name in Registers.__match_args__ if name not in ("rip", "rflags")]
    for row in range(0, len(names), 4):
        yield "  ".join(f"{name:3} {getattr(registers, name):016x}" for name in names[row : row + 4])
    iopl = (registers.rflags & RFLAGS_IOPL) >> 12
    flags = _names("RFLAGS_", registers.rflags & ~bits.RFLAGS_FIXED) + (f" IOPL={iopl}" if iopl else "")
    yield f"rip {registers.rip:016x}  rflags {registers.rflags:08x} [{flags.strip()}]"
    for name in ("cs", "ss", "ds", "es", "fs", "gs", "tr", "ldt"):
        yield describe_segment(name, getattr(system, name))
    for name in ("gdt", "idt"):
        table = getattr(system, name)
        yield f"{name} base {table.base:#x} limit {table.limit:#x}"
    yield f"cr0 {system.cr0:08x} [{_names('CR0_', system.cr0)}]"
    yield f"cr2 {system.cr2:016x}  cr3 {system.cr3:016x}"
    yield f"cr4 {system.cr4:08x} [{_names('CR4_', system.cr4)}]"
    yield f"efer {system.efer:x} [{_names('EFER_', system.efer)}]"


# --- Segments and descriptors -----------------------------------------------------------------------------

_SYSTEM_TYPES = {
    0x1: "16-bit TSS",
    0x2: "LDT",
    0x3: "16-bit TSS, busy",
    0x4: "16-bit call gate",
    0x5: "task gate",
    0x6: "16-bit interrupt gate",
    0x7: "16-bit trap gate",
    0x9: "TSS",
    0xB: "TSS, busy",
    0xC: "call gate",
    0xE: "interrupt gate",
    0xF: "trap gate",
}
"""Descriptor types with S clear (SDM volume 3, table 3-2)."""


def _type_name(segment: Segment) -> str:
    """Descriptor types in words (SDM volume 3, tables 3-1 and 3-2)."""
    if not segment.s:
        return _SYSTEM_TYPES.get(segment.type, f"reserved type {segment.type:#x}")
    if segment.type & 8:
        width = 64 if segment.l else 32 if segment.db else 16
        readable = ", readable" if segment.type & 2 else ", execute-only"
        return f"{width}-bit code{readable}" + (", conforming" if segment.type & 4 else "")
    writable = ", writable" if segment.type & 2 else ", read-only"
    return "data" + writable + (", expand-down" if segment.type & 4 else "")


def describe_segment(name: str, segment: Segment) -> str:
    """A segment register and its hidden part, in one line."""
    head = f"{name:3} {segment.selector:04x}"
    if segment.unusable:
        return f"{head} unusable"
    present = "" if segment.present else ", not present"
    return (
        f"{head} base {segment.base:#x} limit {segment.limit:#x} {_type_name(segment)}, "
        f"dpl {segment.dpl}{present}"
    )


def _decode_descriptor(selector: int, raw: bytes) -> Segment:
    """A segment descriptor of 8 bytes, or of 16 for a TSS or LDT in long mode (SDM volume 3, 3.4.5)."""
    value = int.from_bytes(raw[:8], "little")
    g = value >> 55 & 1
    limit = value & 0xFFFF | value >> 32 & 0xF_0000
    return Segment(
        base=value >> 16 & 0xFF_FFFF | value >> 32 & 0xFF00_0000 | int.from_bytes(raw[8:12], "little") << 32,
        limit=limit << 12 | 0xFFF if g else limit,
        selector=selector,
        type=value >> 40 & 0xF,
        s=value >> 44 & 1,
        dpl=value >> 45 & 3,
        present=value >> 47 & 1,
        avl=value >> 52 & 1,
        l=value >> 53 & 1,
        db=value >> 54 & 1,
        g=g,
    )


class _Guest(Value):
    """The guest as its processor sees it: memory by linear address, tables by selector and vector."""

    memory: Memory
    system: SystemRegisters

    @property
    def long_mode(self) -> bool:
        return bool(self.system.efer & EFER_LMA)

    @property
    def gate_size(self) -> int:
        """Bytes of an entry of the IDT, or of the real-mode vector table."""
        if not self.system.cr0 & CR0_PE:
            return 4
        return 16 if self.long_mode else 8

    def read(self, linear: int, size: int) -> tuple[bytes, str]:
        """Bytes at a linear address, as a supervisor reads them, and why they are fewer than `size`."""
        data = b""
        while len(data) < size:
            here = linear + len(data) & ((1 << 64) - 1)
            count = min(size - len(data), 0x1000 - here % 0x1000)
            walk = page_walk(self.memory, self.system, here)
            if walk.physical is None:
                return data, f"{here:#x}: {walk.why}"
            try:
                data += self.memory.read(walk.physical, count)
            except MemoryAccessError:
                return data, f"{here:#x}: there is no memory at physical {walk.physical:#x}"
        return data, ""

    def descriptor(self, selector: int) -> tuple[Segment | None, str]:
        """The GDT or LDT entry of a selector, or why there is none."""
        if selector & ~3 == 0:
            return None, "null selector"
        name, table = ("LDT", self.system.ldt) if selector & 4 else ("GDT", self.system.gdt)
        offset = selector & ~7
        if offset + 7 > table.limit:
            return None, f"selector {selector:#x} is beyond the {name} limit {table.limit:#x}"
        raw, why = self.read(table.base + offset, 8)
        if why:
            return None, f"{name} entry {selector >> 3} cannot be read: {why}"
        segment = _decode_descriptor(selector, raw)
        if self.long_mode and not segment.s:
            segment = _decode_descriptor(selector, raw + self.read(table.base + offset + 8, 8)[0])
        return segment, ""


def describe_gate(memory: Memory, system_registers: SystemRegisters, vector: int) -> str:
    """Where `vector` would be delivered, or why no handler can run (SDM volume 3, 6.10 to 6.14)."""
    guest = _Guest(memory, system_registers)
    name = f"vector {vector}" + (f" ({VECTORS[vector]})" if vector in VECTORS else "")
    idt, size = system_registers.idt, guest.gate_size
    if vector * size + size - 1 > idt.limit:
        return f"IDT limit {idt.limit:#x}: no gate for {name}"
    raw, why = guest.read(idt.base + vector * size, size)
    if why:
        return f"the gate of {name} cannot be read: {why}"
    if size == 4:
        offset, segment = int.from_bytes(raw[:2], "little"), int.from_bytes(raw[2:], "little")
        return f"{name}: real-mode handler at {segment:04x}:{offset:04x}"
    return f"{name}: {_protected_gate(guest, raw)}"


def _protected_gate(guest: _Guest, raw: bytes) -> str:
    """A gate of 8 or 16 bytes, what it leads to, and what is wrong with it."""
    value = int.from_bytes(raw, "little")
    if not value:
        return "the gate is empty"
    selector = value >> 16 & 0xFFFF
    offset = value & 0xFFFF | value >> 32 & 0xFFFF_0000 | value >> 64 << 32 & 0xFFFF_FFFF_0000_0000
    kind, dpl, present = value >> 40 & 0x1F, value >> 45 & 3, value >> 47 & 1
    text = f"{_SYSTEM_TYPES.get(kind, f'type {kind:#x}')} to {selector:#x}:{offset:#x}, dpl {dpl}"
    if guest.long_mode and (ist := value >> 32 & 7):
        text += f", ist {ist}"
    if not present:
        return f"{text}; the gate is not present"
    if kind not in (0xE, 0xF, 0x5, 0x6, 0x7) or (guest.long_mode and kind not in (0xE, 0xF)):
        return f"{text}; that type is no interrupt gate"
    if kind == 0x5:
        return text
    problem = _handler_problem(guest, selector, offset)
    return f"{text}; {problem}" if problem else text


def _handler_problem(guest: _Guest, selector: int, offset: int) -> str:
    """Why the code that a gate names cannot run; empty if it can."""
    code, why = guest.descriptor(selector)
    if code is None:
        return why
    if not (code.s and code.type & 8):
        return f"selector {selector:#x} is {_type_name(code)}, not code"
    if not code.present:
        return f"the code segment {selector:#x} is not present"
    if guest.long_mode and not code.l:
        return f"selector {selector:#x} is {_type_name(code)}, not 64-bit code"
    base = 0 if guest.long_mode else code.base
    walk = page_walk(guest.memory, guest.system, base + offset, access="execute", user=code.dpl == 3)
    return f"the handler cannot be fetched: {walk.why}" if walk.why else ""


def _in_flight(events: VcpuEvents) -> list[int]:
    """Vectors on their way to the guest."""
    vectors = []
    if events.exception_injected or events.exception_pending:
        vectors.append(events.exception_nr)
    if events.interrupt_injected:
        vectors.append(events.interrupt_nr)
    if events.nmi_injected or events.nmi_pending:
        vectors.append(2)
    return vectors


def _descriptors(guest: _Guest, events: VcpuEvents) -> Iterator[str]:
    in_flight = _in_flight(events)
    for vector in in_flight:
        yield f"in flight: {describe_gate(guest.memory, guest.system, vector)}"
    if guest.system.idt.limit < guest.gate_size - 1:
        yield f"IDT limit {guest.system.idt.limit:#x}: no gate for any vector"
    else:
        others = (vector for vector in (_DF, _GP, _PF) if vector not in in_flight)
        yield from (describe_gate(guest.memory, guest.system, vector) for vector in others)
    if not guest.system.cr0 & CR0_PE:
        return
    for name in ("cs", "ss", "tr"):  # the tables may have changed since these were loaded
        selector = getattr(guest.system, name).selector
        segment, why = guest.descriptor(selector)
        text = f"{name} {selector:04x}: {why}" if segment is None else describe_segment(name, segment)
        yield f"entry of {text}"
    yield from _task_state(guest)


def _task_state(guest: _Guest) -> Iterator[str]:
    """The stacks that the TSS names, for ring 0 and, in long mode, interrupts (SDM volume 3, 7.2, 7.7)."""
    task = guest.system.tr
    if task.unusable or not task.present:
        return
    size = 0x5C if guest.long_mode else 0x0A
    if task.limit + 1 < size:
        yield f"TSS limit {task.limit:#x} is too small for stack pointers"
        return
    raw, why = guest.read(task.base, size)
    if why:
        yield f"TSS cannot be read: {why}"
        return
    if not guest.long_mode:
        ss0, esp0 = int.from_bytes(raw[8:10], "little"), int.from_bytes(raw[4:8], "little")
        yield f"TSS ss0:esp0 {ss0:04x}:{esp0:#x}"
        return
    slots = {"rsp0": 0x04, **{f"ist{number}": 0x1C + 8 * number for number in range(1, 8)}}
    for name, at in slots.items():
        pointer = int.from_bytes(raw[at : at + 8], "little")
        if pointer or name == "rsp0":
            walk = page_walk(guest.memory, guest.system, (pointer - 8) % (1 << 64), access="write")
            yield f"TSS {name} {pointer:#x}" + (f": a push fails: {walk.why}" if walk.why else "")


# --- Sections of the report -------------------------------------------------------------------------------


def _page_walks(guest: _Guest, registers: Registers, events: VcpuEvents) -> Iterator[str]:
    system = guest.system
    if _paging(system) is None:
        yield "paging is off: linear addresses are physical"
        return
    user = system.ss.dpl == 3
    wanted = [
        ("rip", _linear(system, system.cs, registers.rip), "execute", user),
        ("push", _linear(system, system.ss, registers.rsp - _code_bits(system) // 8), "write", user),
        ("idt", system.idt.base, "read", False),
    ]
    if system.cr2 or _PF in _in_flight(events):
        wanted.insert(2, ("cr2", system.cr2, "read", user))
    for name, linear, access, as_user in wanted:
        walk = page_walk(guest.memory, system, linear, access=access, user=as_user)
        target = "not mapped" if walk.physical is None else f"physical {walk.physical:#x}"
        if not walk.why:
            yield f"{name} {linear:#x}: {target}"
            continue
        yield f"{name} {linear:#x}: {target}; {access} fails, {walk.mode}: {walk.why}"
        yield from (f"  {step}" for step in walk.steps)


def _linear(system: SystemRegisters, segment: Segment, offset: int) -> int:
    """The linear address of `offset` in CS or SS."""
    if _code_bits(system) == 64:
        return offset & 0xFFFF_FFFF_FFFF_FFFF
    return segment.base + offset & 0xFFFF_FFFF


def _disassembly(guest: _Guest, registers: Registers) -> Iterator[str]:
    rip = _linear(guest.system, guest.system.cs, registers.rip)
    after, why = guest.read(rip, _CODE_AFTER)
    if not after:
        yield f"no code: {why}"
        return
    width = _code_bits(guest.system)
    following = _decode(after, rip, width)
    if following is None:
        yield f"> {rip:#x}: {after[:_INSTRUCTION_MAX].hex(' ')}  (install capstone for disassembly)"
        return
    yield from (f"  {line}" for line in _leading(guest, rip, width))
    if not following:
        yield f"> {rip:#x}: {after[:_INSTRUCTION_MAX].hex(' ')}  (not an instruction)"
    for number, (_, line) in enumerate(following[:_INSTRUCTIONS_AFTER]):
        yield f"{' ' if number else '>'} {line}"


def _leading(guest: _Guest, rip: int, width: int) -> list[str]:
    """The instructions before RIP: of all places to start from, the farthest whose decoding meets RIP."""
    size = min(_CODE_BEFORE, rip)
    before, why = guest.read(rip - size, size)
    for start in range(0 if why else len(before)):
        decoded = _decode(before[start:], rip - size + start, width) or []
        if sum(length for length, _ in decoded) == size - start:
            return [line for _, line in decoded[-_INSTRUCTIONS_BEFORE:]]
    return []


def _decode(code: bytes, address: int, width: int) -> list[tuple[int, str]] | None:
    """Lengths and texts of the instructions in `code`, until one is invalid; None without capstone."""
    try:
        import capstone  # type: ignore[import-untyped]
    except ImportError:
        return None
    modes = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
    engine = capstone.Cs(capstone.CS_ARCH_X86, modes[width])
    decoded = []
    for at, length, mnemonic, operands in engine.disasm_lite(code, address):
        raw = code[at - address : at - address + length]
        decoded.append((length, f"{at:#x}: {raw.hex(' '):24} {mnemonic} {operands}".rstrip()))
    return decoded


def failure(vcpu: Vcpu, memory: Memory, recent_exits: Iterable[str] = ()) -> Failure:
    """Everything that is known about a guest that died on `vcpu`; `recent_exits` are lines, newest last.

    Raises only what reading the vCPU's registers raises, never for the state of the guest.
    """
    registers, system, events = vcpu.registers(), vcpu.system_registers(), vcpu.events()
    guest = _Guest(memory, system)
    return Failure(
        registers=registers,
        system_registers=system,
        register_dump=tuple(_register_dump(registers, system)),
        recent_exits=tuple(recent_exits),
        descriptors=tuple(_descriptors(guest, events)),
        page_walk=tuple(_page_walks(guest, registers, events)),
        disassembly=tuple(_disassembly(guest, registers)),
    )
