"""The emulator against an Intel 80286: 16,250 instructions recorded from the chip, in real mode.

`tests/data/80286/README.md` says where they come from and what a test holds. A later processor differs
from the 80286 in a few ways: `DIFFERENCES` has them with their sources, and `differences.txt`, beside the
recordings, lists every test that they concern. Those must fail, and end as the source says.
"""

from __future__ import annotations

import gzip
import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pykvm.emulator.backend import EmulatorBackend
from pykvm.exits import Debug, EmulationFailure, Exit, Halt
from pykvm.registers import DescriptorTable, Registers, Segment, SystemRegisters

DATA = Path(__file__).parents[1] / "data" / "80286"
FORMS = sorted(path.name.removesuffix(".json.gz") for path in (DATA / "forms").iterdir())

GENERAL = ("ax", "bx", "cx", "dx", "sp", "bp", "si", "di")
SEGMENTS = ("cs", "ds", "es", "ss")
REAL_MODE_FLAGS = 0x0FFF
MOST_STEPS = 300  # the longest test repeats a string instruction 127 times

UD, SS, GP = 6, 12, 13
NOTHING = None
HANDLERS = 0xF000  # in the tests of differences, the handler of vector n is at (HANDLERS + n):0

Recording = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """What processors since the 80286 do instead of what was recorded."""

    exception: int | None
    source: str


DIFFERENCES = {
    "lock": Difference(
        UD,
        "SDM volume 2, LOCK: allowed only before some read-modify-write instructions, and with a memory "
        "destination; volume 3, 'LOCK Prefix' in the chapter on compatibility. The 80286 locks anything.",
    ),
    "stack": Difference(
        SS,
        "SDM volume 3, 'Segment Wraparound' in the chapter on compatibility: a word across the end of the "
        "stack segment is #SS, across any other #GP. The 80286 raises interrupt 13 for both.",
    ),
    "restart": Difference(
        GP,
        "SDM volume 3, 'Exception Classifications': after a fault the registers are as before the "
        "instruction. The 80286 leaves an index register advanced, and the count of REP.",
    ),
    "length": Difference(
        NOTHING,
        "SDM volume 3, 'Interrupt 13' in the chapter on interrupts: an instruction may have 15 bytes. "
        "On the 80286 (its Programmer's Reference, 'Interrupt 13') it may have 10.",
    ),
    "fs-gs": Difference(
        NOTHING,
        "SDM volume 3, 'New Instructions' in the chapter on compatibility: since the Intel386 there are "
        "moves to and from FS and GS. On the 80286 they are undefined opcodes.",
    ),
}

X87 = "D8"  # recorded without an 80287, whose instructions then do nothing


def listed_differences() -> dict[tuple[str, int], tuple[str, str]]:
    """(form, index) to (reason, name)."""
    rows = [line.split(maxsplit=3) for line in (DATA / "differences.txt").read_text().splitlines()]
    return {(form, int(index)): (reason, name) for form, index, reason, name in rows}


LISTED = listed_differences()
UPSTREAM = json.loads((DATA / "metadata.json").read_text())["opcodes"]


def recordings_of(form: str) -> list[Recording]:
    """The recordings of one form, such as ``"F6.4"``."""
    tests: list[Recording] = json.loads(gzip.decompress((DATA / "forms" / f"{form}.json.gz").read_bytes()))
    return tests


def defined_flags(form: str) -> int:
    """The flags that are defined after an instruction of this form."""
    opcode, _, reg = form.partition(".")
    entry = UPSTREAM[opcode]
    mask: int = (entry["reg"][reg] if reg else entry).get("flags-mask", 0xFFFF)
    return mask & REAL_MODE_FLAGS


class EmptyBus:
    """Nothing is attached: reads are all ones."""

    def port_read(self, port: int, size: int) -> int:
        return (1 << 8 * size) - 1

    def port_write(self, port: int, size: int, value: int) -> None:
        pass

    def mmio_read(self, address: int, size: int) -> int:
        return (1 << 8 * size) - 1

    def mmio_write(self, address: int, size: int, value: int) -> None:
        pass


class Region:
    """All the memory that an 80286 can address."""

    size = 16 << 20

    def __init__(self) -> None:
        self.buffer = mmap.mmap(-1, self.size)


class Chip:
    """A real-mode machine that is set up anew for each test."""

    def __init__(self) -> None:
        region = Region()
        self.ram = region.buffer
        self.bus = EmptyBus()
        self.machine = EmulatorBackend().machine()
        self.machine.map(0, 0, region)
        self.vcpu = self.machine.vcpu(0)

    def set_up(self, test: Recording) -> None:
        """Make memory and registers what they were before the instruction."""
        regs = test["initial"]["regs"]
        for address, byte in test["initial"]["ram"]:
            self.ram[address] = byte
        self.vcpu.set_system_registers(
            SystemRegisters(
                cs=_segment(regs["cs"], type=11),
                ds=_segment(regs["ds"], type=3),
                es=_segment(regs["es"], type=3),
                ss=_segment(regs["ss"], type=3),
                idt=DescriptorTable(0, 0x3FF),
            )
        )
        general = {"r" + name: regs[name] for name in GENERAL}
        flags = regs["flags"] & REAL_MODE_FLAGS
        self.vcpu.set_registers(Registers(**general, rip=regs["ip"], rflags=flags))

    def clean_up(self, test: Recording) -> None:
        """Zero the memory that the test has used."""
        for address, _ in test["initial"]["ram"] + test["final"]["ram"]:
            self.ram[address] = 0

    def run(self) -> Exit:
        """Execute until HLT, or for as long as no test takes."""
        ended: Exit = Debug()
        for _ in range(MOST_STEPS):
            ended = self.vcpu.step(self.bus)
            if not isinstance(ended, Debug):
                break
        return ended

    def state(self) -> dict[str, int]:
        """The registers by the recordings' names."""
        registers, system = self.vcpu.registers(), self.vcpu.system_registers()
        state = {name: getattr(registers, "r" + name) & 0xFFFF for name in GENERAL}
        state |= {name: getattr(system, name).selector for name in SEGMENTS}
        return state | {"ip": registers.rip, "flags": registers.rflags & REAL_MODE_FLAGS}

    def exception(self) -> int | None:
        """The exception that one step ends in, None for none."""
        for vector in (UD, SS, GP):
            self.ram[4 * vector : 4 * vector + 4] = (HANDLERS + vector << 16).to_bytes(4, "little")
        self.vcpu.step(self.bus)
        vector = self.state()["cs"] - HANDLERS
        return vector if vector in (UD, SS, GP) else None


def _segment(selector: int, *, type: int) -> Segment:
    return Segment(base=selector << 4, selector=selector, type=type)


def pushed_flags(test: Recording, flags: int) -> dict[int, int]:
    """Where an exception pushed FLAGS, with the masks of its two bytes. (`flag_address` is made even.)"""
    if "exception" not in test:
        return {}
    regs = test["initial"]["regs"] | test["final"]["regs"]
    address = regs["ss"] * 16 + (regs["sp"] + 4 & 0xFFFF)
    return {address: flags & 0xFF, address + 1: flags >> 8}


def mismatches(chip: Chip, test: Recording, flags: int) -> list[str]:
    """Run one test; what differs from the recording, empty if nothing does."""
    chip.set_up(test)
    ended = chip.run()
    found = [] if isinstance(ended, Halt) else [f"ended in {ended}"]
    before, got = test["initial"]["regs"], chip.state()
    for name, value in (before | test["final"]["regs"]).items():
        mask = flags if name == "flags" else 0xFFFF
        if name in got and (got[name] ^ value) & mask:
            found.append(f"{name} is {got[name]:#x}, not {value:#x} (was {before[name]:#x})")
    masks = pushed_flags(test, flags)
    for address, byte in test["final"]["ram"]:
        if (chip.ram[address] ^ byte) & masks.get(address, 0xFF):
            found.append(f"[{address:#x}] is {chip.ram[address]:#x}, not {byte:#x}")
    chip.clean_up(test)
    return found


@pytest.fixture(scope="module")
def chip() -> Iterator[Chip]:
    """One machine for all tests of this module."""
    made = Chip()
    yield made
    made.machine.close()


@pytest.mark.parametrize("form", [form for form in FORMS if form != X87])
def test_an_instruction_does_what_it_did_on_the_80286(chip: Chip, form: str) -> None:
    flags = defined_flags(form)

    results = {
        f"{index} {test['name']} ({bytes(test['bytes']).hex()})": mismatches(chip, test, flags)
        for index, test in enumerate(recordings_of(form))
        if (form, index) not in LISTED
    }

    assert {name: found for name, found in results.items() if found} == {}


@pytest.mark.parametrize("form", sorted({form for form, _ in LISTED}))
def test_a_listed_difference_is_one_and_is_what_its_source_says(chip: Chip, form: str) -> None:
    tests, flags = recordings_of(form), defined_flags(form)
    for index, (reason, name) in ((i, row) for (f, i), row in LISTED.items() if f == form):
        test = tests[index]

        passed = not mismatches(chip, test, flags)
        chip.set_up(test)
        exception = chip.exception()
        chip.clean_up(test)

        assert (test["name"], passed) == (name, False)
        assert exception == DIFFERENCES[reason].exception, DIFFERENCES[reason].source


def test_arithmetic_of_the_x87_is_named_as_not_implemented(chip: Chip) -> None:
    for test in (test for index, test in enumerate(recordings_of(X87)) if (X87, index) not in LISTED):
        chip.set_up(test)
        ended = chip.run()
        chip.clean_up(test)

        assert isinstance(ended, EmulationFailure)
        assert "x87" in ended.detail
