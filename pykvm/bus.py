"""Bus: finds the device behind a port or MMIO address and calls it.

A machine has two, one for ports (IN, OUT and the string forms, SDM volume 1, chapter 19) and one
for the memory-mapped addresses that no memory slot covers. The bus knows address ranges and locks;
it does not know device types.

Rules
-----
- The whole access must fit one range. What does not is unclaimed: a read returns all ones, a write
  vanishes, as on a PC bus where nothing answers. Both are counted (`Bus.unclaimed`).
- A device has one lock, however many ranges it has and on whichever buses, and the bus holds it
  during each call. So device code needs no locks of its own, unless it is also called from outside
  (a serial port that receives input).
- A backend may take over ranges (`on_change`) and call the devices itself, by the same rules: that saves
  the way through here. The others, and everything while the bus is traced, come to `read` and `write`.
- The lock is re-entrant: a device may, from within a call, raise an interrupt, stop the machine or
  access its own registers through the bus.

Lock order
----------
1. device lock (taken here)
2. a lock inside the device
3. locks behind what the device calls: interrupt lines, memory, the machine

Never take a device lock while holding one further down, and never access *another* device through
the bus from within a device: two vCPUs that do so in opposite directions wait for each other forever.
`attach` and `detach` may be called from any thread, also while vCPUs run and from within a device.
They replace the table of ranges and never wait for a device, so a call that is under way
finishes, and may do so shortly after `detach` has returned.
"""

from __future__ import annotations

from bisect import bisect_right
from operator import index as as_integer
from threading import Lock, RLock
from weakref import WeakValueDictionary

from pykvm.errors import BusError
from pykvm.values import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from pykvm.interfaces import Device

    DeviceLock = AbstractContextManager[object]
    Trace = Callable[[str, int, int, int], None]
    ReadEntry = tuple[int, int, Callable[[int, int], int], DeviceLock]
    WriteEntry = tuple[int, int, Callable[[int, int, int], None], DeviceLock]
    Served = Sequence[tuple["Attachment", DeviceLock]]

__all__ = ["Attachment", "Bus", "Unclaimed", "all_ones"]

_MASKS = {size: (1 << (8 * size)) - 1 for size in range(1, 9)}

# The lock of each attached device, by identity. An entry lives as long as a range or a call under way
# holds the lock, and both hold the device too: an id in here cannot belong to another object.
_device_locks: WeakValueDictionary[int, DeviceLock] = WeakValueDictionary()
_device_locks_guard = Lock()


def all_ones(size: int) -> int:
    """What `size` bytes read as when nothing drives the bus."""
    return (1 << (8 * size)) - 1


def _lock_of(device: Device, new_lock: Callable[[], DeviceLock]) -> DeviceLock:
    with _device_locks_guard:
        lock = _device_locks.get(id(device))
        if lock is None:
            lock = _device_locks[id(device)] = new_lock()
        return lock


class Attachment(Value):
    """A device at a range of a bus: `size` ports or bytes from `address` on."""

    device: Device
    address: int
    size: int

    # An attachment is that range on that bus, not a description of it.
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    @property
    def end(self) -> int:
        """The first address after the range."""
        return self.address + self.size

    def __str__(self) -> str:
        return f"{type(self.device).__name__} at {self.address:#x}..{self.end:#x}"


class Unclaimed:
    """Counts accesses that no device claimed.

    `reads` and `writes` count all of them, `addresses` by address for the first `LIMIT` different
    ones, so that a hostile guest cannot make it grow.
    """

    LIMIT = 64

    __slots__ = ("_lock", "addresses", "reads", "writes")

    def __init__(self) -> None:
        self.reads = 0
        self.writes = 0
        self.addresses: dict[int, int] = {}
        self._lock = Lock()

    def __repr__(self) -> str:
        return f"Unclaimed(reads={self.reads}, writes={self.writes})"

    def count_read(self, address: int) -> None:
        with self._lock:
            self.reads += 1
            self._count(address)

    def count_write(self, address: int) -> None:
        with self._lock:
            self.writes += 1
            self._count(address)

    def _count(self, address: int) -> None:
        seen = self.addresses.get(address, 0)
        if seen or len(self.addresses) < self.LIMIT:
            self.addresses[address] = seen + 1


class _Table:
    """One state of the bus. Never changed once published, but for the entries that were hit last.

    An entry is (first address, size, bound method, lock). A thread that still works with a replaced
    table can only update that table's last hits, so a detached device is never found again.
    """

    __slots__ = ("attachments", "last_read", "last_write", "readers", "starts", "writers")

    def __init__(self, served: Served, trace: Trace | None) -> None:
        self.attachments = tuple([attachment for attachment, _ in served])
        self.starts = [attachment.address for attachment in self.attachments]
        self.readers: list[ReadEntry] = []
        self.writers: list[WriteEntry] = []
        for attachment, lock in served:
            device, start, size = attachment.device, attachment.address, attachment.size
            read = device.read if trace is None else _traced_read(attachment, trace)
            write = device.write if trace is None else _traced_write(attachment, trace)
            self.readers.append((start, size, read, lock))
            self.writers.append((start, size, write, lock))
        self.last_read = _NO_READ
        self.last_write = _NO_WRITE

    def position(self, address: int) -> int:
        """The index of the last range that starts at or before `address`, or -1."""
        return bisect_right(self.starts, address) - 1

    def find(self, address: int, size: int) -> int:
        """The index of the range that holds all of the access, or -1."""
        position = self.position(address)
        if position >= 0 and address + size <= self.attachments[position].end:
            return position
        return -1


class Bus:
    """Device ranges in one address space of `limit` addresses (0x10000 ports, or 2**52 bytes).

    `name` is for messages (``"port"``, ``"mmio"``). `read` and `write` may be called from any thread.

    `on_change` is called with the ranges that its receiver may serve from then on, by address, each with the
    lock to hold during a call: all of them, or none while the bus is traced. `new_lock` makes the re-entrant
    lock of a device that has none yet.
    """

    __slots__ = ("_guard", "_new_lock", "_on_change", "_table", "_trace", "limit", "name", "unclaimed")

    def __init__(
        self,
        name: str,
        limit: int,
        *,
        on_change: Callable[[Served], object] | None = None,
        new_lock: Callable[[], DeviceLock] = RLock,
    ) -> None:
        self.name = name
        self.limit = limit
        self.unclaimed = Unclaimed()
        self._on_change = on_change
        self._new_lock = new_lock
        self._guard = Lock()  # held while the table is replaced, never while a device runs
        self._trace: Trace | None = None
        self._table = _Table([], None)

    def read(self, address: int, size: int) -> int:
        """Read `size` (1 to 8) bytes. Unclaimed: all ones. A device's exception passes through.

        Raises TypeError if the device returns something other than an integer.
        """
        try:
            mask = _MASKS[size]
        except KeyError:
            raise _bad_size(size) from None
        table = self._table
        start, length, read, lock = table.last_read
        offset = address - start
        if offset < 0 or offset + size > length:
            found = table.find(address, size)
            if found < 0:
                return self._read_unclaimed(address, size)
            start, length, read, lock = table.last_read = table.readers[found]
            offset = address - start
        with lock:
            value = read(offset, size)
        if value.__class__ is not int:
            value = _integer(value, self.find(address))
        return value & mask

    def write(self, address: int, size: int, value: int) -> None:
        """Write the low `size` (1 to 8) bytes of `value`. Unclaimed: ignored."""
        try:
            value &= _MASKS[size]
        except KeyError:
            raise _bad_size(size) from None
        table = self._table
        start, length, write, lock = table.last_write
        offset = address - start
        if offset < 0 or offset + size > length:
            found = table.find(address, size)
            if found < 0:
                self._write_unclaimed(address, size, value)
                return
            start, length, write, lock = table.last_write = table.writers[found]
            offset = address - start
        with lock:
            write(offset, size, value)

    def attach(self, device: Device, address: int, size: int) -> Attachment:
        """Let `device` answer `size` addresses from `address` on.

        The device's `read` and `write` are looked up now, not at each access. Raises BusError if
        the range is empty, leaves the address space or overlaps another.
        """
        if not (callable(getattr(device, "read", None)) and callable(getattr(device, "write", None))):
            raise BusError(
                f"{device!r} is no device: it lacks read(offset, size) or write(offset, size, value)"
            )
        new = Attachment(device, address, size)
        if size <= 0:
            raise BusError(f"{self.name}: {type(device).__name__} needs at least 1 address, not {size}")
        if address < 0 or new.end > self.limit:
            raise BusError(f"{self.name}: {new} is outside of the address space 0..{self.limit:#x}")
        with self._guard:
            table = self._table
            following = table.position(address) + 1
            for neighbour in table.attachments[max(following - 1, 0) : following + 1]:
                if address < neighbour.end and neighbour.address < new.end:
                    raise BusError(f"{self.name}: {new} overlaps {neighbour}")
            before, after = table.attachments[:following], table.attachments[following:]
            self._publish((*before, new, *after))
        return new

    def detach(self, what: Attachment | Device) -> None:
        """Remove one range, or all ranges of a device. Raises BusError if it is not attached."""
        with self._guard:
            attached = self._table.attachments
            kept = tuple(each for each in attached if each is not what and each.device is not what)
            if len(kept) == len(attached):
                name = what if isinstance(what, Attachment) else type(what).__name__
                raise BusError(f"{self.name}: {name} is not attached")
            self._publish(kept)

    def find(self, address: int) -> Attachment | None:
        """The range that holds `address`."""
        table = self._table
        found = table.find(address, 1)
        return table.attachments[found] if found >= 0 else None

    def __iter__(self) -> Iterator[Attachment]:
        """All ranges, by address."""
        return iter(self._table.attachments)

    @property
    def trace(self) -> Trace | None:
        """Called after each access, unclaimed ones too, with ``"read"`` or ``"write"``, address, size, value.

        It runs on the vCPU's thread and under the device's lock: it must not access the bus. None
        (the default) costs nothing.
        """
        return self._trace

    @trace.setter
    def trace(self, trace: Trace | None) -> None:
        with self._guard:
            self._trace = trace
            self._publish(self._table.attachments)

    def _publish(self, attachments: tuple[Attachment, ...]) -> None:
        """Replace the table, with `_guard` held."""
        served = [(attachment, _lock_of(attachment.device, self._new_lock)) for attachment in attachments]
        self._table = _Table(served, self._trace)
        if self._on_change is not None:
            self._on_change(served if self._trace is None else [])

    def _read_unclaimed(self, address: int, size: int) -> int:
        value = _MASKS[size]
        self.unclaimed.count_read(address)
        if (trace := self._trace) is not None:
            trace("read", address, size, value)
        return value

    def _write_unclaimed(self, address: int, size: int, value: int) -> None:
        self.unclaimed.count_write(address)
        if (trace := self._trace) is not None:
            trace("write", address, size, value)


def _integer(value: object, where: Attachment | None) -> int:
    """Accept what Python accepts as an index: int, bool, NumPy integers."""
    try:
        return as_integer(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{where}: read returned {value!r}, not an integer") from None


def _traced_read(attachment: Attachment, trace: Trace) -> Callable[[int, int], int]:
    read, start = attachment.device.read, attachment.address

    def traced(offset: int, size: int) -> int:
        value = _integer(read(offset, size), attachment)
        trace("read", start + offset, size, value & _MASKS[size])
        return value

    return traced


def _traced_write(attachment: Attachment, trace: Trace) -> Callable[[int, int, int], None]:
    write, start = attachment.device.write, attachment.address

    def traced(offset: int, size: int, value: int) -> None:
        write(offset, size, value)
        trace("write", start + offset, size, value)

    return traced


def _bad_size(size: int) -> ValueError:
    return ValueError(f"an access of {size} bytes: 1 to 8 are possible")


def _no_read(offset: int, size: int) -> int:
    raise AssertionError("the empty range was read")


def _no_write(offset: int, size: int, value: int) -> None:
    raise AssertionError("the empty range was written")


# What was hit last before anything was: entries that match nothing, since their range is empty.
_NO_READ: ReadEntry = (0, 0, _no_read, RLock())
_NO_WRITE: WriteEntry = (0, 0, _no_write, RLock())
