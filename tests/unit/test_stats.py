"""Decoding the binary statistics file of KVM."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from pykvm.kvm.backend import KvmBackend
from pykvm.kvm.stats import (
    KVM_STATS_BASE_POW2,
    KVM_STATS_BASE_POW10,
    KVM_STATS_TYPE_CUMULATIVE,
    KVM_STATS_TYPE_INSTANT,
    KVM_STATS_TYPE_LOG_HIST,
    KVM_STATS_UNIT_BYTES,
    KVM_STATS_UNIT_SECONDS,
    StatsDescriptor,
    StatsSnapshot,
    read,
)

NAME_SIZE = 16


def statistics_file(path: Path) -> int:
    """A file as KVM lays it out: a counter at value offset 0, a histogram of three buckets at 8."""
    descriptors = (
        struct.pack("<IhHII16s", KVM_STATS_TYPE_CUMULATIVE, 0, 1, 0, 0, b"exits"),
        struct.pack("<IhHII16s", KVM_STATS_TYPE_LOG_HIST | KVM_STATS_UNIT_SECONDS, -9, 3, 8, 0, b"wait_hist"),
    )
    header = struct.pack("<6I", 0, NAME_SIZE, 2, 24, 40, 40 + 2 * 32)
    values = struct.pack("<4Q", 2**40, 1, 2, 3)
    path.write_bytes(header + b"kvm-7/vcpu-0".ljust(NAME_SIZE, b"\0") + b"".join(descriptors) + values)
    return os.open(path, os.O_RDONLY)


def test_a_file_is_read_into_descriptors_and_values(tmp_path: Path) -> None:
    fd = statistics_file(tmp_path / "stats")
    snapshot = read(fd)
    os.close(fd)
    assert snapshot == StatsSnapshot(
        "kvm-7/vcpu-0",
        (
            StatsDescriptor("exits", KVM_STATS_TYPE_CUMULATIVE),
            StatsDescriptor("wait_hist", KVM_STATS_TYPE_LOG_HIST | KVM_STATS_UNIT_SECONDS, -9, 3, 8),
        ),
        ((2**40,), (1, 2, 3)),
    )


def test_a_scalar_is_a_number_and_a_histogram_a_tuple(tmp_path: Path) -> None:
    fd = statistics_file(tmp_path / "stats")
    snapshot = read(fd)
    os.close(fd)
    assert (snapshot["exits"], snapshot["wait_hist"]) == (2**40, (1, 2, 3))
    with pytest.raises(KeyError):
        snapshot["no such thing"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (KVM_STATS_TYPE_INSTANT | KVM_STATS_UNIT_SECONDS | KVM_STATS_BASE_POW10, ("instant", "seconds", 10)),
        (KVM_STATS_TYPE_CUMULATIVE | KVM_STATS_UNIT_BYTES | KVM_STATS_BASE_POW2, ("cumulative", "bytes", 2)),
        (0xFF, ("unknown", "unknown", 10)),
    ],
)
def test_flags_are_told_in_words(flags: int, words: tuple[str, str, int]) -> None:
    descriptor = StatsDescriptor("any", flags)
    assert (descriptor.type, descriptor.unit, descriptor.base) == words


def test_the_statistics_of_a_real_vcpu_are_named_after_it() -> None:
    backend = KvmBackend()
    if backend.why_unavailable():
        pytest.skip(f"no KVM here: {backend.why_unavailable()}")
    machine = backend.machine()
    fd = machine.vcpu(0).fd.get_stats_fd()
    snapshot = read(fd)
    os.close(fd)
    machine.close()
    assert snapshot.id.endswith("vcpu-0")
    assert snapshot["exits"] == 0
