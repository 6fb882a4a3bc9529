"""String instructions: MOVS, STOS, LODS, CMPS, SCAS, with their repetitions (SDM volume 2).

A repeated instruction executes up to `BURST` elements at a time and leaves RIP where it is
until it is done, so that faults, interrupts and kicks find it restartable between elements.
MOVS and STOS go through whole parts of pages where both sides are plain memory.
"""

from __future__ import annotations

from pykvm.emulator.alu import compare_flags
from pykvm.emulator.decode import REPE, Instruction
from pykvm.emulator.flags import LOG2, MASK, SUB
from pykvm.emulator.ports import advancer
from pykvm.emulator.translate import RAX, RCX, RDI, RIP, RSI
from pykvm.layout import PAGE_SIZE
from pykvm.registers import RFLAGS_DF

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.emulator.translate import Get, Op, Translator

BURST = 64
BULK_MINIMUM = 8  # elements; below this, one by one is faster


def _size(i: Instruction) -> int:
    return i.size if i.opcode & 1 else 1


def movs(t: Translator, i: Instruction) -> Op:
    """MOVS: ES:[rDI] = DS:[rSI]."""
    size = _size(i)
    source, destination = t.string_source(i, size), t.string_destination(i, size, write=True)
    load, store = t.load[size], t.store[size]
    advance_source, advance_destination = advancer(t, i, RSI, size), advancer(t, i, RDI, size)

    def element() -> None:
        store(destination(), load(source()))
        advance_source()
        advance_destination()

    return _repeated(t, i, element, _bulk_move(t, i, size, source, destination))


def stos(t: Translator, i: Instruction) -> Op:
    """STOS: ES:[rDI] = rAX."""
    size = _size(i)
    destination, store = t.string_destination(i, size, write=True), t.store[size]
    get, advance = t.get_register(RAX, size), advancer(t, i, RDI, size)

    def element() -> None:
        store(destination(), get())
        advance()

    return _repeated(t, i, element, _bulk_store(t, i, size, destination, get))


def lods(t: Translator, i: Instruction) -> Op:
    """LODS: rAX = DS:[rSI]."""
    size = _size(i)
    source, load = t.string_source(i, size), t.load[size]
    put, advance = t.put_register(RAX, size), advancer(t, i, RSI, size)

    def element() -> None:
        put(load(source()))
        advance()

    return _repeated(t, i, element, None)


def cmps(t: Translator, i: Instruction) -> Op:
    """CMPS: compare DS:[rSI] with ES:[rDI]."""
    size = _size(i)
    source, destination = t.string_source(i, size), t.string_destination(i, size, write=False)
    f, load = t.f, t.load[size]
    advance_source, advance_destination = advancer(t, i, RSI, size), advancer(t, i, RDI, size)

    def element() -> None:
        a = load(source())
        b = load(destination())
        advance_source()
        advance_destination()
        compare_flags(f, a, b, size)

    return _repeated_compare(t, i, element, size)


def scas(t: Translator, i: Instruction) -> Op:
    """SCAS: compare rAX with ES:[rDI]."""
    size = _size(i)
    destination = t.string_destination(i, size, write=False)
    f, load, get = t.f, t.load[size], t.get_register(RAX, size)
    advance = advancer(t, i, RDI, size)

    def element() -> None:
        b = load(destination())
        advance()
        compare_flags(f, get(), b, size)

    return _repeated_compare(t, i, element, size)


def _repeated(t: Translator, i: Instruction, element: Op, bulk: Callable[[int], int] | None) -> Op:
    """`element` once, or rCX times; `bulk` does many at once and says how many, 0 if it cannot."""
    if not i.repeat:
        return element
    t.ended = True
    r, start, following = t.r, i.start, i.next
    mask, put_count = MASK[i.address_size], t.put_register(RCX, i.address_size)

    def op() -> None:
        count = r[RCX] & mask
        if bulk is not None and count >= BULK_MINIMUM:
            done = bulk(count)
            if done:
                put_count(count - done)
                r[RIP] = start if count > done else following
                return
        for _ in range(min(count, BURST)):
            element()
            count -= 1
            put_count(count)
        r[RIP] = start if count else following

    return op


def _repeated_compare(t: Translator, i: Instruction, element: Op, size: int) -> Op:
    """`element` once, or until rCX is 0 or the comparison ends it."""
    if not i.repeat:
        t.new_kind = SUB << 2 | LOG2[size]
        return element
    t.ended = True
    r, f, start, following = t.r, t.f, i.start, i.next
    mask, put_count = MASK[i.address_size], t.put_register(RCX, i.address_size)
    while_equal = i.repeat == REPE

    def op() -> None:
        count = r[RCX] & mask
        for _ in range(min(count, BURST)):
            element()
            count -= 1
            put_count(count)
            if (f[1] == f[2]) != while_equal:
                count = 0
                break
        r[RIP] = start if count else following

    return op


def _room(linear: int, size: int) -> int:
    """How many whole elements fit from `linear` to the end of its page."""
    return (PAGE_SIZE - (linear & 0xFFF)) // size


def _bulk_move(
    t: Translator, i: Instruction, size: int, source: Get, destination: Get
) -> Callable[[int], int]:
    cpu, r, mask = t.cpu, t.r, MASK[i.address_size]
    readable, writable = t.access.readable[1], t.access.writable[1]
    put_source, put_destination = t.put_register(RSI, i.address_size), t.put_register(RDI, i.address_size)
    check_source = _last_element(t, i, RSI, size)
    check_destination = _last_element(t, i, RDI, size)

    def bulk(count: int) -> int:
        if cpu.eflags & RFLAGS_DF:
            return 0
        a, b = source(), destination()
        from_page, to_page = readable.get(a >> 12), writable.get(b >> 12)
        count = min(count, _room(a, size), _room(b, size))
        x, y = a & 0xFFF, b & 0xFFF
        if x < y < x + count * size:
            count = (y - x) // size  # maybe the same memory: no further than what is not yet overwritten
        if from_page is None or to_page is None or count < BULK_MINIMUM:
            return 0
        if not (check_source(count) and check_destination(count)):
            return 0
        length = count * size
        to_page[y : y + length] = from_page[x : x + length]
        put_source((r[RSI] + length) & mask)
        put_destination((r[RDI] + length) & mask)
        return count

    return bulk


def _bulk_store(t: Translator, i: Instruction, size: int, destination: Get, get: Get) -> Callable[[int], int]:
    cpu, r, mask = t.cpu, t.r, MASK[i.address_size]
    writable = t.access.writable[1]
    put_destination = t.put_register(RDI, i.address_size)
    check = _last_element(t, i, RDI, size)

    def bulk(count: int) -> int:
        if cpu.eflags & RFLAGS_DF:
            return 0
        where = destination()
        page = writable.get(where >> 12)
        count = min(count, _room(where, size))
        if page is None or count < BULK_MINIMUM or not check(count):
            return 0
        length, offset = count * size, where & 0xFFF
        page[offset : offset + length] = get().to_bytes(size, "little") * count
        put_destination((r[RDI] + length) & mask)
        return count

    return bulk


def _last_element(t: Translator, i: Instruction, number: int, size: int) -> Callable[[int], bool]:
    """Whether `count` elements from rSI or rDI stay below the segment's limit without wrapping."""
    r, mask = t.r, MASK[i.address_size]
    segment = 0 if number == RDI else (i.segment if i.segment >= 0 else 3)
    limit = t.cpu.write_limit if number == RDI else t.cpu.read_limit
    unlimited = t.bits == 64 or t.flat(segment)

    def check(count: int) -> bool:
        last = (r[number] & mask) + count * size - 1
        return last <= mask and (unlimited or last <= limit[segment])

    return check
