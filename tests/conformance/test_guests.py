"""Every guest on every backend: the exit, the output and the registers that its contract promises."""

from __future__ import annotations

import pytest

from pykvm import backends
from tests.conformance.guest_contracts import GuestContract, all_guests
from tests.conformance.harness import ended_as, run_guest

GUESTS = all_guests()
CASES = [
    pytest.param(guest, backend, id=f"{guest.name}-{backend}")
    for guest in GUESTS
    for backend in backends.NAMES
]


def skip_unless_possible(guest: GuestContract, backend: str) -> None:
    why = backends.get(backend).why_unavailable()
    if why is not None:
        pytest.skip(why)
    if backend not in guest.backends:
        pytest.skip(f"the contract of {guest.name} leaves {backend} out")


@pytest.mark.parametrize(("guest", "backend"), CASES)
def test_guest_keeps_its_contract(guest: GuestContract, backend: str) -> None:
    skip_unless_possible(guest, backend)

    outcome = run_guest(guest, backend)

    assert guest.accepts(outcome.output), outcome
    assert ended_as(guest.exit, outcome), outcome


# What a triple fault leaves in the registers is not architectural (AMD-V resets them), and a guest that is
# stopped while it runs stands anywhere.
DETERMINISTIC = [
    guest
    for guest in GUESTS
    if isinstance(guest.prints, bytes)
    and len(guest.backends) > 1
    and guest.exit.kind in ("debug-exit", "halt")
]


@pytest.mark.parametrize("guest", DETERMINISTIC, ids=lambda guest: guest.name)
def test_backends_agree_on_the_registers_at_the_end(guest: GuestContract) -> None:
    for backend in backends.NAMES:
        skip_unless_possible(guest, backend)

    on_kvm, on_emulator = (run_guest(guest, backend) for backend in backends.NAMES)

    assert on_kvm.output == on_emulator.output
    assert on_kvm.registers == on_emulator.registers
