"""Bad input: one clear message, the right status, never a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.command import GUESTS, ROOT, STRANGER, boot, pykvm

HELLO = str(GUESTS / "hello.bin")


def spelled_out(value: str | tuple[str, ...]) -> str:
    """The name of a test: its arguments, or what is expected."""
    return (value if isinstance(value, str) else " ".join(value)).replace(f"{ROOT}/", "")


def message(errors: bytes) -> str:
    """What standard error says; it is from us, and one paragraph."""
    text = errors.decode()
    assert text.startswith("pykvm")
    assert text.endswith("\n")
    assert "Traceback" not in text
    assert "\n\n" not in text
    return text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "say what to do"),
        (("start",), "no command 'start'"),
        (("boot",), "give either an IMAGE or --bios"),
        (("boot", HELLO, "--bios", HELLO), "give either an IMAGE or --bios"),
        (("boot", HELLO, HELLO), "too many"),
        (("boot", HELLO, "--color"), "no option --color"),
        (("boot", HELLO, "--timeout"), "needs a value"),
        (("boot", HELLO, "--memory", "3"), "multiple of 4096"),
        (("boot", HELLO, "--memory", "4097"), "multiple of 4096"),
        (("boot", HELLO, "--memory", "0"), "not a positive"),
        (("boot", HELLO, "--memory", "-1"), "not a positive"),
        (("boot", HELLO, "--memory", "abc"), "write it like 64M"),
        (("boot", HELLO, "--memory", "nanM"), "'nanM'"),
        (("boot", HELLO, "--memory", "infG"), "'infG'"),
        (("boot", HELLO, "--cpus", "0"), "from 1 to 255"),
        (("boot", HELLO, "--cpus", "300"), "from 1 to 255"),
        (("boot", HELLO, "--cpus", "-1"), "from 1 to 255"),
        (("boot", HELLO, "--cpus", "x"), "from 1 to 255"),
        (("boot", HELLO, "--cpus", "²"), "from 1 to 255"),
        (("boot", HELLO, "--mode", "virtual"), "real, protected, long"),
        (("boot", HELLO, "--backend", "xen"), "auto, kvm, emulator"),
        (("boot", HELLO, "--load-address", "-1"), "negative"),
        (("boot", HELLO, "--load-address", "here"), "such as 0x8000"),
        (("boot", HELLO, "--timeout", "-1"), "not a length of time"),
        (("boot", HELLO, "--timeout", "nan"), "not a length of time"),
        (("boot", HELLO, "--timeout", "inf"), "not a length of time"),
        (("boot", HELLO, "--timeout", "soon"), "not a number of seconds"),
        (("doctor", "--what"), "--what"),
    ],
    ids=spelled_out,
)
def test_wrong_usage_is_2(arguments: tuple[str, ...], expected: str) -> None:
    done = pykvm(*arguments)

    assert (done.returncode, done.stdout) == (2, b"")
    assert expected in done.stderr.decode()
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("missing.bin",), "No such file"),
        (("guests",), "not a regular file"),
        (("/dev/null",), "not a regular file"),
        (("/proc/self/mem",), "'/proc/self/mem'"),
        (("--bios", "missing.bin"), "No such file"),
        (("--bios", HELLO), "multiple of 4 KiB"),
        ((HELLO, "--module", "missing.bin x"), "missing.bin"),
        ((HELLO, "--module", HELLO), "no place for a command line or modules"),
        ((HELLO, "--append", "quiet"), "no place for a command line or modules"),
        ((HELLO, "--memory", "4K"), "give the machine at least"),
        ((HELLO, "--memory", "4000T"), "ask for at most"),
        ((HELLO, "--memory", "5000000T"), "52 bits"),
        ((HELLO, "--load-address", "0x4000000", "--memory", "80M"), "real mode"),
        ((HELLO, "--mode", "long", "--load-address", "0x4000000"), "give the machine at least"),
        ((HELLO, "--mode", "long", "--load-address", "0x1000"), "overlaps"),
        ((HELLO, "--load-address", "0x10000000000000000"), "0x10000000000000000"),
        ((HELLO, "--debug-port", "0x3f8"), "overlaps"),
        ((HELLO, "--debug-port", "0x10000"), "outside"),
        ((HELLO, "--trace", "/missing/trace"), "cannot write the trace to /missing/trace"),
        ((HELLO, "--trace", "guests"), "cannot write the trace to guests"),
        ((HELLO, "--trace", "/dev/full"), "No space left"),
        ((HELLO, "--backend", "emulator", "--cpus", "2"), "the emulator has one"),
        ((str(STRANGER), "--mode", "long"), "protected mode"),
        ((str(STRANGER), "--load-address", "0"), "drop the load address"),
    ],
    ids=spelled_out,
)
def test_what_cannot_be_run_is_125(arguments: tuple[str, ...], expected: str) -> None:
    done = boot(*arguments)

    assert done.returncode == 125
    assert expected in message(done.stderr)


@pytest.mark.parametrize("length", [1, 52, 100, 200, 4200])
def test_a_truncated_kernel_is_refused_or_fails(tmp_path: Path, length: int) -> None:
    image = tmp_path / "kernel"
    image.write_bytes(STRANGER.read_bytes()[:length])

    done = boot(image, "--timeout", "0.1")

    assert done.returncode in (124, 125, 126)
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (b"", "empty"),
        (b"\x7fELF", "ELF"),
        (b"\x7fELF\x02\x01\x01" + bytes(57), "ELF"),
        (b"\x02\xb0\xad\x1b\x03\x00\x01\x00\xfb\x4f\x51\xe4", "Multiboot"),
    ],
    ids=["empty", "elf-magic", "elf-header", "multiboot"],
)
def test_a_malformed_image_is_125(tmp_path: Path, start: bytes, expected: str) -> None:
    image = tmp_path / "image"
    image.write_bytes(start)

    done = boot(image)

    assert done.returncode == 125
    assert expected.lower() in message(done.stderr).lower()


@pytest.mark.parametrize(
    ("size", "expected"), [(8 << 20, "give the machine at least"), (1 << 40, "images go up to")]
)
def test_an_oversized_image_is_125(tmp_path: Path, size: int, expected: str) -> None:
    image = tmp_path / "sparse"
    with image.open("wb") as file:
        file.truncate(size)

    done = boot(image, "--memory", "4M")

    assert done.returncode == 125
    assert expected in message(done.stderr)
