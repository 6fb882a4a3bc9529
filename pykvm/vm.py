"""VM: one virtual machine, its memory, buses, devices and processors, on whichever backend runs it.

A machine starts bare: memory, two empty buses and processors in their RESET state. `pykvm.pc.Pc` adds the
devices of a PC. `run` executes it until something ends it and says what, as a value.

Threads
-------
`run` executes the first processor on the calling thread and each further one on a thread of its own, for
as long as the call lasts. `stop`, `pause` and `resume` may be called from any thread, from devices and
from signal handlers, `close` from any thread that is not in `run`; attaching devices and adding memory
are safe everywhere; everything else belongs to the thread that runs, or to a pause.

All of the control state is guarded by one lock, `_control`, which is never held while a guest or a
device runs. It may be taken while a device lock is held (a device that stops the machine). Signal handlers
may raise at any line: locks are taken by `with` on the lock itself, not on a condition, because only
that is atomic towards signals, and threads are bare, because starting a `threading.Thread` is not.
"""

from __future__ import annotations

import threading
from _thread import start_new_thread
from functools import partial

from pykvm.backends import choose
from pykvm.bus import Attachment, Bus
from pykvm.errors import ConfigurationError, MemoryInUseError
from pykvm.exits import Debug, EmulationFailure, Interrupted, Shutdown, Stopped, Unhandled
from pykvm.layout import HOLE_END, HOLE_START
from pykvm.memory import Memory, parse_size
from pykvm.values import replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from _thread import LockType
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from pykvm.boot import Entry, Module
    from pykvm.exits import Exit
    from pykvm.interfaces import Device, IrqLine, Machine, Vcpu
    from pykvm.memory import Slot
    from pykvm.statistics import Statistics

    Handler = Callable[[int, int, int | None], int | None]

__all__ = ["VM"]

PORTS = 1 << 16
PHYSICAL_ADDRESSES = 1 << 52  # architectural limit (SDM volume 3, 4.1.4)
MAX_CPUS = 255  # xAPIC IDs


class _HandlerDevice:
    """A function as a device; see `VM.on_port`."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler

    def read(self, offset: int, size: int) -> int:
        value = self.handler(offset, size, None)
        return (1 << (8 * size)) - 1 if value is None else value

    def write(self, offset: int, size: int, value: int) -> None:
        self.handler(offset, size, value)


def _map(machine: Machine, slot: Slot) -> None:
    machine.map(slot.index, slot.address, slot, readonly=slot.readonly, log_dirty=slot.log_dirty)


def _unmap(machine: Machine, slot: Slot) -> None:
    machine.unmap(slot.index)


class _Run:
    """One call of `VM.run` or `VM.step`, and who takes part in it. Guarded by `VM._control`."""

    __slots__ = ("active", "kicked", "parked", "threads", "timer")

    def __init__(self) -> None:
        self.threads = {threading.get_ident()}  # those that execute it
        # Processors, by index:
        self.active: set[int] = set()  # that have not ended
        self.parked: set[int] = set()  # that wait for resume
        self.kicked: set[int] = set()  # that we kicked and that have not looked at the control state since
        self.timer: LockType | None = None  # held while the time is running


class VM:
    """A virtual machine.

    `memory` is the size of its RAM in bytes or like ``"64M"`` (what exceeds 3 GiB continues at 4 GiB), or
    0 for none; add other slots with `vm.memory.add`. `backend` is ``"auto"`` (KVM, or else the emulator),
    ``"kvm"`` or ``"emulator"``. `irqchip` adds interrupt controllers and the interval timer.

    Raises ConfigurationError for a machine that cannot be, BackendUnavailable and KvmError for one that
    this host cannot run. Use it as a context manager, or call `close`.
    """

    def __init__(
        self, memory: int | str = "64M", *, backend: str = "auto", cpus: int = 1, irqchip: bool = False
    ) -> None:
        if not 1 <= cpus <= MAX_CPUS:
            raise ConfigurationError(f"{cpus} processors: from 1 to {MAX_CPUS} are possible")
        self.backend, self.fallback_reason = choose(backend)
        self.machine = machine = self.backend.machine(irqchip=irqchip, cpus=cpus)
        self.ports = Bus("port", PORTS, on_change=partial(machine.serve, "port"), new_lock=machine.new_lock)
        self.mmio = Bus(
            "mmio", PHYSICAL_ADDRESSES, on_change=partial(machine.serve, "mmio"), new_lock=machine.new_lock
        )
        # The VM is the IO that its processors run against.
        self.port_read, self.port_write = self.ports.read, self.ports.write
        self.mmio_read, self.mmio_write = self.mmio.read, self.mmio.write
        self.irqchip = irqchip
        self.vcpus: tuple[Vcpu, ...] = ()
        self.entry: Entry | None = None
        self._control = threading.RLock()
        self._changed = threading.Condition(self._control)
        self._run: _Run | None = None  # the one in progress
        self._ending: Exit | None = None  # why it ends, or the next one will
        self._paused = False
        self._closed = False
        # Not methods of ours: a VM that nobody refers to any more goes at once, not at a garbage collection.
        self.memory = Memory(on_add=partial(_map, machine), on_remove=partial(_unmap, machine))
        try:
            if memory != 0:
                self.add_ram(memory)
            self.vcpus = tuple(self.machine.vcpu(index) for index in range(cpus))
            for device, port, ports in self.machine.devices():
                self.attach(device, port=port, size=ports)
        except BaseException:
            self._release()
            raise

    # Construction

    def add_ram(self, size: int | str) -> None:
        """Give a machine made with ``memory=0`` its RAM: from address 0, around the hole below 4 GiB."""
        total = parse_size(size)
        self.memory.add(0, min(total, HOLE_START), name="ram")
        if total > HOLE_START:
            self.memory.add(HOLE_END, total - HOLE_START, name="ram above 4G")

    def attach(
        self, device: Device, *, port: int | None = None, address: int | None = None, size: int
    ) -> Attachment:
        """Let `device` answer `size` ports from `port` on, or `size` bytes of MMIO from `address` on.

        Memory slots win over MMIO devices at the same address. Raises BusError if the range overlaps
        another device or does not exist.
        """
        if (port is None) == (address is None):
            raise ConfigurationError("attach a device at either port= or address=")
        bus, start = (self.ports, port) if port is not None else (self.mmio, address)
        assert start is not None
        return bus.attach(device, start, size)

    def detach(self, what: Attachment | Device) -> None:
        """Remove one range, or a device from both buses. Raises BusError if it is on neither."""
        on = [
            bus for bus in (self.ports, self.mmio) if any(what is each or what is each.device for each in bus)
        ]
        for bus in on or [self.ports]:
            bus.detach(what)

    def on_port(self, port: int, size: int = 1) -> Callable[[Handler], Handler]:
        """Decorator: make a function answer `size` ports from `port` on.

        It is called as ``handler(offset, size, value)``. For a read, `value` is None and what it returns is
        the answer (None: all ones)::

            @vm.on_port(0x510)
            def debug(offset, size, value):
                print(value)
        """

        def attach(handler: Handler) -> Handler:
            self.attach(_HandlerDevice(handler), port=port, size=size)
            return handler

        return attach

    def on_mmio(self, address: int, size: int) -> Callable[[Handler], Handler]:
        """Decorator: as `on_port`, for `size` bytes of MMIO from `address` on."""

        def attach(handler: Handler) -> Handler:
            self.attach(_HandlerDevice(handler), address=address, size=size)
            return handler

        return attach

    def irq(self, gsi: int) -> IrqLine:
        """The interrupt line `gsi`. Raises ConfigurationError in a machine made without `irqchip`."""
        return self.machine.irq(gsi)

    def load(
        self,
        image: str | os.PathLike[str] | bytes | bytearray | memoryview,
        *,
        format: str | None = None,
        mode: str | None = None,
        load_address: int | None = None,
        command_line: str = "",
        modules: Sequence[Module] = (),
    ) -> Entry:
        """Load an image, a path or its bytes, and set the first processor to start it.

        The parameters are those of `pykvm.boot.LoadOptions`; `format` ``"firmware"`` maps the image as
        ROM that ends at 4 GiB and leaves the processor at the reset vector.

        Raises ImageError for an image that cannot be loaded, ConfigurationError for options or memory
        that do not fit it.
        """
        from pykvm import boot

        data = bytes(image) if isinstance(image, bytes | bytearray | memoryview) else boot.read_image(image)
        if format == "firmware":
            from pykvm.boot.firmware import load_firmware

            if mode or load_address is not None or command_line or modules:
                raise ConfigurationError(
                    "firmware knows its place: drop mode, address, command line and modules"
                )
            entry = load_firmware(data, self.memory)
        else:
            options = boot.LoadOptions(format, mode, load_address, command_line, tuple(modules))
            entry = boot.load(data, self.memory, options=options)
        for rom in entry.roms:
            self.memory.add(rom.address, readonly=True, data=rom.data, name="rom")
        self.vcpus[0].set_system_registers(entry.system_registers)
        self.vcpus[0].set_registers(entry.registers)
        self.entry = entry
        return entry

    # Running

    def run(self, timeout: float | None = None) -> Exit:
        """Execute until something ends it, or for `timeout` seconds; returns why.

        What a device or a Python signal handler raises leaves as it is, and the machine can be run again.
        Raises ConfigurationError if the machine is closed or already running, or for a negative timeout.
        """
        if timeout is not None and not timeout >= 0:  # NaN is refused too
            raise ConfigurationError(f"a timeout of {timeout} seconds: it must be 0 or more")
        return self._execute(0, timeout, self._run_all if len(self.vcpus) > 1 else self._run_vcpu)

    async def run_async(self, timeout: float | None = None) -> Exit:
        """As `run`, on a thread of its own. Cancelling it stops the guest before the task goes on."""
        import asyncio
        from concurrent.futures import ThreadPoolExecutor
        from contextlib import suppress

        # Not the event loop's executor: its threads are few, and machines may wait for each other.
        executor = ThreadPoolExecutor(1, thread_name_prefix="pykvm")
        future = asyncio.get_running_loop().run_in_executor(executor, self.run, timeout)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            while not future.done():  # it may not have started yet
                self._end(Interrupted(0, "cancel"), only_if_running=True)
                with suppress(asyncio.CancelledError):  # a second time: the guest has to stop all the same
                    await asyncio.wait([future], timeout=0.01)
            raise
        finally:
            executor.shutdown(wait=False)

    def step(self, vcpu: int = 0) -> Exit:
        """Execute one instruction of one processor; `Debug` with kind "step" if all went well.

        Raises ConfigurationError if there is no such processor, or as `run`.
        """
        if not 0 <= vcpu < len(self.vcpus):
            raise ConfigurationError(f"there is no processor {vcpu}: they are 0 to {len(self.vcpus) - 1}")
        return self._execute(vcpu, None, self._step)

    def stop(self, status: int = 0, reason: str = "stop") -> None:
        """End the run, or else the next one, with `Stopped`. From any thread, also from a device."""
        self._end(Stopped(0, status, reason))

    def pause(self) -> None:
        """Hold all processors where they are, inside `run`; returns when they stand still.

        State can then be read and set from the calling thread. The pause lasts until `resume`, also when the
        run ends meanwhile: the next one then waits at its start. From within a device, which cannot wait
        for itself, this returns at once and takes effect when the device returns.
        """
        with self._control:
            self._paused = True
            self._kick_all()
            if self._run is None or threading.get_ident() not in self._run.threads:
                self._changed.wait_for(lambda: not self._paused or self._stands_still())

    def resume(self) -> None:
        """Let a paused machine go on."""
        with self._control:
            self._paused = False
            self._changed.notify_all()

    def _stands_still(self) -> bool:
        return self._run is None or self._run.parked >= self._run.active

    def _execute(self, vcpu: int, timeout: float | None, how: Callable[[_Run, Vcpu], Exit]) -> Exit:
        """From the start to the end of a run, the first processor of which executes on this thread."""
        run = _Run()
        try:
            self._begin(run, vcpu)
            if timeout is not None:
                self._start_timer(run, timeout)
            return self._with_failure(how(run, self.vcpus[vcpu]))
        finally:
            try:
                self._finish(run, vcpu)
            except BaseException:  # a signal handler raised in there
                self._finish(run, vcpu)
                raise

    def _begin(self, run: _Run, vcpu: int) -> None:
        with self._control:
            if self._closed:
                raise ConfigurationError("the machine is closed")
            if self._run is not None:
                raise ConfigurationError("the machine is already running")
            run.active.add(vcpu)
            self._run = run

    def _finish(self, run: _Run, vcpu: int) -> None:
        """Take back everything that belongs to `run`. May be called again when it did not come to its end."""
        timer, run.timer = run.timer, None
        if timer is not None:
            timer.release()
        with self._control:
            if self._run is not run:  # it was refused
                return
            self._join(run, vcpu)
            for index in run.kicked:
                self.vcpus[index].clear_kick()
            self._ending = None
            self._run = None
            self._changed.notify_all()

    def _end(self, exit: Exit, *, only_if_running: bool = False) -> None:
        with self._control:
            if only_if_running and self._run is None:
                return
            if self._ending is None:
                self._ending = exit
            self._kick_all()
            self._changed.notify_all()

    def _kick_all(self) -> None:
        """Make every processor look at the control state, with `_control` held.

        Kicks are sticky, so one that will look anyhow gets none: its next run would return for nothing.
        """
        if self._run is not None:
            for index in self._run.active - self._run.parked - self._run.kicked:
                self.vcpus[index].kick()
                self._run.kicked.add(index)  # last: a signal handler that raises here must not lose a kick

    def _start_timer(self, run: _Run, timeout: float) -> None:
        cancelled = threading.Lock()
        cancelled.acquire()

        def time_out() -> None:
            if cancelled.acquire(timeout=min(timeout, threading.TIMEOUT_MAX)):
                return
            with self._control:
                if self._run is run:
                    self._end(Interrupted(0, "timeout"))

        run.timer = cancelled
        start_new_thread(time_out, ())

    def _run_vcpu(self, run: _Run, vcpu: Vcpu) -> Exit:
        """Run one processor until the machine ends, through pauses."""
        while True:
            exit = None
            if self._ending is None and not self._paused:
                exit = vcpu.run(self)
                if type(exit) is not Interrupted:
                    return exit
            with self._control:
                if self._ending is not None:
                    return self._ending
                if exit is not None:
                    if vcpu.index not in run.kicked:
                        return exit
                    run.kicked.discard(vcpu.index)
                if self._paused:
                    self._park(run, vcpu.index)

    def _step(self, run: _Run, vcpu: Vcpu) -> Exit:
        result = self._ending or vcpu.step(self)
        if type(result) in (Interrupted, Debug) and self._ending is not None:
            return self._ending
        if type(result) is Interrupted and run.kicked:
            return Interrupted(vcpu.index, "pause")
        return result

    def _park(self, run: _Run, index: int) -> None:
        """Wait for resume or the end, with `_control` held."""
        run.parked.add(index)
        self._changed.notify_all()
        self._changed.wait_for(lambda: not self._paused or self._ending is not None)
        run.parked.discard(index)

    def _run_all(self, run: _Run, first: Vcpu) -> Exit:
        """Run all processors, `first` on this thread; the first one to end ends the machine."""
        results: list[Exit] = []
        errors: list[BaseException] = []

        def drive(vcpu: Vcpu) -> None:
            try:
                exit = self._run_vcpu(run, vcpu)
                results.append(exit)
                self._end(exit)
            except BaseException as error:  # goes on in the caller of run
                errors.append(error)
                self._end(Interrupted(vcpu.index, "error"))

        def drive_here(vcpu: Vcpu) -> None:
            with self._control:
                if self._run is not run or self._ending is not None:
                    return  # it was over before this thread began
                run.threads.add(threading.get_ident())
                run.active.add(vcpu.index)
            drive(vcpu)
            with self._control:
                run.active.discard(vcpu.index)
                self._changed.notify_all()

        for vcpu in self.vcpus[1:]:
            start_new_thread(drive_here, (vcpu,))
        drive(first)
        self._join(run, first.index)
        if errors:
            raise errors[0]
        return results[0]

    def _join(self, run: _Run, index: int) -> None:
        """This thread's processor has ended: wait until all others have, too."""
        with self._control:
            run.active.discard(index)
            if run.active:
                self._end(Interrupted(index, "error"))  # changes nothing unless a signal handler raised
                self._changed.wait_for(lambda: not run.active)

    def _with_failure(self, exit: Exit) -> Exit:
        """Add to a failed exit what the machine looks like, while it still does."""
        if isinstance(exit, Shutdown | EmulationFailure | Unhandled):
            from pykvm.explain import failure

            vcpu = self.vcpus[exit.vcpu]
            return replace(exit, failure=failure(vcpu, self.memory, vcpu.recent_exits()))
        return exit

    # Statistics, closing

    def measure_time(self) -> None:
        """Measure the time that processors spend in the guest, from now on (see `statistics`)."""
        for vcpu in self.vcpus:
            vcpu.measure_time()

    def statistics(self) -> Statistics:
        """Exits, instructions and times of all processors together."""
        from pykvm.statistics import Statistics

        return sum((vcpu.statistics() for vcpu in self.vcpus), Statistics())

    def close(self) -> None:
        """Stop the machine if it runs, and give everything back. Twice is fine.

        Raises MemoryInUseError while views of its memory are alive: release them and call it again. Raises
        ConfigurationError when called by a device of this machine, which would wait for itself.
        """
        with self._control:
            if self._run is not None:
                if threading.get_ident() in self._run.threads:
                    raise ConfigurationError("a device cannot close its own machine: call stop() instead")
                self._closed = True
                self._end(Stopped(0, 0, "close"))
                self._changed.wait_for(lambda: self._run is None)
            self._closed = True
            self._release()  # under the lock: who closes at the same time must find it closed

    def _release(self) -> None:
        self.machine.close()
        self.memory.close()

    def __enter__(self) -> VM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except MemoryInUseError:
            # The frames that `error` went through may hold views; they give them up together with it.
            if error is None:
                raise

    def __repr__(self) -> str:
        size = sum(slot.size for slot in self.memory)
        return f"<VM on {self.backend.name}, {size >> 20} MiB, {len(self.vcpus)} vCPU>"
