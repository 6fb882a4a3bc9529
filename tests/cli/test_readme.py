"""README.md is true: its examples run, its options and tables are the real ones, its links lead somewhere."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from pykvm import backends
from tests.cli.command import GUESTS, ROOT, pykvm
from tests.conformance.guest_contracts import all_guests
from tests.conformance.limits import why_no_registers_after_a_triple_fault

README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```(?:\n```text\n(.*?)```)?", README, re.DOTALL)
COMMANDS = re.findall(r"```sh\npython -m pykvm (.*?)\n```(?:\n```text\n(.*?)```)?", README, re.DOTALL)
TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)


def run_example(code: str) -> str:
    """Execute `code` and the tests that it defines; returns what it prints."""
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, names)
        for test in [each for name, each in names.items() if name.startswith("test_")]:
            assert callable(test)
            test()
    return printed.getvalue()


@pytest.mark.parametrize(("code", "shown"), EXAMPLES)
def test_an_example_prints_what_is_below_it(
    code: str, shown: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("pykvm.vm.choose", lambda name: (backends.get(backend), None))

    assert run_example(code) == shown


def test_the_options_are_those_of_the_help() -> None:
    assert f"```text\n{pykvm('boot', '--help').stdout.decode()}```" in README


@pytest.mark.parametrize(("command", "shown"), [each for each in COMMANDS if each[1]])
def test_a_command_prints_the_lines_shown_in_their_order(command: str, shown: str, backend: str) -> None:
    if "triple" in command and (why := why_no_registers_after_a_triple_fault(backend)):
        pytest.skip(why)

    done = pykvm(*shlex.split(command), "--backend", backend)

    parts = [re.escape(part) for part in shown.split("...")]
    assert re.search(".*?".join(parts), (done.stdout + done.stderr).decode(), re.DOTALL)


def test_the_guests_are_all_there_with_their_modes() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (real|protected|long) \|", README, re.MULTILINE)

    assert sorted(rows) == sorted((guest.name, guest.mode) for guest in all_guests())


def test_the_table_of_guests_is_that_of_their_own_readme() -> None:
    described = {row for row in (GUESTS / "README.md").read_text().splitlines() if row.startswith("| `hello")}

    assert described
    assert described <= set(README.splitlines())


def test_the_measurements_are_those_of_the_benchmarks() -> None:
    tables = TABLE.findall(README.partition("## How fast it is")[2].partition("\n## ")[0])

    assert len(tables) == 2
    assert set(tables) <= set(TABLE.findall((ROOT / "benchmarks/RESULTS.md").read_text()))


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(((?!https?:)[^)]+)\)", README))))
def test_a_link_leads_to_a_file(target: str) -> None:
    assert Path(ROOT, target).exists()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`make (\w+)`|^make (\w+)", README, re.MULTILINE))))
def test_a_make_target_exists(target: tuple[str, str]) -> None:
    assert re.search(f"^{''.join(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
