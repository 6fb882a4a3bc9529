"""Fixtures for tests that hold on every backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pykvm import VM, backends


@pytest.fixture(params=backends.NAMES)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend that works here."""
    name: str = request.param
    why = backends.get(name).why_unavailable()
    if why is not None:
        pytest.skip(why)
    return name


@pytest.fixture
def vm(backend: str) -> Iterator[VM]:
    """A machine with 2 MiB of RAM and nothing else."""
    with VM("2M", backend=backend) as vm:
        yield vm
