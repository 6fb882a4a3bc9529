"""What the explanation of a dead guest says, on crafted tables and on arbitrary wreckage."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.errors import MemoryAccessError
from pykvm.exits import Failure, Shutdown
from pykvm.explain import describe_gate, describe_segment, failure, page_walk
from pykvm.registers import (
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_LA57,
    CR4_PAE,
    CR4_PSE,
    CR4_SMEP,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    PTE_NX,
    PTE_P,
    PTE_PS,
    PTE_RW,
    PTE_US,
    RFLAGS_FIXED,
    RFLAGS_PF,
    RFLAGS_ZF,
    DescriptorTable,
    Registers,
    Segment,
    SystemRegisters,
)
from pykvm.state import VcpuEvents

SIZE = 0x1_0000
CODE64 = Segment(base=0, limit=0xFFFF_FFFF, selector=0x08, type=0xB, l=1, g=1)
DATA = Segment(base=0, limit=0xFFFF_FFFF, selector=0x10, type=0x3, db=1, g=1)
TSS64 = Segment(base=0x6000, limit=0x67, selector=0x18, type=0xB, s=0)
LONG = SystemRegisters(
    cs=CODE64,
    ss=DATA,
    tr=TSS64,
    gdt=DescriptorTable(0x5000, 0x2F),
    idt=DescriptorTable(0x4000, 0xFFF),
    cr0=CR0_PE | CR0_PG | CR0_WP,
    cr3=0x1000,
    cr4=CR4_PAE,
    efer=EFER_LME | EFER_LMA | EFER_NXE,
)
PAE = replace(LONG, efer=EFER_NXE)
LEGACY = replace(LONG, efer=0, cr4=CR4_PSE)
PROTECTED = replace(LONG, efer=0, cr0=CR0_PE, cs=replace(CODE64, l=0, db=1))
ALL = PTE_P | PTE_RW | PTE_US

CODE64_DESCRIPTOR = 0x00AF_9B00_0000_FFFF
CODE32_DESCRIPTOR = 0x00CF_9B00_0000_FFFF
DATA_DESCRIPTOR = 0x00CF_9300_0000_FFFF


class Ram:
    """Guest memory of 64 KiB at zero and nothing beyond it."""

    def __init__(self, contents: bytes = b"") -> None:
        self.data = bytearray(contents.ljust(SIZE, b"\0"))

    def read(self, address: int, size: int) -> bytes:
        if address < 0 or address + size > SIZE:
            raise MemoryAccessError(address, size)
        return bytes(self.data[address : address + size])

    def put(self, address: int, value: int, size: int = 8) -> None:
        self.data[address : address + size] = value.to_bytes(size, "little")


class Cpu:
    """A vCPU that is only looked at."""

    def __init__(
        self, system: SystemRegisters, registers: Registers | None = None, events: VcpuEvents | None = None
    ) -> None:
        self._state = registers or Registers(), system, events or VcpuEvents()

    def registers(self) -> Registers:
        return self._state[0]

    def system_registers(self) -> SystemRegisters:
        return self._state[1]

    def events(self) -> VcpuEvents:
        return self._state[2]


@pytest.fixture
def ram() -> Ram:
    """Long mode with the first 2 MiB mapped to themselves, a GDT at 0x5000, an empty IDT at 0x4000."""
    ram = Ram()
    ram.put(0x1000, 0x2000 | ALL)
    ram.put(0x2000, 0x3000 | ALL)
    ram.put(0x3000, 0 | ALL | PTE_PS)
    ram.put(0x5008, CODE64_DESCRIPTOR)
    ram.put(0x5010, DATA_DESCRIPTOR)
    ram.put(0x5018, 0x0000_8B00_6000_0067)
    ram.put(0x5028, CODE32_DESCRIPTOR)
    ram.put(0x6004, 0x9000)
    return ram


def gate(offset: int, selector: int = 0x08, attributes: int = 0x8E00) -> int:
    low = offset & 0xFFFF | selector << 16 | attributes << 32 | (offset >> 16 & 0xFFFF) << 48
    return low | (offset >> 32) << 64


# Page walks


def test_a_2_mib_page_translates_in_three_steps(ram: Ram) -> None:
    walk = page_walk(ram, LONG, 0x1234, access="write")
    assert (walk.physical, walk.why, walk.mode) == (0x1234, "", "4-level paging")
    assert [step.level for step in walk.steps] == ["PML4", "PDPT", "PD"]


def test_a_4_kib_page_translates_in_four_steps(ram: Ram) -> None:
    ram.put(0x3000, 0x7000 | ALL)
    ram.put(0x7000 + 8 * 5, 0xA000 | ALL)
    walk = page_walk(ram, LONG, 0x5ABC)
    assert (walk.physical, len(walk.steps)) == (0xAABC, 4)


def test_a_1_gib_page_translates_in_two_steps(ram: Ram) -> None:
    ram.put(0x2008, 0x8000_0000 | ALL | PTE_PS)
    walk = page_walk(ram, LONG, 0x4765_4321)
    assert (walk.physical, len(walk.steps)) == (0x8765_4321, 2)


def test_five_level_paging_starts_at_the_pml5(ram: Ram) -> None:
    ram.put(0x7000, 0x1000 | ALL)
    walk = page_walk(ram, replace(LONG, cr4=CR4_PAE | CR4_LA57, cr3=0x7000), 0x99)
    assert (walk.physical, walk.steps[0].level, len(walk.steps)) == (0x99, "PML5", 4)


def test_pae_paging_has_a_page_directory_pointer_table_of_four(ram: Ram) -> None:
    ram.put(0x7020 + 8 * 3, 0x3000 | PTE_P)
    walk = page_walk(ram, replace(PAE, cr3=0x7020), 0xC000_0042, access="write", user=True)
    assert (walk.physical, walk.why) == (0x42, "")
    assert [(step.level, step.index) for step in walk.steps] == [("PDPT", 3), ("PD", 0)]


def test_32_bit_paging_reads_entries_of_four_bytes(ram: Ram) -> None:
    ram.put(0x1000 + 4, 0x7000 | ALL, 4)
    ram.put(0x7000 + 4 * 2, 0xB000 | ALL, 4)
    walk = page_walk(ram, LEGACY, 0x0040_2010)
    assert (walk.physical, [step.index for step in walk.steps]) == (0xB010, [1, 2])


def test_a_4_mib_page_takes_address_bits_32_to_39_from_its_entry(ram: Ram) -> None:
    ram.put(0x1000, 0x0080_0000 | 0x3 << 13 | ALL | PTE_PS, 4)
    assert page_walk(ram, LEGACY, 0x12_3456).physical == 0x3_0092_3456


def test_without_pse_a_page_directory_entry_never_maps_a_page(ram: Ram) -> None:
    ram.put(0x1000, 0x7000 | ALL | PTE_PS, 4)
    ram.put(0x7000, 0xC000 | ALL, 4)
    assert page_walk(ram, replace(LEGACY, cr4=0), 0x10).physical == 0xC010


def test_without_paging_an_address_is_physical() -> None:
    walk = page_walk(Ram(), PROTECTED, 0x1_0000_1234)
    assert (walk.physical, walk.steps, walk.why) == (0x1234, (), "")


@pytest.mark.parametrize(
    ("entry", "access", "user", "why"),
    [
        (0, "read", False, "PD[0] is not present"),
        (PTE_P | PTE_PS, "write", False, "PD[0] is read-only"),
        (PTE_P | PTE_RW | PTE_PS, "read", True, "PD[0] is supervisor only"),
        (ALL | PTE_PS | PTE_NX, "execute", False, "PD[0] is no-execute"),
        (ALL | PTE_PS | 1 << 13, "read", False, "PD[0] has reserved bits set: 0x2000"),
        (0xFF_0000_0000 | ALL, "read", False, "PT[1] lies at 0xff00000008, where there is no memory"),
    ],
)
def test_a_failing_walk_names_the_entry_and_the_reason(
    ram: Ram, entry: int, access: str, user: bool, why: str
) -> None:
    ram.put(0x3000, entry)
    assert page_walk(ram, LONG, 0x1000, access=access, user=user).why == why


def test_a_denied_access_still_tells_where_the_page_is(ram: Ram) -> None:
    ram.put(0x1000, 0x2000 | PTE_P)
    walk = page_walk(ram, LONG, 0x1000, access="write")
    assert (walk.physical, walk.why) == (0x1000, "PML4[0] is read-only")


def test_the_supervisor_writes_to_read_only_pages_while_wp_is_clear(ram: Ram) -> None:
    ram.put(0x3000, PTE_P | PTE_PS)
    assert page_walk(ram, replace(LONG, cr0=CR0_PE | CR0_PG), 0x1000, access="write").why == ""


def test_the_no_execute_bit_is_reserved_while_nxe_is_clear(ram: Ram) -> None:
    ram.put(0x3000, ALL | PTE_PS | PTE_NX)
    walk = page_walk(ram, replace(LONG, efer=EFER_LME | EFER_LMA), 0x1000)
    assert walk.why == "PD[0] has reserved bits set: 0x8000000000000000"


def test_a_page_size_bit_in_the_pml4_is_reserved(ram: Ram) -> None:
    ram.put(0x1000, 0x2000 | ALL | PTE_PS)
    assert page_walk(ram, LONG, 0).why == "PML4[0] has reserved bits set: 0x80"


def test_smep_keeps_the_supervisor_off_user_code(ram: Ram) -> None:
    walk = page_walk(ram, replace(LONG, cr4=CR4_PAE | CR4_SMEP), 0x1000, access="execute")
    assert "SMEP" in walk.why


def test_a_non_canonical_address_is_refused_before_any_table_is_read(ram: Ram) -> None:
    walk = page_walk(ram, LONG, 0x8000_0000_0000)
    assert (walk.physical, walk.steps, walk.why) == (None, (), "not canonical: bits 63 to 47 differ")


def test_the_upper_half_is_canonical(ram: Ram) -> None:
    assert page_walk(ram, LONG, 0xFFFF_FFFF_FFFF_F000).why == "PML4[511] is not present"


# Segments and gates


def test_a_segment_is_one_line() -> None:
    line = describe_segment("cs", CODE64)
    assert line == "cs  0008 base 0x0 limit 0xffffffff 64-bit code, readable, dpl 0"


def test_an_unusable_segment_says_so() -> None:
    assert describe_segment("ldt", replace(DATA, selector=0, unusable=1)) == "ldt 0000 unusable"


def test_an_idt_without_room_has_no_gate(ram: Ram) -> None:
    system = replace(LONG, idt=DescriptorTable(0, 0))
    assert describe_gate(ram, system, 6) == "IDT limit 0x0: no gate for vector 6 (#UD)"


def test_a_good_gate_is_told_without_a_complaint(ram: Ram) -> None:
    ram.put(0x4000 + 16 * 14, gate(0x8000, attributes=0x8E02), 16)
    assert describe_gate(ram, LONG, 14) == "vector 14 (#PF): interrupt gate to 0x8:0x8000, dpl 0, ist 2"


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (gate(0x8000, attributes=0x0E00), "the gate is not present"),
        (gate(0x8000, attributes=0x8C00), "that type is no interrupt gate"),
        (gate(0x8000, selector=0), "null selector"),
        (gate(0x8000, selector=0x30), "selector 0x30 is beyond the GDT limit 0x2f"),
        (gate(0x8000, selector=0x10), "selector 0x10 is data, writable, not code"),
        (gate(0x8000, selector=0x28), "selector 0x28 is 32-bit code, readable, not 64-bit code"),
        (gate(0xFFFF_8000_0000_0000), "the handler cannot be fetched: PML4[256] is not present"),
    ],
)
def test_a_gate_that_cannot_deliver_says_why(ram: Ram, value: int, complaint: str) -> None:
    ram.put(0x4000 + 16 * 13, value, 16)
    assert describe_gate(ram, LONG, 13).endswith(f"; {complaint}")


def test_an_empty_gate_is_called_so(ram: Ram) -> None:
    assert describe_gate(ram, LONG, 13) == "vector 13 (#GP): the gate is empty"


def test_an_unmapped_idt_says_so(ram: Ram) -> None:
    system = replace(LONG, idt=DescriptorTable(0x4000_0000, 0xFFF))
    assert "cannot be read: 0x400000d0: PDPT[1] is not present" in describe_gate(ram, system, 13)


def test_a_protected_mode_gate_has_eight_bytes(ram: Ram) -> None:
    ram.put(0x4000 + 8 * 6, gate(0x8000, selector=0x28))
    assert describe_gate(ram, PROTECTED, 6) == "vector 6 (#UD): interrupt gate to 0x28:0x8000, dpl 0"


def test_a_real_mode_vector_is_a_far_pointer(ram: Ram) -> None:
    ram.put(6 * 4, 0xF000_1234, 4)
    assert describe_gate(ram, SystemRegisters(), 6) == "vector 6 (#UD): real-mode handler at f000:1234"


# The whole report


def test_a_failure_names_flags_mode_and_the_gate_in_flight(ram: Ram) -> None:
    registers = Registers(rip=0x8000, rsp=0x9000, rflags=RFLAGS_FIXED | RFLAGS_ZF | RFLAGS_PF)
    system = replace(LONG, idt=DescriptorTable(0, 0))
    events = VcpuEvents(exception_injected=1, exception_nr=6)
    report = failure(Cpu(system, registers, events), ram, ["KVM_EXIT_IO out 0x3f8"])
    assert report.register_dump[0] == "long mode, 64-bit code, ring 0"
    assert "rip 0000000000008000  rflags 00000046 [PF ZF]" in report.register_dump
    assert report.descriptors[:2] == (
        "in flight: IDT limit 0x0: no gate for vector 6 (#UD)",
        "IDT limit 0x0: no gate for any vector",
    )
    assert "TSS rsp0 0x9000" in report.descriptors
    assert report.recent_exits == ("KVM_EXIT_IO out 0x3f8",)


def test_a_failure_shows_the_entries_of_a_walk_that_fails(ram: Ram) -> None:
    report = failure(Cpu(replace(LONG, cr2=0x20_0000), Registers(rip=0x8000, rsp=0x9000)), ram)
    assert "cr2 0x200000: not mapped; read fails, 4-level paging: PD[1] is not present" in report.page_walk
    assert "  PD[1] at 0x3008 = 0x0000000000000000 [nothing]" in report.page_walk
    assert report.page_walk[:2] == ("rip 0x8000: physical 0x8000", "push 0x8ff8: physical 0x8ff8")


def test_a_stack_that_interrupts_cannot_use_is_pointed_out(ram: Ram) -> None:
    ram.put(0x6004, 0)
    report = failure(Cpu(LONG, Registers(rip=0x8000)), ram)
    assert "TSS rsp0 0x0: a push fails: PML4[511] is not present" in report.descriptors


def test_code_around_rip_is_disassembled_with_a_mark_at_rip(ram: Ram) -> None:
    pytest.importorskip("capstone", reason="capstone is not installed")
    ram.data[0x8000:0x8008] = bytes.fromhex("90 4831c0 0f0b f4 90")  # nop; xor rax, rax; ud2; hlt; nop
    lines = failure(Cpu(LONG, Registers(rip=0x8004)), ram).disassembly
    marked = [line for line in lines if line.startswith(">")]
    assert [line.split()[-1] for line in marked] == ["ud2"]
    assert any("xor rax, rax" in line for line in lines[: lines.index(marked[0])])


@pytest.mark.parametrize(
    ("system", "text"),
    [(LONG, "mov rax, rbx"), (PROTECTED, "dec eax"), (SystemRegisters(cs=Segment(base=0)), "dec ax")],
)
def test_code_is_decoded_in_the_width_of_the_mode(ram: Ram, system: SystemRegisters, text: str) -> None:
    pytest.importorskip("capstone", reason="capstone is not installed")
    ram.data[0x8000:0x8003] = bytes.fromhex("4889d8")
    lines = failure(Cpu(system, Registers(rip=0x8000)), ram).disassembly
    assert next(line for line in lines if line.startswith(">")).endswith(text)


def test_without_capstone_the_bytes_at_rip_are_shown(ram: Ram, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "capstone", None)
    ram.data[0x8000:0x8002] = bytes.fromhex("0f0b")
    lines = failure(Cpu(LONG, Registers(rip=0x8000)), ram).disassembly
    assert len(lines) == 1
    assert lines[0].startswith("> 0x8000: 0f 0b 00")
    assert "capstone" in lines[0]


def test_code_that_is_not_mapped_is_described(ram: Ram) -> None:
    report = failure(Cpu(LONG, Registers(rip=0x20_0000)), ram)
    assert report.disassembly == ("no code: 0x200000: PD[1] is not present",)


def test_the_rendered_explanation_has_every_section(ram: Ram) -> None:
    text = Shutdown(0, failure(Cpu(LONG, Registers(rip=0x8000, rsp=0x9000)), ram, ["exit"])).explain()
    for heading in ("registers:", "last exits", "descriptor tables:", "page walk:", "code at rip:"):
        assert heading in text


u64 = st.integers(0, 2**64 - 1)
# Mostly plausible control bits, so that every paging mode is reached, and some arbitrary ones.
cr0_values = st.sampled_from([0, CR0_PE, CR0_PE | CR0_PG, CR0_PE | CR0_PG | CR0_WP]) | u64
cr4_values = st.sampled_from([0, CR4_PSE, CR4_PAE, CR4_PAE | CR4_LA57, CR4_PAE | CR4_SMEP]) | u64
efer_values = st.sampled_from([0, EFER_LME | EFER_LMA, EFER_LME | EFER_LMA | EFER_NXE]) | u64
addresses = st.integers(0, SIZE) | st.integers(2**32 - 16, 2**32) | st.integers(2**64 - 64, 2**64 - 1) | u64
segments = st.builds(
    Segment,
    base=addresses,
    limit=st.integers(0, 2**32 - 1),
    selector=st.integers(0, 0xFFFF),
    type=st.integers(0, 15),
    present=st.integers(0, 1),
    dpl=st.integers(0, 3),
    db=st.integers(0, 1),
    s=st.integers(0, 1),
    l=st.integers(0, 1),
    unusable=st.integers(0, 1),
)
tables = st.builds(DescriptorTable, base=addresses, limit=st.integers(0, 0xFFFF))
systems = st.builds(
    SystemRegisters,
    cs=segments,
    ss=segments,
    tr=segments,
    ldt=segments,
    gdt=tables,
    idt=tables,
    cr0=cr0_values,
    cr2=addresses,
    cr3=addresses,
    cr4=cr4_values,
    efer=efer_values,
)
# Entries that point back into the 64 KiB make walks that go deep, and tables that contain themselves.
entries = st.integers(0, SIZE - 1) | u64
memories = st.lists(entries, min_size=1, max_size=64).map(
    lambda words: Ram((b"".join(word.to_bytes(8, "little") for word in words) * SIZE)[:SIZE])
)


@settings(deadline=None, max_examples=150)
@given(ram=memories, system=systems, rip=addresses, rsp=addresses, rflags=u64, vector=st.integers(0, 255))
def test_no_wreckage_of_tables_and_registers_makes_the_explanation_raise(
    ram: Ram, system: SystemRegisters, rip: int, rsp: int, rflags: int, vector: int
) -> None:
    events = VcpuEvents(exception_pending=1, exception_nr=vector, interrupt_injected=1, interrupt_nr=vector)
    report = failure(Cpu(system, Registers(rip=rip, rsp=rsp, rflags=rflags), events), ram)
    assert isinstance(report, Failure)
    assert report.register_dump
    assert report.disassembly


@settings(deadline=None, max_examples=150)
@given(ram=memories, system=systems, linear=u64, access=st.sampled_from(["read", "write", "execute"]))
def test_a_page_walk_ends_within_five_steps_and_tells_why_it_maps_nothing(
    ram: Ram, system: SystemRegisters, linear: int, access: str
) -> None:
    walk = page_walk(ram, system, linear, access=access)
    assert len(walk.steps) <= 5
    assert walk.physical is not None or walk.why
