"""The benchmarks: their arithmetic, and that each of them still runs."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import common
from pykvm import backends

BENCHMARKS = Path(common.__file__).parent
SCRIPTS = ("exits", "guests", "lifecycle", "startup")


def why_impossible() -> str:
    """What this host lacks to run them, or nothing."""
    tools = {"cc": os.environ.get("CC", "cc"), "objcopy": "objcopy"}
    missing = [name for name, tool in tools.items() if shutil.which(tool) is None]
    if importlib.util.find_spec("Cython") is None:
        missing.append("cython")
    if missing:
        return f"benchmarks need {', '.join(missing)}"
    return backends.get("kvm").why_unavailable() or ""


WHY_IMPOSSIBLE = why_impossible()


def test_the_estimate_of_many_samples_is_narrower_than_their_range() -> None:
    found = common.estimate(range(1, 102))

    assert found.median == 51
    assert 1 < found.low < 51 < found.high < 101


def test_the_estimate_of_few_samples_spans_all_of_them() -> None:
    assert common.estimate([3.0, 1.0, 2.0]) == common.Estimate(2.0, 1.0, 3.0)


def test_a_ratio_is_taken_pair_by_pair() -> None:
    assert common.ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]) == common.Estimate(2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("at_least", "limit", "verdict"),
    [
        (False, 3.0, "met"),
        (False, 2.0, "undecided"),
        (False, 0.5, "missed"),
        (True, 1.0, "met"),
        (True, 2.0, "undecided"),
        (True, 3.5, "missed"),
    ],
)
def test_a_claim_is_decided_by_its_whole_interval(at_least: bool, limit: float, verdict: str) -> None:
    claim = common.Claim("a claim", common.Estimate(2.0, 1.0, 3.0), limit, at_least)

    assert claim.verdict == verdict


def test_candidates_take_turns() -> None:
    order: list[str] = []

    def note(name: str) -> float:
        order.append(name)
        return 1.0

    common.interleave({"a": lambda: note("a"), "b": lambda: note("b")}, 3)

    assert "".join(order) == "ab" + "abbaab"


@pytest.mark.skipif(bool(WHY_IMPOSSIBLE), reason=WHY_IMPOSSIBLE or "possible")
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_runs(script: str) -> None:
    done = subprocess.run(
        [sys.executable, BENCHMARKS / f"{script}.py", "--quick", "--json"], capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["rows"]
    assert {claim["verdict"] for claim in report["claims"]} <= {"met", "missed", "undecided"}


@pytest.mark.parametrize("script", ["exits", "guests", "lifecycle"])
def test_a_benchmark_without_a_compiler_says_so(script: str) -> None:
    done = subprocess.run(
        [sys.executable, BENCHMARKS / f"{script}.py", "--quick"],
        capture_output=True,
        text=True,
        env={"PATH": "", "PYTHONPATH": str(common.ROOT), "CC": "no-such-compiler"},
    )

    assert done.returncode == 1
    assert done.stderr.startswith(f"{script}.py: ")
    assert "Traceback" not in done.stderr
