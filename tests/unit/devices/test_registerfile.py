"""Register files: declared registers behave as the data sheet notation says."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.bus import Bus
from pykvm.devices import registerfile
from pykvm.devices.registerfile import Register, RegisterFile, RegisterFileState
from pykvm.errors import ConfigurationError, SnapshotError


class Sample(RegisterFile):
    """Every kind of register, with a gap at 0x0f..0x10 and after the last."""

    plain = Register(0x00, size=4, reset=0x11223344)
    masked = Register(0x04, size=2, reset=0xA000, writable=0x0FF0)
    constant = Register(0x06, size=1, reset=0x5A, writable=0)
    flags = Register(0x07, size=1, reset=0xFF, writable=0x80, write_one_to_clear=0x0F)
    events = Register(0x08, size=4, reset=0xFFFF, writable=0, read_to_clear=0xF0F0)
    command = Register(0x0C, size=2)
    counter = Register(0x0E, size=1)
    wide = Register(0x10, size=8)

    def __init__(self) -> None:
        self.written: list[tuple[int, int]] = []

    @command.on_write
    def commanded(self, value: int) -> None:
        self.written.append((value, self.command))

    @counter.on_read
    def count(self) -> int:
        self.counter += 1
        return self.counter


@pytest.fixture
def device() -> Sample:
    return Sample()


def test_the_example_in_the_documentation_works() -> None:
    result = doctest.testmod(registerfile)

    assert result.attempted >= 5
    assert result.failed == 0


def test_registers_start_with_their_reset_values_and_are_attributes(device: Sample) -> None:
    assert device.plain == device.read(0, 4) == 0x11223344
    assert Sample.plain.offset == 0
    assert [register.name for register in Sample.registers] == [
        "plain", "masked", "constant", "flags", "events", "command", "counter", "wide",
    ]  # fmt: skip


def test_two_devices_of_a_class_share_nothing() -> None:
    first, second = Sample(), Sample()

    first.write(0, 4, 1)

    assert (first.plain, second.plain) == (1, 0x11223344)


@pytest.mark.parametrize(
    ("offset", "size", "value"),
    [(0, 1, 0x44), (1, 1, 0x33), (1, 2, 0x2233), (3, 1, 0x11), (1, 4, 0x00112233)],
)
def test_part_of_a_register_can_be_read(device: Sample, offset: int, size: int, value: int) -> None:
    device.masked = 0

    assert device.read(offset, size) == value


@pytest.mark.parametrize(
    ("offset", "size", "value", "result"),
    [
        (0, 1, 0xAA, 0x112233AA),
        (1, 1, 0xAA, 0x1122AA44),
        (1, 2, 0xBBAA, 0x11BBAA44),
        (2, 4, 0x0000BBAA, 0xBBAA3344),
        (0, 8, 0xFFFF_FFFF_0102_0304, 0x01020304),
    ],
)
def test_part_of_a_register_can_be_written(
    device: Sample, offset: int, size: int, value: int, result: int
) -> None:
    device.write(offset, size, value)

    assert device.plain == result


def test_a_wide_access_spans_adjacent_registers(device: Sample) -> None:
    device.write(2, 4, 0xFFFF_BBAA)

    assert (device.plain, device.masked) == (0xBBAA3344, 0xAFF0)
    assert device.read(2, 8) == 0xFFFF_FF5A_AFF0_BBAA


def test_only_writable_bits_change(device: Sample) -> None:
    device.write(4, 2, 0x5555)
    device.write(6, 1, 0x00)

    assert device.masked == 0xA550
    assert device.constant == 0x5A


def test_ones_clear_the_bits_that_are_meant_to_and_zeros_leave_them(device: Sample) -> None:
    device.write(7, 1, 0x85)

    assert device.flags == 0xFA


def test_bytes_that_are_not_written_clear_nothing(device: Sample) -> None:
    device.write(0x06, 1, 0xFF)

    assert device.flags == 0xFF


def test_reading_clears_the_bits_that_are_meant_to(device: Sample) -> None:
    assert device.read(8, 4) == 0xFFFF
    assert device.read(8, 4) == 0x0F0F
    assert device.events == 0x0F0F


def test_reading_the_attribute_has_no_effect(device: Sample) -> None:
    assert (device.events, device.events, device.counter) == (0xFFFF, 0xFFFF, 0)


def test_a_write_callback_gets_what_was_written_and_sees_the_new_content(device: Sample) -> None:
    device.write(0x0C, 2, 0x1234)
    device.write(0x0D, 1, 0xFF)

    assert device.written == [(0x1234, 0x1234), (0xFF34, 0xFF34)]


def test_a_write_callback_of_a_read_only_register_is_a_doorbell() -> None:
    class Doorbell(RegisterFile):
        bell = Register(0, writable=0)
        rung: int | None = None

        @bell.on_write
        def ring(self, value: int) -> None:
            self.rung = value

    device = Doorbell()

    device.write(0, 4, 7)

    assert (device.rung, device.bell) == (7, 0)


def test_each_register_is_read_once_however_wide_the_access(device: Sample) -> None:
    assert device.read(0x0C, 4) == 0x00_01_0000
    assert device.counter == 1


def test_a_callback_that_raises_leaves_the_register_as_it_was() -> None:
    class Picky(RegisterFile):
        value = Register(0, reset=5)

        @value.on_write
        def refuse(self, value: int) -> None:
            raise RuntimeError("no")

    device = Picky()

    with pytest.raises(RuntimeError, match="no"):
        device.write(0, 4, 9)

    assert device.value == 5


def test_gaps_read_as_zero_and_ignore_writes(device: Sample) -> None:
    device.write(0x0F, 1, 0xFF)
    device.write(0x100, 8, 0xFF)

    assert device.read(0x0F, 1) == 0
    assert device.read(0x100, 8) == 0


def test_host_code_may_set_any_bit_and_only_the_bits_there_are(device: Sample) -> None:
    device.constant = 0x1FF

    assert device.constant == 0xFF


def test_reset_puts_everything_back(device: Sample) -> None:
    before = device.save()
    device.write(0, 8, 0)
    device.write(0x10, 8, 2**64 - 1)

    device.reset()

    assert device.save() == before


def test_saved_contents_can_be_restored_into_another_device(device: Sample) -> None:
    device.write(0x10, 8, 0x1234)
    device.read(0x0E, 1)
    other = Sample()

    other.restore(device.save())

    assert other.save() == device.save()
    assert (other.wide, other.counter) == (0x1234, 1)


def test_the_state_of_another_kind_of_device_is_refused(device: Sample) -> None:
    with pytest.raises(SnapshotError, match=r"Sample has registers \['plain'"):
        device.restore(RegisterFileState((("other", 1),)))


def test_a_subclass_inherits_adds_and_replaces_registers() -> None:
    class Extended(Sample):
        extra = Register(0x20)
        constant = Register(0x06, size=1, reset=0xA5)

    device = Extended()

    assert (device.read(0x06, 1), device.plain) == (0xA5, 0x11223344)
    assert Extended.registers[-1].name == "extra"
    assert Sample().constant == 0x5A


def test_overlapping_registers_are_refused_when_the_class_is_made() -> None:
    with pytest.raises(ConfigurationError, match=r"Bad: register second at 0x3 overlaps first at 0x0\.\.0x4"):

        class Bad(RegisterFile):
            first = Register(0)
            second = Register(3, size=1)


@pytest.mark.parametrize("name", ["read", "write", "reset", "save", "restore", "registers"])
def test_registers_cannot_take_the_name_of_a_method(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"Bad: '{name}' cannot be the name of a register"):
        type("Bad", (RegisterFile,), {name: Register(0)})


@pytest.mark.parametrize("size", [-1, 0, 3, 16])
def test_registers_of_an_impossible_size_are_refused(size: int) -> None:
    with pytest.raises(ConfigurationError, match="sizes are 1, 2, 4 and 8"):
        Register(0, size=size)


def test_a_register_at_a_negative_offset_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="offset -4"):
        Register(-4)


@pytest.mark.parametrize("mask", ["reset", "writable", "write_one_to_clear", "read_to_clear"])
@pytest.mark.parametrize("value", [0x100, -1])
def test_masks_that_do_not_fit_are_refused(mask: str, value: int) -> None:
    options: dict[str, int] = {mask: value}

    with pytest.raises(ConfigurationError, match=f"{mask}=.* does not fit a register of 1 bytes"):
        Register(0, size=1, **options)


def test_a_bit_is_either_writable_or_cleared_by_a_one() -> None:
    with pytest.raises(ConfigurationError, match="both"):
        Register(0, writable=3, write_one_to_clear=1)


class Plain(RegisterFile):
    """Registers without side effects, so that they are a piece of memory with a gap."""

    a = Register(0, size=1)
    b = Register(1, size=2)
    c = Register(4, size=4)
    d = Register(8, size=8)


accesses = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 8), st.integers(0, 2**64 - 1)), max_size=30)


@given(accesses)
def test_registers_without_masks_are_memory_with_gaps(writes: list[tuple[int, int, int]]) -> None:
    device = Plain()
    model = dict.fromkeys([0, 1, 2, *range(4, 16)], 0)

    for offset, size, value in writes:
        device.write(offset, size, value)
        model |= {
            offset + index: value >> (8 * index) & 0xFF for index in range(size) if offset + index in model
        }

    for offset, size, _ in writes:
        expected = bytes(model.get(offset + index, 0) for index in range(size))
        assert device.read(offset, size) == int.from_bytes(expected, "little")


@given(accesses)
def test_no_guest_can_make_a_register_file_fail(script: list[tuple[int, int, int]]) -> None:
    device, bus = Sample(), Bus("mmio", 64)
    bus.attach(device, 0, 64)

    for offset, size, value in script:
        bus.write(offset, size, value)
        assert 0 <= bus.read(offset, size) < 1 << (8 * size)

    assert all(0 <= getattr(device, each.name) <= each.mask for each in Sample.registers)
    assert device.constant == 0x5A
    assert device.masked & ~0x0FF0 == 0xA000
