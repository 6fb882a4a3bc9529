"""Making machines: sizes, processors, backends. A backend that only remembers stands in for a real one."""

from __future__ import annotations

from contextlib import AbstractContextManager
from threading import RLock
from types import SimpleNamespace

import pytest

from pykvm import VM, BackendUnavailable, ConfigurationError, backends
from pykvm.interfaces import Device, Region


class Machine:
    """Remembers its memory map and whether it is closed."""

    def __init__(self, cpus: int, *, broken: bool = False) -> None:
        self.cpus = cpus
        self.broken = broken
        self.slots: dict[int, tuple[int, int]] = {}
        self.made: list[int] = []
        self.closed = 0

    def map(
        self, slot: int, address: int, region: Region, *, readonly: bool = False, log_dirty: bool = False
    ) -> None:
        self.slots[slot] = (address, region.size)

    def vcpu(self, index: int) -> SimpleNamespace:
        if self.broken:
            raise OSError("no more processors")
        self.made.append(index)
        return SimpleNamespace(index=index)

    def devices(self) -> list[tuple[Device, int, int]]:
        return []

    def serve(self, space: str, entries: object) -> None: ...

    def new_lock(self) -> AbstractContextManager[object]:
        return RLock()

    def close(self) -> None:
        self.closed += 1


class Backend:
    """Makes such machines; `why` is why it cannot."""

    def __init__(self, name: str, why: str | None = None) -> None:
        self.name = name
        self.why = why
        self.broken = False
        self.machines: list[Machine] = []

    def why_unavailable(self) -> str | None:
        return self.why

    def machine(self, *, irqchip: bool = False, cpus: int = 1) -> Machine:
        self.machines.append(Machine(cpus, broken=self.broken))
        return self.machines[-1]


@pytest.fixture
def kvm(monkeypatch: pytest.MonkeyPatch) -> Backend:
    backend = Backend("kvm")
    monkeypatch.setitem(backends._made, "kvm", backend)
    return backend


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> Backend:
    backend = Backend("emulator")
    monkeypatch.setitem(backends._made, "emulator", backend)
    return backend


# Memory


@pytest.mark.parametrize("memory", ["64K", "0x10000", 65536, "0.0625M"])
def test_memory_is_a_size_in_bytes_or_with_a_unit(kvm: Backend, memory: int | str) -> None:
    with VM(memory) as vm:
        assert [(slot.address, slot.size, slot.name) for slot in vm.memory] == [(0, 0x1_0000, "ram")]
    assert kvm.machines[0].slots == {0: (0, 0x1_0000)}


def test_memory_beyond_3_gib_goes_on_at_4_gib(kvm: Backend) -> None:
    with VM("3.5G") as vm:
        slots = [(slot.address, slot.size, slot.name) for slot in vm.memory]
        vm.memory.write_u32(0x1_0000_0000 + (512 << 20) - 4, 0x1234)

        assert slots == [(0, 3 << 30, "ram"), (4 << 30, 512 << 20, "ram above 4G")]
        assert vm.memory.read_u32((4 << 30) + (512 << 20) - 4) == 0x1234
    assert set(kvm.machines[0].slots.values()) == {(0, 3 << 30), (4 << 30, 512 << 20)}


def test_exactly_3_gib_is_one_slot(kvm: Backend) -> None:
    with VM("3G") as vm:
        assert [slot.size for slot in vm.memory] == [3 << 30]


def test_a_machine_without_memory_can_be_given_some(kvm: Backend) -> None:
    with VM(memory=0) as vm:
        assert list(vm.memory) == []

        vm.add_ram("64K")

        assert [slot.address for slot in vm.memory] == [0]


@pytest.mark.parametrize(
    ("memory", "text"),
    [
        ("3", "multiples of 4096"),
        (4097, "multiples of 4096"),
        ("0", "not a positive"),
        (-4096, "not a positive"),
        ("", "^$|memory|size"),
        ("lots", "not understood"),
        ("1.3", "not a positive whole number"),
        ("512T", "on a host that has"),
        ("5000T", "52 bits"),
    ],
)
def test_impossible_memory_is_refused_and_nothing_stays_open(
    kvm: Backend, memory: int | str, text: str
) -> None:
    with pytest.raises(ConfigurationError, match=text):
        VM(memory)

    assert [machine.closed for machine in kvm.machines] == [1] * len(kvm.machines)


# Processors


@pytest.mark.parametrize("cpus", [0, -1, 256])
def test_an_impossible_number_of_processors_is_refused(kvm: Backend, cpus: int) -> None:
    with pytest.raises(ConfigurationError, match="from 1 to 255"):
        VM("64K", cpus=cpus)

    assert kvm.machines == []


def test_processors_are_made_in_order(kvm: Backend) -> None:
    with VM("64K", cpus=3) as vm:
        assert [vcpu.index for vcpu in vm.vcpus] == [0, 1, 2]
    assert (kvm.machines[0].cpus, kvm.machines[0].made) == (3, [0, 1, 2])


def test_a_machine_whose_processors_cannot_be_made_is_closed(kvm: Backend) -> None:
    kvm.broken = True

    with pytest.raises(OSError, match="no more processors"):
        VM("64K")

    assert kvm.machines[0].closed == 1


# Backends


def test_auto_takes_kvm_where_it_works(kvm: Backend, emulator: Backend) -> None:
    with VM("64K") as vm:
        assert (vm.backend, vm.fallback_reason) == (kvm, None)


def test_auto_falls_back_to_the_emulator_and_says_why(kvm: Backend, emulator: Backend) -> None:
    kvm.why = "there is no /dev/kvm"

    with VM("64K") as vm:
        assert (vm.backend, vm.fallback_reason) == (emulator, "there is no /dev/kvm")


def test_a_backend_asked_for_by_name_is_not_replaced(kvm: Backend, emulator: Backend) -> None:
    kvm.why = "there is no /dev/kvm"

    with pytest.raises(BackendUnavailable, match="the kvm backend cannot be used here: there is no /dev/kvm"):
        VM("64K", backend="kvm")

    assert (kvm.machines, emulator.machines) == ([], [])


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match="unknown backend 'xen': choose auto, kvm or emulator"):
        VM("64K", backend="xen")


def test_each_backend_is_made_once() -> None:
    assert [backends.get(name) is backends.get(name) for name in backends.NAMES] == [True, True]
    assert [backends.get(name).name for name in backends.NAMES] == list(backends.NAMES)
