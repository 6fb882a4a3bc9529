"""Tests of the extension on the real /dev/kvm; without one they are skipped, saying why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from pykvm.kvm.backend import KvmBackend
from tests.kvm.machines import Machine, lacks

if TYPE_CHECKING:
    from pykvm._kvm import System


@pytest.fixture(scope="session")
def system() -> Iterator[System]:
    """An open /dev/kvm."""
    backend = KvmBackend()
    why = backend.why_unavailable()
    if why is not None:
        pytest.skip(why)
    # With its last VM gone KVM switches the processor's virtualisation off. That takes time, and an
    # emulated AMD-V may hang in it: an idle VM keeps it on.
    with backend.system() as system, system.create_vm():
        yield system


@pytest.fixture
def make_machine(system: System) -> Iterator[Callable[..., Machine]]:
    """Makes machines that are closed at the end of the test."""
    machines: list[Machine] = []

    def make(**options: Any) -> Machine:
        machines.append(Machine(system, **options))
        return machines[-1]

    yield make
    for machine in machines:
        machine.close()


@pytest.fixture
def machine(make_machine: Callable[..., Machine]) -> Machine:
    """A machine with one processor and no interrupt controller."""
    return make_machine()


@pytest.fixture
def irq_machine(make_machine: Callable[..., Machine]) -> Machine:
    """A machine with one processor, and PIC, I/O APIC and local APIC in the kernel."""
    return make_machine(irqchip=True)


@pytest.fixture
def need(system: System) -> Callable[..., None]:
    """Skips the test where this host's KVM lacks a capability (KVM_CAP_*)."""

    def need(*names: str) -> None:
        missing = lacks(system, *names)
        if missing:
            pytest.skip(missing)

    return need
