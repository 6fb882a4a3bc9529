"""The debug ports: exit with a status, console, on a bus as a guest sees them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.bus import Bus
from pykvm.devices.debug import DebugConsole, DebugExit


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("value", "status"), [(0, 0), (1, 1), (42, 42), (255, 255)])
def test_writing_a_value_stops_with_it_as_status(size: int, value: int, status: int) -> None:
    stops: list[tuple[int, str]] = []
    exit_port = DebugExit(lambda *stop: stops.append(stop))

    exit_port.write(0, size, value)

    assert stops == [(status, "debug-exit")]


@pytest.mark.parametrize("value", [256, 0x1200, 0xFFFF_FF00])
def test_a_value_too_wide_for_an_exit_status_never_becomes_success(value: int) -> None:
    stops: list[int] = []

    DebugExit(lambda status, reason: stops.append(status)).write(0, 4, value)

    assert stops == [255]


@pytest.mark.parametrize(("value", "status"), [(0, 1), (0x10, 0x21), (0x11, 0x23), (0x80, 1), (0xFFFF, 0xFF)])
def test_the_qemu_convention_is_what_a_shell_sees_after_qemu(value: int, status: int) -> None:
    stops: list[int] = []

    DebugExit(lambda status, reason: stops.append(status), qemu=True).write(0, 2, value)

    assert stops == [status]


def test_reading_the_exit_port_does_not_stop() -> None:
    stops: list[tuple[int, str]] = []

    value = DebugExit(lambda *stop: stops.append(stop)).read(0, 4)

    assert (value, stops) == (0, [])


def test_the_console_passes_bytes_on_as_they_come_and_tells_that_it_is_there() -> None:
    chunks: list[bytes] = []
    ports = Bus("port", 0x10000)
    ports.attach(DebugConsole(chunks.append), 0xE9, 1)

    ports.write(0xE9, 1, ord("h"))
    ports.write(0xE9, 1, 0x169)

    assert chunks == [b"h", b"i"]
    assert ports.read(0xE9, 1) == 0xE9


def test_a_wide_write_to_the_console_is_its_bytes_lowest_first() -> None:
    chunks: list[bytes] = []

    DebugConsole(chunks.append).write(0, 4, 0x64636261)

    assert chunks == [b"abcd"]


@given(st.lists(st.tuples(st.integers(0, 7), st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**64 - 1))))
def test_no_guest_can_make_the_debug_ports_fail(accesses: list[tuple[int, int, int]]) -> None:
    ports = Bus("port", 0x10000)
    statuses: list[int] = []
    chunks: list[bytes] = []
    ports.attach(DebugExit(lambda status, reason: statuses.append(status)), 0, 8)
    ports.attach(DebugExit(lambda status, reason: statuses.append(status), qemu=True), 8, 8)
    ports.attach(DebugConsole(chunks.append), 16, 8)

    for offset, size, value in accesses:
        for base in (0, 8, 16):
            ports.write(base + offset, size, value)
            ports.read(base + offset, size)

    assert all(0 <= status <= 255 for status in statuses)
    assert all(len(chunk) in (1, 2, 4, 8) for chunk in chunks)
