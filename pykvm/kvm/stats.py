"""Binary statistics of KVM: the file behind KVM_GET_STATS_FD, decoded (KVM API 4.133).

The file holds a header, the owner's name, descriptors, and the values::

    header: flags, name_size, num_desc, id_offset, desc_offset, data_offset (32 bits each)
    id_offset:   name_size bytes
    desc_offset: num_desc times a descriptor of 16 bytes and name_size bytes of name
    data_offset: 64-bit values, where the descriptors say
"""

from __future__ import annotations

import os
import struct

from pykvm.values import Value

__all__ = ["StatsDescriptor", "StatsSnapshot", "read"]

# kvm_stats_desc.flags, three 4-bit fields
KVM_STATS_TYPE_MASK = 0xF
KVM_STATS_TYPE_CUMULATIVE = 0x0
KVM_STATS_TYPE_INSTANT = 0x1
KVM_STATS_TYPE_PEAK = 0x2
KVM_STATS_TYPE_LINEAR_HIST = 0x3
KVM_STATS_TYPE_LOG_HIST = 0x4
KVM_STATS_UNIT_MASK = 0xF << 4
KVM_STATS_UNIT_NONE = 0x0 << 4
KVM_STATS_UNIT_BYTES = 0x1 << 4
KVM_STATS_UNIT_SECONDS = 0x2 << 4
KVM_STATS_UNIT_CYCLES = 0x3 << 4
KVM_STATS_UNIT_BOOLEAN = 0x4 << 4
KVM_STATS_BASE_MASK = 0xF << 8
KVM_STATS_BASE_POW10 = 0x0 << 8
KVM_STATS_BASE_POW2 = 0x1 << 8

_HEADER = struct.Struct("<6I")
_DESCRIPTOR = struct.Struct("<IhHII")


class StatsDescriptor(Value):
    """One statistic of the binary statistics file (``struct kvm_stats_desc``, 4.133).

    Its values are `size` 64-bit numbers in units of ``base ** exponent`` `unit`, `base` 10 or 2.
    `bucket_size` is the width of a bucket of a linear histogram.
    """

    name: str
    flags: int
    exponent: int = 0
    size: int = 1
    offset: int = 0
    bucket_size: int = 0

    @property
    def type(self) -> str:
        """``"cumulative"``, ``"instant"``, ``"peak"``, ``"linear histogram"`` or ``"log histogram"``."""
        return _STATS_TYPES.get(self.flags & KVM_STATS_TYPE_MASK, "unknown")

    @property
    def unit(self) -> str:
        """``"count"``, ``"bytes"``, ``"seconds"``, ``"cycles"`` or ``"boolean"``."""
        return _STATS_UNITS.get(self.flags & KVM_STATS_UNIT_MASK, "unknown")

    @property
    def base(self) -> int:
        """10 or 2: what `exponent` is a power of."""
        return 2 if self.flags & KVM_STATS_BASE_MASK == KVM_STATS_BASE_POW2 else 10


_STATS_TYPES = {
    KVM_STATS_TYPE_CUMULATIVE: "cumulative",
    KVM_STATS_TYPE_INSTANT: "instant",
    KVM_STATS_TYPE_PEAK: "peak",
    KVM_STATS_TYPE_LINEAR_HIST: "linear histogram",
    KVM_STATS_TYPE_LOG_HIST: "log histogram",
}
_STATS_UNITS = {
    KVM_STATS_UNIT_NONE: "count",
    KVM_STATS_UNIT_BYTES: "bytes",
    KVM_STATS_UNIT_SECONDS: "seconds",
    KVM_STATS_UNIT_CYCLES: "cycles",
    KVM_STATS_UNIT_BOOLEAN: "boolean",
}


class StatsSnapshot(Value):
    """All statistics of a VM or vCPU at one moment; `values` is parallel to `descriptors`.

    `id` is the kernel's name for the owner, such as ``"kvm-4711/vcpu-0"``.
    """

    id: str
    descriptors: tuple[StatsDescriptor, ...]
    values: tuple[tuple[int, ...], ...]

    def __getitem__(self, name: str) -> int | tuple[int, ...]:
        """The statistic `name`: a number, or a tuple for a histogram. Raises KeyError."""
        for descriptor, values in zip(self.descriptors, self.values, strict=True):
            if descriptor.name == name:
                return values[0] if descriptor.size == 1 else values
        raise KeyError(name)


def read(fd: int) -> StatsSnapshot:
    """Read everything from a descriptor that KVM_GET_STATS_FD gave. Raises OSError."""
    _, name_size, count, id_offset, first, data_offset = _HEADER.unpack(os.pread(fd, _HEADER.size, 0))
    stride = _DESCRIPTOR.size + name_size
    table = os.pread(fd, count * stride, first)
    descriptors = []
    for at in range(0, count * stride, stride):
        flags, exponent, size, offset, bucket_size = _DESCRIPTOR.unpack_from(table, at)
        name = _text(table[at + _DESCRIPTOR.size : at + stride])
        descriptors.append(StatsDescriptor(name, flags, exponent, size, offset, bucket_size))
    data = os.pread(fd, max((d.offset + 8 * d.size for d in descriptors), default=0), data_offset)
    values = tuple(struct.unpack_from(f"<{d.size}Q", data, d.offset) for d in descriptors)
    return StatsSnapshot(_text(os.pread(fd, name_size, id_offset)), tuple(descriptors), values)


def _text(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode()
