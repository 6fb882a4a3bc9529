"""The cost of an exit: served by C, by a C-level device, by Python, against a minimal C program.

    python benchmarks/exits.py [--quick] [--json]

The guest is a loop of one access, in real mode. Where KVM interprets ring 0 the loop's own two instructions
cost something too, the same for all. The time is the thread's CPU time, as nothing here ever waits: other
processes disturb it less. Claims: a C-level device costs at most 1.02 times the floor, a Python
device at most 0.5 us more than the floor.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from time import thread_time_ns
from types import ModuleType
from typing import Any

import common

MEMORY = 0xF000  # bytes; what lies above, up to 64 KiB, is MMIO that real mode reaches
MMIO = 0xF000
PORT = 0x10

LOOP = "6649 75fa f4"  # dec ecx; jnz back to the access; hlt
ACCESSES = {
    "out": "e610",  # out 0x10, al
    "in": "e410",  # in al, 0x10
    "mmio write": "8807",  # mov [bx], al
    "mmio read": "8a07",  # mov al, [bx]
}


class Latch:
    """Does what the floor does, as an ordinary device: a write sets its value, a read returns it."""

    def __init__(self) -> None:
        self.value = 0

    def read(self, offset: int, size: int) -> int:
        return self.value

    def write(self, offset: int, size: int, value: int) -> None:
        self.value = value


class BareLatch:
    """The same as an IO of its own, with no bus in between: what the run loop itself costs."""

    def __init__(self) -> None:
        self.value = 0

    def port_read(self, port: int, size: int) -> int:
        return self.value

    def mmio_read(self, address: int, size: int) -> int:
        return self.value

    def port_write(self, port: int, size: int, value: int) -> None:
        self.value = value

    def mmio_write(self, address: int, size: int, value: int) -> None:
        self.value = value


def measure(quick: bool) -> common.Report:
    common.require_kvm()
    common.stay_on_one_cpu()
    rounds, count = (4, 200) if quick else (60, 2000)
    hot_device = load_module(common.build_extension("hot_device.pyx"))
    program = common.build_program("exits", "exits.c")
    report = common.Report("An exit", ("access", "served by", "us", "times the floor", "us above the floor"))
    for access, opcode in ACCESSES.items():
        code = bytes.fromhex(opcode + LOOP)
        samples = compare(code, program, hot_device, rounds=rounds, count=count)
        add_rows(report, access, samples)
    return report


def load_module(path: Path) -> ModuleType:
    """Import a compiled module from its file."""
    name = path.name.partition(".")[0]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare(
    code: bytes, program: Path, hot_device: ModuleType, *, rounds: int, count: int
) -> dict[str, list[float]]:
    """Microseconds an exit, for everyone who can serve it."""
    with ExitStack() as stack:
        floor = stack.enter_context(common.Floor(program, code.hex(), MMIO, MEMORY))

        def run_floor() -> float:
            elapsed, served = floor.round(count)
            assert served == count, f"the floor served {served} exits of {count}"
            return elapsed / count / 1000

        candidates = {
            "the floor, C": run_floor,
            "a C-level device": stack.enter_context(Candidate(code, hot_device.HotLatch())).runner(count),
            "a Python device": stack.enter_context(Candidate(code, Latch())).runner(count),
            "Python without a bus": stack.enter_context(Candidate(code, BareLatch())).runner(count),
        }
        return common.interleave(candidates, rounds)


class Candidate:
    """A machine of pykvm whose accesses `device` serves."""

    def __init__(self, code: bytes, device: Any) -> None:
        from pykvm import VM

        self.device = device
        self.vm = VM(MEMORY, backend="kvm")
        if not isinstance(device, BareLatch):
            self.vm.attach(device, port=PORT, size=1)
            self.vm.attach(device, address=MMIO, size=0x1000)
        self.start = self.vm.load(code, mode="real")

    def runner(self, count: int) -> Callable[[], float]:
        """A function that runs `count` accesses and returns microseconds for each."""
        from pykvm.exits import Halt

        vcpu: Any = self.vm.vcpus[0]
        registers = replace(self.start.registers, rbx=MMIO, rcx=count)
        bare = isinstance(self.device, BareLatch)

        def run() -> float:
            before = self.accesses()
            vcpu.set_system_registers(self.start.system_registers)
            vcpu.set_registers(registers)
            start = thread_time_ns()
            exit = vcpu.run(self.device) if bare else self.vm.run()
            elapsed = thread_time_ns() - start
            assert isinstance(exit, Halt), exit
            assert self.accesses() - before == count, "the device has not seen every access"
            return elapsed / count / 1000

        return run

    def accesses(self) -> int:
        """How many accesses have reached the device so far."""
        statistics = self.vm.statistics()
        assert self.vm.ports.unclaimed.writes + self.vm.mmio.unclaimed.writes == 0
        if isinstance(self.device, Latch | BareLatch):
            return statistics.exits.get("KVM_EXIT_IO", 0) + statistics.exits.get("KVM_EXIT_MMIO", 0)
        return statistics.served

    def __enter__(self) -> Candidate:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.vm.close()


def add_rows(report: common.Report, access: str, samples: dict[str, list[float]]) -> None:
    floor = samples["the floor, C"]
    report.row(access, "the floor, C", common.estimate(floor).text(), "1", "0")
    for name in list(samples)[1:]:
        ratio, above = common.ratio(samples[name], floor), common.difference(samples[name], floor)
        report.row(access, name, common.estimate(samples[name]).text(), ratio.text(3), above.text())
        if name == "a C-level device":
            report.claims.append(common.Claim(f"{access}, C-level device / floor", ratio, 1.02))
        if name == "a Python device":
            report.claims.append(common.Claim(f"{access}, Python device - floor in us", above, 0.5))


if __name__ == "__main__":
    common.main(__doc__.splitlines()[0], measure)
