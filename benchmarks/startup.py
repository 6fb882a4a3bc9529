"""From the command to a guest's first byte, and to its end, against bare Python and QEMU.

    python benchmarks/startup.py [--quick] [--json]

`python -m pykvm boot guests/hello.bin` as whole processes, from spawn to first output and to exit. Claims: it
ends within 20 ms of `python -c pass`, and no later than `qemu-system-x86_64 -M microvm` with the same code as
its BIOS. Without QEMU that row is left out.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from time import perf_counter_ns

import common

GREETING = b"Hello, world!\n"
QEMU_EXIT = 1  # isa-debug-exit turns the guest's 0 into (0 << 1) | 1
IMPORT_TIME = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \|(\s+)(\S+)")
SLOWEST = 12


class Command:
    """A process to be timed, with what it must print and how it must end."""

    def __init__(self, *arguments: object, prints: bytes = b"", status: int = 0) -> None:
        self.arguments = [str(each) for each in arguments]
        self.prints = prints
        self.status = status
        self.first_output: list[float] = []  # milliseconds, a sample a run

    def run(self) -> float:
        """Run it once; returns milliseconds to its end."""
        start = perf_counter_ns()
        with subprocess.Popen(
            self.arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment(),
            bufsize=0,
        ) as process:
            assert process.stdout is not None
            output = process.stdout.read(1)
            first = perf_counter_ns()
            output += process.stdout.read()
            process.wait()
        end = perf_counter_ns()
        assert (output, process.returncode) == (self.prints, self.status), (self.arguments, output)
        self.first_output.append((first - start) / 1e6)
        return (end - start) / 1e6


def environment() -> dict[str, str]:
    """Ours, with this pykvm first and with compiled modules on disk, as every installed package has them."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONPATH": str(common.ROOT)}


def boot_command() -> Command:
    return Command(sys.executable, "-m", "pykvm", "boot", common.GUESTS / "hello.bin", prints=GREETING)


def qemu_command() -> Command | None:
    """QEMU with the devices that the guest needs and no others, or None where there is none."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        return None
    machine = (qemu, "-M", "microvm", "-accel", "kvm", "-m", "64M", "-bios", common.build_image("bios.S"))
    devices = ("-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio")
    debug_exit = ("-device", "isa-debug-exit,iobase=0xf4,iosize=1")
    return Command(*machine, *devices, *debug_exit, prints=GREETING, status=QEMU_EXIT)


def measure(quick: bool) -> common.Report:
    common.require_kvm()
    commands = {
        "python -c pass": Command(sys.executable, "-c", "pass"),
        "python -c 'import pykvm'": Command(sys.executable, "-c", "import pykvm"),
        "python -m pykvm boot hello.bin": boot_command(),
    }
    qemu = qemu_command()
    if qemu is not None:
        commands["qemu -M microvm -bios"] = qemu
    runs: dict[str, Callable[[], float]] = {name: command.run for name, command in commands.items()}
    samples = common.interleave(runs, 3 if quick else 60)
    report = common.Report("From the command to the guest", ("command", "first output, ms", "end, ms"))
    for name, command in commands.items():
        first = common.estimate(command.first_output[1:]).text(1) if command.prints else ""
        report.row(name, first, common.estimate(samples[name]).text(1))
    ours = samples["python -m pykvm boot hello.bin"]
    above = common.difference(ours, samples["python -c pass"])
    report.claims.append(common.Claim("boot - python -c pass, in ms", above, 20))
    if qemu is None:
        report.notes.append("qemu-system-x86_64 is not installed: not compared")
    else:
        ratio = common.ratio(ours, samples["qemu -M microvm -bios"])
        report.claims.append(common.Claim("boot / qemu -M microvm -bios", ratio, 1.0))
    report.notes.extend(slowest_imports())
    return report


def slowest_imports() -> list[str]:
    """The modules of a boot that take longest to import by themselves, without those they import."""
    arguments = boot_command().arguments
    command = [arguments[0], "-X", "importtime", *arguments[1:]]
    done = subprocess.run(command, capture_output=True, env=environment(), text=True)
    found = [(int(match[1]), match[4]) for match in IMPORT_TIME.finditer(done.stderr)]
    ours = sum(microseconds for microseconds, name in found if name.partition(".")[0] == "pykvm")
    slowest = ", ".join(f"{name} {us / 1000:.1f}" for us, name in sorted(found, reverse=True)[:SLOWEST])
    total = sum(microseconds for microseconds, _ in found)
    return [
        f"imports: {len(found)} modules, {total / 1000:.1f} ms, of it pykvm's own {ours / 1000:.1f} ms "
        "(as -X importtime sees it, which costs some itself)",
        f"slowest, in ms: {slowest}",
    ]


if __name__ == "__main__":
    common.main(__doc__.splitlines()[0], measure)
