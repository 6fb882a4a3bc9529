"""Guest memory: slots, access by bytes and by view, and what closing may not lose."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.errors import ConfigurationError, MemoryAccessError, MemoryInUseError
from pykvm.memory import OVERCOMMIT, Memory, Slot, parse_size

PAGE = 0x1000


@pytest.fixture
def memory() -> Iterator[Memory]:
    """Two adjacent pages at 0, a hole, and a page at 0x4000."""
    memory = Memory()
    memory.add(0, PAGE, name="low")
    memory.add(PAGE, PAGE, name="high")
    memory.add(0x4000, PAGE, name="far")
    yield memory
    memory.close()


def open_resources() -> tuple[int, int]:
    """How many file descriptors and guest mappings this process has."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text()
    return len(os.listdir("/proc/self/fd")), maps.count("memfd:pykvm")


# Sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64M", 64 << 20),
        ("64m", 64 << 20),
        ("64 MiB", 64 << 20),
        ("64MB", 64 << 20),
        ("1.5G", 3 << 29),
        ("4KiB", 4096),
        ("2T", 2 << 40),
        ("4096", 4096),
        ("0x1B", 0x1B),
        (" 1_000 ", 1000),
        (4096, 4096),
    ],
)
def test_sizes_are_understood(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "M", "64X", "sixty-four", "64MM", "-1M", "0", 0, -4096, "inf", "nanM", "0.3", "1e999G", "9" * 5000],
)
def test_sizes_that_make_no_sense_are_refused(text: str | int) -> None:
    with pytest.raises(ConfigurationError, match="size"):
        parse_size(text)


# Slots


def test_slots_are_listed_by_address_and_numbered_by_age() -> None:
    with Memory() as memory:
        second = memory.add(0x2000, "4K")
        first = memory.add(0, PAGE)

        assert list(memory) == [first, second]
        assert (second.index, first.index) == (0, 1)
        assert (first.address, first.size, first.end) == (0, PAGE, PAGE)


def test_a_removed_slot_leaves_a_hole_and_its_number_is_used_again(memory: Memory) -> None:
    low = memory.find(0)
    assert low is not None

    memory.remove(low)

    assert memory.find(0) is None
    assert memory.add(0x8000, PAGE).index == low.index
    with pytest.raises(MemoryAccessError):
        memory.read(0, 1)
    with pytest.raises(ConfigurationError, match=r"slot low at 0x0..0x1000 is not part of this memory"):
        memory.remove(low)


def test_find_knows_borders(memory: Memory) -> None:
    names = {
        address: slot and slot.name
        for address in (-1, 0, 0xFFF, 0x1000, 0x2000, 0x3FFF, 0x4FFF, 0x5000)
        for slot in [memory.find(address)]
    }

    assert names == {
        -1: None,
        0: "low",
        0xFFF: "low",
        0x1000: "high",
        0x2000: None,
        0x3FFF: None,
        0x4FFF: "far",
        0x5000: None,
    }


@pytest.mark.parametrize(("address", "size"), [(0x4000, PAGE), (0x3000, 2 * PAGE), (0x3000, 0x10000)])
def test_overlapping_slots_are_refused_and_both_are_named(memory: Memory, address: int, size: int) -> None:
    with pytest.raises(ConfigurationError) as caught:
        memory.add(address, size)

    end = address + size
    assert str(caught.value) == f"memory at {address:#x}..{end:#x} overlaps slot far at 0x4000..0x5000"


@pytest.mark.parametrize(
    ("address", "size", "message"),
    [
        (0x8001, PAGE, "multiples of 4096"),
        (0x8000, 3, "multiples of 4096"),
        (0x8000, PAGE + 1, "multiples of 4096"),
        (0x8000, 0, "positive"),
        (0x8000, None, "needs a size"),
        (-PAGE, PAGE, "52 bits"),
        (1 << 52, PAGE, "52 bits"),
        ((1 << 52) - PAGE, 2 * PAGE, "52 bits"),
        (0x8000, 1 << 70, "52 bits"),
        (0x8000, "2048T", "ask for at most"),
    ],
)
def test_impossible_slots_are_refused(
    memory: Memory, address: int, size: int | str | None, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        memory.add(address, size)


def test_more_memory_than_the_host_has_is_refused_in_total_too() -> None:
    physical = os.sysconf("SC_PHYS_PAGES") * PAGE
    with Memory() as memory:
        memory.add(0, physical)

        with pytest.raises(ConfigurationError, match="MiB of guest memory on a host that has"):
            memory.add(1 << 50, OVERCOMMIT * physical)


def test_memory_that_mmap_refuses_is_a_clear_error() -> None:
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))\n"
        "from pykvm.memory import Memory\n"
        "Memory().add(0, '1G')"
    )

    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert "ConfigurationError: the host cannot map 1024 MiB" in result.stderr
    assert "ulimit -v" in result.stderr


def test_fresh_memory_is_zero_and_starts_with_the_given_data() -> None:
    with Memory() as memory:
        slot = memory.add(0, data=b"\x90" * 5000)

        assert slot.size == 2 * PAGE
        assert memory.read(0, slot.size) == b"\x90" * 5000 + bytes(slot.size - 5000)


def test_data_that_does_not_fit_its_slot_is_refused() -> None:
    with Memory() as memory, pytest.raises(ConfigurationError, match="4097 bytes of data do not fit"):
        memory.add(0, PAGE, data=bytes(PAGE + 1))


def test_the_descriptor_of_a_slot_has_its_content(memory: Memory) -> None:
    memory.write(0x1010, b"hello")
    slot = memory.find(0x1010)
    assert slot is not None

    assert os.pread(slot.fd, 5, slot.file_offset + 0x10) == b"hello"
    assert not os.get_inheritable(slot.fd)


def test_without_memfd_memory_is_anonymous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with Memory() as memory:
        slot = memory.add(0, PAGE, data=b"x")

        assert (slot.fd, memory.read(0, 2)) == (-1, b"x\0")


# The machine that uses the memory


def test_observers_are_told_of_slots_coming_and_going() -> None:
    seen: list[tuple[str, Slot]] = []
    memory = Memory(lambda slot: seen.append(("add", slot)), lambda slot: seen.append(("remove", slot)))

    slot = memory.add(0, PAGE, readonly=True, log_dirty=True)
    memory.remove(slot)
    other = memory.add(0, PAGE)
    memory.close()

    assert seen == [("add", slot), ("remove", slot), ("add", other)]
    assert (slot.readonly, slot.log_dirty) == (True, True)


def test_a_slot_that_the_machine_refuses_is_not_added_and_leaves_nothing_behind() -> None:
    def refuse(slot: Slot) -> None:
        raise OSError("no more slots")

    before = open_resources()
    memory = Memory(on_add=refuse)

    with pytest.raises(OSError, match="no more slots"):
        memory.add(0, PAGE)

    assert list(memory) == []
    assert open_resources() == before


# Files


@pytest.fixture
def two_pages(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"A" * PAGE + b"B" * PAGE)
    return path


def test_a_private_file_is_read_and_never_written(two_pages: Path) -> None:
    with Memory() as memory:
        slot = memory.add(0, path=two_pages)
        memory.write(0, b"xyz")

        assert (slot.size, slot.fd) == (2 * PAGE, -1)
        assert memory.read(0xFFF, 2) == b"AB"
        assert memory.read(0, 4) == b"xyzA"
    assert two_pages.read_bytes()[:4] == b"AAAA"


def test_a_shared_file_is_written(two_pages: Path) -> None:
    with Memory() as memory:
        slot = memory.add(0, PAGE, path=two_pages, shared=True)
        memory.write(0, b"xyz")

        assert os.pread(slot.fd, 4, slot.file_offset) == b"xyzA"
    assert two_pages.read_bytes()[:4] == b"xyzA"


def test_a_file_mapping_leaves_no_descriptor_behind(two_pages: Path) -> None:
    before = open_resources()

    with Memory() as memory:
        memory.add(0, path=two_pages)
        memory.add(0x8000, path=two_pages, shared=True)

    assert open_resources() == before


def test_unusable_files_are_refused(tmp_path: Path, two_pages: Path) -> None:
    odd, empty = tmp_path / "odd", tmp_path / "empty"
    odd.write_bytes(b"123")
    empty.touch()

    with Memory() as memory:
        with pytest.raises(ConfigurationError, match="missing: No such file"):
            memory.add(0, path=tmp_path / "missing")
        with pytest.raises(ConfigurationError, match="not a regular file"):
            memory.add(0, path=tmp_path)
        with pytest.raises(ConfigurationError, match="multiples of 4096"):
            memory.add(0, path=odd)
        with pytest.raises(ConfigurationError, match="empty is empty"):
            memory.add(0, path=empty)
        with pytest.raises(ConfigurationError, match="has 8192 bytes, not 12288: extend it"):
            memory.add(0, 3 * PAGE, path=two_pages)
        with pytest.raises(ConfigurationError, match="either a file or data"):
            memory.add(0, path=two_pages, data=b"x")
        assert list(memory) == []


# Bytes


def test_accesses_across_the_border_of_adjacent_slots_work(memory: Memory) -> None:
    memory.write(0xFFE, b"abcd")

    assert memory.read(0xFFD, 6) == b"\0abcd\0"
    assert memory.read(0xFFE, 2) == b"ab"
    assert memory.read(0x1000, 2) == b"cd"


@pytest.mark.parametrize("address", [0x1FFF, 0x2000, 0x3FFF, 0x4FFF, 0x5000, -1, 1 << 52, 1 << 64])
def test_accesses_that_touch_a_hole_raise_and_write_nothing(memory: Memory, address: int) -> None:
    everything = [memory.read(slot.address, slot.size) for slot in memory]

    with pytest.raises(MemoryAccessError) as read:
        memory.read(address, 2)
    with pytest.raises(MemoryAccessError):
        memory.write(address, b"xy")
    with pytest.raises(MemoryAccessError):
        memory.fill(address, 2, 0xFF)

    assert (read.value.address, read.value.size) == (address, 2)
    assert [memory.read(slot.address, slot.size) for slot in memory] == everything


def test_a_negative_size_is_refused_and_an_empty_access_is_fine_anywhere(memory: Memory) -> None:
    memory.write(0x2000, b"")

    assert memory.read(0x2000, 0) == b""
    with pytest.raises(MemoryAccessError, match="negative"):
        memory.read(0, -1)
    with pytest.raises(MemoryAccessError, match="negative"):
        memory.fill(0, -1)


def test_the_host_may_write_read_only_slots() -> None:
    with Memory() as memory:
        memory.add(0, PAGE, readonly=True)

        memory.write(0, b"rom")

        assert memory.read(0, 3) == b"rom"


@pytest.mark.parametrize(
    "data",
    [
        b"\1\0\2\0",
        bytearray(b"\1\0\2\0"),
        memoryview(b"\1\0\2\0"),
        memoryview(b"\1x\0x\2x\0x")[::2],
        np.array([1, 2], "<u2"),
        np.array([1, 9, 2, 9], "<u2")[::2],
        np.array([[1], [2]], "<u2", order="F"),
        np.array(0x20001, "<u4"),
    ],
    ids=lambda data: type(data).__name__,
)
def test_any_buffer_can_be_written(memory: Memory, data: Any) -> None:
    memory.write(0xFFE, data)

    assert memory.read(0xFFE, 4) == b"\1\0\2\0"


def test_an_empty_array_can_be_written(memory: Memory) -> None:
    nothing: Any = np.zeros((0, 4))

    memory.write(0, nothing)

    assert memory.read(0, 1) == b"\0"


def test_fill_sets_exactly_what_it_was_told(memory: Memory) -> None:
    memory.fill(0xFF0, 0x20, 0xCC)

    assert memory.read(0xFEF, 0x22) == b"\0" + b"\xcc" * 0x20 + b"\0"


def test_fill_and_search_work_on_more_than_a_chunk() -> None:
    with Memory() as memory:
        memory.add(0, "3M")
        memory.fill(1, (3 << 20) - 2, 0x55)

        assert list(memory.search(b"\0")) == [0, (3 << 20) - 1]
        assert list(memory.search(b"\x55" * ((3 << 20) - 3))) == [1, 2]


# Views


def test_a_view_is_guest_memory_itself(memory: Memory) -> None:
    view = memory.view(0x1004, 2, np.uint32)
    view[1] = 0x11223344
    memory.write(0x1004, b"\5")

    assert memory.read(0x1008, 4) == b"\x44\x33\x22\x11"
    assert view[0] == 5
    assert view.dtype == np.uint32
    assert memory.view(0, 3).dtype == np.uint8
    del view


def test_a_view_need_not_be_aligned(memory: Memory) -> None:
    memory.write(0x1003, b"\1\2\3\4\5\6\7\x08")

    assert memory.view(0x1003, 1, "<u8").tolist() == [0x0807060504030201]


def test_a_view_of_a_structured_type_works(memory: Memory) -> None:
    memory.write(0x1000, b"\1\2\0\0\0\0\0\0\0")

    record = memory.view(0x1000, 1, np.dtype([("type", "u1"), ("length", "<u8")]))

    assert record["length"].tolist() == [2]
    del record


def test_a_view_across_slots_raises_and_says_why(memory: Memory) -> None:
    with pytest.raises(MemoryAccessError, match=r"one slot, not slot low .* and slot high .*use read"):
        memory.view(0xFFE, 4)


@pytest.mark.parametrize(("address", "count"), [(0x1FFF, 2), (0x3000, 1), (0, -1), (-4, 8), (0, 1 << 62)])
def test_a_view_outside_of_memory_raises(memory: Memory, address: int, count: int) -> None:
    with pytest.raises(MemoryAccessError):
        memory.view(address, count)


def test_an_empty_view_is_fine(memory: Memory) -> None:
    assert memory.view(0x1FFF, 0, np.uint64).shape == (0,)


# Closing


def test_closing_twice_is_fine_and_afterwards_there_is_no_memory() -> None:
    memory = Memory()
    memory.add(0, PAGE)

    memory.close()
    memory.close()

    assert list(memory) == []
    with pytest.raises(MemoryAccessError):
        memory.read(0, 1)


VIEWS: list[Callable[[Memory, Slot], Any]] = [
    lambda memory, slot: memory.view(slot.address, 4),
    lambda memory, slot: memory.view(slot.address, 4)[1:3],
    lambda memory, slot: memoryview(slot.buffer),
    lambda memory, slot: memoryview(slot.buffer)[5:6],
]


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("make_view", VIEWS)
def test_closing_while_a_view_is_alive_raises_and_loses_nothing(
    memory: Memory, make_view: Callable[[Memory, Slot], Any], position: int
) -> None:
    slots = list(memory)
    for slot in slots:
        memory.write(slot.address, b"data")
    view = make_view(memory, slots[position])

    with pytest.raises(MemoryInUseError, match=slots[position].name):
        memory.close()

    assert [memory.read(slot.address, 4) for slot in slots] == [b"data"] * 3
    assert os.pread(slots[position].fd, 4, 0) == b"data"
    del view
    memory.close()
    assert list(memory) == []


def test_a_slot_with_views_is_not_removed_and_the_machine_gets_it_back() -> None:
    seen: list[str] = []
    memory = Memory(lambda slot: seen.append("add"), lambda slot: seen.append("remove"))
    slot = memory.add(0, PAGE, data=b"data")
    view = memory.view(0, 4)

    with pytest.raises(MemoryInUseError, match="slot 0"):
        memory.remove(slot)

    assert memory.read(0, 4) == b"data"
    assert seen == ["add", "remove", "add"]
    del view
    memory.close()


def test_an_array_keeps_its_mapping_alive_when_the_memory_is_forgotten() -> None:
    before = open_resources()
    memory = Memory()
    memory.add(0, PAGE, data=b"data")
    view = memory.view(0, 4)

    del memory
    gc.collect()

    assert view.tobytes() == b"data"
    del view
    assert open_resources() == before


def test_neither_closed_nor_forgotten_memory_leaks() -> None:
    before = open_resources()

    for _ in range(20):
        with Memory() as closed:
            closed.add(0, PAGE)
        Memory().add(0, PAGE)

    assert open_resources() == before


def test_the_memory_works_as_a_context_manager_that_passes_errors_on() -> None:
    memory = Memory()
    memory.add(0, PAGE)

    with pytest.raises(KeyError), memory:
        raise KeyError

    assert list(memory) == []


# Values


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
def test_integers_are_little_endian(memory: Memory, bits: int) -> None:
    value = 0x8877665544332211 & ((1 << bits) - 1)

    getattr(memory, f"write_u{bits}")(0xFFF, value)

    assert getattr(memory, f"read_u{bits}")(0xFFF) == value
    assert memory.read(0xFFF, bits // 8) == value.to_bytes(bits // 8, "little")
    with pytest.raises(OverflowError):
        getattr(memory, f"write_u{bits}")(0, 1 << bits)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [("BI", b"\1\2\0\0\0"), ("<BI", b"\1\2\0\0\0"), (">BI", b"\1\0\0\0\2"), ("@BI", b"\1\0\0\0\2\0\0\0")],
)
def test_structs_are_little_endian_and_packed_unless_told_otherwise(
    memory: Memory, layout: str, expected: bytes
) -> None:
    memory.write_struct(0xFFF, layout, 1, 2)

    assert memory.read(0xFFF, len(expected)) == expected
    assert memory.read_struct(0xFFF, layout) == (1, 2)


def test_a_string_ends_at_its_nul_or_at_the_limit_also_across_slots(memory: Memory) -> None:
    memory.write(0xFFD, b"hello\0world")

    assert memory.read_cstring(0xFFD) == b"hello"
    assert memory.read_cstring(0xFFD, limit=4) == b"hell"
    assert memory.read_cstring(0xFFD, limit=5) == b"hello"
    assert memory.read_cstring(0xFFD, limit=0) == b""
    assert memory.read_cstring(0xFFD + 5) == b""


def test_a_string_that_runs_out_of_memory_raises(memory: Memory) -> None:
    memory.write(0x1FFC, b"abcd")

    assert memory.read_cstring(0x1FFC, limit=4) == b"abcd"
    with pytest.raises(MemoryAccessError, match="does not end before the memory"):
        memory.read_cstring(0x1FFC)


# Looking around


def test_search_finds_every_place_also_overlapping_and_across_slots(memory: Memory) -> None:
    for address in (0, 0xFFD, 0x1FFC, 0x4FFC):
        memory.write(address, b"aXaX"[: 0x5000 - address])
    memory.write(0x4000, b"aXaXa")

    assert list(memory.search(b"aXa")) == [0, 0xFFD, 0x1FFC, 0x4000, 0x4002, 0x4FFC]
    assert list(memory.search(b"aXa", 1, 0x4005)) == [0xFFD, 0x1FFC, 0x4000, 0x4002]
    assert list(memory.search(b"aXa", 1, 0x4004)) == [0xFFD, 0x1FFC, 0x4000]


def test_search_does_not_join_what_a_hole_separates(memory: Memory) -> None:
    memory.write(0x1FFE, b"ab")
    memory.write(0x4000, b"cd")

    assert list(memory.search(b"abcd")) == []


def test_search_for_nothing_is_refused_at_once(memory: Memory) -> None:
    with pytest.raises(ValueError, match="empty pattern"):
        memory.search(b"")


def test_hexdump_shows_address_bytes_and_text(memory: Memory) -> None:
    memory.write(0xFF8, b"Hello, \x7fworld\xff!\0\0~~")

    dump = memory.hexdump(0xFF8, 18)

    assert dump == (
        "000000000ff8  48 65 6c 6c 6f 2c 20 7f 77 6f 72 6c 64 ff 21 00  |Hello, .world.!.|\n"
        "000000001008  00 7e                                            |.~|"
    )


# A model: memory is a dictionary of bytes

operations = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(-3, 0x5003), st.binary(max_size=12)),
        st.tuples(st.just("fill"), st.integers(0xF00, 0x2100), st.integers(0, 0x1100)),
        st.tuples(
            st.just("border"), st.sampled_from([0x1000, 0x2000, 0x4000, 0x5000]), st.binary(max_size=12)
        ),
    ),
    max_size=12,
)


@given(operations, st.binary(min_size=1, max_size=2))
def test_memory_agrees_with_a_dictionary_of_bytes(steps: list[tuple[str, int, Any]], pattern: bytes) -> None:
    model = dict.fromkeys([*range(0x2000), *range(0x4000, 0x5000)], 0)
    with Memory() as memory:
        for address in (0x1000, 0x4000, 0):
            memory.add(address, PAGE)
        for kind, address, argument in steps:
            start = address - 5 if kind == "border" else address
            data = b"\xee" * argument if kind == "fill" else argument
            inside = all(start + index in model for index in range(len(data)))
            try:
                memory.write(start, data) if kind != "fill" else memory.fill(start, len(data), 0xEE)
            except MemoryAccessError:
                assert not inside
            else:
                assert inside
                model |= dict(zip(range(start, start + len(data)), data, strict=True))

        assert memory.read(0, 0x2000) == bytes(model[address] for address in range(0x2000))
        assert memory.read(0x4000, 0x1000) == bytes(model[address] for address in range(0x4000, 0x5000))
        assert list(memory.search(pattern)) == [
            address
            for address in model
            if all(model.get(address + index) == byte for index, byte in enumerate(pattern))
        ]
