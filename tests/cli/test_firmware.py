"""Firmware from outside the project: Debian's SeaBIOS, from the reset vector to the end of its POST."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.command import read_until, start

SEABIOS = Path("/usr/share/seabios")
NO_DEVICE = b"No bootable device."


@pytest.mark.parametrize(
    ("name", "backend"),
    [("bios.bin", "kvm"), ("bios-256k.bin", "kvm"), ("bios.bin", "emulator")],
    indirect=["backend"],
)
def test_seabios_goes_through_its_self_test(name: str, backend: str) -> None:
    if not (SEABIOS / name).exists():
        pytest.skip(f"there is no {SEABIOS / name}: apt-get install seabios")

    with start("--bios", SEABIOS / name, "--backend", backend, "--timeout", 60) as process:
        assert process.stderr is not None
        log = read_until(process.stderr.fileno(), NO_DEVICE)
        process.terminate()

    assert log.startswith(b"SeaBIOS (version ")
    assert b"RamSize: 0x04000000 [cmos]" in log
    assert b"Found 1 serial ports" in log
    assert log.endswith(NO_DEVICE)
    assert process.returncode == 143
