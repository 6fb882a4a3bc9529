"""The request numbers, structures and names of `pykvm.kvm.abi` against the installed <linux/kvm.h>."""

from __future__ import annotations

import ctypes
import inspect
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pykvm.kvm import abi, stats, structs

STRUCTURES = {
    name: value
    for name, value in inspect.getmembers(abi, inspect.isclass)
    if name.startswith("kvm_") and issubclass(value, ctypes.Structure)
}

FLAGS = {
    name: value
    for name, value in (vars(structs) | vars(stats)).items()
    if name.startswith(("KVM_", "GUEST_MEMFD_"))
}

# The newest header that a supported distribution ships is Linux 6.1. These came later; the numbers are those
# that other programs of the KVM world carry as constants (QEMU's linux-headers, rust-vmm's kvm-bindings).
NEWER_REQUESTS = {
    "KVM_SET_USER_MEMORY_REGION2": 0x40A0AE49,  # Linux 6.8
    "KVM_SET_MEMORY_ATTRIBUTES": 0x4020AED2,  # Linux 6.8
    "KVM_CREATE_GUEST_MEMFD": 0xC040AED4,  # Linux 6.8
    "KVM_PRE_FAULT_MEMORY": 0xC040AED5,  # Linux 6.11
}

# Requests every VMM knows by heart, so that a broken header or compiler cannot hide a broken table.
WELL_KNOWN_REQUESTS = {
    "KVM_GET_API_VERSION": 0xAE00,
    "KVM_CREATE_VM": 0xAE01,
    "KVM_SET_USER_MEMORY_REGION": 0x4020AE46,
    "KVM_RUN": 0xAE80,
    "KVM_GET_REGS": 0x8090AE81,
    "KVM_GET_SREGS": 0x8138AE83,
    "KVM_SET_CPUID2": 0x4008AE90,
}


def members(structure: Any, prefix: str = "", base: int = 0) -> Iterator[tuple[str, int]]:
    """C member designators of a structure with their offsets, through its unnamed parts."""
    anonymous = getattr(structure, "_anonymous_", ())
    for name, ctype, *_ in structure._fields_:
        offset = base + getattr(structure, name).offset
        inner_prefix = prefix if name in anonymous else f"{prefix}{name}."
        if name not in anonymous:
            yield prefix + name, offset
        if ctype.__name__.startswith("_") and hasattr(ctype, "_fields_"):
            yield from members(ctype, inner_prefix, offset)


def newer_than(structure: str) -> str:
    """The request whose absence from a header tells that the structure is absent too, or the API version."""
    users = [
        name for name, ioctl in abi.IOCTLS.items() if getattr(ioctl.structure, "__name__", "") == structure
    ]
    return users[0] if users else "KVM_API_VERSION"


def c_program() -> str:
    """A program that prints everything this module knows about and the header has, as "name = number"."""
    lines = ["#include <stddef.h>", "#include <stdio.h>", "#include <linux/kvm.h>", "int main(void) {"]
    for name in (*abi.IOCTLS, *abi.EXIT_REASONS.values(), *abi.INTERNAL_ERRORS.values(), *FLAGS):
        lines += [f"#ifdef {name}", f'printf("{name} = %llu\\n", (unsigned long long){name});', "#endif"]
    for name, structure in STRUCTURES.items():
        lines += [f"#ifdef {newer_than(name)}", f'printf("{name} = %zu\\n", sizeof(struct {name}));']
        lines += [
            f'printf("{name}.{member} = %zu\\n", offsetof(struct {name}, {member}));'
            for member, _ in members(structure)
        ]
        lines += ["#endif"]
    return "\n".join([*lines, "return 0; }"])


@pytest.fixture(scope="module")
def compiler() -> str:
    found = shutil.which("gcc") or shutil.which("cc")
    if found is None:
        pytest.skip("no C compiler: neither gcc nor cc is on PATH")
    probe = subprocess.run(
        [found, "-E", "-x", "c", "-"], input="#include <linux/kvm.h>\n", text=True, capture_output=True
    )
    if probe.returncode:
        pytest.skip("no <linux/kvm.h>: install linux-libc-dev or the kernel's headers")
    return found


@pytest.fixture(scope="module")
def header(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What the C compiler makes of <linux/kvm.h>: name to number, or to size, or to offset."""
    directory: Path = tmp_path_factory.mktemp("abi")
    source, program = directory / "abi.c", directory / "abi"
    source.write_text(c_program())
    subprocess.run([compiler, "-std=gnu11", "-o", program, source], check=True)
    printed = subprocess.run([program], check=True, text=True, capture_output=True).stdout
    return {name: int(value) for name, value in (line.split(" = ") for line in printed.splitlines())}


def test_every_request_number_equals_the_header_s(header: dict[str, int]) -> None:
    known = {name: ioctl.number for name, ioctl in abi.IOCTLS.items() if name in header}
    assert known == {name: header[name] for name in known}
    assert len(known) >= len(abi.IOCTLS) - len(NEWER_REQUESTS)


@pytest.mark.parametrize(("name", "number"), (WELL_KNOWN_REQUESTS | NEWER_REQUESTS).items())
def test_a_request_has_its_published_number(name: str, number: int) -> None:
    assert abi.IOCTLS[name].number == number


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_structure_has_the_header_s_size_and_offsets(name: str, header: dict[str, int]) -> None:
    if name not in header:
        pytest.skip(f"struct {name} is newer than the installed <linux/kvm.h>")
    ours = {f"{name}.{member}": offset for member, offset in members(STRUCTURES[name])}
    assert ctypes.sizeof(STRUCTURES[name]) == header[name]
    assert ours == {member: header[member] for member in ours}


def test_the_structures_newer_than_linux_6_1_have_their_documented_sizes() -> None:
    assert ctypes.sizeof(abi.kvm_userspace_memory_region2) == 160
    assert ctypes.sizeof(abi.kvm_create_guest_memfd) == 64
    assert ctypes.sizeof(abi.kvm_memory_attributes) == 32
    assert ctypes.sizeof(abi.kvm_pre_fault_memory) == 64


def test_exit_reasons_and_suberrors_have_the_header_s_numbers(header: dict[str, int]) -> None:
    ours = {
        name: number for table in (abi.EXIT_REASONS, abi.INTERNAL_ERRORS) for number, name in table.items()
    }
    known = {name: number for name, number in ours.items() if name in header}
    assert known == {name: header[name] for name in known}
    assert len(known) >= 38


def test_flags_have_the_header_s_values(header: dict[str, int]) -> None:
    known = {name: value for name, value in FLAGS.items() if name in header}
    assert known == {name: header[name] for name in known}
    assert len(known) > 80


def test_every_capability_of_the_header_is_known_by_its_number(compiler: str) -> None:
    macros = subprocess.run(
        [compiler, "-E", "-dM", "-x", "c", "-"],
        input="#include <linux/kvm.h>\n",
        text=True,
        capture_output=True,
        check=True,
    ).stdout
    of_header = {name: int(number) for name, number in re.findall(r"#define (KVM_CAP_\w+) (\d+)\s", macros)}
    assert len(of_header) > 200
    assert of_header.items() <= abi.CAPABILITIES.items()


def test_capabilities_have_distinct_numbers() -> None:
    assert len(set(abi.CAPABILITIES.values())) == len(abi.CAPABILITIES)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("KVM_CAP_USER_MEMORY2", 231),  # Linux 6.8
        ("KVM_CAP_MEMORY_ATTRIBUTES", 233),
        ("KVM_CAP_GUEST_MEMFD", 234),
        ("KVM_CAP_VM_TYPES", 235),
        ("KVM_CAP_PRE_FAULT_MEMORY", 236),  # Linux 6.11
        ("KVM_CAP_X86_APIC_BUS_CYCLES_NS", 237),
        ("KVM_CAP_X86_GUEST_MODE", 238),
        ("KVM_CAP_GUEST_MEMFD_FLAGS", 244),  # Linux 6.18
    ],
)
def test_a_capability_newer_than_linux_6_1_has_its_published_number(name: str, number: int) -> None:
    assert abi.CAPABILITIES[name] == number


def test_no_two_requests_share_a_number() -> None:
    assert len({ioctl.number for ioctl in abi.IOCTLS.values()}) == len(abi.IOCTLS)
