"""IN, OUT, INS, OUTS, and who may use which port (SDM volume 1, chapter 18)."""

from __future__ import annotations

from pykvm.emulator.decode import Instruction
from pykvm.emulator.faults import GP, Fault
from pykvm.emulator.flags import MASK
from pykvm.emulator.segments import TSS32, TSS32_BUSY
from pykvm.emulator.translate import RCX, RDI, RDX, RIP, RSI
from pykvm.registers import RFLAGS_DF, RFLAGS_IOPL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from pykvm.emulator.cpu import Cpu
    from pykvm.emulator.translate import Op, Translator

    class PortSpace(Protocol):
        """Where port accesses go: interrupt controllers and timer, else the machine's bus."""

        def read(self, port: int, size: int) -> int: ...
        def write(self, port: int, size: int, value: int) -> None: ...


IO_MAP_BASE = 0x66  # offset in the TSS of the offset of the I/O permission bitmap


def check_permission(cpu: Cpu, port: int, size: int) -> None:
    """Raise #GP(0) unless privilege or the TSS's bitmap allows the access (SDM volume 1, 18.5)."""
    if not cpu.is_protected or cpu.cpl <= (cpu.eflags & RFLAGS_IOPL) >> 12:
        return
    tr = cpu.tr
    if tr.unusable or tr.type not in (TSS32, TSS32_BUSY) or tr.limit < IO_MAP_BASE + 1:
        raise Fault(GP, 0)
    load = cpu.mmu.supervisor.load[2]
    offset = load(tr.base + IO_MAP_BASE) + port // 8
    if offset + 1 > tr.limit:  # two bytes are read, for ports across a byte border
        raise Fault(GP, 0)
    if load(tr.base + offset) >> (port & 7) & ((1 << size) - 1):
        raise Fault(GP, 0)


def in_(t: Translator, i: Instruction) -> Op:
    """IN."""
    dst, src = i.operands
    cpu, r, ports, following = t.cpu, t.r, t.cpu.ports, i.next
    port, put, size = t.get(i, src), t.put(i, dst), dst.size

    def op() -> None:
        number = port()
        check_permission(cpu, number, size)
        put(ports.read(number, size))
        r[RIP] = following

    return op


def out(t: Translator, i: Instruction) -> Op:
    """OUT."""
    dst, src = i.operands
    cpu, r, ports, following = t.cpu, t.r, t.cpu.ports, i.next
    port, get, size = t.get(i, dst), t.get(i, src), src.size

    def op() -> None:
        number = port()
        check_permission(cpu, number, size)
        ports.write(number, size, get())
        r[RIP] = following

    return op


def _size(i: Instruction) -> int:
    return 1 if not i.opcode & 1 else min(i.size, 4)


def ins(t: Translator, i: Instruction) -> Op:
    """INS: memory is probed first, so that no input is lost to a fault."""
    size = _size(i)
    cpu, r, ports, store = t.cpu, t.r, t.cpu.ports, t.store[size]
    where, advance = t.string_destination(i, size, write=True), advancer(t, i, RDI, size)
    probe = t.access.probe_write

    def element() -> None:
        port = r[RDX] & 0xFFFF
        check_permission(cpu, port, size)
        linear = where()
        probe(linear, size)
        store(linear, ports.read(port, size))
        advance()

    return _repeated(t, i, element)


def outs(t: Translator, i: Instruction) -> Op:
    """OUTS."""
    size = _size(i)
    cpu, r, ports, load = t.cpu, t.r, t.cpu.ports, t.load[size]
    where, advance = t.string_source(i, size), advancer(t, i, RSI, size)

    def element() -> None:
        port = r[RDX] & 0xFFFF
        check_permission(cpu, port, size)
        ports.write(port, size, load(where()))
        advance()

    return _repeated(t, i, element)


def _repeated(t: Translator, i: Instruction, element: Op) -> Op:
    """One element an execution: with REP, RIP stays until rCX is 0, so that interrupts come between."""
    r, start, following = t.r, i.start, i.next
    mask, put_count = MASK[i.address_size], t.put_register(RCX, i.address_size)

    def once() -> None:
        element()
        r[RIP] = following

    def repeat() -> None:
        count = r[RCX] & mask
        if count:
            element()
            count -= 1
            put_count(count)
        r[RIP] = start if count else following

    return repeat if i.repeat else once


def advancer(t: Translator, i: Instruction, number: int, size: int) -> Op:
    """Moves rSI or rDI by one element, in the direction of DF."""
    cpu, r, mask = t.cpu, t.r, MASK[i.address_size]
    put: Callable[[int], None] = t.put_register(number, i.address_size)

    def advance() -> None:
        put((r[number] + (-size if cpu.eflags & RFLAGS_DF else size)) & mask)

    return advance
