"""The run loop: executes blocks, delivers exceptions and interrupts, waits in HLT, ends in an exit.

Virtual time passes only here (see `cpu.Clock`): with each instruction, and in HLT, which
skips to the next timer event. So a run is a function of its inputs: the timer interrupts
the same instruction every time. Kicks and lines raised by other threads are not; they are
noticed within `SLICE` instructions. Where a device may end it, HLT takes as long as it
says, so that a guest that waits for input lets the host rest; the guest sees no difference.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from time import perf_counter_ns

from pykvm.emulator.blocks import Block
from pykvm.emulator.cpu import NANOSECONDS, Cpu
from pykvm.emulator.faults import NMI, SS, Fault, NonCanonical, TripleFault
from pykvm.emulator.interrupts import raise_exception, raise_interrupt, raise_single_step
from pykvm.emulator.translate import RIP
from pykvm.errors import UnsupportedInstruction
from pykvm.exits import Debug, EmulationFailure, Exit, Halt, Interrupted, Shutdown
from pykvm.registers import RFLAGS_IF, RFLAGS_TF

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pykvm.emulator.chipset import Chipset

SLICE = 256
"""Instructions between two looks at kicks and interrupt lines, at most."""

HALT_WAIT = 0.05
"""Seconds that a halted processor sleeps before it looks for kicks again."""


class Execution:
    """Runs one processor."""

    def __init__(self, cpu: Cpu, chipset: Chipset | None, index: int) -> None:
        self.cpu = cpu
        self.chipset = chipset
        self.index = index
        self.breakpoints: frozenset[int] = frozenset()
        self._kicked = False
        self._call: Callable[[], None] | None = None
        # Unlocked: there is something to look at. A bare lock, because a signal handler that interrupts
        # the code of an Event and sets it would wait for itself.
        self._wake = threading.Lock()

    def kick(self) -> None:
        """End the current or else the next run. Any thread may call this."""
        self._kicked = True
        self.attend()

    def clear_kick(self) -> None:
        """Forget a kick. Only between runs."""
        self._kicked = False

    def call_between_instructions(self, call: Callable[[], None]) -> None:
        """Call `call` soon, when RIP is at an instruction's border; what it raises leaves the run."""
        self._call = call
        self.attend()

    def call_held(self) -> None:
        """Make the call that `call_between_instructions` has asked for, if any."""
        if self._call is not None:
            call, self._call = self._call, None
            call()

    def attend(self) -> None:
        """Look at kicks and interrupt lines soon. Any thread may call this."""
        self.cpu.clock.limit = 0
        with suppress(RuntimeError):  # it was unlocked already
            self._wake.release()

    # Running

    def run(self) -> Exit:
        """Execute until an exit. Exceptions of devices pass through, at an instruction's border."""
        self._begin()
        loop = self._run_to_breakpoint if self.breakpoints else self._run_freely
        while True:
            ended = self._guarded(loop)
            if ended is not None:
                return ended

    def step(self) -> Exit:
        """Execute one instruction, or deliver its exception, after an interrupt if one is due."""
        self._begin()
        return self._guarded(self._run_one) or self._debug("step")

    def _begin(self) -> None:
        self.cpu.code.drop_changed()
        self.cpu.clock.limit = 0

    def _guarded(self, loop: Callable[[], Exit | None]) -> Exit | None:
        """Call `loop`; deliver a fault that ends it. After any exception RIP is at an instruction."""
        clock = self.cpu.clock
        try:
            return loop()
        except Fault as fault:
            self._stop_at_instruction()
            clock.count += 1  # so that time passes, and kicks are seen, in an endless chain of faults
            return self._deliver(fault)
        except TripleFault:
            self._stop_at_instruction()
            return Shutdown(self.index)
        except UnsupportedInstruction as error:
            self._stop_at_instruction()
            return self._failure(error)
        finally:
            self._stop_at_instruction()

    def _deliver(self, fault: Fault) -> Exit | None:
        try:
            if isinstance(fault, NonCanonical) and self.cpu.code.uses_as_stack(fault.address):
                fault = Fault(SS, 0)
            raise_exception(self.cpu, fault)
        except TripleFault:
            return Shutdown(self.index)
        except UnsupportedInstruction as error:
            return self._failure(error)
        return None

    def _failure(self, error: UnsupportedInstruction) -> EmulationFailure:
        code = error.code or self.cpu.code.peek()
        what = UnsupportedInstruction(self.cpu.linear_ip(), code, error.mnemonic)
        return EmulationFailure(self.index, code=code, suberror=1, detail=str(what))

    def _debug(self, kind: str) -> Debug:
        cpu = self.cpu
        return Debug(self.index, kind=kind, address=cpu.linear_ip(), dr6=cpu.dr6, dr7=cpu.dr7)

    def _stop_at_instruction(self) -> None:
        """After an exception within a block: RIP and count as before the instruction that raised it."""
        clock = self.cpu.clock
        block = clock.block
        if block is not None:
            done = clock.done()
            clock.block = None
            clock.count += done
            self.cpu.r[RIP] = block.addresses[done]

    def _run_freely(self) -> Exit:
        cpu, r, clock, find = self.cpu, self.cpu.r, self.cpu.clock, self.cpu.code.find
        while True:
            block = cpu.blocks.get(r[RIP])
            if block is None or clock.count + block.count > clock.limit:
                clock.block = None
                ended = self._attend() if clock.count >= clock.limit else None
                if ended is not None:
                    return ended
                block = cpu.blocks.get(r[RIP]) or find(r[RIP])
                if clock.count + block.count > clock.limit:
                    self._run_part(block, clock.limit - clock.count)
                    continue
            clock.position = position = iter(block.ops)
            clock.block = block
            for op in position:
                op()
            clock.count += block.count

    def _run_to_breakpoint(self) -> Exit:
        """As `_run_freely`, one instruction at a time."""
        ended = self._run_one()
        while ended is None:
            if self.cpu.linear_ip() in self.breakpoints:
                return self._debug("breakpoint")
            ended = self._run_one()
        return ended

    def _run_one(self) -> Exit | None:
        """Attend to what is due, then execute one instruction."""
        cpu, clock = self.cpu, self.cpu.clock
        ended = self._attend() if clock.count >= clock.limit else None
        if ended is None:
            rip = cpu.r[RIP]
            self._run_part(cpu.blocks.get(rip) or cpu.code.find(rip), 1)
        if ended is None and cpu.halted:
            ended = self._attend()
        return ended

    def _run_part(self, block: Block, count: int) -> None:
        """Execute the first `count` instructions of a block, fewer if it is cut."""
        clock = self.cpu.clock
        clock.position = position = iter(block.ops)
        clock.block = block
        done = 0
        while done < count and done < block.count:
            next(position)()
            done += 1
        clock.block = None
        clock.count += done
        if done < len(block.ops):  # else the last operation set RIP
            self.cpu.r[RIP] = block.addresses[done]

    # Attention

    def _attend(self) -> Exit | None:
        """Kicks, the timer, interrupts, HLT and single-stepping. Sets the next limit."""
        cpu, clock = self.cpu, self.cpu.clock
        while True:
            self._wake.acquire(blocking=False)
            self.call_held()
            if self._kicked:
                self._kicked = False
                return Interrupted(self.index)
            clock.limit = clock.count + SLICE
            self._interrupt()
            if cpu.halted:
                if self.chipset is None or not cpu.eflags & RFLAGS_IF or not self.chipset.may_interrupt():
                    cpu.halted = False
                    return Halt(self.index)
                self._wait(self.chipset)
            elif cpu.eflags & RFLAGS_TF:
                self._single_step()
            else:
                return None

    def _interrupt(self) -> None:
        """Deliver an interrupt if one is due and allowed; bring the limit down to the next one."""
        cpu, clock, chipset = self.cpu, self.cpu.clock, self.chipset
        due = chipset.advance() if chipset is not None else None
        nmi = cpu.nmi_pending and not cpu.nmi_masked
        line = chipset is not None and chipset.pending() and bool(cpu.eflags & RFLAGS_IF)
        wanted = nmi or line or cpu.injected is not None
        if wanted and clock.count < cpu.shadow_until and not cpu.halted:
            clock.limit = cpu.shadow_until
            return
        if due is not None:
            clock.limit = min(clock.limit, max(clock.count + 1, due - clock.skipped))
        if not wanted:
            return
        cpu.halted = False
        if cpu.injected is not None:
            vector, cpu.injected = cpu.injected, None
            raise_interrupt(cpu, vector)
        elif nmi:
            cpu.nmi_pending, cpu.nmi_masked = False, True
            raise_interrupt(cpu, NMI)
        elif chipset is not None:
            raise_interrupt(cpu, chipset.acknowledge())

    def _wait(self, chipset: Chipset) -> None:
        """In HLT: go to the timer's next event, or sleep until another thread raises a line.

        What only the timer can end takes no time. A wait that a device may end as well takes as long as it
        does for the guest: input comes in real time, and a guest that waits for it should cost nothing.
        """
        clock = self.cpu.clock
        event = chipset.advance()
        if chipset.pending():
            return
        if event is None:
            self._wake.acquire(timeout=HALT_WAIT)
            return
        wait = max(0, event - clock.ticks())
        clock.skipped += self._sleep(wait) if chipset.devices_may_interrupt() else wait
        chipset.advance()

    def _sleep(self, ticks: int) -> int:
        """Sleep for `ticks` of the processor's clock, or until woken. Returns how many have passed."""
        start = perf_counter_ns()
        if not self._wake.acquire(timeout=ticks * NANOSECONDS / 1e9):
            return ticks
        return min(ticks, (perf_counter_ns() - start) // NANOSECONDS)

    def _single_step(self) -> None:
        """With RFLAGS.TF: one instruction, then its #DB, unless it entered a handler."""
        cpu = self.cpu
        cpu.delivered = False
        rip = cpu.r[RIP]
        self._run_part(cpu.blocks.get(rip) or cpu.code.find(rip), 1)
        if not cpu.delivered:
            raise_single_step(cpu)
