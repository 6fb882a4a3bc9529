"""Standard files: the guest's serial line is on standard input and output, and nothing else is."""

from __future__ import annotations

import os
import random
import shlex
import subprocess
import time
from pathlib import Path
from subprocess import PIPE, CompletedProcess, Popen

import pytest

from tests.cli.command import (
    BOOT,
    COMMAND,
    EOT,
    GUESTS,
    LIMIT,
    ROOT,
    TALK,
    boot,
    exit_with,
    read_until,
    start,
)
from tests.cli.conftest import MakeImage


def in_shell(command: str, *arguments: object) -> CompletedProcess[bytes]:
    """Run a shell command in which ``$@`` is ``pykvm boot`` with the arguments."""
    return subprocess.run(
        ["sh", "-c", command, "sh", *BOOT, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        timeout=LIMIT,
    )


def test_output_is_the_guests_byte_for_byte(backend: str) -> None:
    done = boot(GUESTS / "hello.bin", "--backend", backend)

    assert (done.returncode, done.stdout, done.stderr) == (0, b"Hello, world!\n", b"")


def test_all_bytes_pass_in_both_directions(backend: str, image: MakeImage) -> None:
    every = bytes(set(range(256)) - {EOT[0]})

    done = boot(image(TALK), "--backend", backend, input=every + EOT)

    assert (done.returncode, done.stdout) == (7, b">" + every)


def test_output_comes_while_the_guest_still_runs(backend: str, image: MakeImage) -> None:
    with start(image(TALK), "--backend", backend) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        before = read_until(process.stdout.fileno(), b">")
        process.stdin.write(b"a line\n")
        answer = read_until(process.stdout.fileno(), b"\n")
        running = process.poll() is None
        process.communicate(EOT, timeout=10)

    assert (before, answer, running, process.returncode) == (b">", b"a line\n", True, 7)


@pytest.mark.parametrize(("backend", "size"), [("kvm", 10_000), ("emulator", 100_000)], indirect=["backend"])
def test_a_big_paste_loses_nothing(backend: str, image: MakeImage, size: int) -> None:
    paste = bytes(random.Random(0).choices(range(32, 127), k=size))

    done = boot(image(TALK), "--backend", backend, input=paste + EOT)

    assert done.stdout == b">" + paste
    assert done.returncode == 7


def test_endless_input_is_read_no_faster_than_the_guest_takes_it(image: MakeImage) -> None:
    spin = bytes.fromhex("fa eb fe")
    report = "import resource; print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    command = f"{shlex.join(BOOT)} {image(spin)} --memory 4M --timeout 0.5 </dev/zero; exit $?"

    program = f"import subprocess; print(subprocess.call({command!r}, shell=True)); {report}"
    done = subprocess.run([COMMAND[0], "-c", program], cwd=ROOT, capture_output=True, timeout=LIMIT)

    status, kilobytes = map(int, done.stdout.split())
    assert status == 124
    assert kilobytes < 60_000


@pytest.mark.parametrize("redirection", ["</dev/null", "<&-", "</dev/zero"])
def test_the_end_of_input_is_not_the_end_of_the_guest(redirection: str) -> None:
    done = in_shell(f'"$@" {redirection}', GUESTS / "hello.bin")

    assert (done.returncode, done.stdout, done.stderr) == (0, b"Hello, world!\n", b"")


@pytest.mark.parametrize(
    ("redirection", "printed"), [(">&-", b""), ("2>&-", b"Hello, world!\n"), ("<&- >&- 2>&-", b"")]
)
def test_closed_files_stay_closed(backend: str, tmp_path: Path, redirection: str, printed: bytes) -> None:
    """The next file opened has their number: it must not be KVM's or the guest's memory."""
    stdout = tmp_path / "stdout"

    done = in_shell(f'exec >{stdout}; "$@" {redirection}', GUESTS / "hello.bin", "--backend", backend)

    assert (done.returncode, done.stderr, stdout.read_bytes()) == (0, b"", printed)


def test_messages_are_lost_with_a_closed_standard_error() -> None:
    done = in_shell('"$@" 2>&-', "missing.bin")

    assert (done.returncode, done.stdout) == (125, b"")


def test_a_reader_that_goes_away_ends_the_guest_with_a_message(backend: str, image: MakeImage) -> None:
    with start(image(TALK), "--backend", backend) as process:
        assert process.stdout is not None
        read_until(process.stdout.fileno(), b">")
        process.stdout.close()
        process.stdout = None
        _, errors = process.communicate(b"anyone?", timeout=10)

    assert process.returncode == 125
    assert errors == b"pykvm: cannot write to standard output any more: Broken pipe\n"


def test_a_full_disk_ends_the_guest_with_a_message(backend: str) -> None:
    done = in_shell('"$@" >/dev/full', GUESTS / "hello.bin", "--backend", backend)

    assert done.returncode == 125
    assert done.stderr == b"pykvm: cannot write to standard output any more: No space left on device\n"


def test_a_pipe_that_is_full_and_non_blocking_gets_everything(image: MakeImage) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = b"x" * os.write(writing, bytes(b"x" * (1 << 20)))  # as much as it holds
    with Popen([*BOOT, str(image(TALK))], cwd=ROOT, stdin=PIPE, stdout=writing) as process:
        os.close(writing)
        assert process.stdin is not None
        process.stdin.write(b"words" + EOT)
        process.stdin.close()
        time.sleep(0.3)  # until the guest wants to print
        with open(reading, "rb") as pipe:
            output = pipe.read()

    assert (process.returncode, output) == (7, before + b">words")


def test_the_debug_console_is_on_standard_error(backend: str, image: MakeImage) -> None:
    code = bytes.fromhex("b0 21  e6 e9") + exit_with(0)  # mov al, '!'; out 0xe9, al

    done = boot(image(code), "--backend", backend)

    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"!")


def test_one_more_debug_port_is_on_standard_error(backend: str, image: MakeImage) -> None:
    code = bytes.fromhex("ba 02 04  b0 21  ee") + exit_with(0)  # mov dx, 0x402; mov al, '!'; out dx, al

    done = boot(image(code), "--backend", backend, "--debug-port", "0x402")

    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"!")


def test_help_into_a_pipe_that_nobody_reads_is_quiet() -> None:
    done = subprocess.run(
        ["sh", "-c", f"{{ sleep 0.2; {shlex.join(COMMAND)} boot --help; echo $? >&2; }} | true"],
        cwd=ROOT,
        capture_output=True,
        timeout=LIMIT,
    )

    assert done.stderr == b"125\n"
