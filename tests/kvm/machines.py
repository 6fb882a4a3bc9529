"""The smallest machines for tests of the extension: a page or two of RAM, real mode, a few bytes of code."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from pykvm.boot.modes import real_mode
from pykvm.bus import Bus
from pykvm.kvm.abi import CAPABILITIES
from pykvm.registers import Registers
from pykvm.values import replace

if TYPE_CHECKING:
    from pykvm._kvm import System, Vcpu
    from pykvm.exits import Exit

CODE = 0x1000
STACK = 0x8000
RAM = 0x10000
MMIO = 0x2_0000  # beyond RAM, within reach of a real-mode segment
MMIO_SEGMENT = MMIO >> 4
PORT = 0x510

KVM_EXIT_IO, KVM_EXIT_HLT, KVM_EXIT_MMIO, KVM_EXIT_INTR = 2, 5, 6, 10

# Code that many tests run (16-bit)
HLT = b"\xf4"
CLI_HLT = b"\xfa\xf4"
STI_HLT = b"\xfb\xf4"
SPIN = b"\xfa\xeb\xfe"  # cli; jmp $
OUT_AL = b"\xee"  # out dx, al
IN_AL = b"\xec"  # in al, dx
OUT_FOREVER = b"\xee\xeb\xfd"  # 1: out dx, al; jmp 1b


class Recorder:
    """The IO of a run: keeps what is written, and answers reads with `answer`."""

    def __init__(self, answer: Callable[[], int] = lambda: 0) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.answer = answer

    def port_read(self, port: int, size: int) -> int:
        self.log.append(("in", port, size))
        return self.answer()

    def port_write(self, port: int, size: int, value: int) -> None:
        self.log.append(("out", port, size, value))

    def mmio_read(self, address: int, size: int) -> int:
        self.log.append(("read", address, size))
        return self.answer()

    def mmio_write(self, address: int, size: int, value: int) -> None:
        self.log.append(("write", address, size, value))


class NoIO(Recorder):
    """The IO of a guest whose accesses must not reach Python."""

    def port_read(self, port: int, size: int) -> int:
        raise AssertionError(f"port {port:#x} was read in Python")

    def port_write(self, port: int, size: int, value: int) -> None:
        raise AssertionError(f"port {port:#x} was written in Python")

    def mmio_read(self, address: int, size: int) -> int:
        raise AssertionError(f"{address:#x} was read in Python")

    def mmio_write(self, address: int, size: int, value: int) -> None:
        raise AssertionError(f"{address:#x} was written in Python")


class Machine:
    """A VM with RAM from address 0 and `cpus` processors, all in real mode with flat segments at 0."""

    def __init__(
        self,
        system: System,
        *,
        irqchip: bool = False,
        cpus: int = 1,
        ram: int = RAM,
        flags: int = 0,
        cpuid: bool = True,
    ) -> None:
        self.vm = system.create_vm()
        self.vm.set_identity_map_addr(0xFEFF_C000)
        self.vm.set_tss_addr(0xFEFF_D000)
        if irqchip:
            self.vm.create_irqchip()
        self.ram = mmap.mmap(-1, ram)
        self.vm.set_user_memory_region(0, flags, 0, self.ram)
        self.vcpus: list[Vcpu] = []
        for index in range(cpus):
            vcpu = self.vm.create_vcpu(index)
            if cpuid:
                vcpu.set_supported_cpuid(system, cpus)
            self.vcpus.append(vcpu)

    def bus(self, space: str) -> Bus:
        """A bus (`space` is "port" or "mmio") whose devices the run loop calls."""
        from pykvm._kvm import DeviceLock

        return Bus(space, 1 << 52, on_change=partial(self.vm.serve, space), new_lock=DeviceLock)

    @property
    def vcpu(self) -> Vcpu:
        """The first processor."""
        return self.vcpus[0]

    def load(self, code: bytes, *, cpu: int = 0, at: int = CODE, **registers: int) -> None:
        """Write `code` and point a processor at it; rdx is PORT and es the MMIO segment if not given."""
        self.ram[at : at + len(code)] = code
        vcpu = self.vcpus[cpu]
        system = real_mode(vcpu.get_sregs())
        es = system.es.__class__(base=MMIO, selector=MMIO_SEGMENT)
        vcpu.set_sregs(replace(system, es=es))
        vcpu.set_regs(Registers(**{"rip": at, "rsp": STACK, "rdx": PORT, **registers}))

    def run(self, code: bytes, io: Recorder | None = None, **registers: int) -> Exit:
        """Load `code` and run it on the first processor."""
        self.load(code, **registers)
        return self.vcpu.run(io if io is not None else NoIO())

    def close(self) -> None:
        for vcpu in self.vcpus:
            vcpu.close()
        self.vm.close()
        self.ram.close()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def exits_of(vcpu: Vcpu) -> dict[int, int]:
    """Its exits by KVM_EXIT_* number, but for interruptions, which come as they like."""
    return {reason: count for reason, count in vcpu.exit_counts().items() if reason != KVM_EXIT_INTR}


def lacks(system: System, *names: str) -> str:
    """Which of these KVM_CAP_* this host's KVM lacks, as the reason to skip; empty if none."""
    values = {name: system.check_extension(CAPABILITIES[name]) for name in names}
    missing = [f"check_extension({name}) is {value}" for name, value in values.items() if value == 0]
    return ", ".join(missing)
