"""Descriptors, mappings and memory: closed in any order, at any time, and given back."""

from __future__ import annotations

import gc
import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pykvm.bus import Attachment
from pykvm.errors import ConfigurationError, KvmError
from pykvm.exits import Exit, Halt, Interrupted
from tests.kvm.machines import CODE, HLT, OUT_FOREVER, SPIN, Machine, NoIO, Recorder

if TYPE_CHECKING:
    from pykvm._kvm import System, Vcpu

CYCLES = 2000
WARM_UP = 50
PAGE = 4096


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def mappings_of_kvm() -> int:
    """Mapped vCPU pages and guest memory: what is KVM's or shared and nameless."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum("kvm-vcpu" in line or "/dev/zero" in line for line in lines)


def mappings() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def one_life(system: System, *, close: bool = True) -> None:
    """Make a VM with memory and a processor, run it to its end, and leave it."""
    machine = Machine(system, ram=0x4000, cpuid=False)
    assert machine.run(HLT) == Halt()
    if close:
        machine.close()


@pytest.mark.timeout(600)  # three seconds, but minutes on an emulated AMD-V
def test_two_thousand_machines_leave_nothing_behind(system: System) -> None:
    for _ in range(WARM_UP):
        one_life(system)
    before = open_files(), mappings_of_kvm()
    memory = resident_bytes()
    for _ in range(CYCLES):
        one_life(system)
    assert (open_files(), mappings_of_kvm()) == before
    assert resident_bytes() - memory < 4 << 20  # less than a page a machine


def test_machines_that_are_dropped_without_close_leave_nothing_behind(system: System) -> None:
    gc.collect()
    gc.disable()  # reference counts alone must do
    try:
        one_life(system, close=False)
        before = open_files(), mappings()
        for _ in range(50):
            one_life(system, close=False)
        after = open_files(), mappings()
    finally:
        gc.enable()
    assert after == before


def test_a_machine_with_an_irqchip_that_ran_on_a_thread_leaves_nothing_behind(system: System) -> None:
    def live() -> None:
        with Machine(system, irqchip=True) as machine:
            machine.run(b"\xfa\xf4")

    live()
    before = open_files(), mappings_of_kvm()
    for _ in range(20):
        thread = threading.Thread(target=live)
        thread.start()
        thread.join()
    assert (open_files(), mappings_of_kvm()) == before


@pytest.mark.parametrize("order", ["vcpu vm", "vm vcpu", "vm vm vcpu vcpu", "vcpu vcpu vm vm"])
def test_descriptors_are_closed_in_any_order_and_twice(system: System, order: str) -> None:
    before = open_files()
    machine = Machine(system)
    machine.run(HLT)
    for name in order.split():
        getattr(machine, name).close()
    machine.ram.close()  # would raise if it were still pinned
    assert open_files() == before


def test_memory_stays_pinned_until_the_last_vcpu_is_closed(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(cpus=2)
    machine.vm.close()
    machine.vcpus[0].close()
    with pytest.raises(BufferError):
        machine.ram.close()
    machine.vcpus[1].close()
    machine.ram.close()


def test_a_vcpu_that_was_dropped_does_not_keep_the_memory_pinned(system: System) -> None:
    machine = Machine(system)
    machine.vcpus.clear()
    machine.vm.close()
    machine.ram.close()


def test_a_vcpu_runs_on_when_its_vm_is_closed(machine: Machine) -> None:
    machine.load(b"\x40" + HLT)
    machine.vm.close()
    assert machine.vcpu.run(NoIO()) == Halt()
    assert machine.vcpu.get_regs().rax == 1


class Running:
    """A guest that runs on another thread until something ends it."""

    def __init__(self, machine: Machine, io: Recorder, *, wait: float = 0.01) -> None:
        self.ends: list[Exit | BaseException] = []
        self.thread = threading.Thread(target=self._run, args=(machine.vcpu, io), daemon=True)
        self.thread.start()
        time.sleep(wait)

    def _run(self, vcpu: Vcpu, io: Recorder) -> None:
        try:
            self.ends.append(vcpu.run(io))
        except BaseException as error:
            self.ends.append(error)

    def end(self) -> Exit | BaseException:
        self.thread.join(10)
        return self.ends[0]


@pytest.mark.parametrize("code", [SPIN, OUT_FOREVER], ids=["in the guest", "in a device"])
def test_closing_a_vcpu_that_runs_on_another_thread_ends_its_run(system: System, code: bytes) -> None:
    before = open_files()
    machine = Machine(system)
    machine.load(code)
    running = Running(machine, Recorder())
    machine.vcpu.close()
    machine.vcpu.close()
    assert running.end() == Interrupted(0, "close")
    assert machine.vcpu.fileno() == -1
    machine.close()
    assert open_files() == before


def test_closing_everything_during_a_run_is_safe_and_memory_outlives_it(system: System) -> None:
    machine = Machine(system)
    machine.load(SPIN)
    running = Running(machine, NoIO())
    machine.vm.close()
    with pytest.raises(BufferError):
        machine.ram.close()
    machine.vcpu.close()
    assert running.end() == Interrupted(0, "close")
    machine.ram.close()


def test_closing_races_with_runs_many_times(system: System) -> None:
    ends = []
    for number in range(100):
        machine = Machine(system, ram=0x4000, cpuid=False)
        machine.load(OUT_FOREVER)
        running = Running(machine, Recorder(), wait=number * 5e-6)
        machine.vcpu.close()
        machine.vm.close()
        ends.append(running.end())
        machine.ram.close()
    closed_before = [end for end in ends if isinstance(end, KvmError) and end.request == "KVM_RUN"]
    assert len(closed_before) + ends.count(Interrupted(0, "close")) == 100


def test_a_device_may_close_the_vcpu_that_called_it(system: System) -> None:
    machine = Machine(system)

    class Closing(Recorder):
        def port_write(self, port: int, size: int, value: int) -> None:
            machine.vcpu.close()
            machine.vm.close()

    assert machine.run(OUT_FOREVER, Closing()) == Interrupted(0, "close")
    machine.ram.close()


def test_a_closed_vcpu_cannot_run(machine: Machine) -> None:
    machine.vcpu.close()
    with pytest.raises(KvmError, match="the vCPU is closed"):
        machine.vcpu.run(NoIO())


def test_the_system_may_be_closed_while_its_machines_live(system: System) -> None:
    from pykvm import _kvm

    own = _kvm.System()
    machine = Machine(own)
    own.close()
    assert machine.run(HLT) == Halt()
    machine.close()


def test_a_forked_child_ends_well_and_the_parent_goes_on(machine: Machine) -> None:
    machine.load(HLT, rbx=3)
    child = os.fork()
    if child == 0:  # nothing but the end: the child has only this thread of ours
        machine.close()
        os._exit(7)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    assert machine.vcpu.run(NoIO()) == Halt()
    assert machine.vcpu.get_regs().rbx == 3


def test_a_forked_child_cannot_run_the_vcpu_of_its_parent(machine: Machine) -> None:
    machine.load(HLT)
    child = os.fork()
    if child == 0:
        try:
            machine.vcpu.run(NoIO())
        except KvmError:
            os._exit(7)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7


@pytest.mark.parametrize(
    ("space", "ranges"),
    [
        ("ports", [(0, 1)]),
        ("port", [(0, 0)]),
        ("mmio", [((1 << 64) - 1, 2)]),
        ("port", [(0, 4), (3, 1)]),
        ("port", [(8, 1), (0, 1)]),
    ],
)
def test_a_device_at_an_impossible_place_is_refused(
    machine: Machine, space: str, ranges: list[tuple[int, int]]
) -> None:
    from pykvm._kvm import DeviceLock
    from pykvm.device import CDevice

    entries = [(Attachment(CDevice(), address, size), DeviceLock()) for address, size in ranges]
    with pytest.raises(ConfigurationError):
        machine.vm.serve(space, entries)


def test_a_c_device_without_c_methods_is_called_in_python(machine: Machine) -> None:
    from pykvm.device import CDevice

    machine.bus("port").attach(CDevice(), 0x510, 1)
    assert machine.run(b"\xee\xec" + HLT, NoIO()) == Halt()
    assert machine.vcpu.times()[2] == 0
    assert machine.vcpu.get_regs().rax & 0xFF == 0xFF
    assert machine.vcpu.get_regs().rip == CODE + 3


def test_a_vm_that_nobody_refers_to_goes_at_once(system: System) -> None:
    from pykvm import VM

    VM("64K", backend="kvm").close()  # the backend's own descriptor stays
    gc.collect()
    files = open_files()
    gc.disable()
    try:
        vm = VM("64K", backend="kvm")
        vm.load(HLT)
        vm.run()
        del vm
        assert open_files() == files
    finally:
        gc.enable()
