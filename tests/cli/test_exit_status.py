"""The exit status: what the guest said, or why it could not."""

from __future__ import annotations

import signal

import pytest

from tests.cli.command import (
    DESTROY_PAGE_TABLES,
    GUESTS,
    HALT,
    SPIN,
    STRANGER,
    boot,
    exit_with,
    patched,
    read_until,
    run,
    start,
)
from tests.cli.conftest import MakeImage


@pytest.mark.parametrize("status", [0, 1, 42, 255])
def test_it_is_what_the_guest_wrote_to_the_debug_exit_port(
    backend: str, image: MakeImage, status: int
) -> None:
    done = boot(image(exit_with(status)), "--backend", backend)

    assert (done.returncode, done.stdout, done.stderr) == (status, b"", b"")


def test_with_qemu_exit_it_follows_the_convention_of_qemu(backend: str, image: MakeImage) -> None:
    done = boot(image(exit_with(0x10)), "--backend", backend, "--qemu-exit")

    assert (done.returncode, done.stderr) == (33, b"")


def test_a_final_halt_is_0(backend: str, image: MakeImage) -> None:
    done = boot(image(HALT), "--backend", backend)

    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_timeout_is_124(backend: str, image: MakeImage) -> None:
    done = boot(image(SPIN), "--backend", backend, "--timeout", "0.2")

    assert (done.returncode, done.stdout) == (124, b">")
    assert b"still running" in done.stderr


@pytest.mark.parametrize(
    "code", [DESTROY_PAGE_TABLES, (GUESTS / "triple.bin").read_bytes()], ids=["page-tables", "triple"]
)
def test_a_guest_that_dies_is_126_and_explained(backend: str, image: MakeImage, code: bytes) -> None:
    done = boot(image(code), "--backend", backend, "--mode", "long", "--timeout", 30)

    assert (done.returncode, done.stdout) == (126, b"")
    assert b"triple fault" in done.stderr
    assert b"rip " in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_is_128_and_its_number(
    backend: str, image: MakeImage, number: signal.Signals, status: int
) -> None:
    with start(image(SPIN), "--backend", backend) as process:
        assert process.stdout is not None
        read_until(process.stdout.fileno(), b">")
        process.send_signal(number)
        output, errors = process.communicate(timeout=10)

    assert (process.returncode, output, errors) == (status, b"", b"")


def test_nohup_stays_in_force(image: MakeImage) -> None:
    ignore = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    send = "import threading, os; threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGHUP)).start()"

    done = run(patched(f"{ignore}\n{send}", "boot", image(SPIN), "--timeout", 0.5))

    assert done.returncode == 124


def test_a_kernel_from_elsewhere_runs_as_it_does_under_qemu(backend: str, kernel_arguments: str) -> None:
    module = f"{STRANGER.parent / 'kernel.ld'} first second"

    done = boot(
        STRANGER,
        *("--backend", backend, "--qemu-exit", "--timeout", 30),
        *("--append", kernel_arguments, "--module", module, "--module", STRANGER.parent / "build.sh"),
    )

    lines = done.stdout.decode().splitlines()
    size = (STRANGER.parent / "kernel.ld").stat().st_size
    assert done.returncode == 33, done
    assert f"command line: {kernel_arguments}" in lines
    assert "modules: 2" in lines
    assert any(line.startswith(f"  '{module}' {size} bytes, sum ") for line in lines)
    assert lines[-1].startswith("timer: 5 ticks")


def test_an_error_inside_is_125_without_a_traceback(image: MakeImage) -> None:
    patch = "import pykvm.devices.debug as debug\ndel debug.DebugExit._stop"

    done = run(patched(patch, "boot", image(exit_with(0))))

    assert (done.returncode, done.stdout) == (125, b"")
    assert done.stderr.startswith(b"pykvm: internal error: AttributeError: ")
    assert done.stderr.count(b"\n") == 1
