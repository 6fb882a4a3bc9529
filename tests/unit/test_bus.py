"""The bus: which device answers, what happens where none does, locks and tracing."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.bus import Attachment, Bus
from pykvm.errors import BusError

ALL_ONES = {size: (1 << (8 * size)) - 1 for size in range(1, 9)}


class Recorder:
    """Returns `value` and remembers what it was asked."""

    def __init__(self, value: object = 0x1122334455667788) -> None:
        self.value = value
        self.calls: list[tuple[object, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.calls.append(("read", offset, size))
        return self.value  # type: ignore[return-value]

    def write(self, offset: int, size: int, value: int) -> None:
        self.calls.append(("write", offset, size, value))


@pytest.fixture
def ports() -> Bus:
    return Bus("port", 0x10000)


def test_a_device_sees_offsets_into_its_range(ports: Bus) -> None:
    device = Recorder()
    ports.attach(device, 0x3F8, 8)

    ports.read(0x3FD, 1)
    ports.write(0x3F8, 2, 0x4142)

    assert device.calls == [("read", 5, 1), ("write", 0, 2, 0x4142)]


@pytest.mark.parametrize("size", range(1, 9))
def test_values_are_cut_to_the_access_size_in_both_directions(ports: Bus, size: int) -> None:
    device = Recorder(-1)
    ports.attach(device, 0, 8)

    value = ports.read(0, size)
    ports.write(0, size, (1 << 100) - 1)

    assert value == ALL_ONES[size]
    assert device.calls[-1] == ("write", 0, size, ALL_ONES[size])


@pytest.mark.parametrize("size", [0, -1, 9, 16])
def test_an_access_of_an_impossible_size_is_refused(ports: Bus, size: int) -> None:
    with pytest.raises(ValueError, match="1 to 8"):
        ports.read(0, size)
    with pytest.raises(ValueError, match="1 to 8"):
        ports.write(0, size, 0)


def test_unclaimed_reads_return_all_ones_and_writes_vanish_and_both_are_counted(ports: Bus) -> None:
    value = ports.read(0x80, 4)
    ports.write(0x80, 1, 7)
    ports.write(0x81, 1, 7)

    assert value == 0xFFFF_FFFF
    assert (ports.unclaimed.reads, ports.unclaimed.writes) == (1, 2)
    assert ports.unclaimed.addresses == {0x80: 2, 0x81: 1}


def test_an_access_that_leaves_its_range_is_unclaimed_even_where_the_next_range_is_adjacent(
    ports: Bus,
) -> None:
    first, second = Recorder(), Recorder()
    ports.attach(first, 0x10, 2)
    ports.attach(second, 0x12, 2)
    ports.read(0x10, 2)
    first.calls.clear()

    values = [ports.read(0x11, 2), ports.read(0xF, 2), ports.read(0x13, 2)]

    assert values == [0xFFFF] * 3
    assert first.calls == second.calls == []


def test_a_guest_that_probes_every_port_does_not_make_the_counters_grow(ports: Bus) -> None:
    for port in range(0x1000):
        ports.read(port, 1)

    assert ports.unclaimed.reads == 0x1000
    assert len(ports.unclaimed.addresses) == ports.unclaimed.LIMIT


def test_overlap_is_refused_and_the_error_names_both_ranges_and_devices(ports: Bus) -> None:
    ports.attach(Recorder(), 0x3F8, 8)

    with pytest.raises(BusError) as caught:
        ports.attach(Bystander(), 0x3F0, 9)

    assert str(caught.value) == "port: Bystander at 0x3f0..0x3f9 overlaps Recorder at 0x3f8..0x400"


class Bystander(Recorder):
    pass


@pytest.mark.parametrize(
    ("address", "size"), [(0x3F0, 9), (0x3F8, 8), (0x3FF, 1), (0x3FA, 2), (0x3F0, 0x20), (0, 0x10000)]
)
def test_every_kind_of_overlap_is_refused(ports: Bus, address: int, size: int) -> None:
    ports.attach(Recorder(), 0x3F8, 8)

    with pytest.raises(BusError, match="overlaps"):
        ports.attach(Recorder(), address, size)


@pytest.mark.parametrize(("address", "size"), [(0, 0), (0, -1), (-1, 2), (0xFFFF, 2), (0x10000, 1)])
def test_ranges_that_are_empty_or_leave_the_address_space_are_refused(
    ports: Bus, address: int, size: int
) -> None:
    with pytest.raises(BusError, match="port: "):
        ports.attach(Recorder(), address, size)


def test_an_object_without_read_and_write_is_refused(ports: Bus) -> None:
    with pytest.raises(BusError, match=r"lacks read"):
        ports.attach(object(), 0, 1)  # type: ignore[arg-type]


def test_a_detached_range_is_unclaimed_at_once_and_can_be_attached_again(ports: Bus) -> None:
    device = Recorder(5)
    attachment = ports.attach(device, 0x10, 1)
    ports.read(0x10, 1)

    ports.detach(attachment)
    gone = ports.read(0x10, 1)
    ports.attach(device, 0x10, 1)
    back = ports.read(0x10, 1)

    assert (gone, back) == (0xFF, 5)


def test_detaching_a_device_removes_all_of_its_ranges_and_only_those(ports: Bus) -> None:
    device, other = Recorder(), Recorder()
    ports.attach(device, 0x10, 1)
    kept = ports.attach(other, 0x20, 1)
    ports.attach(device, 0x30, 1)

    ports.detach(device)

    assert list(ports) == [kept]


def test_detaching_what_is_not_attached_is_an_error(ports: Bus) -> None:
    attachment = ports.attach(Recorder(), 0x10, 1)
    ports.detach(attachment)

    with pytest.raises(BusError, match=r"Recorder at 0x10..0x11 is not attached"):
        ports.detach(attachment)
    with pytest.raises(BusError, match="Recorder is not attached"):
        ports.detach(Recorder())


def test_ranges_are_listed_by_address_and_found_by_any_address_inside(ports: Bus) -> None:
    high = ports.attach(Recorder(), 0x20, 4)
    low = ports.attach(Recorder(), 0x10, 4)

    assert list(ports) == [low, high]
    assert ports.find(0x13) is low
    assert ports.find(0x14) is None
    assert ports.find(0x20) is high
    assert ports.find(0) is None


@pytest.mark.parametrize("value", [None, "1", 1.0, b"\x01"])
def test_a_device_that_returns_no_integer_raises_a_type_error_that_names_it(
    ports: Bus, value: object
) -> None:
    ports.attach(Recorder(value), 0x10, 1)

    with pytest.raises(TypeError, match=r"Recorder at 0x10..0x11: read returned .*, not an integer"):
        ports.read(0x10, 1)


@pytest.mark.parametrize("value", [np.uint8(0x88), np.int64(0x88), np.uint64(0x88)])
def test_a_device_may_return_numpy_integers(ports: Bus, value: object) -> None:
    ports.attach(Recorder(value), 0x10, 8)

    result = ports.read(0x10, 8)

    assert result == 0x88
    assert type(result) is int


def test_a_device_may_return_a_bool(ports: Bus) -> None:
    ports.attach(Recorder(True), 0x10, 1)

    result = ports.read(0x10, 1)

    assert result == 1
    assert type(result) is int


class Failing(Recorder):
    def read(self, offset: int, size: int) -> int:
        raise KeyError("from the device")


def test_an_exception_of_a_device_comes_out_as_itself_and_its_lock_is_free_again(ports: Bus) -> None:
    device = Failing()
    ports.attach(device, 0x10, 1)

    with pytest.raises(KeyError, match="from the device"):
        ports.read(0x10, 1)
    with ThreadPoolExecutor(1) as other_thread:
        other_thread.submit(ports.write, 0x10, 1, 3).result(timeout=5)

    assert device.calls == [("write", 0, 1, 3)]


class Reentrant(Recorder):
    """Reads another of its own registers, and detaches itself, from within a call."""

    def __init__(self, bus: Bus) -> None:
        super().__init__()
        self.bus = bus

    def read(self, offset: int, size: int) -> int:
        return offset if offset else self.bus.read(0x15, 1)

    def write(self, offset: int, size: int, value: int) -> None:
        self.bus.detach(self)


def test_a_device_may_use_the_bus_from_within_a_call(ports: Bus) -> None:
    ports.attach(Reentrant(ports), 0x10, 8)

    value = ports.read(0x10, 1)
    ports.write(0x10, 1, 0)

    assert value == 5
    assert list(ports) == []


class Crowded(Recorder):
    """Notices two threads inside at once."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = 0
        self.most = 0
        self.second_is_waiting = threading.Event()

    def read(self, offset: int, size: int) -> int:
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.second_is_waiting.wait(0.05)
        self.inside -= 1
        return 0


@pytest.mark.parametrize("where", ["same range", "other range", "other bus"])
def test_a_device_is_never_called_by_two_threads_at_once(where: str) -> None:
    ports, mmio, device = Bus("port", 0x10000), Bus("mmio", 1 << 52), Crowded()
    ports.attach(device, 0x10, 1)
    ports.attach(device, 0x20, 1)
    mmio.attach(device, 0x1000, 1)
    second = {"same range": (ports, 0x10), "other range": (ports, 0x20), "other bus": (mmio, 0x1000)}
    bus, address = second[where]

    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(ports.read, 0x10, 1), threads.submit(bus.read, address, 1)]
        results = [call.result(timeout=5) for call in calls]

    assert results == [0, 0]
    assert device.most == 1


class Blocking(Recorder):
    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.leave = threading.Event()

    def read(self, offset: int, size: int) -> int:
        self.entered.set()
        assert self.leave.wait(5)
        return 1


def test_one_device_does_not_wait_for_another(ports: Bus) -> None:
    slow, quick = Blocking(), Recorder(2)
    ports.attach(slow, 0x10, 1)
    ports.attach(quick, 0x20, 1)

    with ThreadPoolExecutor(1) as thread:
        blocked = thread.submit(ports.read, 0x10, 1)
        slow.entered.wait(5)
        value = ports.read(0x20, 1)
        ports.detach(slow)
        slow.leave.set()

    assert value == 2
    assert blocked.result() == 1
    assert ports.read(0x10, 1) == 0xFF


def test_ranges_may_come_and_go_while_other_threads_access_the_bus(ports: Bus) -> None:
    ports.attach(Recorder(1), 0x10, 1)
    moving = Recorder(2)
    done = threading.Event()
    seen: set[tuple[int, int]] = set()

    def vcpu() -> None:
        while not done.is_set():
            seen.add((ports.read(0x10, 1), ports.read(0x20, 1)))

    with ThreadPoolExecutor(2) as threads:
        vcpus = [threads.submit(vcpu), threads.submit(vcpu)]
        for _ in range(300):
            ports.detach(ports.attach(moving, 0x20, 1))
        done.set()
        [each.result(timeout=5) for each in vcpus]

    assert seen <= {(1, 2), (1, 0xFF)}
    assert ports.read(0x20, 1) == 0xFF


def test_a_lock_does_not_outlive_its_device(ports: Bus) -> None:
    from pykvm import bus

    before = len(bus._device_locks)
    device = Recorder()
    ports.attach(device, 0x10, 1)
    during = len(bus._device_locks)

    ports.detach(device)

    assert during == before + 1
    assert len(bus._device_locks) == before


def test_tracing_sees_every_access_and_can_be_switched_at_any_time(ports: Bus) -> None:
    ports.attach(Recorder(0x1FF), 0x10, 4)
    ports.read(0x10, 1)
    seen: list[tuple[str, int, int, int]] = []
    bound_before = ports.read

    ports.trace = lambda *access: seen.append(access)
    bound_before(0x11, 1)
    ports.write(0x12, 2, 0x1FFFF)
    ports.read(0x99, 2)
    ports.write(0x99, 1, 3)
    ports.trace = None
    ports.read(0x10, 1)

    assert seen == [
        ("read", 0x11, 1, 0xFF),
        ("write", 0x12, 2, 0xFFFF),
        ("read", 0x99, 2, 0xFFFF),
        ("write", 0x99, 1, 3),
    ]


def test_devices_attached_while_tracing_are_traced(ports: Bus) -> None:
    seen: list[tuple[str, int, int, int]] = []
    ports.trace = lambda *access: seen.append(access)

    ports.attach(Recorder(7), 0x10, 1)
    ports.read(0x10, 1)

    assert seen == [("read", 0x10, 1, 7)]


def test_a_device_that_returns_no_integer_is_told_while_tracing_too(ports: Bus) -> None:
    ports.trace = lambda *access: None
    ports.attach(Recorder(None), 0x10, 1)

    with pytest.raises(TypeError, match=r"Recorder at 0x10..0x11: read returned None"):
        ports.read(0x10, 1)


class Identity:
    """Answers with the address it believes to be at."""

    def __init__(self, base: int) -> None:
        self.base = base

    def read(self, offset: int, size: int) -> int:
        return self.base + offset

    def write(self, offset: int, size: int, value: int) -> None:
        raise AssertionError


ranges = st.lists(st.tuples(st.integers(-2, 70), st.integers(-1, 12)), max_size=12)
accesses = st.lists(st.tuples(st.integers(0, 70), st.integers(1, 8)), max_size=30)


@given(ranges, accesses)
def test_the_bus_agrees_with_a_model_that_lists_every_address(
    wanted: list[tuple[int, int]], reads: list[tuple[int, int]]
) -> None:
    bus = Bus("test", 64)
    owner: dict[int, int] = {}
    attached: list[Attachment] = []
    for address, size in wanted:
        cells = range(address, address + size)
        possible = size > 0 and address >= 0 and address + size <= 64 and owner.keys().isdisjoint(cells)
        try:
            attached.append(bus.attach(Identity(address), address, size))
        except BusError:
            assert not possible
        else:
            assert possible
            owner |= dict.fromkeys(cells, address)

    for address, size in reads:
        owners = {owner.get(cell) for cell in range(address, address + size)}
        claimed = len(owners) == 1 and None not in owners
        assert bus.read(address, size) == (address if claimed else ALL_ONES[size])
    assert list(bus) == sorted(attached, key=lambda each: each.address)
