"""Placement: what goes where in guest memory, all of it checked before the first byte is written."""

from __future__ import annotations

from bisect import bisect

from pykvm import layout
from pykvm.errors import ConfigurationError, ImageError
from pykvm.values import Value

TYPE_CHECKING = False  # typing costs milliseconds at start-up; type checkers know this name
if TYPE_CHECKING:
    from pykvm.memory import Memory


class Piece(Value):
    """Part of an image: `data` goes to guest-physical `address`, zeros follow up to `size` bytes."""

    address: int
    data: bytes | memoryview
    size: int
    what: str

    @property
    def end(self) -> int:
        """The first address behind the piece."""
        return self.address + self.size


def align_up(value: int, alignment: int) -> int:
    """Return the lowest multiple of `alignment` that is not below `value`."""
    return -(-value // alignment) * alignment


def format_size(size: int) -> str:
    """Return `size` bytes in the unit that a person would give a machine's memory in."""
    if size >= 1 << 20:
        return f"{align_up(size, 1 << 20) >> 20} MiB"
    return f"{align_up(size, 1 << 10) >> 10} KiB"


def ram_ranges(memory: Memory) -> list[tuple[int, int]]:
    """Return the writable ranges (start, end) of `memory`, ascending, adjacent slots joined."""
    ranges: list[tuple[int, int]] = []
    for start, end in sorted((s.address, s.address + s.size) for s in memory if not s.readonly):
        if ranges and ranges[-1][1] == start:
            start = ranges.pop()[0]
        ranges.append((start, end))
    return ranges


def _missing(what: str, start: int, end: int) -> ConfigurationError | ImageError:
    """The error for something that needs memory at start..end where there is none."""
    place = f"{start:#x}..{end:#x} for {what}"
    if end > 1 << 52:
        return ImageError(f"no memory at {place}: physical addresses have 52 bits")
    if start < layout.HOLE_END and end > layout.HOLE_START:
        hole = f"{layout.HOLE_START:#x}..{layout.HOLE_END:#x}"
        return ImageError(f"no memory at {place}: {hole} belongs to devices, link or load it below")
    size = end if end <= layout.HOLE_START else end - (layout.HOLE_END - layout.HOLE_START)
    return ConfigurationError(f"no writable memory at {place}: give the machine at least {format_size(size)}")


class Placement:
    """A plan of guest memory. Pieces are added, checked against memory and each other, then written."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._ram = ram_ranges(memory)
        self._taken: list[tuple[int, int, str]] = []  # start, end, what; ascending, disjoint
        self._pieces: list[Piece] = []

    def reserve(self, address: int, size: int, what: str) -> None:
        """Take a range that somebody else writes.

        Raises ConfigurationError if memory is missing there, ImageError if it is taken.
        """
        if size == 0:
            return
        end = address + size
        self.require(address, size, what)
        index = bisect(self._taken, (address, end, what))
        for start, stop, other in self._taken[max(index - 1, 0) : index + 1]:
            if start < end and address < stop:
                raise ImageError(
                    f"{what} at {address:#x}..{end:#x} overlaps {other} at {start:#x}..{stop:#x}"
                )
        self._taken.insert(index, (address, end, what))

    def add(self, piece: Piece) -> None:
        """Take the range of `piece`, to be filled by `write`. Raises as `reserve` does."""
        self.reserve(piece.address, piece.size, piece.what)
        self._pieces.append(piece)

    def require(self, address: int, size: int, what: str) -> None:
        """Raise ConfigurationError unless there is memory at `address`, taken or not."""
        if not self._in_ram(address, size):
            raise _missing(what, address, address + size)

    def is_free(self, address: int, size: int) -> bool:
        """Whether `size` bytes at `address` are memory that nothing has taken."""
        return self._in_ram(address, size) and self._first_free(address, size, 1) == address

    def _in_ram(self, address: int, size: int) -> bool:
        return any(low <= address and address + size <= high for low, high in self._ram)

    def find(self, size: int, what: str, *, start: int, end: int, align: int = layout.PAGE_SIZE) -> int:
        """Return the lowest free address in start..end where `size` bytes fit, `align`-aligned.

        Raises ConfigurationError that says how much memory would do.
        """
        for low, high in self._ram:
            candidate = self._first_free(align_up(max(low, start), align), size, align)
            if candidate + size <= min(high, end):
                return candidate
        candidate = self._first_free(align_up(start, align), size, align)
        if candidate + size > end:
            raise ImageError(f"{what} ({format_size(size)}) does not fit between {start:#x} and {end:#x}")
        raise _missing(what, candidate, candidate + size)

    def _first_free(self, candidate: int, size: int, align: int) -> int:
        for start, stop, _ in self._taken:
            if stop > candidate and start < candidate + size:
                candidate = align_up(stop, align)
        return candidate

    def write(self) -> None:
        """Write every piece to memory."""
        for piece in self._pieces:
            if piece.data:
                self._memory.write(piece.address, piece.data)
            self._memory.fill(piece.address + len(piece.data), piece.size - len(piece.data))
