"""docs/library.md: every example runs on every backend and prints what the page says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from pykvm import backends
from tests.conformance import limits

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "library.md"

# What some examples need beyond a backend, by a word in them
LIMITS = {
    "set_breakpoints": limits.why_no_breakpoints,
    "failure.registers": limits.why_no_registers_after_a_triple_fault,
    "ring=3": limits.why_no_ports_in_ring3,
}

EXAMPLE = re.compile(
    r"(?:<!-- backends: (?P<backends>[a-z ]+) -->\n)?"
    r"```python\n(?P<code>.*?)```\n```text\n(?P<prints>.*?)```",
    re.DOTALL,
)


@dataclass(frozen=True)
class Example:
    """A block of code, what it prints, and the backends that can run it."""

    line: int
    code: str
    prints: str
    backends: tuple[str, ...]


def examples() -> list[Example]:
    text = PAGE.read_text()
    return [
        Example(
            text.count("\n", 0, match.start("code")) + 1,
            match["code"],
            match["prints"],
            tuple((match["backends"] or "kvm emulator").split()),
        )
        for match in EXAMPLE.finditer(text)
    ]


def test_every_block_of_code_is_an_example_with_its_output() -> None:
    assert len(examples()) == PAGE.read_text().count("```python") > 0


@pytest.mark.parametrize("example", examples(), ids=lambda example: f"line{example.line}")
def test_the_example_prints_what_the_page_says(
    example: Example, backend: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if backend not in example.backends:
        pytest.skip(f"the page says that only {' '.join(example.backends)} can")
    for word, why_not in LIMITS.items():
        if word in example.code and (why := why_not(backend)):
            pytest.skip(why)
    monkeypatch.setattr("pykvm.vm.choose", lambda name: (backends.get(backend), None))
    monkeypatch.chdir(ROOT)

    exec(compile("\n" * (example.line - 1) + example.code, str(PAGE), "exec"), {})

    assert capsys.readouterr().out == example.prints
