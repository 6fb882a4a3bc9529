"""The paging unit: translations, rights, accessed and dirty bits, page faults, the TLB."""

from __future__ import annotations

import pytest

from pykvm.exits import Halt
from pykvm.registers import CR0_ET, CR0_PE, CR0_PG, CR4_PAE, CR4_PSE, PTE_A, PTE_D, PTE_NX, SystemRegisters
from tests.unit.emulator.guest import Guest

HLT = b"\xf4"
HANDLER, TSS = 0xA000, 0x600
P, W, U = 1, 2, 4


@pytest.fixture
def table(guest: Guest) -> int:
    """Long mode with 4 KiB pages, and a #PF handler that halts."""
    guest.long()
    guest.gate64(14, HANDLER)
    guest.gate64(13, HANDLER + 0x100)
    guest.load(HLT, HANDLER)
    guest.load(HLT, HANDLER + 0x100)
    return guest.small_pages()


def entry(table: int, address: int) -> int:
    return table + 8 * (address >> 12)


def faulted(guest: Guest) -> bool:
    return guest.registers.rip == HANDLER + 1


LOAD, STORE, ADD, JUMP = "488b06f4", "488906f4", "480106f4", "ffe6"


@pytest.mark.parametrize(
    ("bits", "code", "error"),
    [
        (0, LOAD, 0),
        (0, STORE, 2),
        (0, ADD, 2),  # read-modify-write faults as a write
        (P, LOAD, None),
        (P, STORE, 3),
        (P | W, STORE, None),
        (0, JUMP, 0x10),
        (P | PTE_NX, JUMP, 0x11),
        (P | PTE_NX, LOAD, None),
        (P | 1 << 50, LOAD, 9),  # a reserved bit
    ],
)
def test_supervisor_access_is_checked(
    guest: Guest, table: int, bits: int, code: str, error: int | None
) -> None:
    guest.put(entry(table, 0x10_0000), 0x10_0000 | bits)
    guest.load(HLT, 0x10_0000)

    guest.run(bytes.fromhex(code), rsi=0x10_0000)

    assert faulted(guest) == (error is not None)
    assert (guest.get(guest.registers.rsp) if faulted(guest) else None) == error
    assert guest.vcpu.system_registers().cr2 == (0x10_0000 if faulted(guest) else 0)


@pytest.mark.parametrize(
    ("bits", "code", "error"),
    [(P | W, LOAD, 5), (P | W | U, STORE, None), (P | U, STORE, 7), (0, LOAD, 4), (P | W, JUMP, 0x15)],
)
def test_user_access_is_checked(guest: Guest, table: int, bits: int, code: str, error: int | None) -> None:
    guest.long(user=True)
    guest.small_pages()
    guest.put(TSS + 4, 0x6800)
    guest.put(entry(table, 0x10_0000), 0x10_0000 | bits)

    guest.run(bytes.fromhex(code), rsi=0x10_0000)

    assert (guest.get(guest.registers.rsp) if faulted(guest) else None) == error


def test_without_wp_the_supervisor_writes_read_only_pages(guest: Guest, table: int) -> None:
    guest.put(entry(table, 0x10_0000), 0x10_0000 | P)
    # mov rax, cr0; and eax, 0xfffeffff; mov cr0, rax; mov [rsi], rax; hlt
    code = bytes.fromhex("0f 20 c0 25 ff ff fe ff 0f 22 c0 48 89 06 f4")

    guest.run(code, rsi=0x10_0000)

    assert not faulted(guest)


def test_loads_set_accessed_and_stores_set_dirty(guest: Guest, table: int) -> None:
    read, written = entry(table, 0x10_0000), entry(table, 0x10_1000)
    # mov rax, [rsi]; mov [rsi+0x1000], rax; hlt
    code = bytes.fromhex("48 8b 06 48 89 86 00 10 00 00 f4")

    guest.run(code, rsi=0x10_0000)

    assert guest.get(read) & (PTE_A | PTE_D) == PTE_A
    assert guest.get(written) & (PTE_A | PTE_D) == PTE_A | PTE_D


def test_a_load_before_does_not_hide_the_dirty_bit_of_a_store(guest: Guest, table: int) -> None:
    # mov rax, [rsi]; mov rax, [rsi]; mov [rsi], rax; hlt
    code = bytes.fromhex("48 8b 06 48 8b 06 48 89 06 f4")

    guest.run(code, rsi=0x10_0000)

    assert guest.get(entry(table, 0x10_0000)) & PTE_D


def test_invlpg_makes_a_new_mapping_seen(guest: Guest, table: int) -> None:
    guest.put(0x10_0000, 1)
    guest.put(0x10_1000, 2)
    # mov rax, [rsi]; mov qword ptr [rdi], 0x101003; invlpg [rsi]; mov rbx, [rsi]; hlt
    code = bytes.fromhex("48 8b 06 48 c7 07 03 10 10 00 0f 01 3e 48 8b 1e f4")

    guest.run(code, rsi=0x10_0000, rdi=entry(table, 0x10_0000))

    assert (guest.registers.rax, guest.registers.rbx) == (1, 2)


def test_a_store_across_two_pages_writes_nothing_if_the_second_faults(guest: Guest, table: int) -> None:
    guest.put(entry(table, 0x10_1000), 0)

    guest.run(bytes.fromhex(STORE), rsi=0x10_0FFC, rax=(1 << 64) - 1)

    assert faulted(guest)
    assert guest.get(0x10_0FFC, 4) == 0
    assert guest.vcpu.system_registers().cr2 == 0x10_1000


def test_accesses_across_pages_use_both_translations(guest: Guest, table: int) -> None:
    guest.put(entry(table, 0x10_0000), 0x10_5000 | 7)
    guest.put(entry(table, 0x10_1000), 0x10_3000 | 7)
    # mov [rsi], rax; mov rbx, [rsi]; hlt
    code = bytes.fromhex("48 89 06 48 8b 1e f4")

    guest.run(code, rsi=0x10_0FFD, rax=0x1122_3344_5566_7788)

    assert guest.registers.rbx == 0x1122_3344_5566_7788
    assert guest.get(0x10_5FFD, 3) == 0x66_7788
    assert guest.get(0x10_3000, 5) == 0x11_2233_4455


def test_non_canonical_address_is_a_protection_fault(guest: Guest, table: int) -> None:
    guest.run(bytes.fromhex(LOAD), rsi=1 << 63)

    assert guest.registers.rip == HANDLER + 0x101


NON_CANONICAL = 1 << 63


@pytest.mark.parametrize(
    ("code", "registers", "vector"),
    [
        ("48 8b 45 00", {"rbp": NON_CANONICAL}, 12),  # mov rax, [rbp]
        ("3e 48 8b 45 00", {"rbp": NON_CANONICAL}, 12),  # mov rax, ds:[rbp]: the prefix is ignored
        ("36 48 8b 00", {"rax": NON_CANONICAL}, 13),  # mov rax, ss:[rax]: so is this one
        ("48 8b 45 00", {"rbp": 0x7FFF_FFFF_FFFC}, 12),  # the last of its 8 bytes are not canonical
        ("48 89 06", {"rsi": 0x7FFF_FFFF_FFFC}, 13),  # mov [rsi], rax
        ("0f 28 45 01", {"rbp": NON_CANONICAL}, 12),  # movaps xmm0, [rbp+1]: misaligned besides
        ("50", {"rsp": NON_CANONICAL}, 12),  # push rax
        ("c3", {"rsp": NON_CANONICAL}, 12),  # ret
        ("48 cf", {"rsp": NON_CANONICAL}, 12),  # iretq
        ("c9", {"rbp": NON_CANONICAL}, 12),  # leave
        ("ff 30", {"rax": NON_CANONICAL}, 13),  # push [rax]
        ("ff 30", {"rsp": NON_CANONICAL, "rax": 0x8000}, 12),
    ],
)
def test_non_canonical_address_of_the_stack_is_a_stack_fault(
    guest: Guest, table: int, code: str, registers: dict[str, int], vector: int
) -> None:
    handler = HANDLER + 0x10 * vector
    guest.put(TSS + 0x24, 0x6000)
    guest.gate64(vector, handler, ist=1)
    guest.load(HLT, handler)

    guest.run(bytes.fromhex(code), **registers)

    assert guest.registers.rip == handler + 1
    assert guest.get(guest.registers.rsp) == 0  # the error code
    assert guest.get(guest.registers.rsp + 8) == 0x8000


def test_clflush_faults_as_a_load(guest: Guest, table: int) -> None:
    guest.put(entry(table, 0x10_0000), 0)

    guest.run(bytes.fromhex("0f ae 3e"), rsi=0x10_0040)

    assert faulted(guest)
    assert guest.vcpu.system_registers().cr2 == 0x10_0040


def test_five_level_paging_translates_57_bits(guest: Guest, table: int) -> None:
    guest.put(0x5_0000, 0x1000 | 7)  # PML5 -> PML4
    # mov rax, [rsi]; hlt
    code = bytes.fromhex("48 8b 06 f4")
    system = guest.vcpu.system_registers()
    fields = {name: getattr(system, name) for name in system.__match_args__}
    guest.vcpu.set_system_registers(
        SystemRegisters(**fields | {"cr3": 0x5_0000, "cr4": system.cr4 | 1 << 12})
    )
    guest.put(0x5_0000 + 8, 0x1000 | 7)  # the same again at 2**48
    guest.put(0x10_0000, 99)

    guest.run(code, rsi=(1 << 48) + 0x10_0000)

    assert guest.registers.rax == 99


@pytest.mark.parametrize("cr4", [0, CR4_PSE, CR4_PAE])
def test_32_bit_paging_translates(guest: Guest, cr4: int) -> None:
    guest.protected()
    fields = {name: getattr(guest.vcpu.system_registers(), name) for name in SystemRegisters.__match_args__}
    if cr4 == CR4_PAE:
        guest.put(0x5_0000, 0x5_1000 | P)
        guest.put(0x5_1000, 0x83)  # 2 MiB at 0
        guest.put(0x5_1008, 0x5_2000 | 3)
        guest.put(0x5_2000, 0x10_0000 | 3)
        linear = 0x20_0000
    else:
        guest.put(0x5_0000, (0x83 if cr4 else 0x5_1000 | 3), 4)
        for page in range(512):
            guest.put(0x5_1000 + 4 * page, page << 12 | 3, 4)
        guest.put(0x5_0004, 0x5_2000 | 3, 4)
        guest.put(0x5_2000, 0x10_0000 | 3, 4)
        linear = 0x40_0000
    guest.put(0x10_0000, 1234, 4)
    paging = {"cr0": CR0_PE | CR0_PG | CR0_ET, "cr3": 0x5_0000, "cr4": cr4}
    guest.vcpu.set_system_registers(SystemRegisters(**fields | paging))
    # mov eax, [esi]; mov [esi+4], eax; hlt
    code = bytes.fromhex("8b 06 89 46 04 f4")

    ended = guest.run(code, rsi=linear)

    assert isinstance(ended, Halt)
    assert guest.registers.rax == 1234
    assert guest.get(0x10_0004, 4) == 1234
    assert guest.get(0x5_2000, 4) & (PTE_A | PTE_D) == PTE_A | PTE_D


def test_page_tables_in_a_hole_give_a_fault_not_a_crash(guest: Guest, table: int) -> None:
    guest.gate64(14, HANDLER)
    # mov cr3, rax; hlt
    code = bytes.fromhex("0f 22 d8 f4")

    ended = guest.run(code, rax=0x7000_0000)

    assert type(ended).__name__ == "Shutdown"
