"""Stacks for transfers and interrupts: several pushes or pops that take effect together."""

from __future__ import annotations

from pykvm.emulator.decode import SS
from pykvm.emulator.faults import SELECTOR, TS, Fault
from pykvm.emulator.faults import SS as STACK_FAULT
from pykvm.emulator.segments import TSS16, TSS16_BUSY, SegmentCache, limits
from pykvm.emulator.translate import M16, M32, M64, RSP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.emulator.cpu import Cpu


class Stack:
    """A stack segment and pointer. Only `commit` changes RSP; memory is written at once."""

    def __init__(
        self,
        cpu: Cpu,
        segment: SegmentCache,
        top: int,
        *,
        user: bool,
        code64: bool = False,
        error_code: int = 0,
    ) -> None:
        """`error_code` goes with #SS where the stack ends; `user` tells whose accesses its own are."""
        self._cpu = cpu
        self._access = cpu.mmu.user if user else cpu.mmu.supervisor
        self._long = code64 or (cpu.is_long and bool(segment.unusable))
        self._segment = segment
        self._mask = M64 if self._long else (M32 if segment.db else M16)
        self._top = top
        self._error_code = error_code

    @classmethod
    def current(cls, cpu: Cpu, *, error_code: int = 0) -> Stack:
        """The stack in use."""
        user, code64 = cpu.cpl == 3, cpu.is_code64
        return cls(cpu, cpu.segments[SS], cpu.r[RSP], user=user, code64=code64, error_code=error_code)

    def _address(self, top: int, size: int) -> int:
        offset = top & self._mask
        if self._long:
            mmu = self._cpu.mmu
            if not (mmu.canonical(offset) and mmu.canonical((offset + size - 1) & M64)):
                raise Fault(STACK_FAULT, self._error_code)
            return offset
        limit = limits(self._cpu, self._segment)[1]
        if offset + size - 1 > limit and not self._inside_expand_down(offset, size):
            raise Fault(STACK_FAULT, self._error_code)
        return (self._segment.base + offset) & self._cpu.mmu.linear_mask

    def _inside_expand_down(self, offset: int, size: int) -> bool:
        segment = self._segment
        if not self._cpu.is_protected or segment.unusable or not segment.type & 4:
            return False
        return segment.limit < offset and offset + size - 1 <= self._mask

    def push(self, value: int, size: int) -> None:
        """Push `value`, cut to `size` bytes."""
        top = (self._top - size) & M64
        self._access.store[size](self._address(top, size), value & ((1 << 8 * size) - 1))
        self._top = top

    def pop(self, size: int) -> int:
        """Pop `size` bytes."""
        value = self._access.load[size](self._address(self._top, size))
        self._top = (self._top + size) & M64
        return value

    def peek(self, index: int, size: int) -> int:
        """The value `index` places from the top."""
        return self._access.load[size](self._address(self._top + index * size, size))

    def release(self, count: int) -> None:
        """Drop `count` bytes."""
        self._top = (self._top + count) & M64

    def commit(self) -> None:
        """Make RSP the new top, as wide as this stack uses it."""
        r, mask = self._cpu.r, self._mask
        if mask == M16:
            r[RSP] = r[RSP] & ~M16 | self._top & M16
        else:
            r[RSP] = self._top & mask


def task_stack(cpu: Cpu, level: int, ist: int = 0) -> tuple[int, int]:
    """SS and rSP for privilege `level` from the TSS; in long mode the IST entry if one is given.

    SS is 0 in long mode, where it is not in the TSS. Raises #TS if the TSS is too short
    (SDM volume 3, figures 7-2, 7-10 and 7-11).
    """
    load, tr = cpu.mmu.supervisor.load, cpu.tr
    if cpu.is_long:
        offset, size = (0x24 + 8 * (ist - 1) if ist else 4 + 8 * level), 8
    elif tr.type in (TSS16, TSS16_BUSY):
        offset, size = 2 + 4 * level, 4
    else:
        offset, size = 4 + 8 * level, 6
    if offset + size - 1 > tr.limit or tr.unusable:
        raise Fault(TS, tr.selector & SELECTOR)
    address = tr.base + offset
    if cpu.is_long:
        return 0, load[8](address)
    if size == 4:
        return load[2](address + 2), load[2](address)
    return load[2](address + 4), load[4](address)
