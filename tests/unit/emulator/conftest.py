"""Fixtures: a guest with and without interrupt controllers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.emulator.guest import Guest


@pytest.fixture
def guest() -> Iterator[Guest]:
    """A guest without interrupt controllers."""
    made = Guest()
    yield made
    made.machine.close()


@pytest.fixture
def timer_guest() -> Iterator[Guest]:
    """A guest with PIC and PIT."""
    made = Guest(irqchip=True)
    yield made
    made.machine.close()
