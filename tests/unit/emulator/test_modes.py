"""Processor modes, segments, privilege: switches between modes, rings, descriptor checks, MSRs, CPUID."""

from __future__ import annotations

import pytest

from pykvm.errors import ConfigurationError
from pykvm.exits import EmulationFailure, Halt, Shutdown
from pykvm.registers import CR0_PE, CR0_PG, EFER_LMA, RESET_REGISTERS, Registers, Segment, SystemRegisters
from tests.unit.emulator.guest import Guest

IDT, TSS, STACK = 0x4000, 0x600, 0x7000
HLT = b"\xf4"
MARK = 0xA000  # where handlers are


def test_reset_state_equals_the_constants(guest: Guest) -> None:
    assert guest.vcpu.registers() == RESET_REGISTERS
    assert guest.vcpu.system_registers() == SystemRegisters()


def test_state_survives_being_read_and_set(guest: Guest) -> None:
    guest.long(user=True)
    system = guest.vcpu.system_registers()
    general = Registers(
        **{name: index for index, name in enumerate(("rax", "rbx", "r15", "rip"))}, rflags=0x246
    )

    guest.vcpu.set_registers(general)
    guest.vcpu.set_system_registers(system)

    assert guest.vcpu.registers() == general
    assert guest.vcpu.system_registers() == system


def test_real_mode_addresses_are_segment_times_16_plus_offset(guest: Guest) -> None:
    guest.real()
    guest.put(0x1_2345 + 0x10, 0xBEEF, 2)
    # mov ax, 0x1234; mov ds, ax; mov bx, 0x15; mov cx, [bx]; hlt
    code = bytes.fromhex("b8 34 12 8e d8 bb 15 00 8b 0f f4")

    guest.run(code)

    assert guest.registers.rcx == 0xBEEF


def test_real_mode_goes_to_protected_mode_and_back(guest: Guest) -> None:
    guest.real()
    guest.write_tables()
    guest.put(0x9000, 0x5F | 0x500 << 16, 6)
    # lgdt [0x9000]; mov eax, cr0; or al, 1; mov cr0, eax; jmp 0x08:0x8100
    code = bytes.fromhex("0f 01 16 00 90 0f 20 c0 0c 01 0f 22 c0 ea 00 81 08 00")
    guest.load(code)
    # mov ax, 0x10; mov ds, ax; mov dword ptr [0x9100], 0x12345678; jmp 0x60:0x8200
    thirty_two = bytes.fromhex("66 b8 10 00 8e d8 c7 05 00 91 00 00 78 56 34 12 ea 00 82 00 00 60 00")
    guest.load(thirty_two, 0x8100)
    guest.put(0x500 + 0x60, 0x0000_9B00_0000_FFFF)  # 16-bit code
    guest.put(0x9000, 0x67 | 0x500 << 16, 6)
    # mov eax, cr0; and al, 0xfe; mov cr0, eax; jmp 0:0x8300
    sixteen = bytes.fromhex("0f 20 c0 24 fe 0f 22 c0 ea 00 83 00 00")
    guest.load(sixteen, 0x8200)
    guest.load(HLT, 0x8300)

    guest.start()
    ended = guest.resume()

    assert isinstance(ended, Halt)
    assert guest.get(0x9100, 4) == 0x1234_5678
    assert guest.registers.rip == 0x8301
    assert not guest.vcpu.system_registers().cr0 & CR0_PE


def test_protected_mode_goes_to_long_mode(guest: Guest) -> None:
    guest.long()
    guest.protected()
    # mov eax, 0x20; mov cr4, eax; mov eax, 0x1000; mov cr3, eax; mov ecx, 0xc0000080; rdmsr; or ah, 1;
    # wrmsr; mov eax, cr0; or eax, 0x80000000; mov cr0, eax; jmp 0x18:0x8100
    code = bytes.fromhex(
        "b8 20 00 00 00 0f 22 e0 b8 00 10 00 00 0f 22 d8 b9 80 00 00 c0 0f 32 80 cc 01 0f 30 0f 20 c0 0d"
        "00 00 00 80 0f 22 c0 ea 00 81 00 00 18 00"
    )
    guest.load(code)
    # mov rax, 0x123456789abcdef0; hlt
    guest.load(bytes.fromhex("48 b8 f0 de bc 9a 78 56 34 12 f4"), 0x8100)

    guest.start()
    ended = guest.resume()

    system = guest.vcpu.system_registers()
    assert isinstance(ended, Halt)
    assert guest.registers.rax == 0x1234_5678_9ABC_DEF0
    assert system.cr0 & CR0_PG
    assert system.efer & EFER_LMA
    assert system.cs.l == 1


def test_interrupt_goes_from_ring_3_to_ring_0_and_back(guest: Guest) -> None:
    guest.long(user=True)
    guest.put(TSS + 4, 0x6800)
    guest.gate64(0x80, MARK, dpl=3)
    # mov eax, cs; mov rbx, rsp; iretq
    guest.load(bytes.fromhex("8c c8 48 89 e3 48 cf"), MARK)
    guest.gate64(13, 0xB000)
    guest.load(HLT, 0xB000)
    # int 0x80; mov ecx, cs; hlt
    code = bytes.fromhex("cd 80 8c c9 f4")

    ended = guest.run(code)

    assert isinstance(ended, Halt)
    assert (guest.registers.rax, guest.registers.rcx) == (0x18, 0x2B)
    assert guest.registers.rbx == 0x6800 - 40
    assert guest.get(0x6800 - 16) == STACK  # the ring-3 stack pointer was saved
    assert guest.registers.rip == 0xB001  # hlt in ring 3 is #GP


def test_protected_mode_interrupt_switches_stacks(guest: Guest) -> None:
    guest.protected(user=True)
    guest.put(TSS + 4, 0x6800, 4)
    guest.put(TSS + 8, 0x10, 4)
    guest.gate32(0x80, MARK, dpl=3)
    guest.load(HLT, MARK)

    guest.run(bytes.fromhex("cd 80"))  # int 0x80

    saved = [guest.get(0x6800 - 4 * place, 4) for place in (1, 2, 4, 5)]
    assert saved == [0x23, STACK, 0x33, 0x8002]
    assert guest.registers.rsp == 0x6800 - 20


def test_software_interrupt_needs_the_gates_privilege(guest: Guest) -> None:
    guest.long(user=True)
    guest.put(TSS + 4, 0x6800)
    guest.gate64(0x80, MARK, dpl=0)
    guest.gate64(13, 0xB000)
    guest.load(HLT, 0xB000)

    guest.run(bytes.fromhex("cd 80"))

    assert guest.get(guest.registers.rsp) == 0x80 << 3 | 2


def test_syscall_and_sysret(guest: Guest) -> None:
    guest.long(user=True)
    guest.vcpu.set_msrs({0xC000_0081: 0x18 << 48 | 0x18 << 32, 0xC000_0082: MARK, 0xC000_0084: 0x200})
    # mov ebx, cs; mov rdx, rcx; sysretq
    guest.load(bytes.fromhex("8c cb 48 89 ca 48 0f 07"), MARK)
    guest.gate64(13, 0xB000)
    guest.put(TSS + 4, 0x6800)
    guest.load(HLT, 0xB000)
    # syscall; mov esi, cs; hlt
    code = bytes.fromhex("0f 05 8c ce f4")

    guest.run(code, rflags=0x202)

    assert guest.registers.rbx == 0x18
    assert guest.registers.rdx == 0x8002
    assert guest.registers.rsi == 0x2B
    assert guest.registers.r11 == 0x202


def test_swapgs_exchanges_the_bases(guest: Guest) -> None:
    guest.long()
    guest.vcpu.set_msrs({0xC000_0101: 0x9000, 0xC000_0102: 0x9100})
    guest.put(0x9108, 77)
    # swapgs; mov rax, gs:[8]; hlt
    code = bytes.fromhex("0f 01 f8 65 48 8b 04 25 08 00 00 00 f4")

    guest.run(code)

    assert guest.registers.rax == 77
    assert guest.vcpu.msrs([0xC000_0101, 0xC000_0102]) == {0xC000_0101: 0x9100, 0xC000_0102: 0x9000}


@pytest.mark.parametrize(
    ("selector", "vector", "error"),
    [
        (0x08, None, None),  # readable code is fine as data
        (0x200, 13, 0x200),  # beyond the GDT
        (0x38, 13, 0x38),  # a TSS
        (0x58, 11, 0x58),  # not present
    ],
)
def test_data_segment_load_checks_the_descriptor(
    guest: Guest, selector: int, vector: int | None, error: int | None
) -> None:
    guest.protected()
    for number in (11, 13):
        guest.gate32(number, MARK + number)
        guest.load(HLT, MARK + number)
    # mov ds, eax; hlt
    code = bytes.fromhex("8e d8 f4")

    guest.run(code, rax=selector)

    fault = guest.registers.rip - 1 - MARK if guest.registers.rip > MARK else None
    assert fault == vector
    assert (guest.get(guest.registers.rsp, 4) if vector else None) == error


@pytest.mark.parametrize(
    ("selector", "address", "is_write", "faults"),
    [
        (0x48, 0xFFC, 1, False),
        (0x48, 0xFFD, 1, True),
        (0x48, 0xFFD, 0, True),
        (0x50, 0x100, 0, False),
        (0x50, 0x100, 1, True),
        (0, 0x100, 0, True),
    ],
)
def test_segment_limits_and_rights_are_enforced(
    guest: Guest, selector: int, address: int, is_write: int, faults: bool
) -> None:
    guest.protected()
    guest.gate32(13, MARK)
    guest.load(HLT, MARK)
    # mov ds, eax; jecxz 1f; mov [ebx], edx; hlt; 1: mov edx, [ebx]; hlt
    code = bytes.fromhex("8e d8 e3 03 89 13 f4 8b 13 f4")

    guest.run(code, rax=selector, rbx=address, rcx=is_write)

    assert (guest.registers.rip == MARK + 1) == faults


def test_far_call_and_return(guest: Guest) -> None:
    guest.protected()
    # call 0x08:0xa000; mov ebx, eax; hlt
    code = bytes.fromhex("9a 00 a0 00 00 08 00 89 c3 f4")
    # mov eax, [esp+4]; retf
    guest.load(bytes.fromhex("8b 44 24 04 cb"), MARK)

    guest.run(code)

    assert guest.registers.rbx == 0x08
    assert guest.registers.rsp == STACK


def test_system_table_registers_are_stored_as_loaded(guest: Guest) -> None:
    guest.long()
    guest.put(0x9000, 0x123, 2)
    guest.put(0x9002, 0x4567)
    # lidt [rsi]; sidt [rdi]; sgdt [rdi+16]; mov ax, 0x38; ltr ax; str ecx; smsw edx; hlt
    code = bytes.fromhex("0f 01 1e 0f 01 0f 0f 01 47 10 66 b8 38 00 0f 00 d8 0f 00 c9 0f 01 e2 f4")
    guest.put(0x500 + 0x38, 0x0000_8900_0600_0067)

    guest.run(code, rsi=0x9000, rdi=0x9100)

    assert (guest.get(0x9100, 2), guest.get(0x9102)) == (0x123, 0x4567)
    assert (guest.get(0x9110, 2), guest.get(0x9112)) == (0x5F, 0x500)
    assert guest.registers.rcx == 0x38
    assert guest.get(0x500 + 0x38 + 5, 1) == 0x8B  # the TSS is busy now


@pytest.mark.parametrize("code", ["f4", "0f20c0", "0f30", "fa", "e610", "0f0118"])
def test_user_mode_may_not_use_privileged_instructions(guest: Guest, code: str) -> None:
    guest.long(user=True)
    guest.put(TSS + 4, 0x6800)
    guest.put(TSS + 0x66, 0x68, 2)  # no I/O permission bitmap
    guest.gate64(13, MARK)
    guest.load(HLT, MARK)

    guest.run(bytes.fromhex(code))

    assert guest.registers.rip == MARK + 1


def test_io_permission_bitmap_opens_single_ports(guest: Guest) -> None:
    guest.long(user=True)
    system = guest.vcpu.system_registers()
    guest.put(TSS + 4, 0x6800)
    guest.put(TSS + 0x66, 0x68, 2)
    guest.ram[TSS + 0x68 : TSS + 0x6B] = bytes([0xFF, 0xFE, 0xFF])  # port 8 is open
    tr = Segment(TSS, 0x6A, 0x38, type=0xB, s=0)
    fields = {name: getattr(system, name) for name in system.__match_args__}
    guest.vcpu.set_system_registers(SystemRegisters(**fields | {"tr": tr}))
    guest.gate64(13, MARK)
    guest.load(HLT, MARK)

    guest.run(bytes.fromhex("e6 08 e6 09"))  # out 8, al; out 9, al

    assert guest.bus.log == [("out", 8, 1, 0)]
    assert guest.get(guest.registers.rsp + 8) == 0x8002


def test_msrs_can_be_written_and_read_by_the_guest(guest: Guest) -> None:
    guest.long()
    # wrmsr; xor eax, eax; xor edx, edx; rdmsr; hlt
    code = bytes.fromhex("0f 30 31 c0 31 d2 0f 32 f4")

    guest.run(code, rcx=0xC000_0082, rax=0x1234_5678, rdx=0x7FFF)

    assert (guest.registers.rax, guest.registers.rdx) == (0x1234_5678, 0x7FFF)
    assert guest.vcpu.msrs([0xC000_0082]) == {0xC000_0082: 0x7FFF_1234_5678}


def test_unknown_msr_is_gp_for_the_guest_and_a_clear_error_for_the_host(guest: Guest) -> None:
    guest.long()
    guest.gate64(13, MARK)
    guest.load(HLT, MARK)

    guest.run(bytes.fromhex("0f 32"), rcx=0x1234)  # rdmsr

    assert guest.registers.rip == MARK + 1
    with pytest.raises(ConfigurationError, match="0x1234"):
        guest.vcpu.msrs([0x1234])
    with pytest.raises(ConfigurationError, match="0x1234"):
        guest.vcpu.set_msrs({0x1234: 0})


def test_cpuid_names_vendor_hypervisor_and_long_mode(guest: Guest) -> None:
    guest.long()
    # cpuid; mov r8, rbx; mov eax, 0x40000000; cpuid; mov r9, rbx; mov eax, 0x80000001; cpuid; hlt
    code = bytes.fromhex("0f a2 49 89 d8 b8 00 00 00 40 0f a2 49 89 d9 b8 01 00 00 80 0f a2 f4")

    guest.run(code)

    assert guest.registers.r8.to_bytes(4, "little") == b"Pykv"
    assert guest.registers.r9.to_bytes(4, "little") == b"pykv"
    assert guest.registers.rdx & 1 << 29


def test_unimplemented_instruction_is_named_and_has_no_effect(guest: Guest) -> None:
    guest.long()
    code = bytes.fromhex("ff c0 0f 58 c1 f4")  # inc eax; addps xmm0, xmm1; hlt

    ended = guest.run(code)

    assert isinstance(ended, EmulationFailure)
    assert ended.code == bytes.fromhex("0f 58 c1")
    assert "0x8002" in ended.detail
    assert (guest.registers.rip, guest.registers.rax) == (0x8002, 1)


def test_execution_where_no_memory_is_ends_the_run(guest: Guest) -> None:
    guest.real()
    guest.vcpu.set_system_registers(SystemRegisters())
    guest.vcpu.set_registers(RESET_REGISTERS)

    ended = guest.resume()

    assert isinstance(ended, EmulationFailure)
    assert "0xfffffff0" in ended.detail


def test_sse_moves_and_logic(guest: Guest) -> None:
    guest.long()
    guest.ram[0x9000:0x9010] = bytes(range(16))
    # movups xmm0, [rsi]; movdqa xmm1, xmm0; pxor xmm1, xmm0; movaps [rsi+16], xmm0; movq rax, xmm0; movd
    # xmm2, eax; hlt
    code = bytes.fromhex("0f 10 06 66 0f 6f c8 66 0f ef c8 0f 29 46 10 66 48 0f 7e c0 66 0f 6e d0 f4")

    ended = guest.run(code, rsi=0x9000)

    assert isinstance(ended, Halt)
    assert guest.ram[0x9010:0x9020] == bytes(range(16))
    assert guest.registers.rax == 0x0706_0504_0302_0100
    assert guest.vcpu.fpu().xmm[1] == bytes(16)
    assert guest.vcpu.fpu().xmm[2] == bytes((0, 1, 2, 3)) + bytes(12)


def test_triple_fault_shuts_down(guest: Guest) -> None:
    guest.long()
    # lidt [rsi]; ud2
    code = bytes.fromhex("0f 01 1e 0f 0b")

    ended = guest.run(code, rsi=0x9000)

    assert ended == Shutdown(0)
    assert guest.registers.rip == 0x8003
