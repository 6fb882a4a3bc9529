"""The VM class on every backend: devices, their exceptions, and memory slots."""

from __future__ import annotations

import pytest

from pykvm import VM, BusError, ConfigurationError, Halt
from pykvm.values import replace
from tests.conformance.small_guests import (
    FETCH,
    HALT,
    HIGH,
    IN_HALT,
    LIMIT,
    OUT_INC_HALT,
    SEGMENT,
    STORE_55,
    Recorder,
    rax,
)


class FailsOnce(Recorder):
    """Raises at the n-th access and serves all others."""

    def __init__(self, at: int, value: int = 0) -> None:
        super().__init__(value)
        self.countdown = at

    def _count(self) -> None:
        self.countdown -= 1
        if self.countdown == 0:
            raise LookupError("not now")

    def read(self, offset: int, size: int) -> int:
        self._count()
        return super().read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._count()
        super().write(offset, size, value)


# Devices


def test_a_device_sees_offsets_and_sizes(vm: VM) -> None:
    device = Recorder(value=0x1234)
    vm.attach(device, port=0x10, size=4)
    vm.load(b"\xe5\x12\xe7\x10\xf4")  # in ax, 0x12; out 0x10, ax; hlt

    vm.run(timeout=LIMIT)

    assert (device.reads, device.writes, rax(vm)) == ([(2, 2)], [(0, 2, 0x1234)], 0x1234)


@pytest.mark.parametrize(
    ("code", "where"),
    [
        pytest.param(IN_HALT, {"port": 0x10}, id="in"),
        pytest.param(OUT_INC_HALT, {"port": 0x10}, id="out"),
        pytest.param(FETCH, {"address": HIGH}, id="mmio-read"),
        pytest.param(STORE_55, {"address": HIGH}, id="mmio-write"),
    ],
)
def test_what_a_device_raises_leaves_run_and_the_access_is_offered_again(
    backend: str, code: bytes, where: dict[str, int]
) -> None:
    with VM("64K", backend=backend) as vm:
        device = FailsOnce(at=1, value=0x77)
        vm.attach(device, **where, size=16)
        vm.load(code)

        with pytest.raises(LookupError, match="not now"):
            vm.run(timeout=LIMIT)

        assert (device.reads, device.writes) == ([], [])
        assert vm.run(timeout=LIMIT) == Halt(0)
        assert len(device.reads) + len(device.writes) == 1


def test_a_string_instruction_goes_on_at_the_element_where_the_device_raised(vm: VM) -> None:
    device = FailsOnce(at=3)
    vm.attach(device, port=0x10, size=1)
    # cld; mov si, 0x9000; mov dx, 0x10; mov cx, 5; rep outsb; hlt
    vm.load(b"\xfc\xbe\x00\x90\xba\x10\x00\xb9\x05\x00\xf3\x6e\xf4")
    vm.memory.write(0x9000, b"abcde")

    with pytest.raises(LookupError):
        vm.run(timeout=LIMIT)

    assert vm.run(timeout=LIMIT) == Halt(0)
    assert bytes(value for _, _, value in device.writes) == b"abcde"


def test_setting_registers_abandons_the_access_of_a_device_that_raised(vm: VM) -> None:
    device = FailsOnce(at=1, value=0x77)
    vm.attach(device, port=0x10, size=1)
    vm.load(IN_HALT + HALT)
    with pytest.raises(LookupError):
        vm.run(timeout=LIMIT)

    vm.vcpus[0].set_registers(replace(vm.vcpus[0].registers(), rip=0x8003))

    assert vm.run(timeout=LIMIT) == Halt(0)
    assert (device.reads, vm.vcpus[0].registers().rip) == ([], 0x8004)


def test_a_stop_in_a_device_that_then_raises_does_not_reach_the_next_run(vm: VM) -> None:
    vm.load(OUT_INC_HALT)

    @vm.on_port(0x10)
    def stop_and_fail(offset: int, size: int, value: int | None) -> None:
        vm.detach(vm.ports.find(0x10))
        vm.stop()
        raise LookupError("after the stop")

    with pytest.raises(LookupError):
        vm.run(timeout=LIMIT)

    assert vm.run(timeout=LIMIT) == Halt(0)


def test_unclaimed_reads_are_all_ones_and_counted(vm: VM) -> None:
    vm.load(b"\xe4\x10\xe6\x11\xf4")  # in al, 0x10; out 0x11, al; hlt

    vm.run(timeout=LIMIT)

    assert rax(vm) == 0xFF
    assert (vm.ports.unclaimed.reads, vm.ports.unclaimed.writes) == (1, 1)


def test_a_function_answers_a_port(vm: VM) -> None:
    seen: list[tuple[int, int, int | None]] = []

    @vm.on_port(0x10, size=2)
    def double(offset: int, size: int, value: int | None) -> int | None:
        seen.append((offset, size, value))
        return 0x21

    vm.load(b"\xe4\x11\xe6\x10\xf4")  # in al, 0x11; out 0x10, al; hlt
    vm.run(timeout=LIMIT)

    assert seen == [(1, 1, None), (0, 1, 0x21)]
    assert rax(vm) == 0x21


def test_a_function_that_returns_none_reads_as_all_ones(vm: VM) -> None:
    vm.on_port(0x10)(lambda offset, size, value: None)
    vm.load(IN_HALT)

    vm.run(timeout=LIMIT)

    assert rax(vm) == 0xFF


def test_a_function_answers_memory_addresses(backend: str) -> None:
    with VM("64K", backend=backend) as vm:
        vm.on_mmio(HIGH, size=0x10)(lambda offset, size, value: 0x30 + offset)
        vm.load(FETCH)

        vm.run(timeout=LIMIT)

        assert rax(vm) & 0xFF == 0x36


def test_a_detached_device_is_asked_no_more(vm: VM) -> None:
    device = Recorder()
    vm.attach(device, port=0x10, size=1)
    vm.attach(device, address=0xD000_0000, size=4)
    vm.detach(device)
    vm.load(IN_HALT)

    vm.run(timeout=LIMIT)

    assert device.reads == []
    assert rax(vm) == 0xFF


@pytest.mark.parametrize("where", [{"port": 0x10}, {"address": 0xD000_0000}])
def test_one_range_of_a_device_can_be_detached(vm: VM, where: dict[str, int]) -> None:
    device = Recorder()
    vm.attach(device, port=0x20, size=1)
    attachment = vm.attach(device, **where, size=4)

    vm.detach(attachment)

    assert [each.address for bus in (vm.ports, vm.mmio) for each in bus if each.device is device] == [0x20]


def test_detaching_what_is_not_attached_is_an_error(vm: VM) -> None:
    with pytest.raises(BusError, match="Recorder is not attached"):
        vm.detach(Recorder())


@pytest.mark.parametrize("where", [{}, {"port": 1, "address": 1}])
def test_a_device_goes_to_either_a_port_or_an_address(vm: VM, where: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match="either port= or address="):
        vm.attach(Recorder(), **where, size=1)


@pytest.mark.parametrize("where", [{"port": 0x12}, {"address": 0xD000_0002}])
def test_devices_do_not_overlap(vm: VM, where: dict[str, int]) -> None:
    vm.attach(Recorder(), port=0x10, size=4)
    vm.attach(Recorder(), address=0xD000_0000, size=4)

    with pytest.raises(BusError, match="overlaps Recorder"):
        vm.attach(Recorder(), **where, size=4)


def test_an_interrupt_line_needs_interrupt_controllers(vm: VM) -> None:
    with pytest.raises(ConfigurationError, match="irqchip=True"):
        vm.irq(4)


# Memory


def test_what_memory_does_not_cover_goes_to_the_mmio_bus(backend: str) -> None:
    with VM("64K", backend=backend) as vm:
        device = Recorder()
        vm.attach(device, address=HIGH, size=0x10)
        vm.load(STORE_55)

        exit = vm.run(timeout=LIMIT)

        assert exit == Halt(0)
        assert device.writes == [(4, 1, 0x55)]


def test_guest_writes_to_read_only_memory_go_to_the_mmio_bus(backend: str) -> None:
    with VM("64K", backend=backend) as vm:
        vm.memory.add(HIGH, readonly=True, data=b"rom data")
        device = Recorder()
        vm.attach(device, address=HIGH, size=0x1000)
        vm.load(STORE_55[:-1] + FETCH)

        exit = vm.run(timeout=LIMIT)

        assert exit == Halt(0)
        assert (device.writes, device.reads) == ([(4, 1, 0x55)], [])
        assert rax(vm) & 0xFF == b"rom data"[6]
        assert vm.memory.read(HIGH, 8) == b"rom data"


def test_dirty_pages_are_those_written_since_the_last_look(backend: str) -> None:
    with VM("64K", backend=backend) as vm:
        slot = vm.memory.add(HIGH, 0x4000, log_dirty=True)
        # mov byte [0x1000], 1; mov al, [0x2000]; mov byte [0x3fff], 1; hlt; mov byte [0], 1; hlt
        vm.load(SEGMENT + bytes.fromhex("c6060010 01 a00020 c606ff3f 01 f4 c6060000 01 f4"))
        vm.run(timeout=LIMIT)

        first = vm.machine.dirty(slot.index).tolist()
        between = vm.machine.dirty(slot.index).tolist()
        vm.run(timeout=LIMIT)
        second = vm.machine.dirty(slot.index).tolist()

        # Where it tracks writes by write protection, KVM may take the first read of a page for a write.
        assert [first[0], first[1], first[3]] == [False, True, True]
        assert between == [False] * 4
        assert second == [True, False, False, False]


def test_memory_added_between_runs_is_there(backend: str) -> None:
    with VM("64K", backend=backend) as vm:
        vm.load(STORE_55[:-1] + b"\xf4" + STORE_55)
        vm.run(timeout=LIMIT)

        vm.memory.add(HIGH, "4K")
        vm.run(timeout=LIMIT)

        assert vm.mmio.unclaimed.writes == 1
        assert vm.memory.read_u8(HIGH + 4) == 0x55


def test_a_device_may_add_and_remove_memory_while_the_guest_runs(backend: str) -> None:
    with VM("64K", backend=backend) as vm:
        slots = [vm.memory.add(HIGH, "4K")]

        @vm.on_port(0x10)
        def swap(offset: int, size: int, value: int | None) -> None:
            vm.memory.remove(slots.pop())
            slots.append(vm.memory.add(HIGH, "4K", data=b"\xaa" * 16))

        # out 0x10, al, with accesses before and after
        vm.load(STORE_55[:-1] + b"\xe6\x10" + FETCH)
        exit = vm.run(timeout=LIMIT)

        assert exit == Halt(0)
        assert rax(vm) & 0xFF == 0xAA
        assert vm.memory.read_u8(HIGH + 4) == 0xAA


def test_memory_removed_by_a_device_is_a_hole_at_once(backend: str) -> None:
    with VM("64K", backend=backend) as vm:
        slot = vm.memory.add(HIGH, "4K", data=b"\xaa" * 16)
        vm.on_port(0x10)(lambda offset, size, value: vm.memory.remove(slot))
        vm.load(FETCH[:-1] + b"\xe6\x10" + FETCH)

        exit = vm.run(timeout=LIMIT)

        assert exit == Halt(0)
        assert rax(vm) & 0xFF == 0xFF
        assert vm.mmio.unclaimed.reads == 1


def test_a_view_and_the_guest_see_each_other_s_writes(vm: VM) -> None:
    view = vm.memory.view(0x9000, 2, "<u2")
    view[0] = 0x1234
    vm.load(b"\xa1\x00\x90\x40\xa3\x02\x90\xf4")  # mov ax, [0x9000]; inc ax; mov [0x9002], ax; hlt

    vm.run(timeout=LIMIT)

    assert view.tolist() == [0x1234, 0x1235]
    del view


def test_code_written_by_the_host_between_runs_is_executed(vm: VM) -> None:
    vm.load(b"\x40\xf4\xeb\xfc")  # 1: inc ax; hlt; jmp 1b
    vm.run(timeout=LIMIT)

    vm.memory.write(0x8000, b"\x48")  # dec ax
    vm.run(timeout=LIMIT)

    assert rax(vm) == 0
