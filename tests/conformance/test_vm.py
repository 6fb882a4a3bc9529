"""The VM class on one thread, on every backend: how runs end, steps, images and failures.

Devices and memory are in test_vm_devices.py, threads in test_vm_threads.py.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pykvm import (
    VM,
    ConfigurationError,
    Debug,
    Exit,
    Halt,
    ImageError,
    Interrupted,
    MemoryInUseError,
    Module,
    Shutdown,
    Stopped,
)
from tests.conformance.small_guests import HALT, HALT_AGAIN, IN_HALT, LIMIT, OUT_INC_HALT, SPIN, Recorder, rax

# How runs end


def test_a_run_ends_at_hlt(vm: VM) -> None:
    vm.load(HALT)

    exit = vm.run(timeout=LIMIT)

    assert exit == Halt(0)
    assert vm.vcpus[0].registers().rip == 0x8001


def test_a_run_goes_on_after_hlt(vm: VM) -> None:
    vm.load(b"\xf4\x40\xf4")  # hlt; inc ax; hlt

    first, second = vm.run(timeout=LIMIT), vm.run(timeout=LIMIT)

    assert (first, second) == (Halt(0), Halt(0))
    assert rax(vm) == 1


def test_a_device_that_stops_the_machine_ends_it_before_the_next_instruction(vm: VM) -> None:
    vm.load(OUT_INC_HALT)
    vm.on_port(0x10)(lambda offset, size, value: vm.stop(7, "done"))

    exit = vm.run(timeout=LIMIT)

    assert exit == Stopped(0, 7, "done")
    assert rax(vm) == 0
    assert vm.run(timeout=LIMIT) == Halt(0)
    assert rax(vm) == 1


def test_a_stop_before_the_run_ends_only_the_next_one(vm: VM) -> None:
    vm.load(b"\x40\xf4")  # inc ax; hlt
    vm.stop(3)

    exit = vm.run(timeout=LIMIT)

    assert exit == Stopped(0, 3, "stop")
    assert rax(vm) == 0
    assert vm.run(timeout=LIMIT) == Halt(0)


def test_the_first_of_several_stops_counts(vm: VM) -> None:
    vm.load(HALT)
    vm.stop(1)
    vm.stop(2)

    assert vm.run(timeout=LIMIT) == Stopped(0, 1, "stop")
    assert vm.run(timeout=LIMIT) == Halt(0)


def test_a_timeout_ends_a_spinning_guest_which_can_go_on(vm: VM) -> None:
    vm.load(b"\xfa" + SPIN)  # cli
    start = time.monotonic()

    first, second = vm.run(timeout=0.05), vm.run(timeout=0.05)

    assert first == second == Interrupted(0, "timeout")
    assert 0.1 <= time.monotonic() - start < 5
    assert vm.vcpus[0].registers().rip == 0x8001


def test_a_timeout_of_zero_ends_a_spinning_guest(vm: VM) -> None:
    vm.load(SPIN)

    assert vm.run(timeout=0) == Interrupted(0, "timeout")


@pytest.mark.parametrize("timeout", [-1, -0.001, float("nan"), float("-inf")])
def test_an_impossible_timeout_is_refused_and_the_machine_stays_usable(vm: VM, timeout: float) -> None:
    vm.load(HALT)

    with pytest.raises(ConfigurationError, match="timeout"):
        vm.run(timeout=timeout)

    assert vm.run(timeout=LIMIT) == Halt(0)


def test_an_endless_timeout_is_none_at_all(vm: VM) -> None:
    vm.load(HALT)

    assert vm.run(timeout=float("inf")) == Halt(0)


def test_a_timeout_does_not_reach_the_next_run(vm: VM) -> None:
    vm.load(HALT + SPIN)
    vm.run(timeout=0.1)
    start = time.monotonic()

    exit = vm.run(timeout=0.4)

    assert exit == Interrupted(0, "timeout")
    assert time.monotonic() - start >= 0.4


def test_two_hundred_short_runs_with_timeouts_leave_no_threads(vm: VM) -> None:
    vm.load(HALT_AGAIN)
    vm.run(timeout=LIMIT)  # KVM starts a thread of its own with the first
    before = len(os.listdir("/proc/self/task"))

    exits = {vm.run(timeout=LIMIT) for _ in range(200)}

    assert exits == {Halt(0)}
    assert eventually(lambda: len(os.listdir("/proc/self/task")) <= before)


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether `condition` comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def test_a_kick_by_the_user_interrupts_one_run(vm: VM) -> None:
    vm.load(HALT)
    vm.vcpus[0].kick()

    assert vm.run(timeout=LIMIT) == Interrupted(0, "kick")
    assert vm.run(timeout=LIMIT) == Halt(0)


def test_pause_and_resume_within_a_device_change_nothing(vm: VM) -> None:
    vm.load(OUT_INC_HALT)

    @vm.on_port(0x10)
    def both(offset: int, size: int, value: int | None) -> None:
        vm.pause()
        vm.resume()

    assert vm.run(timeout=LIMIT) == Halt(0)
    assert rax(vm) == 1


def test_a_run_within_a_run_is_refused(vm: VM) -> None:
    vm.load(OUT_INC_HALT)
    vm.on_port(0x10)(lambda offset, size, value: vm.run() and None)

    with pytest.raises(ConfigurationError, match="already running"):
        vm.run(timeout=LIMIT)

    vm.ports.detach(next(iter(vm.ports)))
    assert vm.run(timeout=LIMIT) == Halt(0)


# Steps and breakpoints

THREE_STEPS = b"\xb8\x05\x00\x40\x90\xf4"  # mov ax, 5; inc ax; nop; hlt


def test_step_executes_one_instruction(vm: VM) -> None:
    vm.load(THREE_STEPS)

    first = vm.step()
    after_first = rax(vm)
    second = vm.step()

    assert isinstance(first, Debug)
    assert isinstance(second, Debug)
    assert (first.kind, first.address, after_first) == ("step", 0x8003, 5)
    assert (second.kind, second.address, rax(vm)) == ("step", 0x8004, 6)
    assert vm.run(timeout=LIMIT) == Halt(0)


def test_step_reaches_hlt(vm: VM) -> None:
    vm.load(HALT)

    exits = [vm.step()]

    assert isinstance(exits[0], Halt | Debug)
    assert vm.vcpus[0].registers().rip == 0x8001


def test_step_serves_devices(vm: VM) -> None:
    device = Recorder(value=0x42)
    vm.attach(device, port=0x10, size=1)
    vm.load(IN_HALT)

    exit = vm.step()

    assert isinstance(exit, Debug)
    assert (rax(vm), device.reads) == (0x42, [(0, 1)])


def test_a_stop_before_a_step_ends_it_before_the_instruction(vm: VM) -> None:
    vm.load(THREE_STEPS)
    vm.stop(9)

    assert vm.step() == Stopped(0, 9, "stop")
    assert rax(vm) == 0
    assert isinstance(vm.step(), Debug)


@pytest.mark.parametrize("index", [-1, 1, 99])
def test_stepping_a_processor_that_is_not_there_is_refused(vm: VM, index: int) -> None:
    with pytest.raises(ConfigurationError, match="no processor"):
        vm.step(index)


@pytest.mark.usefixtures("breakpoints")
def test_a_run_stops_before_a_breakpoint_and_resumes_from_it(vm: VM) -> None:
    vm.load(THREE_STEPS)
    vm.vcpus[0].set_breakpoints([0x8003])

    exit = vm.run(timeout=LIMIT)

    assert isinstance(exit, Debug)
    assert (exit.kind, exit.address, rax(vm)) == ("breakpoint", 0x8003, 5)
    assert vm.run(timeout=LIMIT) == Halt(0)
    assert rax(vm) == 6


@pytest.mark.usefixtures("breakpoints")
def test_a_breakpoint_in_a_loop_is_reached_each_time_round(vm: VM) -> None:
    vm.load(b"\x40\x90\xeb\xfc")  # 1: inc ax; nop; jmp 1b
    vm.vcpus[0].set_breakpoints([0x8001])

    counts = [(type(vm.run(timeout=LIMIT)), rax(vm)) for _ in range(3)]

    assert counts == [(Debug, 1), (Debug, 2), (Debug, 3)]


@pytest.mark.usefixtures("breakpoints")
def test_adjacent_breakpoints_are_all_reached(vm: VM) -> None:
    vm.load(b"\x90\x40\x40\xf4")  # nop; inc ax; inc ax; hlt
    vm.vcpus[0].set_breakpoints([0x8001, 0x8002, 0x8003])

    reached = [vm.vcpus[0].registers().rip for _ in range(3) if isinstance(vm.run(timeout=LIMIT), Debug)]

    assert reached == [0x8001, 0x8002, 0x8003]
    assert vm.run(timeout=LIMIT) == Halt(0)


def test_breakpoints_can_be_taken_away(vm: VM) -> None:
    vm.load(THREE_STEPS)
    vm.vcpus[0].set_breakpoints([0x8003])
    vm.vcpus[0].set_breakpoints([])

    assert vm.run(timeout=LIMIT) == Halt(0)


def test_a_fifth_breakpoint_is_refused(vm: VM) -> None:
    with pytest.raises(ConfigurationError, match="breakpoints"):
        vm.vcpus[0].set_breakpoints(range(5))


# Images


def test_an_image_comes_from_a_path_a_string_or_bytes(vm: VM, tmp_path: Path) -> None:
    path = tmp_path / "image.bin"
    path.write_bytes(HALT)

    for image in (path, str(path), HALT, bytearray(HALT), memoryview(HALT)):
        entry = vm.load(image)
        assert (entry.format, vm.entry) == ("flat", entry)
        assert vm.run(timeout=LIMIT) == Halt(0)


def test_a_guest_can_be_loaded_anew_after_it_died(vm: VM) -> None:
    vm.load(b"\x0f\x0b", mode="protected")  # ud2, with no IDT
    assert isinstance(vm.run(timeout=LIMIT), Shutdown)

    vm.load(b"\x40\xf4")

    assert vm.run(timeout=LIMIT) == Halt(0)
    assert rax(vm) == 1


@pytest.mark.parametrize(
    ("image", "options", "error", "text"),
    [
        pytest.param(b"", {}, ImageError, "empty", id="empty"),
        pytest.param("/nonexistent/image", {}, ImageError, "No such file", id="missing"),
        pytest.param("/dev", {}, ImageError, "not a regular file", id="directory"),
        pytest.param(bytes(4 << 20), {}, ConfigurationError, "memory", id="too-large"),
        pytest.param(HALT, {"format": "tar"}, ConfigurationError, "unknown image format", id="format"),
        pytest.param(HALT, {"mode": "virtual"}, ConfigurationError, "unknown mode", id="mode"),
        pytest.param(HALT, {"load_address": -1}, ConfigurationError, "negative", id="negative-address"),
        pytest.param(
            HALT, {"load_address": 1 << 40}, ConfigurationError, "no writable memory", id="far-address"
        ),
        pytest.param(HALT, {"command_line": "x"}, ConfigurationError, "no place", id="command-line"),
        pytest.param(HALT, {"modules": [Module(b"x")]}, ConfigurationError, "no place", id="modules"),
        pytest.param(b"\x7fELF", {}, ImageError, "ELF", id="truncated-elf"),
        pytest.param(HALT, {"format": "firmware"}, ImageError, "multiple of 4 KiB", id="odd-firmware"),
        pytest.param(
            bytes(4096), {"format": "firmware", "mode": "real"}, ConfigurationError, "firmware", id="rom-mode"
        ),
    ],
)
def test_an_image_that_cannot_be_loaded_is_an_error(
    vm: VM, image: bytes | str, options: dict[str, object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        vm.load(image, **options)


def test_firmware_starts_at_the_reset_vector_in_read_only_memory(vm: VM) -> None:
    rom = bytearray(b"\x90" * 0x1_0000)
    rom[0:9] = b"\x2e\xc6\x06\x10\x00\x55\xb0\x07\xf4"  # mov byte cs:[0x10], 0x55; mov al, 7; hlt
    rom[0xFFF0:0xFFF3] = b"\xe9\x0d\x00"  # jmp 0x0000

    entry = vm.load(bytes(rom), format="firmware")
    exit = vm.run(timeout=LIMIT)

    assert entry.format == "firmware"
    assert exit == Halt(0)
    assert rax(vm) & 0xFF == 7
    assert vm.memory.read(0xFFFF_0000, 0x1_0000) == bytes(rom)
    assert vm.mmio.unclaimed.writes == 1


# Guests that die


def dies(vm: VM, code: str, mode: str) -> Exit:
    vm.load(bytes.fromhex(code), mode=mode)
    return vm.run(timeout=LIMIT)


@pytest.mark.usefixtures("registers_after_a_triple_fault")
def test_a_triple_fault_explains_itself(vm: VM) -> None:
    exit = dies(vm, "b8 efbeadde 0f0b", "protected")  # mov eax, 0xdeadbeef; ud2

    assert isinstance(exit, Shutdown)
    assert exit.failure is not None
    text = exit.explain()
    assert text.startswith("vCPU 0: triple fault\nregisters:\n")
    assert "deadbeef" in text
    assert "no gate for any vector" in text
    assert "0f 0b" in text


@pytest.mark.parametrize(
    ("code", "mode"),
    [
        # mov edi, 0x1000; mov ecx, 7 * 1024; xor eax, eax; rep stosd; mov rax, cr3; mov cr3, rax; jmp $
        pytest.param("bf00100000 b9001c0000 31c0 f3ab 0f20d8 0f22d8 ebfe", "long", id="page-tables"),
        # mov edi, 0x500; mov ecx, 16; xor eax, eax; rep stosd; mov ax, 0x10; mov ds, ax; jmp $
        pytest.param("bf00050000 b910000000 31c0 f3ab 66b81000 8ed8 ebfe", "protected", id="gdt"),
        # mov eax, 0xe0000000; jmp eax
        pytest.param("b8000000e0 ffe0", "protected", id="nothing-there"),
        # mov esp, 0xe0000000; int3: neither an IDT nor a stack
        pytest.param("bc000000e0 cc ebfe", "protected", id="no-stack"),
        # mov rax, 1 << 63; jmp rax: not canonical
        pytest.param("48b80000000000000080 ffe0", "long", id="not-canonical"),
    ],
)
def test_a_guest_that_destroys_itself_ends_in_an_exit_that_explains(vm: VM, code: str, mode: str) -> None:
    exit = dies(vm, code, mode)

    assert not isinstance(exit, Halt | Stopped | Interrupted | Debug)
    assert exit.failure is not None
    assert "registers:" in exit.explain()
    vm.load(HALT)
    assert vm.run(timeout=LIMIT) == Halt(0)


# Statistics


def test_statistics_count_exits_and_time(vm: VM) -> None:
    vm.attach(Recorder(), port=0x10, size=1)
    vm.load(OUT_INC_HALT)
    vm.measure_time()

    vm.run(timeout=LIMIT)
    statistics = vm.statistics()

    assert sum(statistics.exits.values()) >= 1
    assert statistics.guest_seconds >= 0
    assert statistics.guest_seconds + statistics.host_seconds > 0


# The end of a machine


def test_closing_twice_is_fine_and_running_afterwards_an_error(vm: VM) -> None:
    vm.load(HALT)
    vm.close()
    vm.close()

    for action in (vm.run, vm.step):
        with pytest.raises(ConfigurationError, match="closed"):
            action()


def test_closing_while_a_view_lives_is_refused_until_it_is_gone(backend: str) -> None:
    vm = VM("64K", backend=backend)
    view = vm.memory.view(0, 16)

    with pytest.raises(MemoryInUseError):
        vm.close()
    view[0] = 1  # still there
    del view
    vm.close()

    assert list(vm.memory) == []


def test_a_device_cannot_close_its_own_machine(vm: VM) -> None:
    vm.load(OUT_INC_HALT)
    vm.on_port(0x10)(lambda offset, size, value: vm.close())

    with pytest.raises(ConfigurationError, match=r"call stop\(\) instead"):
        vm.run(timeout=LIMIT)

    vm.detach(vm.ports.find(0x10))
    assert vm.run(timeout=LIMIT) == Halt(0)


def resources() -> tuple[int, int]:
    """Open descriptors, and mappings of guest memory and of vCPUs."""
    maps = Path("/proc/self/maps").read_text()
    return len(os.listdir("/proc/self/fd")), maps.count("memfd:") + maps.count("kvm")


def test_a_machine_that_is_dropped_without_close_leaves_nothing(backend: str) -> None:
    def use() -> None:
        vm = VM("1M", backend=backend)
        vm.on_port(0x10)(lambda offset, size, value: vm.stop())
        vm.load(OUT_INC_HALT)
        vm.run()

    use()
    gc.collect()
    before = resources()

    for _ in range(20):
        use()
    gc.collect()

    assert resources() == before


def test_a_machine_tells_what_it_is(vm: VM, backend: str) -> None:
    assert repr(vm) == f"<VM on {backend}, 2 MiB, 1 vCPU>"
