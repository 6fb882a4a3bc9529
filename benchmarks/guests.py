"""How fast guests run: user mode on KVM against the same code natively, and KVM against the emulator.

    python benchmarks/guests.py [--quick] [--json]

guests/sieve.inc is the code of the guest ring3, and here a function in a C program: the same bytes. Claim:
on KVM it reaches at least 0.95 of the native speed. Then every guest runs on every backend, from its
first instruction to its end.
"""

from __future__ import annotations

from time import perf_counter_ns, thread_time_ns
from typing import TYPE_CHECKING

import common

if TYPE_CHECKING:
    from tests.conformance.guest_contracts import GuestContract

PRIMES = 78498
PARAMETER = slice(8, 16)  # where a guest's parameter is in its image
PATIENCE = 3000  # milliseconds after which a guest is not run again for a better estimate
QUICK = ("hello", "hello64", "mmio")
SIEVE_FLAGS = (f"-Wa,-I{common.GUESTS}",)


def measure(quick: bool) -> common.Report:
    common.require_kvm()
    rounds, count = (2, 20) if quick else (15, 800)
    with common.Floor(common.build_program("sieve", "sieve.c", "sieve.S", flags=SIEVE_FLAGS)) as floor:

        def natively() -> float:
            elapsed, primes = floor.round(count)
            assert primes == PRIMES, primes
            return elapsed / count / 1e6

        samples = common.interleave({"native": natively, "ring 3": lambda: count_primes(count)}, rounds)
    native, guest = samples["native"], samples["ring 3"]
    speed = common.ratio(native, guest)
    report = common.Report("Guests", ("guest", "kvm, ms", "emulator, ms", "emulator / kvm"))
    report.claims.append(common.Claim("native time / time in ring 3 on KVM", speed, 0.95, at_least=True))
    report.notes.append(
        f"one sieve: native {common.estimate(native).text(3)} ms, ring 3 {common.estimate(guest).text(3)} ms"
    )
    compare_backends(report, quick)
    return report


def count_primes(times: int) -> float:
    """CPU milliseconds of a count in ring 3 on KVM, with a share of the machine's start and end."""
    from pykvm import VM, Pc
    from pykvm.exits import Stopped

    image = bytearray((common.GUESTS / "ring3.bin").read_bytes())
    image[PARAMETER] = times.to_bytes(8, "little")
    output = bytearray()
    with VM("64M", backend="kvm") as vm:
        pc = Pc(vm, output=output.extend)
        vm.load(image, mode="long")
        start = thread_time_ns()
        exit = vm.run(timeout=60)
        elapsed = thread_time_ns() - start
        pc.close()
    assert isinstance(exit, Stopped), exit
    assert output == b"%d\n" % PRIMES, output
    return elapsed / times / 1e6


def compare_backends(report: common.Report, quick: bool) -> None:
    """A row for each guest that ends by itself: its time on each backend, or why there is none."""
    from tests.conformance.guest_contracts import all_guests

    rounds = 1 if quick else 9
    for guest in all_guests():
        if guest.exit.kind == "timeout" or (quick and guest.name not in QUICK):
            continue
        times = {backend: time_on(backend, guest, rounds) for backend in ("kvm", "emulator")}
        kvm, emulator = times["kvm"], times["emulator"]
        if isinstance(kvm, common.Estimate) and isinstance(emulator, common.Estimate):
            factor = f"{emulator.median / kvm.median:.3g}"
        else:
            factor = "-"
        report.row(guest.name, cell(kvm), cell(emulator), factor)


def cell(time: common.Estimate | str) -> str:
    return time if isinstance(time, str) else time.text()


def time_on(backend: str, guest: GuestContract, rounds: int) -> common.Estimate | str:
    """Milliseconds from the guest's first instruction to its end, or why it does not run there."""
    if backend not in guest.backends:
        return "not meant for it"
    samples: list[float] = []
    try:
        while len(samples) < rounds and sum(samples) < PATIENCE:
            samples.append(run_once(backend, guest))
        return common.estimate(samples)
    except Exception as error:  # whatever keeps it from running belongs into its row
        return f"{type(error).__name__}: {error}".partition("\n")[0]


def run_once(backend: str, guest: GuestContract) -> float:
    from pykvm import VM, Pc
    from tests.conformance.harness import COUNTER_ADDRESS, FIFO_PORT, Counter, Fifo

    output = bytearray()
    with VM("64M", backend=backend, cpus=guest.cpus, irqchip="irqchip" in guest.devices) as vm:
        pc = Pc(vm, output=output.extend)
        vm.attach(Counter(), address=COUNTER_ADDRESS, size=0x1000)
        vm.attach(Fifo(), port=FIFO_PORT, size=4)
        pc.serial.receive(guest.input)
        vm.load(guest.image.read_bytes(), mode=guest.mode)
        start = perf_counter_ns()
        vm.run(timeout=60)
        elapsed = perf_counter_ns() - start
        pc.close()
    if not guest.accepts(bytes(output)):
        raise common.Impossible(f"printed {bytes(output)!r}")
    return elapsed / 1e6


if __name__ == "__main__":
    common.main(__doc__.splitlines()[0], measure)
