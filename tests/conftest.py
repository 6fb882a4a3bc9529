"""What every test shares: how Hypothesis runs here, and which needs of a test this machine meets."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from pykvm import backends
from pykvm.kvm.probe import Host, ring0_native

# No deadlines: on a busy machine they would fail tests at random. On CI the same examples every time.
settings.register_profile("pykvm", deadline=None, derandomize="CI" in os.environ, print_blob=True)
settings.load_profile("pykvm")

KVM_TESTS = Path(__file__).parent / "kvm"


def why_no_ring0() -> str | None:
    return None if ring0_native() else "this KVM interprets ring 0"


# Per marker: why this machine does not have it, or None
NEEDS = {
    "linux": lambda: None if sys.platform == "linux" else f"needs Linux, this is {sys.platform}",
    "kvm": backends.get("kvm").why_unavailable,
    "ring0_native": why_no_ring0,
}


def pytest_report_header() -> str:
    why = NEEDS["kvm"]()
    kind = Host.read().kind or "of an unknown kind"
    return f"kvm: {why}" if why else f"kvm: {kind}, ring 0 {'native' if ring0_native() else 'interpreted'}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs KVM: a directory, and the tests that run on each backend."""
    for item in items:
        parameters = (
            item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        )
        if KVM_TESTS in item.path.parents or parameters.get("backend") == "kvm":
            item.add_marker("kvm")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests whose needs this machine does not meet."""
    for need, why_missing in NEEDS.items():
        if item.get_closest_marker(need) and (why := why_missing()):
            pytest.skip(why)
