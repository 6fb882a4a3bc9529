"""A whole life of a machine: made, run to its first exit, closed, against a minimal C program.

    python benchmarks/lifecycle.py [--quick] [--json]

The machine has 64 MiB and one vCPU that may use all that KVM supports; the guest is a HLT. The floor asks KVM
once, not for each machine, what it supports. Claim: a `pykvm.VM` lives at most 1.15 times as long.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from time import perf_counter_ns
from typing import Any

import common

MEMORY = 64 << 20
HLT = b"\xf4"


def live_as_vm() -> None:
    """A life at the level that users see."""
    from pykvm import VM
    from pykvm.exits import Halt

    with VM(MEMORY, backend="kvm") as vm:
        vm.load(HLT)
        exit = vm.run()
        assert isinstance(exit, Halt), exit


def extension_life() -> Callable[[], None]:
    """A life at the level of the extension: descriptors and ioctls."""
    from pykvm import _kvm
    from pykvm.boot import modes
    from pykvm.exits import Halt
    from pykvm.layout import KVM_IDENTITY_MAP, KVM_TSS, REAL_MODE_IMAGE
    from pykvm.registers import Registers, SystemRegisters

    system = _kvm.System()
    no_devices: Any = None  # a HLT accesses none
    registers = Registers(rip=REAL_MODE_IMAGE)
    system_registers = modes.real_mode(SystemRegisters())

    def live() -> None:
        with system.create_vm() as vm:
            vm.set_identity_map_addr(KVM_IDENTITY_MAP)
            vm.set_tss_addr(KVM_TSS)
            fd = os.memfd_create("life", os.MFD_CLOEXEC)
            os.ftruncate(fd, MEMORY)
            with mmap.mmap(fd, MEMORY, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE) as memory:
                os.close(fd)
                vm.set_user_memory_region(0, 0, 0, memory)
                memory[REAL_MODE_IMAGE : REAL_MODE_IMAGE + 1] = HLT
                with vm.create_vcpu(0) as vcpu:
                    vcpu.set_supported_cpuid(system)
                    vcpu.set_sregs(system_registers)
                    vcpu.set_regs(registers)
                    exit = vcpu.run(no_devices)
                    assert isinstance(exit, Halt), exit
                vm.close()

    return live


def timed(live: Callable[[], None], lives: int) -> Callable[[], float]:
    """A function that returns the milliseconds of one life, as an average over `lives`."""

    def run() -> float:
        start = perf_counter_ns()
        for _ in range(lives):
            live()
        return (perf_counter_ns() - start) / lives / 1e6

    return run


def measure(quick: bool) -> common.Report:
    common.require_kvm()
    common.stay_on_one_cpu()
    rounds, lives = (4, 2) if quick else (200, 10)
    with common.Floor(common.build_program("lifecycle", "lifecycle.c")) as floor:
        samples = common.interleave(
            {
                "the floor, C": lambda: floor.round(lives)[0] / lives / 1e6,
                "pykvm.VM": timed(live_as_vm, lives),
                "pykvm._kvm": timed(extension_life(), lives),
            },
            rounds,
        )
    report = common.Report("A life of a machine", ("level", "ms", "times the floor", "ms above the floor"))
    base = samples["the floor, C"]
    report.row("the floor, C", common.estimate(base).text(3), "1", "0")
    for name in ("pykvm.VM", "pykvm._kvm"):
        ratio, above = common.ratio(samples[name], base), common.difference(samples[name], base)
        report.row(name, common.estimate(samples[name]).text(3), ratio.text(), above.text(3))
        report.claims.append(common.Claim(f"a life, {name} / floor", ratio, 1.15))
    return report


if __name__ == "__main__":
    common.main(__doc__.splitlines()[0], measure)
