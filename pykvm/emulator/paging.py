"""Linear to physical addresses: the page walk, and loads and stores with their TLB.

SDM volume 3, chapter 4: no paging, 2-level, PAE, 4-level and 5-level, with large pages,
accessed and dirty bits, WP, NX and SMEP.

The TLB holds host memory, not addresses: for each operand size a dictionary from linear page
number to that page as a memoryview of such operands. An aligned hit is two look-ups. A page
is in a writable dictionary only if a plain write to it is all there is to do: present,
writable and dirty in the page tables, not read-only, not decoded code, not awaiting the
dirty log. Everything else takes the slow path, which may fill the TLB or end in a device.
"""

from __future__ import annotations

from pykvm.emulator.faults import (
    GP,
    PF,
    PF_FETCH,
    PF_PRESENT,
    PF_RESERVED,
    PF_USER,
    PF_WRITE,
    Fault,
    NonCanonical,
)
from pykvm.emulator.physical import OFFSET, PAGE_SHIFT, PhysicalMemory
from pykvm.layout import PAGE_SIZE
from pykvm.registers import (
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_LA57,
    CR4_PAE,
    CR4_PSE,
    CR4_SMEP,
    EFER_LMA,
    EFER_NXE,
    PTE_A,
    PTE_D,
    PTE_NX,
    PTE_P,
    PTE_PS,
    PTE_RW,
    PTE_US,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Literal

    from pykvm.emulator.accesses import Accesses

    Load = Callable[[int], int]
    Store = Callable[[int, int], None]
    Pages = dict[int, memoryview]

PHYSICAL_BITS = 40
"""MAXPHYADDR as CPUID reports it; higher bits of a page-table entry are reserved."""

ADDRESS = 0x000F_FFFF_FFFF_F000
RESERVED_HIGH = ADDRESS & ~((1 << PHYSICAL_BITS) - 1)
LINEAR32 = 0xFFFF_FFFF
LINEAR64 = 0xFFFF_FFFF_FFFF_FFFF
SHIFT = {1: 0, 2: 1, 4: 2, 8: 3}
FORMAT: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}

# Kinds of access
READ, WRITE, FETCH = range(3)


class Mmu:
    """The paging unit of one processor. `user` and `supervisor` hold its loads and stores."""

    def __init__(self, memory: PhysicalMemory, accesses: Accesses) -> None:
        self.memory = memory
        self.accesses = accesses
        self.after_io: Callable[[], None] = _nothing
        self.flushed: Callable[[], None] = _nothing
        self.cr3 = 0
        self.levels = 0  # 0: no paging; 2, 3 (PAE), 4, 5
        self.linear_mask = LINEAR32
        self.write_protect = False
        self.nx = False
        self.smep = False
        self.large_pages = False  # CR4.PSE, for 2-level paging
        self.supervisor = Access(self, user=False)
        self.user = Access(self, user=True)

    def configure(self, cr0: int, cr3: int, cr4: int, efer: int) -> None:
        """Take new control registers, and flush."""
        self.cr3 = cr3
        self.write_protect = bool(cr0 & CR0_WP)
        self.nx = bool(efer & EFER_NXE)
        self.smep = bool(cr4 & CR4_SMEP)
        self.large_pages = bool(cr4 & CR4_PSE)
        self.linear_mask = LINEAR64 if efer & EFER_LMA else LINEAR32
        if not (cr0 & CR0_PG and cr0 & CR0_PE):
            self.levels = 0
        elif efer & EFER_LMA:
            self.levels = 5 if cr4 & CR4_LA57 else 4
        else:
            self.levels = 3 if cr4 & CR4_PAE else 2
        self.flush()

    def flush(self) -> None:
        """Forget all translations."""
        self.supervisor.flush()
        self.user.flush()
        self.flushed()

    def flush_writable(self) -> None:
        """Make every page's next write take the slow path."""
        self.supervisor.flush_writable()
        self.user.flush_writable()

    def canonical(self, address: int) -> bool:
        """Whether the upper bits of a 64-bit linear address all equal its highest usable one."""
        upper = address >> (56 if self.levels == 5 else 47)
        return upper == 0 or upper == (0xFF if self.levels == 5 else 0x1FFFF)

    def translate(self, linear: int, kind: int, *, user: bool) -> int:
        """The physical address of `linear`, setting accessed and dirty bits. Raises Fault."""
        levels = self.levels
        if levels == 0:
            return linear
        if levels == 2:
            return self._walk32(linear, kind, user)
        if levels >= 4 and not self.canonical(linear):
            raise Fault(GP, 0) if kind == FETCH else NonCanonical(linear)
        return self._walk64(linear, kind, user)

    def misaligned(self, linear: int) -> Fault:
        """The fault of an operand that must be aligned and is not. That it is canonical comes first."""
        return Fault(GP, 0) if self.levels < 4 or self.canonical(linear) else NonCanonical(linear)

    def next_page(self, linear: int) -> int:
        """Where the page after that of `linear` begins. Raises Fault if it is not canonical."""
        following = (linear | OFFSET) + 1 & self.linear_mask
        if self.levels >= 4 and not self.canonical(following):
            raise NonCanonical(following)
        return following

    def _page_fault(self, linear: int, kind: int, user: bool, why: int) -> Fault:
        code = why | (PF_USER if user else 0) | (PF_WRITE if kind == WRITE else 0)
        if kind == FETCH and (self.nx or self.smep):
            code |= PF_FETCH
        return Fault(PF, code, linear)

    def _walk64(self, linear: int, kind: int, user: bool) -> int:
        """PAE, 4-level and 5-level paging: 8-byte entries, 9 bits of index a level."""
        read = self.memory.read
        table = self.cr3 & (0xFFFF_FFE0 if self.levels == 3 else ADDRESS)
        rights = PTE_RW | PTE_US
        no_execute = False
        reserved = RESERVED_HIGH | (0 if self.nx else PTE_NX)
        level = self.levels
        while True:
            shift = 3 + 9 * level
            address = table + (linear >> shift & 0x1FF) * 8
            entry = read(address, 8)
            if not entry & PTE_P:
                raise self._page_fault(linear, kind, user, 0)
            large = bool(entry & PTE_PS and level in (2, 3) and not (level == 3 and self.levels == 3))
            if entry & reserved or (entry & PTE_PS and level > 3):
                raise self._page_fault(linear, kind, user, PF_PRESENT | PF_RESERVED)
            if level == 3 and self.levels == 3:  # a PDPTE of PAE paging has no rights of its own
                table = entry & ADDRESS
                level = 2
                continue
            rights &= entry
            no_execute = no_execute or bool(entry & PTE_NX)
            if level == 1 or large:
                break
            if not entry & PTE_A:
                self.memory.write(address, 8, entry | PTE_A)
            table = entry & ADDRESS
            level -= 1
        page = (1 << shift) - 1
        if large and entry & ADDRESS & page & ~0x1000:  # bit 12 is PAT
            raise self._page_fault(linear, kind, user, PF_PRESENT | PF_RESERVED)
        self._check(linear, kind, user, rights, no_execute)
        wanted = PTE_A | (PTE_D if kind == WRITE else 0)
        if entry & wanted != wanted:
            self.memory.write(address, 8, entry | wanted)
        return entry & ADDRESS & ~page | linear & page

    def _walk32(self, linear: int, kind: int, user: bool) -> int:
        """2-level paging: 4-byte entries, 10 bits of index a level, 4 MiB pages with CR4.PSE."""
        read = self.memory.read
        address = (self.cr3 & 0xFFFF_F000) + (linear >> 22) * 4
        entry = read(address, 4)
        if not entry & PTE_P:
            raise self._page_fault(linear, kind, user, 0)
        rights = entry
        page = 0x3F_FFFF
        if entry & PTE_PS and self.large_pages:
            if entry & 1 << 21:
                raise self._page_fault(linear, kind, user, PF_PRESENT | PF_RESERVED)
            base = entry & 0xFFC0_0000 | (entry >> 13 & 0xFF) << 32  # PSE-36
        else:
            if not entry & PTE_A:
                self.memory.write(address, 4, entry | PTE_A)
            address = (entry & 0xFFFF_F000) + (linear >> 12 & 0x3FF) * 4
            entry = read(address, 4)
            if not entry & PTE_P:
                raise self._page_fault(linear, kind, user, 0)
            rights &= entry
            page = OFFSET
            base = entry & 0xFFFF_F000
        self._check(linear, kind, user, rights, False)
        wanted = PTE_A | (PTE_D if kind == WRITE else 0)
        if entry & wanted != wanted:
            self.memory.write(address, 4, entry | wanted)
        return base | linear & page

    def _check(self, linear: int, kind: int, user: bool, rights: int, no_execute: bool) -> None:
        """Raise #PF unless the combined `rights` of all levels allow the access (SDM 4.6)."""
        if user and not rights & PTE_US:
            allowed = False
        elif kind == WRITE:
            allowed = bool(rights & PTE_RW) or not (user or self.write_protect)
        elif kind == FETCH:
            allowed = not no_execute and not (self.smep and not user and rights & PTE_US)
        else:
            allowed = True
        if not allowed:
            raise self._page_fault(linear, kind, user, PF_PRESENT)


class Access:
    """Loads and stores at one privilege, user or supervisor.

    ``load[size](linear)``, ``store[size](linear, value)`` and ``modify[size](linear)``, a load
    that faults as the store to come would (read-modify-write instructions read that way).
    Sizes are 1, 2, 4 and 8; `value` must be cut to size.
    """

    def __init__(self, mmu: Mmu, *, user: bool) -> None:
        self.mmu = mmu
        self.is_user = user
        self.readable: dict[int, Pages] = {size: {} for size in SHIFT}
        self.writable: dict[int, Pages] = {size: {} for size in SHIFT}
        read, write = self.readable, self.writable
        self.load = {n: _make_load(read[n], read[1], n, self.load_slowly) for n in SHIFT}
        self.modify = {n: _make_load(write[n], write[1], n, self.modify_slowly) for n in SHIFT}
        self.store = {n: _make_store(write[n], write[1], n, self.store_slowly) for n in SHIFT}

    def flush(self) -> None:
        """Forget all translations."""
        for pages in self.readable.values():
            pages.clear()
        self.flush_writable()

    def flush_writable(self) -> None:
        """Forget the translations for writing."""
        for pages in self.writable.values():
            pages.clear()

    def load_slowly(self, linear: int, size: int) -> int:
        """Load through the page walk, whatever alignment, page borders or devices."""
        mmu = self.mmu
        if (linear & OFFSET) + size > PAGE_SIZE:
            second = mmu.next_page(linear)
            first = PAGE_SIZE - (linear & OFFSET)
            low = self.load_slowly(linear, first)
            return low | self.load_slowly(second, size - first) << (8 * first)
        physical = mmu.translate(linear, READ, user=self.is_user)
        page = mmu.memory.page(physical)
        if page is None:
            return self._device_read(physical, size)
        self.readable[1][linear >> PAGE_SHIFT] = page
        if size in SHIFT:
            self.readable[size][linear >> PAGE_SHIFT] = page.cast(FORMAT[size])
        offset = linear & OFFSET
        return int.from_bytes(page[offset : offset + size], "little")

    def modify_slowly(self, linear: int, size: int) -> int:
        """Load as `load_slowly`, but only what may also be written."""
        self.probe_write(linear, size)
        return self.load_slowly(linear, size)

    def probe_write(self, linear: int, size: int) -> None:
        """Raise the fault that a store would meet, storing nothing."""
        mmu = self.mmu
        second = mmu.next_page(linear) if (linear & OFFSET) + size > PAGE_SIZE else None
        mmu.translate(linear, WRITE, user=self.is_user)
        if second is not None:
            mmu.translate(second, WRITE, user=self.is_user)

    def store_slowly(self, linear: int, size: int, value: int) -> None:
        """Store through the page walk. Where a page border splits it, both pages are tried first."""
        mmu = self.mmu
        if (linear & OFFSET) + size > PAGE_SIZE:
            self.probe_write(linear, size)
            first = PAGE_SIZE - (linear & OFFSET)
            second = (linear + first) & mmu.linear_mask
            self.store_slowly(linear, first, value & ((1 << 8 * first) - 1))
            self.store_slowly(second, size - first, value >> (8 * first))
            return
        physical = mmu.translate(linear, WRITE, user=self.is_user)
        if not mmu.memory.write(physical, size, value):
            self._device_write(physical, size, value)
            return
        page = mmu.memory.writable_page(physical)
        if page is not None:
            self.writable[1][linear >> PAGE_SHIFT] = page
            if size in SHIFT:
                self.writable[size][linear >> PAGE_SHIFT] = page.cast(FORMAT[size])

    def _device_read(self, physical: int, size: int) -> int:
        value = self.mmu.accesses.mmio_read(physical, size)
        self.mmu.after_io()
        return value

    def _device_write(self, physical: int, size: int, value: int) -> None:
        self.mmu.accesses.mmio_write(physical, size, value)
        self.mmu.after_io()


def _make_load(pages: Pages, whole: Pages, size: int, slowly: Callable[[int, int], int]) -> Load:
    """A load of `size` bytes through `pages`; misaligned ones through `whole`, the bytes."""
    if size == 1:

        def load_byte(linear: int) -> int:
            try:
                return pages[linear >> 12][linear & 0xFFF]
            except KeyError:
                pass
            return slowly(linear, 1)

        return load_byte

    shift = SHIFT[size]
    low = size - 1
    last = PAGE_SIZE - size
    from_bytes = int.from_bytes

    def load(linear: int) -> int:
        offset = linear & 0xFFF
        try:
            if not linear & low:
                return pages[linear >> 12][offset >> shift]
            if offset <= last:
                return from_bytes(whole[linear >> 12][offset : offset + size], "little")
        except KeyError:
            pass
        return slowly(linear, size)

    return load


def _make_store(pages: Pages, whole: Pages, size: int, slowly: Callable[[int, int, int], None]) -> Store:
    """A store of `size` bytes through `pages`; misaligned ones through `whole`, the bytes."""
    shift = SHIFT[size]
    low = size - 1
    last = PAGE_SIZE - size

    def store(linear: int, value: int) -> None:
        offset = linear & 0xFFF
        try:
            if not linear & low:
                pages[linear >> 12][offset >> shift] = value
                return
            if offset <= last:
                whole[linear >> 12][offset : offset + size] = value.to_bytes(size, "little")
                return
        except KeyError:
            pass
        slowly(linear, size, value)

    return store


def _nothing() -> None:
    pass
