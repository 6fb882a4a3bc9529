"""Fixtures for tests of the command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pykvm import backends
from pykvm.kvm.probe import ring0_native

MakeImage = Callable[[bytes], Path]


@pytest.fixture(params=backends.NAMES)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend that works here, or of the one that a test names itself."""
    name: str = request.param
    why = backends.get(name).why_unavailable()
    if why is not None:
        pytest.skip(why)
    return name


@pytest.fixture
def image(tmp_path: Path) -> MakeImage:
    """Writes the code of a guest to a file and returns its path."""

    def write(code: bytes) -> Path:
        path = tmp_path / "guest.bin"
        path.write_bytes(code)
        return path

    return write


@pytest.fixture
def kernel_arguments(backend: str) -> str:
    """What the Multiboot kernel must be told: where KVM interprets ring 0, 32-bit IRET is missing."""
    return "one two" if backend == "emulator" or ring0_native() else "one two noirq"
