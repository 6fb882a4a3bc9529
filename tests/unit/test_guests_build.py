"""The guests' committed images are what their sources build to, and every contract is whole."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conformance.guest_contracts import (
    GUESTS,
    ContractError,
    GuestContract,
    GuestExit,
    all_guests,
    parse,
)

CONTRACTS = {contract.name: contract for contract in all_guests()}
WHOLE = 'Mode: real\nPrints: ""\nExit: timeout'

needs_binutils = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("make", "as", "ld")),
    reason="rebuilding the guests needs make and GNU binutils (apt install make binutils)",
)


def write_guest(directory: Path, fields: str, title: str = "sample: does nothing.") -> Path:
    comment = "\n".join(f" * {line}".rstrip() for line in f"{title}\n\n{fields}".split("\n"))
    path = directory / "sample.S"
    path.write_text(f"/*\n{comment}\n */\n        .code16\n")
    return path


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("guests")
    subprocess.run(
        ["make", "--no-print-directory", "-C", str(GUESTS), f"OUT={output}"], check=True, capture_output=True
    )
    return output


@needs_binutils
@pytest.mark.parametrize("name", CONTRACTS)
def test_committed_image_is_what_its_source_builds_to(name: str, rebuilt: Path) -> None:
    assert CONTRACTS[name].image.read_bytes() == (rebuilt / f"{name}.bin").read_bytes()


def test_every_source_has_an_image_and_every_image_a_source() -> None:
    images = {path.stem for path in GUESTS.glob("*.bin")}
    assert images == set(CONTRACTS)


def test_the_table_in_the_readme_names_every_guest_and_its_mode() -> None:
    readme = (GUESTS / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", readme, re.MULTILINE)
    assert dict(rows) == {name: contract.mode for name, contract in CONTRACTS.items()}


@pytest.mark.parametrize("contract", CONTRACTS.values(), ids=CONTRACTS)
def test_input_is_given_only_to_guests_that_print_something(contract: GuestContract) -> None:
    assert not contract.input or not contract.accepts(b"")


@pytest.mark.parametrize(
    "contract", [c for c in CONTRACTS.values() if c.parameter is not None], ids=lambda contract: contract.name
)
def test_default_parameter_is_the_quadword_at_offset_8(contract: GuestContract) -> None:
    assert int.from_bytes(contract.image.read_bytes()[8:16], "little") == contract.parameter


def test_contract_with_every_field_is_parsed(tmp_path: Path) -> None:
    path = write_guest(
        tmp_path,
        'Mode:      long\nInput:     "a\\n"\nPrints:    "one\\n"\n           "two\\n"\n'
        "Exit:      debug-exit 0x2a\nDevices:   irqchip, cmos\nCpus:      2\nParameter: 0x40\nBackends:  kvm",
    )

    assert parse(path) == GuestContract(
        name="sample",
        summary="does nothing.",
        mode="long",
        prints=b"one\ntwo\n",
        exit=GuestExit("debug-exit", status=42),
        input=b"a\n",
        devices=("irqchip", "cmos"),
        cpus=2,
        parameter=64,
        backends=("kvm",),
    )


def test_halt_names_the_registers_that_count(tmp_path: Path) -> None:
    path = write_guest(tmp_path, 'Mode: long\nPrints: ""\nExit: halt rax=0x10 rbx=2')
    assert parse(path).exit == GuestExit("halt", registers=(("rax", 16), ("rbx", 2)))


def test_pattern_must_match_the_whole_output(tmp_path: Path) -> None:
    contract = parse(write_guest(tmp_path, r"Mode: real" "\n" r"Prints: /\d+\n/" "\nExit: timeout"))
    assert contract.accepts(b"123\n")
    assert not contract.accepts(b"123\n4")


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ('Prints: ""\nExit: timeout', "lacks Mode"),
        ("Mode: real", "lacks Prints, Exit"),
        (f"{WHOLE}\nExit: shutdown", "repeated field"),
        (f"{WHOLE}\nColour: blue", "unknown or repeated field in 'Colour: blue'"),
        (WHOLE.replace("real", "virtual"), "Mode has virtual; known are real, protected, long"),
        (f"{WHOLE}\nDevices: toaster", "Devices has toaster"),
        (f"{WHOLE}\nCpus: many", "many"),
        (WHOLE.replace("timeout", "debug-exit"), "unknown exit: 'debug-exit'"),
        (WHOLE.replace("timeout", "halt rax"), "sample.S"),
        (WHOLE.replace('""', "7"), "not a string literal: 7"),
        (WHOLE.replace('""', '"unclosed'), "sample.S"),
        (WHOLE.replace('""', "/(/"), "sample.S"),
    ],
)
def test_contract_that_is_not_whole_is_refused(tmp_path: Path, fields: str, complaint: str) -> None:
    path = write_guest(tmp_path, fields)
    with pytest.raises(ContractError, match=re.escape(complaint)):
        parse(path)


def test_contract_under_another_name_is_refused(tmp_path: Path) -> None:
    path = write_guest(tmp_path, WHOLE, title="other: does nothing.")
    with pytest.raises(ContractError, match='must be "sample: "'):
        parse(path)


def test_source_without_a_contract_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sample.S"
    path.write_text("        .code16\n")
    with pytest.raises(ContractError, match="does not begin with a contract"):
        parse(path)
