"""Devices in C: somebody else's Cython module, built as docs/c-devices.md says, served with no GIL."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import pykvm
from pykvm.bus import Bus
from pykvm.exits import Exit, Halt, Interrupted
from pykvm.state import MP_STATE_RUNNABLE
from pykvm.values import replace
from tests.kvm.machines import HLT, MMIO, PORT, Machine, NoIO, Recorder

PAGE = Path(__file__).parents[2] / "docs/c-devices.md"
PACKAGES = Path(pykvm.__file__).parents[1]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")

IN_1000 = b"\xb9\xe8\x03\xec\xe2\xfd\xf4"  # mov cx, 1000; 1: in al, dx; loop 1b; hlt
DATA = 0x3000
READ_FOREVER = b"\xec\xeb\xfd"  # 1: in al, dx; jmp 1b


def blocks(language: str) -> list[str]:
    """The fenced blocks of the page in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the page's instructions were followed."""
    compiler = sysconfig.get_config_var("CC").split()[0]
    if importlib.util.find_spec("Cython") is None or shutil.which(os.environ.get("CC", compiler)) is None:
        pytest.skip("needs Cython and a C compiler to build a device")
    directory = tmp_path_factory.mktemp("counter")
    (directory / "counter.pyx").write_text(blocks("cython")[0])
    (directory / "setup.py").write_text(blocks("python")[0])
    (directory / "use.py").write_text(blocks("python")[1])
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = os.environ | {"PYTHONPATH": str(PACKAGES), "CFLAGS": "-O1 -g0"}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


@pytest.fixture(scope="session")
def counter_module(built: Path) -> ModuleType:
    """The module that was built."""
    spec = importlib.util.spec_from_file_location("counter", built / f"counter{SUFFIX}")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def counter(counter_module: ModuleType) -> Any:
    return counter_module.Counter()


def test_the_program_of_the_page_prints_what_the_page_says(built: Path, system: object) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(PACKAGES), str(built)])}
    done = subprocess.run(
        [sys.executable, "use.py"], cwd=built, env=environment, capture_output=True, text=True
    )
    assert done.stdout == blocks("text")[0], done.stderr


def test_it_is_a_device_for_the_bus_too(counter: Any) -> None:
    bus = Bus("port", 1 << 16)
    bus.attach(counter, PORT, 2)
    bus.write(PORT, 1, 41)
    bus.write(PORT + 1, 1, 7)  # not served, and nobody else is there: ignored
    assert bus.read(PORT, 1) == 42
    assert counter.count == 42


def test_its_accesses_do_not_reach_python(machine: Machine, counter: Any) -> None:
    machine.bus("port").attach(counter, PORT, 2)
    machine.bus("mmio").attach(counter, MMIO, 4)
    assert machine.run(IN_1000, NoIO()) == Halt()
    assert (counter.count, machine.vcpu.times()[2]) == (1000, 1000)
    # mov al, 5; mov es:[0], al; mov al, es:[0]; hlt
    assert machine.run(b"\xb0\x05\x26\xa2\x00\x00\x26\xa0\x00\x00" + HLT, NoIO()) == Halt()
    assert machine.vcpu.get_regs().rax == 6


def test_it_serves_strings_element_by_element(machine: Machine, counter: Any) -> None:
    machine.bus("port").attach(counter, PORT, 1)
    machine.load(b"\xfc\xf3\x6c" + HLT, rcx=100, rdi=DATA)  # cld; rep insb; hlt
    system = machine.vcpu.get_sregs()
    machine.vcpu.set_sregs(replace(system, es=system.ds))
    assert machine.vcpu.run(NoIO()) == Halt()
    assert machine.ram[DATA : DATA + 100] == bytes(range(1, 101))


def test_an_access_that_it_does_not_serve_reaches_its_python_methods(
    machine: Machine, counter_module: ModuleType
) -> None:
    class Noting(counter_module.Counter):  # type: ignore[name-defined,misc]
        noted: tuple[int, ...] = ()

        def write(self, offset: int, size: int, value: int) -> None:
            self.noted += (offset, size, value)

    device = Noting()
    machine.bus("port").attach(device, PORT, 2)
    # out dx, al; inc dx; out dx, al; hlt
    assert machine.run(b"\xee\x42\xee" + HLT, NoIO(), rax=9) == Halt()
    assert device.noted == (1, 1, 9)
    assert device.count == 9


def test_an_access_that_leaves_its_range_reaches_python(machine: Machine, counter: Any) -> None:
    machine.bus("port").attach(counter, PORT, 1)
    io = Recorder()
    assert machine.run(b"\xed" + HLT, io) == Halt()  # in ax, dx
    assert io.log == [("in", PORT, 2)]


def run_aside(machine: Machine, io: Recorder) -> tuple[threading.Thread, list[Exit]]:
    ends: list[Exit] = []
    thread = threading.Thread(target=lambda: ends.append(machine.vcpu.run(io)), daemon=True)
    thread.start()
    return thread, ends


def test_it_is_served_while_another_thread_keeps_the_gil(machine: Machine, counter: Any) -> None:
    machine.bus("port").attach(counter, PORT, 1)
    machine.load(READ_FOREVER)
    thread, ends = run_aside(machine, NoIO())
    while counter.count == 0:
        thread.join(0.001)
    before = counter.count
    sum(range(20_000_000))  # one call into C that never gives the GIL up
    served_meanwhile = counter.count - before
    machine.vcpu.kick()
    thread.join(10)
    assert served_meanwhile > 100
    assert ends == [Interrupted()]


def test_a_device_that_is_taken_away_while_the_guest_runs_is_served_no_more(
    machine: Machine, counter: Any
) -> None:
    arrived = threading.Event()

    class Arriving(Recorder):
        def port_read(self, port: int, size: int) -> int:
            arrived.set()
            machine.vcpu.kick()
            return 0

    ports = machine.bus("port")
    ports.attach(counter, PORT, 1)
    machine.load(READ_FOREVER)
    thread, ends = run_aside(machine, Arriving())
    ports.detach(counter)
    assert arrived.wait(10)
    thread.join(10)
    assert ends == [Interrupted()]


def test_ctrl_c_ends_a_guest_that_only_a_c_device_serves(machine: Machine, counter: Any) -> None:
    machine.bus("port").attach(counter, PORT, 1)
    machine.load(READ_FOREVER)
    for _ in range(5):
        timer = threading.Timer(0.01, lambda: os.kill(os.getpid(), 2))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            machine.vcpu.run(NoIO())
        timer.join()


@pytest.mark.parametrize("cpus", [2, 4])
def test_processors_on_threads_share_devices_in_c_and_in_python(
    make_machine: Callable[..., Machine], counter: Any, cpus: int
) -> None:
    rounds = 1000
    machine = make_machine(cpus=cpus, irqchip=True)
    machine.bus("port").attach(counter, PORT, 1)
    total = 0
    lock = threading.Lock()

    class Adding(Recorder):
        def port_write(self, port: int, size: int, value: int) -> None:
            nonlocal total
            with lock:
                total += value

    # mov cx, rounds; 1: in al, dx; mov al, 1; out 0x80, al; loop 1b; cli; hlt
    code = b"\xb9" + rounds.to_bytes(2, "little") + b"\xec\xb0\x01\xe6\x80\xe2\xf9\xfa\xf4"
    for index, vcpu in enumerate(machine.vcpus):
        vcpu.set_mp_state(MP_STATE_RUNNABLE)
        machine.load(code, cpu=index)
    io = Adding()
    threads = [threading.Thread(target=vcpu.run, args=(io,), daemon=True) for vcpu in machine.vcpus]
    for thread in threads:
        thread.start()
    while total < cpus * rounds and any(thread.is_alive() for thread in threads):
        threads[0].join(0.01)
    for vcpu, thread in zip(machine.vcpus, threads, strict=True):
        vcpu.kick()
        thread.join(10)
    assert (counter.count, total) == (cpus * rounds, cpus * rounds)
