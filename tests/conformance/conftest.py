"""Fixtures for tests that hold on every backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pykvm import VM, backends
from tests.conformance.limits import why_no_breakpoints, why_no_registers_after_a_triple_fault


@pytest.fixture(params=backends.NAMES)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend that works here."""
    name: str = request.param
    why = backends.get(name).why_unavailable()
    if why is not None:
        pytest.skip(why)
    return name


@pytest.fixture
def breakpoints(backend: str) -> None:
    """Skips the test where breakpoints do not work."""
    if why := why_no_breakpoints(backend):
        pytest.skip(why)


@pytest.fixture
def registers_after_a_triple_fault(backend: str) -> None:
    """Skips the test where they are lost."""
    if why := why_no_registers_after_a_triple_fault(backend):
        pytest.skip(why)


@pytest.fixture
def vm(backend: str) -> Iterator[VM]:
    """A machine with 2 MiB of RAM and nothing else."""
    with VM("2M", backend=backend) as vm:
        yield vm
