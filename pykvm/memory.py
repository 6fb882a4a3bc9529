"""Memory: the guest-physical memory of a machine, as slots of host memory (KVM API 4.35).

A slot is a memfd (or a file) mapped with stdlib `mmap`. Slots may have holes between them, where
accesses go to the MMIO bus, and may be read-only for the guest; they never overlap. Pages
are committed when first touched, so a large, empty memory costs nothing.

Host code reads and writes through `Memory`, across slot borders if need be, or without copies through
NumPy arrays from `Memory.view`, which keep the mapping alive. All integers are little-endian.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
from bisect import bisect_right
from functools import cache
from threading import Lock
from weakref import finalize

from pykvm.errors import ConfigurationError, MemoryAccessError, MemoryInUseError
from pykvm.layout import PAGE_SIZE
from pykvm.values import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType
    from typing import Any

    from numpy.typing import DTypeLike, NDArray
    from typing_extensions import Buffer

    Observer = Callable[["Slot"], object]

__all__ = ["Memory", "Slot", "parse_size"]

PHYSICAL_ADDRESSES = 1 << 52  # the architecture's limit (SDM volume 3, 4.1.4)
OVERCOMMIT = 4  # a machine may be given this many times the host's physical memory
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_CHUNK = 1 << 20  # bytes handled at once by fill and search


def parse_size(size: str | int) -> int:
    """Bytes from ``"64M"``, ``"1.5 GiB"``, ``"0x1000"`` or an int; K, M, G, T are powers of 1024.

    Raises ConfigurationError if it is not a positive whole number of bytes.
    """
    result = size if isinstance(size, int) else _parse_size_text(size)
    if result <= 0:
        raise ConfigurationError(f"size {size!r} is not a positive whole number of bytes")
    return result


def _parse_size_text(text: str) -> int:
    stripped = text.strip().upper()
    try:
        return int(stripped, 0)  # first, as the B of 0x1B is a digit
    except ValueError:
        pass
    stripped = stripped.removesuffix("B").removesuffix("I")
    number = stripped.rstrip("KMGT")
    try:
        size = float(number) * (1 << _UNITS[stripped[len(number) :]])
    except (KeyError, ValueError):
        raise ConfigurationError(
            f"size {text!r} is not understood: write it like 64M, 1.5GiB or 4096"
        ) from None
    return int(size) if size.is_integer() else 0


class Slot(Value):
    """A piece of guest-physical memory. Made by `Memory.add`.

    `index` is its slot number for the backend. `address` and `size` are in bytes. `readonly` holds for the
    guest; the host may write. `fd` is the memfd or shared file that has the slot's content from
    `file_offset` on, -1 if the content is in no file.
    """

    index: int
    address: int
    size: int
    readonly: bool
    log_dirty: bool
    name: str
    buffer: mmap.mmap
    fd: int
    file_offset: int
    _close_fd: Callable[[], object] | None

    @property
    def end(self) -> int:
        """The first address after the slot."""
        return self.address + self.size

    # A slot is that piece of memory, not a description of it.
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def __repr__(self) -> str:
        return f"<{self}>"

    def __str__(self) -> str:
        return f"slot {self.name or self.index} at {self.address:#x}..{self.end:#x}"


class Memory:
    """Guest-physical memory: slots by address. Accesses that no slot covers raise MemoryAccessError.

    `on_add` is called with each new slot before it is part of the memory, and may refuse it by
    raising; `on_remove` before one is unmapped. Slots may be added and removed while other threads access
    the rest. Use it as a context manager, or call `close`.
    """

    __slots__ = ("__weakref__", "_guard", "_on_add", "_on_remove", "_table")

    def __init__(self, on_add: Observer | None = None, on_remove: Observer | None = None) -> None:
        self._on_add = on_add or _ignore
        self._on_remove = on_remove or _ignore
        self._guard = Lock()  # held while slots are added or removed
        # Start addresses and slots in the same order. Replaced as one, never changed.
        self._table: tuple[tuple[int, ...], tuple[Slot, ...]] = ((), ())

    # Slots

    def add(
        self,
        address: int,
        size: int | str | None = None,
        *,
        readonly: bool = False,
        log_dirty: bool = False,
        path: str | os.PathLike[str] | None = None,
        shared: bool = False,
        data: Buffer = b"",
        name: str = "",
    ) -> Slot:
        """Put memory at guest-physical `address`; both it and `size` are multiples of 4096.

        Fresh memory is zero and starts with `data`, which also gives the size if there is none. With
        `path` the memory is that file: copy-on-write, or, if `shared`, written back to it. The file
        must not shrink while it is mapped.

        Raises ConfigurationError for bad sizes, overlaps, unusable files, and for more memory than
        the host can map, or than four times what it physically has.
        """
        content = _as_bytes(data)
        if path is not None and len(content):
            raise ConfigurationError(f"{path}: give a slot either a file or data, not both")
        if size is not None:
            length = parse_size(size)
        else:
            length = _file_size(path) if path is not None else -(-len(content) // PAGE_SIZE) * PAGE_SIZE
        if len(content) > length:
            raise ConfigurationError(f"{len(content)} bytes of data do not fit a slot of {length} bytes")
        with self._guard:
            self._check_range(address, length)
            if path is None:
                self._check_host_memory(length)
            buffer, fd = _map_fresh(length) if path is None else _map_file(path, length, shared)
            close_fd = finalize(buffer, os.close, fd) if fd >= 0 else None
            index = self._free_index()
            slot = Slot(index, address, length, readonly, log_dirty, name, buffer, fd, 0, close_fd)
            buffer[: len(content)] = content
            try:
                self._on_add(slot)
            except BaseException:
                _release([slot])
                raise
            self._publish((*self, slot))
        return slot

    def remove(self, slot: Slot) -> None:
        """Unmap one slot. Raises MemoryInUseError, and leaves it in place, while views of it are alive."""
        with self._guard:
            before = tuple(self)
            if slot not in before:
                raise ConfigurationError(f"{slot} is not part of this memory")
            self._on_remove(slot)
            self._publish(each for each in before if each is not slot)
            try:
                _release([slot])
            except MemoryInUseError:
                self._publish(before)
                self._on_add(slot)
                raise

    def close(self) -> None:
        """Unmap everything; doing it twice is fine. `on_remove` is not called: close the machine first.

        Raises MemoryInUseError, and unmaps nothing, while views (or a machine) are alive.
        """
        with self._guard:
            before = tuple(self)
            self._publish(())
            try:
                _release(before)
            except MemoryInUseError:
                self._publish(before)
                raise

    def __enter__(self) -> Memory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Slot]:
        """All slots, by address."""
        return iter(self._table[1])

    def find(self, address: int) -> Slot | None:
        """The slot that holds `address`."""
        starts, slots = self._table
        position = bisect_right(starts, address) - 1
        if position >= 0 and address < slots[position].end:
            return slots[position]
        return None

    # Bytes

    def read(self, address: int, size: int) -> bytes:
        """Copy `size` bytes out."""
        pieces = self._pieces(address, size)
        if len(pieces) == 1:
            slot, offset, count = pieces[0]
            return slot.buffer[offset : offset + count]
        return b"".join([slot.buffer[offset : offset + count] for slot, offset, count in pieces])

    def write(self, address: int, data: Buffer) -> None:
        """Copy `data` in, also to read-only slots. What does not fit raises before a byte is written."""
        content = _as_bytes(data)
        done = 0
        for slot, offset, count in self._pieces(address, len(content)):
            slot.buffer[offset : offset + count] = content[done : done + count]
            done += count

    def fill(self, address: int, size: int, byte: int = 0) -> None:
        """Set `size` bytes to `byte`."""
        chunk = bytes([byte]) * min(max(size, 0), _CHUNK)
        for slot, offset, count in self._pieces(address, size):
            for position in range(offset, offset + count, _CHUNK):
                length = min(_CHUNK, offset + count - position)
                slot.buffer[position : position + length] = chunk[:length]

    def view(self, address: int, count: int, dtype: DTypeLike = "uint8") -> NDArray[Any]:
        """A writable array of `count` elements over guest memory itself: no copy, changes show at once.

        `address` need not be aligned to the element. The elements must lie in one slot; the slot cannot
        be removed nor the memory closed while the array, or one made from it, is alive.
        """
        import numpy as np

        size = np.dtype(dtype).itemsize * count
        pieces = self._pieces(address, size)
        if len(pieces) > 1:
            where = " and ".join(str(slot) for slot, _, _ in pieces)
            raise MemoryAccessError(address, size, f"a view must lie in one slot, not {where}; use read()")
        if not pieces:
            return np.empty(0, dtype)
        slot, offset, _ = pieces[0]
        return np.frombuffer(slot.buffer, dtype, count, offset)

    # Values

    def read_struct(self, address: int, layout: str) -> tuple[Any, ...]:
        """Unpack a `struct` format; little-endian without padding unless it says otherwise."""
        layout = _little_endian(layout)
        return struct.unpack(layout, self.read(address, struct.calcsize(layout)))

    def write_struct(self, address: int, layout: str, *values: object) -> None:
        """Pack values by a `struct` format; little-endian without padding unless it says otherwise."""
        self.write(address, struct.pack(_little_endian(layout), *values))

    def read_u8(self, address: int) -> int:
        return self.read(address, 1)[0]

    def read_u16(self, address: int) -> int:
        return int.from_bytes(self.read(address, 2), "little")

    def read_u32(self, address: int) -> int:
        return int.from_bytes(self.read(address, 4), "little")

    def read_u64(self, address: int) -> int:
        return int.from_bytes(self.read(address, 8), "little")

    def write_u8(self, address: int, value: int) -> None:
        self.write(address, value.to_bytes(1, "little"))

    def write_u16(self, address: int, value: int) -> None:
        self.write(address, value.to_bytes(2, "little"))

    def write_u32(self, address: int, value: int) -> None:
        self.write(address, value.to_bytes(4, "little"))

    def write_u64(self, address: int, value: int) -> None:
        self.write(address, value.to_bytes(8, "little"))

    def read_cstring(self, address: int, limit: int = PAGE_SIZE) -> bytes:
        """The bytes up to the first NUL, at most `limit`. Raises if memory ends before either."""
        result = b""
        while len(result) < limit:
            slot = self.find(address + len(result))
            if slot is None:
                raise MemoryAccessError(address, len(result) + 1, "the string does not end before the memory")
            offset = address + len(result) - slot.address
            stop = min(slot.size, offset + limit - len(result))
            found = slot.buffer.find(b"\0", offset, stop)
            if found >= 0:
                return result + slot.buffer[offset:found]
            result += slot.buffer[offset:stop]
        return result

    # Looking around

    def search(self, pattern: Buffer, start: int = 0, end: int | None = None) -> Iterator[int]:
        """The addresses in `start`..`end` where `pattern` lies completely, overlapping ones too, in order.

        Raises ValueError for an empty pattern.
        """
        wanted = bytes(_as_bytes(pattern))
        if not wanted:
            raise ValueError("an empty pattern is everywhere")
        return self._search(wanted, start, PHYSICAL_ADDRESSES if end is None else end)

    def hexdump(self, address: int, size: int) -> str:
        """`size` bytes as lines of address, 16 bytes in hex, and text."""
        data = self.read(address, size)
        lines = []
        for offset in range(0, size, 16):
            row = data[offset : offset + 16]
            text = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in row)
            lines.append(f"{address + offset:012x}  {row.hex(' '):<47}  |{text}|")
        return "\n".join(lines)

    def _search(self, pattern: bytes, start: int, end: int) -> Iterator[int]:
        overlap = len(pattern) - 1
        for run_start, run_end in self._runs():
            stop = min(run_end, end)
            for position in range(max(run_start, start), stop - overlap, _CHUNK):
                chunk = self.read(position, min(_CHUNK + overlap, stop - position))
                found = chunk.find(pattern)
                while found >= 0:
                    yield position + found
                    found = chunk.find(pattern, found + 1)

    def _runs(self) -> list[tuple[int, int]]:
        """Start and end of each stretch of memory without holes."""
        runs: list[tuple[int, int]] = []
        for slot in self:
            if runs and runs[-1][1] == slot.address:
                runs[-1] = (runs[-1][0], slot.end)
            else:
                runs.append((slot.address, slot.end))
        return runs

    def _pieces(self, address: int, size: int) -> list[tuple[Slot, int, int]]:
        """The access as (slot, offset, count), all of it or MemoryAccessError. Nothing for size 0."""
        if size < 0:
            raise MemoryAccessError(address, size, "the size is negative")
        pieces = []
        position, end = address, address + size
        while position < end:
            slot = self.find(position)
            if slot is None:
                raise MemoryAccessError(address, size)
            count = min(end, slot.end) - position
            pieces.append((slot, position - slot.address, count))
            position += count
        return pieces

    def _publish(self, slots: Iterable[Slot]) -> None:
        ordered = tuple(sorted(slots, key=lambda slot: slot.address))
        self._table = (tuple(slot.address for slot in ordered), ordered)

    def _free_index(self) -> int:
        used = {slot.index for slot in self}
        return next(index for index in range(len(used) + 1) if index not in used)

    def _check_range(self, address: int, size: int) -> None:
        end = address + size
        if size <= 0:
            raise ConfigurationError("a memory slot needs a size, a file, or data")
        if address % PAGE_SIZE or size % PAGE_SIZE:
            raise ConfigurationError(
                f"memory at {address:#x} of {size:#x} bytes: both must be multiples of {PAGE_SIZE}"
            )
        if address < 0 or end > PHYSICAL_ADDRESSES:
            raise ConfigurationError(f"memory at {address:#x}..{end:#x}: physical addresses have 52 bits")
        for slot in self:
            if address < slot.end and slot.address < end:
                raise ConfigurationError(f"memory at {address:#x}..{end:#x} overlaps {slot}")

    def _check_host_memory(self, size: int) -> None:
        """Refuse what could never be filled; memory is committed on touch, so some excess is fine."""
        physical = _host_memory()
        total = size + sum(slot.size for slot in self)
        if total > OVERCOMMIT * physical:
            raise ConfigurationError(
                f"{total >> 20} MiB of guest memory on a host that has {physical >> 20} MiB: "
                f"ask for at most {OVERCOMMIT * physical >> 20}M"
            )


@cache
def _host_memory() -> int:
    """Bytes of physical memory. Asked once: the C library reads it from a file of Linux."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _ignore(slot: Slot) -> None:
    """The observer of a memory that belongs to no machine."""


def _little_endian(layout: str) -> str:
    return layout if layout[:1] in "@=<>!" and layout else "<" + layout


def _as_bytes(data: Buffer) -> bytes | memoryview:
    """The bytes of any buffer, in order, without copying where that is possible."""
    if isinstance(data, bytes):
        return data
    view = memoryview(data)
    return view.cast("B") if view.c_contiguous and view.nbytes else view.tobytes()


def _release(slots: Iterable[Slot]) -> None:
    """Unmap all of the slots, or none of them."""
    slots = tuple(slots)
    for slot in slots:
        if _has_views(slot.buffer):
            raise MemoryInUseError(
                f"{slot} is in use: first delete the arrays made by view() and close the machine that maps it"
            )
    for slot in slots:
        slot.buffer.close()
        if slot._close_fd is not None:
            slot._close_fd()


def _has_views(buffer: mmap.mmap) -> bool:
    """Whether something still points into the mapping.

    `mmap.close` would tell too, but only by closing the ones that are free. `mmap.resize` looks for
    views before it looks at the size, and this size is always refused.
    """
    try:
        buffer.resize(-1)
    except BufferError:
        return True
    except (ValueError, SystemError, AttributeError):  # the latter two: a system without mremap
        return False
    raise AssertionError("mmap.resize accepted a negative size")


def _map_fresh(size: int) -> tuple[mmap.mmap, int]:
    """Zeroed memory, as a memfd where the system has that."""
    if not hasattr(os, "memfd_create"):
        return _map(-1, size, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS), -1
    fd = os.memfd_create("pykvm", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        return _map(fd, size, mmap.MAP_SHARED), fd
    except BaseException:
        os.close(fd)
        raise


def _map_file(path: str | os.PathLike[str], size: int, shared: bool) -> tuple[mmap.mmap, int]:
    available = _file_size(path)
    if size > available:
        raise ConfigurationError(
            f"{path} has {available} bytes, not {size}: extend it with truncate -s {size}"
        )
    try:
        fd = os.open(path, (os.O_RDWR if shared else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from error
    try:
        buffer = _map(fd, size, mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE)
    except BaseException:
        os.close(fd)
        raise
    if shared:
        return buffer, fd
    os.close(fd)  # what the guest writes is not in the file
    return buffer, -1


def _map(fd: int, size: int, flags: int) -> mmap.mmap:
    try:
        return mmap.mmap(fd, size, flags, mmap.PROT_READ | mmap.PROT_WRITE)
    except (OSError, OverflowError) as error:
        raise ConfigurationError(
            f"the host cannot map {size >> 20} MiB ({error}): ask for less, or raise the limit (ulimit -v)"
        ) from error


def _file_size(path: str | os.PathLike[str]) -> int:
    try:
        status = os.stat(path)
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise ConfigurationError(f"{path} is not a regular file")
    if status.st_size == 0:
        raise ConfigurationError(f"{path} is empty")
    return status.st_size
