"""The options of boot, the other commands, and what is chosen by itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import pykvm as library
from pykvm import backends
from pykvm.options import Option, UsageError, parse
from tests.cli.command import GUESTS, HALT, boot, exit_with, patched, pykvm, run
from tests.cli.conftest import MakeImage

HELLO = GUESTS / "hello.bin"
NO_EXTENSION = "sys.modules['pykvm._kvm'] = None"
NO_KVM = "import pykvm.kvm.backend\npykvm.kvm.backend.DEVICE = '/dev/missing'"


@pytest.mark.parametrize(("name", "mode"), [("hello32", "protected"), ("hello64", "long")])
def test_mode_is_how_a_flat_binary_starts(backend: str, name: str, mode: str) -> None:
    done = boot(GUESTS / f"{name}.bin", "--backend", backend, "--mode", mode)

    assert (done.returncode, done.stdout) == (0, f"Hello, {mode} mode!\n".encode())


def test_load_address_is_where_a_flat_binary_starts(backend: str, image: MakeImage) -> None:
    # call next; next: pop ax; mov al, ah; out 0xf4, al: the exit status is the upper byte of IP.
    code = bytes.fromhex("e8 00 00  58  88 e0  e6 f4")

    done = boot(image(code), "--backend", backend, "--load-address", "0x9700")

    assert done.returncode == 0x97


def test_memory_is_what_the_guest_has(backend: str, image: MakeImage) -> None:
    # CMOS 0x34 is the low byte of the memory above 16 MiB in units of 64 KiB.
    code = bytes.fromhex("b0 34  e6 70  e4 71  e6 f4")

    done = boot(image(code), "--backend", backend, "--memory", "18M")

    assert done.returncode == (2 << 20) // (64 << 10)


@pytest.mark.parametrize("backend", ["kvm"], indirect=True)
def test_cpus_start_when_the_guest_wakes_them(backend: str) -> None:
    done = boot(GUESTS / "smp.bin", "--backend", backend, "--mode", "protected", "--cpus", 4)

    assert (done.returncode, done.stderr) == (0, b"")
    assert sorted(done.stdout.splitlines()) == [b"4 CPUs", b"CPU 1", b"CPU 2", b"CPU 3"]


def test_a_trace_has_every_access_in_order(backend: str, tmp_path: Path, image: MakeImage) -> None:
    trace = tmp_path / "trace"
    code = bytes.fromhex("ba fd 03  ec  b0 41  b2 f8  ee") + exit_with(3)  # in LSR; out THR, 'A'

    boot(image(code), "--backend", backend, "--trace", trace)

    lines = [line.partition(" ") for line in trace.read_text().splitlines()]
    assert [rest for _, _, rest in lines] == [
        "port read 0x3fd size 1 value 0x60",
        "port write 0x3f8 size 1 value 0x41",
        "port write 0xf4 size 1 value 0x3",
    ]
    times = [float(time) for time, _, _ in lines]
    assert times == sorted(times)


def test_a_trace_has_mmio_and_what_nobody_claims(backend: str, tmp_path: Path, image: MakeImage) -> None:
    trace = tmp_path / "trace"
    # mov byte ptr [0xd0000000], 5; cli; hlt, in 32-bit code
    code = bytes.fromhex("c6 05 000000d0 05") + HALT

    boot(image(code), "--mode", "protected", "--backend", backend, "--trace", trace)

    assert trace.read_text().endswith(" mmio write 0xd0000000 size 1 value 0x5\n")


def test_a_trace_to_a_dash_is_on_standard_error(image: MakeImage) -> None:
    done = boot(image(exit_with(0)), "--trace", "-")

    assert done.stdout == b""
    assert re.fullmatch(rb"\d+\.\d{6} port write 0xf4 size 1 value 0x0\n", done.stderr)


def test_stats_count_exits_and_measure_times(backend: str) -> None:
    done = boot(HELLO, "--backend", backend, "--stats")

    lines = done.stderr.decode().splitlines()
    counts = {name: int(count) for count, name in re.findall(r"^ +(\d+) (\w+)$", done.stderr.decode(), re.M)}
    assert done.stdout == b"Hello, world!\n"
    assert counts["KVM_EXIT_IO"] >= len(done.stdout) + 1
    assert ("instructions" in counts) == (backend == "emulator")
    guest, host, total = (float(ms) for ms in re.findall(r"([\d.]+) ms", done.stderr.decode()))
    assert guest > 0
    assert host > 0
    assert total == pytest.approx(guest + host, abs=0.002)
    assert lines[-1].endswith("ms")


def test_stats_tell_of_accesses_that_no_device_claims(backend: str, image: MakeImage) -> None:
    done = boot(image(bytes.fromhex("e4 99  e6 99") + HALT), "--backend", backend, "--stats")

    assert b"1 reads and 1 writes that no port device claimed" in done.stderr


@pytest.mark.parametrize(
    ("patch", "reason"),
    [(NO_EXTENSION, b"pykvm._kvm"), (NO_KVM, b"/dev/missing")],
    ids=["extension", "device"],
)
def test_auto_falls_back_to_the_emulator_with_one_line(patch: str, reason: bytes) -> None:
    done = run(patched(patch, "boot", HELLO))

    assert (done.returncode, done.stdout) == (0, b"Hello, world!\n")
    assert done.stderr.startswith(b"pykvm: using the emulator: ")
    assert reason in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_the_emulator_on_request_needs_no_line() -> None:
    done = run(patched(NO_EXTENSION, "boot", HELLO, "--backend", "emulator"))

    assert (done.returncode, done.stdout, done.stderr) == (0, b"Hello, world!\n", b"")


def test_kvm_on_request_fails_without_kvm() -> None:
    done = run(patched(NO_KVM, "boot", HELLO, "--backend", "kvm"))

    assert (done.returncode, done.stdout) == (125, b"")
    assert b"/dev/missing" in done.stderr


def test_the_doctor_says_which_backend_auto_picks() -> None:
    done = pykvm("doctor")

    picks = "kvm" if backends.get("kvm").why_unavailable() is None else "emulator"
    assert done.returncode == (0 if picks == "kvm" else 1)
    assert re.search(rb"^auto picks +" + picks.encode(), done.stdout, re.M)
    assert done.stderr == b""


def test_the_doctor_without_kvm_says_how_to_mend_it() -> None:
    done = run(patched(NO_EXTENSION, "doctor"))

    assert done.returncode == 1
    assert b"to mend it" in done.stdout
    assert re.search(rb"^auto picks +emulator, because ", done.stdout, re.M)


def test_the_doctor_speaks_json() -> None:
    report = json.loads(pykvm("doctor", "--json").stdout)

    assert report["backend"] in backends.NAMES
    assert "IRQCHIP" in report["capabilities"]


def test_version_is_that_of_the_package() -> None:
    assert pykvm("--version").stdout.decode() == f"pykvm {library.__version__}\n"


def test_help_names_every_option_that_is_understood() -> None:
    done = pykvm("boot", "--help")

    options = set(re.findall(r"^  (--[a-z-]+)", done.stdout.decode(), re.M))
    assert {"--bios", "--backend", "--memory", "--timeout", "--trace", "--stats"} < options
    assert done.returncode == 0


TABLE = (
    Option("FILE", "FILE"),
    Option("--level", "N", convert=int, default=1),
    Option("--name", "S", repeat=True),
    Option("--dry-run"),
)


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        ([], {}),
        (["a"], {"file": "a"}),
        (["-"], {"file": "-"}),
        (["--", "--level"], {"file": "--level"}),
        (["--level", "3", "a"], {"file": "a", "level": 3}),
        (["--level=-3"], {"level": -3}),
        (["--level", "3", "--level", "4"], {"level": 4}),
        (["--name", "--x", "--name=", "--name=a=b"], {"name": ("--x", "", "a=b")}),
        (["--dry-run"], {"dry_run": True}),
    ],
)
def test_options_become_values(arguments: list[str], changed: dict[str, object]) -> None:
    defaults = {"file": None, "level": 1, "name": (), "dry_run": False}

    assert parse(arguments, TABLE) == defaults | changed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b"], "'b' is one argument too many"),
        (["--lev", "3"], "no option --lev"),
        (["-l"], "no option -l"),
        (["--level"], "--level needs a value: --level N"),
        (["--dry-run=yes"], "--dry-run takes no value"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(arguments, TABLE)
