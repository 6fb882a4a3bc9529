"""What the doctor finds on crafted hosts and backends, and on this one where it has KVM."""

from __future__ import annotations

import errno
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pykvm import doctor
from pykvm.errors import KvmError
from pykvm.exits import Exit, Halt, Interrupted, Shutdown
from pykvm.interfaces import IO, Region
from pykvm.kvm import abi, probe
from pykvm.kvm.backend import KvmBackend
from pykvm.kvm.probe import Host, HostReport, exit_cost, missing_in_ring0, obstacle
from pykvm.registers import CR4_OSXSAVE, Registers, SystemRegisters

CODE = 0x8000
WORKING = Host(
    kernel="6.1.0",
    flags=frozenset({"fpu", "sse", "vmx"}),
    modules=frozenset({"kvm_intel"}),
    in_container=False,
    device_error=0,
    device_group="kvm",
)
HEALTHY = HostReport(
    kernel="6.1.0",
    kind="AMD-V",
    nested=True,
    extension=True,
    api_version=12,
    capabilities=(("IRQCHIP", 1), ("NR_VCPUS", 8), ("X86_SMM", 0)),
    ring0_native=True,
    exit_us=1.25,
)


class FakeVcpu:
    """Writes to port 0x80 `writes` times, then halts, unless the code holds what it cannot execute."""

    def __init__(self, machine: FakeMachine) -> None:
        self.machine = machine
        self.system = SystemRegisters()

    def system_registers(self) -> SystemRegisters:
        return self.system

    def set_system_registers(self, value: SystemRegisters) -> None:
        if value.cr4 & self.machine.backend.refused_cr4:
            raise KvmError("KVM_SET_SREGS", errno.EINVAL)
        self.system = value

    def set_registers(self, value: Registers) -> None:
        assert value.rip == CODE

    def run(self, io: IO) -> Exit:
        code = bytes(memoryview(self.machine.region.buffer)[CODE : CODE + 32])
        if any(code.startswith(unknown) for unknown in self.machine.backend.unknown):
            return Shutdown()
        for _ in range(self.machine.backend.writes):
            io.port_write(0x80, 1, 0)
        return Halt()

    def kick(self) -> None: ...


class FakeMachine:
    def __init__(self, backend: FakeBackend) -> None:
        self.backend = backend

    def map(self, slot: int, address: int, region: Region) -> None:
        self.region = region

    def vcpu(self, index: int) -> FakeVcpu:
        return FakeVcpu(self)

    def close(self) -> None:
        self.backend.closed += 1


class FakeBackend:
    def __init__(self, *unknown: bytes, writes: int = 0, refused_cr4: int = 0) -> None:
        self.unknown, self.writes, self.refused_cr4 = unknown, writes, refused_cr4
        self.closed = 0

    def machine(self) -> FakeMachine:
        return FakeMachine(self)


# Reading a host


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A file system of a nested AMD-V host on which opening the device works."""
    for directory in ("proc", "dev", "sys/module/kvm", "sys/module/kvm_amd"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "proc/cpuinfo").write_text(
        "processor\t: 0\nflags\t\t: fpu sse svm hypervisor\n\nprocessor\t: 1\n"
    )
    (tmp_path / "dev/kvm").touch(0o600)
    return tmp_path


def test_a_host_is_read_from_proc_sys_and_dev(root: Path) -> None:
    host = Host.read(root)
    assert (host.kind, host.nested, host.device_error, host.in_container) == ("AMD-V", True, 0, False)
    assert host.flags == {"fpu", "sse", "svm", "hypervisor"}
    assert host.kernel == os.uname().release


def test_the_software_kvm_is_known_by_its_module(root: Path) -> None:
    (root / "sys/module/kvm_pvm").mkdir()
    assert Host.read(root).kind == "PVM"


def test_a_host_without_a_device_tells_the_errno(root: Path) -> None:
    (root / "dev/kvm").unlink()
    assert Host.read(root).device_error == errno.ENOENT


def test_a_container_is_known_by_its_mark(root: Path) -> None:
    (root / ".dockerenv").touch()
    assert Host.read(root).in_container


def test_an_empty_file_system_reads_as_a_host_with_nothing(tmp_path: Path) -> None:
    host = Host.read(tmp_path)
    assert (host.kind, host.nested, host.flags, host.device_error) == ("", False, frozenset(), errno.ENOENT)


# What stands in the way


def test_a_working_host_has_no_obstacle() -> None:
    assert obstacle(WORKING) == ("", "")


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"device_error": errno.EACCES}, "sudo usermod -aG kvm $USER, then log in again"),
        ({"device_error": errno.EACCES, "device_group": ""}, "sudo chmod 666 /dev/kvm"),
        ({"device_error": errno.EPERM, "in_container": True}, "start it with --device /dev/kvm"),
        ({"device_error": errno.ENOENT, "in_container": True}, "start it with --device /dev/kvm"),
        ({"device_error": errno.ENOENT}, "sudo mknod /dev/kvm c 10 232"),
        ({"device_error": errno.ENOENT, "modules": frozenset()}, "sudo modprobe kvm_intel"),
        (
            {"device_error": errno.ENOENT, "modules": frozenset(), "flags": frozenset({"svm", "hypervisor"})},
            "sudo modprobe kvm_amd",
        ),
        (
            {"device_error": errno.ENOENT, "modules": frozenset(), "flags": frozenset({"hypervisor"})},
            "let the hypervisor around it offer nested virtualization",
        ),
        (
            {"device_error": errno.ENOENT, "modules": frozenset(), "flags": frozenset()},
            "enable virtualization in the firmware setup",
        ),
        ({"device_error": errno.EMFILE}, "look at the kernel's log: sudo dmesg"),
    ],
)
def test_each_obstacle_comes_with_what_mends_it(changes: dict[str, object], remedy: str) -> None:
    problem, told = obstacle(replace(WORKING, **changes))
    assert problem
    assert told == remedy


# Probing with tiny guests


def test_instructions_that_end_in_a_triple_fault_are_missing() -> None:
    backend = FakeBackend(b"\xd9\xe8", b"\xf3\x0f\xb8\xc0")
    assert missing_in_ring0(backend, frozenset({"fpu", "sse", "popcnt"})) == ("fld1", "popcnt")
    assert backend.closed == 4


def test_instructions_that_the_processor_lacks_are_not_tried() -> None:
    backend = FakeBackend(b"\xf3\x0f\xb8\xc0")
    assert missing_in_ring0(backend, frozenset({"fpu", "sse"})) == ()


def test_an_instruction_whose_control_bit_is_refused_is_missing() -> None:
    assert missing_in_ring0(FakeBackend(refused_cr4=CR4_OSXSAVE), frozenset({"xsave"})) == ("xgetbv", "xsave")


def test_the_cost_of_an_exit_is_the_median_gap_between_port_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0, 1000, 3000, 5000, 95_000])
    monkeypatch.setattr("time.perf_counter_ns", lambda: next(ticks))
    assert exit_cost(FakeBackend(writes=5)) == 2.0


def test_a_guest_that_never_exits_costs_nothing_known() -> None:
    assert exit_cost(FakeBackend(writes=0)) == 0.0


def test_a_probe_that_hangs_is_kicked(monkeypatch: pytest.MonkeyPatch) -> None:
    from threading import Event

    kicked = Event()

    class Hanging(FakeVcpu):
        def run(self, io: IO) -> Exit:
            kicked.wait(5)
            return Interrupted()

        def kick(self) -> None:
            kicked.set()

    monkeypatch.setattr(probe, "_RUN_LIMIT", 0.01)
    monkeypatch.setattr(FakeMachine, "vcpu", lambda machine, index: Hanging(machine))
    assert missing_in_ring0(FakeBackend(), frozenset({"sse"})) == ("addps",)
    assert kicked.is_set()


def test_every_reported_capability_exists() -> None:
    assert {f"KVM_CAP_{name}" for name in probe.REPORTED_CAPABILITIES} <= set(abi.CAPABILITIES)


# The report


def test_a_healthy_host_is_rendered_with_all_that_was_found() -> None:
    text = doctor.render(HEALTHY)
    assert "KVM             AMD-V, inside a virtual machine" in text
    assert "ring 0          native" in text
    assert "an exit costs   1.2 us" in text
    assert "present         IRQCHIP NR_VCPUS=8" in text
    assert "missing         X86_SMM" in text
    assert text.endswith("auto picks      kvm, because KVM works here")


def test_each_problem_is_rendered_with_its_remedy() -> None:
    problems = (("no permission to open /dev/kvm", "sudo chmod 666 /dev/kvm"), ("no extension", "build it"))
    text = doctor.render(replace(HEALTHY, problems=problems, extension=False))
    assert "problem         no permission to open /dev/kvm\nto mend it      sudo chmod 666 /dev/kvm" in text
    assert "problem         no extension\nto mend it      build it" in text
    assert "emulator, because no permission to open /dev/kvm; no extension" in text
    assert "an exit costs" not in text


def test_lines_stay_narrow() -> None:
    many = tuple((f"CAPABILITY_{number}", 1) for number in range(60))
    assert max(map(len, doctor.render(replace(HEALTHY, capabilities=many)).splitlines())) <= 100


@pytest.mark.parametrize(("problems", "status"), [((), 0), ((("no KVM", "get one"),), 1)])
def test_json_and_exit_status_follow_the_report(
    problems: tuple[tuple[str, str], ...],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(probe, "probe", lambda: replace(HEALTHY, problems=problems))
    assert doctor.main(["--json"]) == status
    printed = json.loads(capsys.readouterr().out)
    assert printed["capabilities"]["NR_VCPUS"] == 8
    assert printed["backend"] == ("kvm", "emulator")[status]


def test_a_missing_extension_is_a_problem_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pykvm._kvm", None)
    report = probe.probe()
    assert not report.extension
    assert any("pykvm._kvm is not built" in problem for problem, _ in report.problems)
    assert report.backend == "emulator"


def test_an_integer_instruction_works_in_ring0_of_every_kvm() -> None:
    backend = KvmBackend()
    if backend.why_unavailable():
        pytest.skip(f"no KVM here: {backend.why_unavailable()}")
    assert probe._works_in_ring0(backend, probe._Instruction("nop", "", b"\x90"))
    assert not probe._works_in_ring0(backend, probe._Instruction("ud2", "", b"\x0f\x0b"))


def test_this_host_is_probed_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    report = probe.probe()
    if report.problems:
        pytest.skip(f"no KVM here: {report.problems[0][0]}")
    assert report.api_version == 12
    assert dict(report.capabilities)["USER_MEMORY"] == 1
    assert 0.1 < report.exit_us < 10_000
    assert report.ring0_native == (not {"fld1", "fwait", "addps"} & set(report.ring0_missing))
    assert doctor.main([]) == 0
    assert "auto picks      kvm" in capsys.readouterr().out
