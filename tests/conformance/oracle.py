"""One instruction at a time in ring 3 of 64-bit mode, on any backend; and what it did, to be compared.

Every case ends in an exception: HLT, which follows the instruction and fills all other code, is #GP in
ring 3. Its gate leads to a HLT in ring 0, which ends the run with the registers as they were. So neither
the stack nor any register has to be spared. Ring 3 is native on every kind of KVM, but for what is #GP or
#SS: software KVM interprets that instruction itself.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from random import Random

from pykvm import layout
from pykvm.boot.modes import long_mode
from pykvm.exits import Halt
from pykvm.registers import PTE_US, RFLAGS_DF, RFLAGS_FIXED, DescriptorTable, Registers
from pykvm.state import FpuState
from pykvm.values import replace
from pykvm.vm import VM
from tests.conformance.random_instructions import (
    ARITHMETIC,
    CODE,
    CODE_SIZE,
    DATA,
    DATA_SIZE,
    HLT,
    Case,
)

IDT = 0x1_0000
HANDLERS = 0x1_1000  # a HLT for each vector, one byte each
VECTORS = 32
WITH_ERROR_CODE = (8, 10, 11, 12, 13, 14, 17)
NAMES = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
COMMON_DATA = Random(0).randbytes(DATA_SIZE)
LONGEST = 16


@dataclass(frozen=True)
class Outcome:
    """What an instruction left behind. `flags` are the arithmetic ones and DF, where defined."""

    vector: int
    error_code: int
    rip: int
    registers: tuple[int, ...]
    flags: int
    cr2: int
    fpu: FpuState
    data: bytes

    def differences(self, other: Outcome) -> list[str]:
        """In words, how `other` is different."""
        found = [
            f"{name}: {getattr(self, name):#x} against {getattr(other, name):#x}"
            for name in ("vector", "error_code", "rip", "flags", "cr2")
            if getattr(self, name) != getattr(other, name)
        ]
        pairs = zip(NAMES, self.registers, other.registers, strict=True)
        found += [f"{name}: {mine:#x} against {theirs:#x}" for name, mine, theirs in pairs if mine != theirs]
        found += [
            f"{name}: {getattr(self.fpu, name):#x} against {getattr(other.fpu, name):#x}"
            for name in ("fcw", "fsw")
            if getattr(self.fpu, name) != getattr(other.fpu, name)
        ]
        vectors = enumerate(zip(self.fpu.xmm, other.fpu.xmm, strict=True))
        found += [f"xmm{n}: {a.hex()} against {b.hex()}" for n, (a, b) in vectors if a != b]
        if self.data != other.data:
            bytes_ = enumerate(zip(self.data, other.data, strict=True), DATA)
            found += [f"[{at:#x}]: {a:#x} against {b:#x}" for at, (a, b) in bytes_ if a != b][:16]
        return found


class NoBus:
    """There are no devices."""

    def port_read(self, port: int, size: int) -> int:
        return (1 << 8 * size) - 1

    def port_write(self, port: int, size: int, value: int) -> None:
        pass

    def mmio_read(self, address: int, size: int) -> int:
        return (1 << 8 * size) - 1

    def mmio_write(self, address: int, size: int, value: int) -> None:
        pass


class Processor:
    """A machine in ring 3 that executes cases."""

    def __init__(self, backend: str) -> None:
        self.vm = VM("4M", backend=backend)
        self.vcpu, self.bus = self.vm.vcpus[0], NoBus()
        memory = self.vm.memory
        system = long_mode(memory, self.vcpu.system_registers(), ring=3, map_bytes=4 << 20)
        directory = layout.BOOT_PAGE_TABLES + 3 * layout.PAGE_SIZE
        memory.write_u64(directory, memory.read_u64(directory) & ~PTE_US)  # the lower 2 MiB are the system's
        for vector in range(VECTORS):
            low, high = _gate(HANDLERS + vector)
            memory.write_struct(IDT + 16 * vector, "<QQ", low, high)
        memory.fill(HANDLERS, VECTORS, HLT)
        memory.fill(CODE, CODE_SIZE, HLT)
        self.system = replace(system, idt=DescriptorTable(IDT, 16 * VECTORS - 1))

    def close(self) -> None:
        """Close the machine."""
        self.vm.close()

    def execute(self, case: Case) -> Outcome:
        """Run one case."""
        memory, vcpu = self.vm.memory, self.vcpu
        memory.write(DATA, COMMON_DATA)
        for where, data in case.memory:
            memory.write(where, data)
        memory.write(case.address, case.code.ljust(LONGEST, bytes([HLT])))
        vcpu.set_system_registers(self.system)
        if case.fpu is not None:
            vcpu.set_fpu(case.fpu)
        registers = dict(zip(NAMES, case.registers, strict=True))
        vcpu.set_registers(Registers(**registers, rip=case.address, rflags=case.flags))
        end = vcpu.run(self.bus)
        memory.fill(case.address, LONGEST, HLT)
        assert isinstance(end, Halt), end
        return self._outcome(case)

    def _outcome(self, case: Case) -> Outcome:
        memory, registers = self.vm.memory, self.vcpu.registers()
        vector = registers.rip - HANDLERS - 1
        frame = registers.rsp
        error_code = 0
        if vector in WITH_ERROR_CODE:
            error_code = memory.read_u64(frame)
            frame += 8
        rip, _, flags, rsp, _ = struct.unpack("<5Q", memory.read(frame, 40))
        data = memory.read(DATA, DATA_SIZE)
        if rip == case.address and case.form.row.name in ("call", "enter"):
            # Processors differ in what these have pushed before they fault; it is below the stack.
            data = data[max(0, rsp - DATA) :].rjust(DATA_SIZE, b"\0")
        return Outcome(
            vector=vector,
            error_code=error_code,
            rip=rip,
            registers=tuple(rsp if name == "rsp" else getattr(registers, name) for name in NAMES),
            flags=flags & (ARITHMETIC | RFLAGS_DF | RFLAGS_FIXED) & ~case.undefined,
            cr2=self.vcpu.system_registers().cr2 if vector == 14 else 0,
            fpu=self._fpu() if case.fpu is not None else FpuState(),
            data=data,
        )

    def _fpu(self) -> FpuState:
        """The registers of x87 and SSE that the cases use."""
        state = self.vcpu.fpu()
        return FpuState(xmm=state.xmm, fcw=state.fcw, fsw=state.fsw)


def _gate(handler: int) -> tuple[int, int]:
    """An interrupt gate to ring 0 (SDM volume 3, figure 6-8)."""
    low = handler & 0xFFFF | layout.SELECTOR_CODE64 << 16 | 0x8E00 << 32 | (handler >> 16 & 0xFFFF) << 48
    return low, handler >> 32


def describe(case: Case, differences: list[str]) -> str:
    """Everything that is needed to run the case again."""
    registers = [f"{name}={value:#x}" for name, value in zip(NAMES, case.registers, strict=True)]
    memory = [f"[{where:#x}]={data.hex()}" for where, data in case.memory]
    return "\n  ".join(
        [
            f"{case.form}: {case.code.hex(' ')} at {case.address:#x}: {disassemble(case)}",
            " ".join(registers[:8]),
            " ".join(registers[8:]),
            " ".join([f"rflags={case.flags:#x}", *memory]),
            *_describe_fpu(case.fpu),
            "processor against emulator:",
            *("  " + difference for difference in differences),
        ]
    )


def _describe_fpu(fpu: FpuState | None) -> list[str]:
    if fpu is None:
        return []
    return [" ".join([f"fcw={fpu.fcw:#x}", *(f"xmm{n}={value.hex()}" for n, value in enumerate(fpu.xmm))])]


def disassemble(case: Case) -> str:
    """The instruction as Capstone prints it."""
    import capstone  # type: ignore[import-untyped]

    for i in capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64).disasm(case.code, case.address):
        return f"{i.mnemonic} {i.op_str}"
    return "(no instruction)"
