"""Guest-physical memory: slots of host memory, read-only slots, the dirty log, and code marks.

Addresses that no slot covers are device space (KVM API 4.35, KVM_SET_USER_MEMORY_REGION).
Multi-byte values are read through native-order views: the host is little-endian, as all are
that this runs on.
"""

from __future__ import annotations

from pykvm.errors import ConfigurationError
from pykvm.layout import PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.interfaces import Region

PAGE_SHIFT = 12
OFFSET = PAGE_SIZE - 1


class Slot:
    """One range of guest-physical memory and the host bytes behind it."""

    __slots__ = ("bytes", "dirty", "end", "number", "readonly", "start")

    def __init__(self, number: int, start: int, view: memoryview, *, readonly: bool, log_dirty: bool) -> None:
        self.number = number
        self.start = start
        self.end = start + len(view)
        self.bytes = view
        self.readonly = readonly
        self.dirty: bytearray | None = bytearray(len(view) >> PAGE_SHIFT) if log_dirty else None


class PhysicalMemory:
    """The slots of one machine, and which bytes of them the processor holds decoded.

    `changed` is called whenever what was derived from the slots (translations, decoded code)
    must be dropped; `code_written` with the page number when decoded bytes were overwritten.
    """

    def __init__(self) -> None:
        self.slots: dict[int, Slot] = {}
        self.code: dict[int, bytearray] = {}  # page number -> 1 for each byte that is decoded code
        self.changed: Callable[[], None] = _ignore
        self.code_written: Callable[[int], None] = _ignore_page
        self._last: Slot | None = None

    def map(self, number: int, start: int, region: Region, *, readonly: bool, log_dirty: bool) -> None:
        """Add slot `number`. Raises ConfigurationError if it is misaligned, empty or overlaps another."""
        view = memoryview(region.buffer).cast("B")
        if not len(view) or len(view) % PAGE_SIZE or start % PAGE_SIZE or start < 0:
            raise ConfigurationError(
                f"slot {number} at {start:#x}, {len(view):#x} bytes: address and size must be whole pages"
            )
        slot = Slot(number, start, view, readonly=readonly, log_dirty=log_dirty)
        for other in self.slots.values():
            if other.number != number and start < other.end and other.start < slot.end:
                raise ConfigurationError(
                    f"slot {number} at {start:#x}..{slot.end:#x} overlaps slot {other.number} "
                    f"at {other.start:#x}..{other.end:#x}"
                )
        self.slots[number] = slot
        self._forget()

    def unmap(self, number: int) -> None:
        """Remove slot `number`; its addresses become device space."""
        if self.slots.pop(number, None) is None:
            raise ConfigurationError(f"slot {number} is not mapped")
        self._forget()

    def clear(self) -> None:
        """Remove all slots, so that nothing keeps their host memory alive."""
        self.slots.clear()
        self._forget()

    def take_dirty(self, number: int) -> bytes:
        """One byte a page, 1 where it was written since the last call."""
        slot = self.slots.get(number)
        if slot is None or slot.dirty is None:
            raise ConfigurationError(f"slot {number} is not mapped with log_dirty=True")
        taken = bytes(slot.dirty)
        slot.dirty[:] = bytes(len(taken))
        self.changed()  # writable translations would write past the log
        return taken

    def _forget(self) -> None:
        self._last = None
        self.changed()

    def find(self, address: int) -> Slot | None:
        """The slot that covers `address`, None for device space."""
        slot = self._last
        if slot is not None and slot.start <= address < slot.end:
            return slot
        for slot in self.slots.values():
            if slot.start <= address < slot.end:
                self._last = slot
                return slot
        return None

    def page(self, address: int) -> memoryview | None:
        """The bytes of the page that holds `address`, None for device space."""
        slot = self.find(address)
        if slot is None:
            return None
        offset = (address - slot.start) & ~OFFSET
        return slot.bytes[offset : offset + PAGE_SIZE]

    def read(self, address: int, size: int) -> int:
        """Read within one page; all ones where no slot is, as from an empty bus."""
        slot = self.find(address)
        if slot is None:
            return (1 << (8 * size)) - 1
        offset = address - slot.start
        return int.from_bytes(slot.bytes[offset : offset + size], "little")

    def write(self, address: int, size: int, value: int) -> bool:
        """Write within one page. False if no writable slot is there and nothing was written."""
        slot = self.find(address)
        if slot is None or slot.readonly:
            return False
        offset = address - slot.start
        slot.bytes[offset : offset + size] = value.to_bytes(size, "little")
        self.written(slot, address, size)
        return True

    def written(self, slot: Slot, address: int, size: int) -> None:
        """Account for a write of `size` bytes within one page: dirty log and decoded code."""
        if slot.dirty is not None:
            slot.dirty[(address - slot.start) >> PAGE_SHIFT] = 1
        marks = self.code.get(address >> PAGE_SHIFT)
        if marks is not None and any(marks[address & OFFSET : (address & OFFSET) + size]):
            self.code_written(address >> PAGE_SHIFT)

    def writable_page(self, address: int) -> memoryview | None:
        """The page for unsupervised writing, None if its writes must be seen one by one."""
        slot = self.find(address)
        if slot is None or slot.readonly or address >> PAGE_SHIFT in self.code:
            return None
        if slot.dirty is not None and not slot.dirty[(address - slot.start) >> PAGE_SHIFT]:
            return None
        offset = (address - slot.start) & ~OFFSET
        return slot.bytes[offset : offset + PAGE_SIZE]


def _ignore() -> None:
    pass


def _ignore_page(page: int) -> None:
    pass
