"""The emulator against the processor of this host: random instructions in ring 3, on KVM and on the emulator.

Every form of the opcode table gets a few instructions with random operands, registers, flags and memory.
For longer runs::

    PYKVM_ORACLE_CASES=1000 PYKVM_ORACLE_SEED=$RANDOM pytest tests/conformance/test_oracle.py

CASES are instructions of each form (8 by default), SEED any text (always the same by default). A failure
shows the instruction, its inputs, and what is different.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from random import Random

import pytest

from pykvm import backends
from pykvm.emulator.faults import GP, SS, UD
from tests.conformance.limits import why_no_oracle
from tests.conformance.oracle import Outcome, Processor, describe
from tests.conformance.random_instructions import Form, forms, make_case

CASES = int(os.environ.get("PYKVM_ORACLE_CASES", "8"))
SEED = os.environ.get("PYKVM_ORACLE_SEED", "0")


@pytest.fixture(scope="module")
def processor() -> Iterator[Processor]:
    """The host's processor."""
    why = backends.get("kvm").why_unavailable() or why_no_oracle()
    if why is not None:
        pytest.skip(why)
    made = Processor("kvm")
    yield made
    made.close()


@pytest.fixture(scope="module")
def emulator() -> Iterator[Processor]:
    """The emulated processor."""
    made = Processor("emulator")
    yield made
    made.close()


@pytest.fixture(scope="module")
def host_kind() -> str:
    """The kind of KVM on this host."""
    from pykvm.kvm.probe import Host

    return Host.read().kind


def is_decided(processor: Outcome, emulator: Outcome, host_kind: str) -> bool:
    """Software KVM interprets what is #GP or #SS: which of them, or #UD, is not the processor's word then."""
    interpreted = host_kind == "PVM" and processor.vector in (UD, GP, SS) and emulator.vector in (GP, SS)
    return not interpreted or processor.vector == emulator.vector


@pytest.mark.kvm
@pytest.mark.parametrize("form", forms(), ids=str)
def test_an_instruction_does_what_it_does_on_this_processor(
    processor: Processor, emulator: Processor, host_kind: str, form: Form
) -> None:
    rng = Random(f"{SEED} {form}")
    cases = [make_case(rng, form) for _ in range(CASES)]

    results = [(case, processor.execute(case), emulator.execute(case)) for case in cases]

    wrong = [
        describe(case, real.differences(emulated))
        for case, real, emulated in results
        if is_decided(real, emulated, host_kind) and real.differences(emulated)
    ]
    assert not wrong, "\n" + "\n\n".join(wrong[:3])
