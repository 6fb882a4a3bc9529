"""Translated code: basic blocks of closures, found by instruction pointer, dropped when overwritten.

A block is a run of instructions within one page that ends at a jump, at anything that can
change mode, or at the page's end. Its last operation sets RIP; the others do not touch it.

There are two levels. Per environment, `Context.blocks` maps RIP to block and is emptied
whenever translations are flushed. `Context.translated` maps (RIP, physical address) and
outlives that. A store into bytes that are marked as decoded drops all blocks of the page;
the block being executed is cut after the current instruction, which ends it correctly even
if the overwritten instruction is the very next one.
"""

from __future__ import annotations

from pykvm.emulator.decode import CS, MAX_LENGTH, SS, Instruction, decode
from pykvm.emulator.faults import GP, Fault
from pykvm.emulator.opcodes import TABLE
from pykvm.emulator.paging import FETCH
from pykvm.emulator.physical import OFFSET, PAGE_SHIFT
from pykvm.emulator.translate import M64, RIP, RSP, Environment, Translator
from pykvm.errors import UnsupportedInstruction
from pykvm.layout import PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.emulator.cpu import Cpu
    from pykvm.emulator.translate import Op

    Key = tuple[int, bool, int, int, bool, int]

STACK_INSTRUCTIONS = frozenset(("push", "pop", "pushf", "popf", "call", "ret", "enter", "leave"))
"""Those that use the stack in one step; longer transfers go through `stack.Stack`."""

MAX_BLOCK = 64  # instructions
MAX_BLOCKS = 50_000
MAX_CONTEXTS = 256


class Block:
    """Instructions that are executed in a row.

    `ops` holds one closure for each of the `count` instructions, and one more to set RIP if the
    last instruction does not; `addresses` their instruction pointers, and the one after the last.
    """

    __slots__ = ("addresses", "context", "count", "ops", "physical")

    def __init__(self, context: Context, ops: list[Op], addresses: list[int], physical: int) -> None:
        self.context = context
        self.ops = ops
        self.addresses = addresses
        self.count = len(addresses) - 1
        self.physical = physical

    def discard(self) -> bool:
        """Take the block out of its context. False if it was not there any more."""
        rip = self.addresses[0]
        if self.context.blocks.get(rip) is self:
            del self.context.blocks[rip]
        if self.context.translated.get((rip, self.physical)) is not self:
            return False
        del self.context.translated[rip, self.physical]
        return True


class Context:
    """The translated code of one environment."""

    __slots__ = ("blocks", "environment", "translated", "translator")

    def __init__(self, cpu: Cpu, environment: Environment) -> None:
        self.environment = environment
        self.translator = Translator(cpu, environment)
        self.blocks: dict[int, Block] = {}
        self.translated: dict[tuple[int, int], Block] = {}


class CodeCache:
    """All translated code of one processor."""

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu
        self._memory = cpu.memory
        self._contexts: dict[Key, Context] = {}
        self._pages: dict[int, list[Block]] = {}  # page number -> blocks with bytes in it
        self._copies: dict[int, bytes] = {}  # page -> its bytes when it was first decoded
        self._count = 0
        cpu.memory.code_written = self.drop_page

    def context(self, key: Key) -> Context:
        """The context of the environment with these fields, made on first use."""
        context = self._contexts.get(key)
        if context is None:
            if len(self._contexts) >= MAX_CONTEXTS:
                self.clear()
            context = self._contexts[key] = Context(self._cpu, Environment(*key))
        return context

    def forget_translations(self) -> None:
        """Linear addresses may mean other memory now; physical ones keep their code."""
        for context in self._contexts.values():
            context.blocks.clear()

    def clear(self) -> None:
        """Drop everything."""
        for context in self._contexts.values():
            context.blocks.clear()
            context.translated.clear()
        self._contexts.clear()
        self._pages.clear()
        self._copies.clear()
        self._memory.code.clear()
        self._count = 0

    def drop_page(self, page: int) -> None:
        """Drop all blocks with bytes in physical page number `page`, and cut the running one."""
        running = self._cpu.clock.block
        for block in self._pages.pop(page, ()):
            if block.discard():
                self._count -= 1
            if block is running:
                self.cut()
        self._memory.code.pop(page, None)
        self._copies.pop(page, None)

    def drop_changed(self) -> None:
        """Drop the pages that the host changed behind our back, between runs."""
        for page, copy in list(self._copies.items()):
            view = self._memory.page(page << PAGE_SHIFT)
            now = bytes(view) if view is not None else b""  # a memoryview compares byte by byte
            if not now:
                self.drop_page(page)
            elif now != copy:
                marks = self._memory.code[page]
                if any(mark and now[index] != copy[index] for index, mark in enumerate(marks)):
                    self.drop_page(page)
                else:
                    self._copies[page] = now

    def cut(self) -> None:
        """End the running block after the current instruction."""
        clock, r = self._cpu.clock, self._cpu.r
        block = clock.block
        if block is None:
            return
        done = clock.done() + 1
        if done >= block.count:
            return
        following = block.addresses[done]

        def resume() -> None:
            r[RIP] = following

        if block.discard():
            self._count -= 1
        block.ops[done:] = [resume]
        block.count = done
        del block.addresses[done + 1 :]

    def find(self, rip: int) -> Block:
        """The block at `rip`, translated if need be.

        Raises Fault if it cannot be fetched or is no instruction, UnsupportedInstruction if
        it is one that is not implemented; RIP points at it then.
        """
        cpu, context = self._cpu, self._cpu.context
        environment = context.environment
        if environment.bits != 64 and rip > cpu.segments[CS].limit:
            raise Fault(GP, 0)
        linear = (rip + environment.code_base) & cpu.mmu.linear_mask
        physical = cpu.mmu.translate(linear, FETCH, user=environment.user)
        block = context.translated.get((rip, physical))
        if block is None:
            if self._count >= MAX_BLOCKS:
                self.clear()
                cpu.update_environment()
                context = cpu.context
            block = self._translate(context, rip, linear, physical)
        context.blocks[rip] = block
        return block

    def peek(self) -> bytes:
        """The bytes at RIP, as far as they can be read without side effects."""
        cpu = self._cpu
        linear = cpu.linear_ip()
        try:
            physical = cpu.mmu.translate(linear, FETCH, user=cpu.cpl == 3)
        except Fault:
            return b""
        page = self._memory.page(physical)
        return bytes(page[physical & OFFSET :][:MAX_LENGTH]) if page is not None else b""

    def uses_as_stack(self, address: int) -> bool:
        """Whether the 64-bit instruction at RIP uses the linear `address` as one of its stack's."""
        cpu = self._cpu
        rip = cpu.linear_ip()
        physical = cpu.mmu.translate(rip, FETCH, user=cpu.cpl == 3)
        i, _ = self._fetch(cpu.context, rip, rip, physical)
        if i.has_memory and i.segment == SS:
            return True
        if i.row.name not in STACK_INSTRUCTIONS:
            return False
        from_top = (address - cpu.r[RSP] + 8) & M64
        return not i.has_memory or from_top <= 16  # else it is the memory operand of PUSH, POP or CALL

    def _translate(self, context: Context, rip: int, linear: int, physical: int) -> Block:
        translator = context.translator
        translator.kind = None
        ops: list[Op] = []
        addresses = [rip]
        pages = {physical >> PAGE_SHIFT}
        position, ended = physical, False
        while not ended and len(ops) < MAX_BLOCK and position >> PAGE_SHIFT in pages and len(pages) == 1:
            try:
                i, second = self._fetch(context, addresses[-1], linear + position - physical, position)
                if second is not None and ops:  # an instruction across pages is a block of its own
                    break
                op, ended = translator.translate(i)
            except (Fault, UnsupportedInstruction):
                if not ops:
                    raise
                break
            if second is not None:
                pages.add(second >> PAGE_SHIFT)
                self._mark(second, len(i.code) - (-position & OFFSET))
            self._mark(position, min(len(i.code), PAGE_SIZE - (position & OFFSET)))
            ops.append(op)
            addresses.append(i.next)
            position += len(i.code)
        if not ended:
            ops.append(_jump(self._cpu.r, addresses[-1]))
        block = Block(context, ops, addresses, physical)
        context.translated[rip, physical] = block
        self._count += 1
        for page in pages:
            self._pages[page].append(block)
        return block

    def _fetch(
        self, context: Context, rip: int, linear: int, physical: int
    ) -> tuple[Instruction, int | None]:
        """Decode at `physical`; also the physical address of the next page if the instruction needs it."""
        cpu, environment = self._cpu, context.environment
        page = self._memory.page(physical)
        if page is None:
            raise UnsupportedInstruction(linear, b"", "instruction fetch where no memory is")
        offset = physical & OFFSET
        code = bytes(page[offset : offset + MAX_LENGTH])
        second = None
        try:
            i = decode(code, rip, environment.bits, TABLE)
        except IndexError:
            if len(code) == MAX_LENGTH:
                raise Fault(GP, 0) from None  # longer than 15 bytes
            beyond = (linear + len(code)) & cpu.mmu.linear_mask
            second = cpu.mmu.translate(beyond, FETCH, user=environment.user)
            next_page = self._memory.page(second)
            if next_page is None:
                raise UnsupportedInstruction(linear, code, "instruction fetch where no memory is") from None
            try:
                i = decode(code + bytes(next_page[: MAX_LENGTH - len(code)]), rip, environment.bits, TABLE)
            except IndexError:
                raise Fault(GP, 0) from None
        if environment.bits != 64 and i.next - 1 > cpu.segments[CS].limit:
            raise Fault(GP, 0)
        return i, second

    def _mark(self, physical: int, size: int) -> None:
        """Mark bytes within one page as decoded code."""
        number, offset = physical >> PAGE_SHIFT, physical & OFFSET
        marks = self._memory.code.get(number)
        page = self._memory.page(physical)
        if marks is None and page is not None:
            marks = self._memory.code[number] = bytearray(PAGE_SIZE)
            self._pages[number] = []
            self._copies[number] = bytes(page)
            self._cpu.mmu.flush_writable()
        if marks is not None:
            marks[offset : offset + size] = b"\1" * size


def _jump(r: list[int], target: int) -> Op:
    def op() -> None:
        r[RIP] = target

    return op
