"""Importing the package costs nothing, and booting a guest pays only for what it uses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNNEEDED = {"numpy", "Cython", "ctypes", "ioctl_opt", "asyncio", "json", "capstone"}


def modules_loaded_by(statement: str) -> set[str]:
    """The modules that `statement` adds to those of an interpreter that has just started."""
    before = "import sys; before = set(sys.modules)"
    after = "print(*set(sys.modules) - before, file=sys.stderr)"
    program = "\n".join([before, statement, after])
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT
    )
    return set(done.stderr.splitlines()[-1].split())


def test_importing_pykvm_loads_no_other_module() -> None:
    assert modules_loaded_by("import pykvm") == {"pykvm", "__future__"}


def test_a_public_name_loads_only_the_module_that_defines_it() -> None:
    loaded = modules_loaded_by("import pykvm; pykvm.Registers")
    assert {name for name in loaded if name.startswith("pykvm")} == {
        "pykvm",
        "pykvm.registers",
        "pykvm.values",
    }


@pytest.mark.parametrize("backend", ["auto", "emulator"])
def test_booting_a_guest_loads_nothing_that_it_does_not_need(backend: str) -> None:
    boot = f"from pykvm.cli import main; main(['boot', 'guests/hello.bin', '--backend', '{backend}'])"
    assert modules_loaded_by(boot) & UNNEEDED == set()
