"""What only the processor itself executes in ring 0: KVM hosts that interpret ring 0 lack it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pykvm import VM, Halt, Registers
from pykvm.boot.modes import long_mode

pytestmark = pytest.mark.ring0_native

CODE = 0x10_0000
HANDLER = 0x10_1000
DATA = 0x9000
LIMIT = 20.0  # seconds
MSR_STAR = 0xC000_0081
MSR_LSTAR = 0xC000_0082


@pytest.fixture
def vm() -> Iterator[VM]:
    """A machine on KVM with 4 MiB of RAM."""
    with VM("4M", backend="kvm") as vm:
        yield vm


@pytest.mark.parametrize(
    ("code", "rax"),
    [
        # fld1; fld1; faddp; fistp dword [0x9000]; mov eax, [0x9000]; hlt
        pytest.param("d9e8 d9e8 dec1 db1c2500900000 8b042500900000 f4", 2, id="x87"),
        # mov eax, 3; cvtsi2sd xmm0, eax; mulsd xmm0, xmm0; cvtsd2si eax, xmm0; hlt
        pytest.param("b803000000 f20f2ac0 f20f59c0 f20f2dc0 f4", 9, id="sse2"),
        # mov eax, 0xff; popcnt eax, eax; hlt
        pytest.param("b8ff000000 f30fb8c0 f4", 8, id="popcnt"),
    ],
)
def test_an_instruction_computes(vm: VM, code: str, rax: int) -> None:
    vm.load(bytes.fromhex(code), mode="long")

    assert vm.run(timeout=LIMIT) == Halt(0)
    assert vm.vcpus[0].registers().rax == rax


def test_cmpxchg16b_stores_both_halves(vm: VM) -> None:
    # xor eax, eax; xor edx, edx; mov ebx, 1; mov ecx, 2; lock cmpxchg16b [0x9000]; hlt
    vm.load(bytes.fromhex("31c0 31d2 bb01000000 b902000000 f0480fc70c2500900000 f4"), mode="long")

    assert vm.run(timeout=LIMIT) == Halt(0)
    assert vm.memory.read(DATA, 16) == (1 | 2 << 64).to_bytes(16, "little")


def test_syscall_enters_ring0_and_leaves_the_way_back_in_rcx(vm: VM) -> None:
    cpu = vm.vcpus[0]
    cpu.set_system_registers(long_mode(vm.memory, cpu.system_registers(), ring=3))
    cpu.set_registers(Registers(rip=CODE))
    cpu.set_msrs({MSR_STAR: 0x08 << 32, MSR_LSTAR: HANDLER})
    vm.memory.write(CODE, b"\x0f\x05")  # syscall
    vm.memory.write(HANDLER, b"\x8c\xc8\xf4")  # mov eax, cs; hlt

    assert vm.run(timeout=LIMIT) == Halt(0)
    assert (cpu.registers().rax, cpu.registers().rcx) == (0x08, CODE + 2)
