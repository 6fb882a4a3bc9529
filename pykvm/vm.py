"""VM: one virtual machine, its memory, buses, devices and processors, on whichever backend runs it.

A machine starts bare: memory, two empty buses and processors in their RESET state. `pykvm.pc.Pc` adds the
devices of a PC. `run` executes it until something ends it and says what, as a value.

Threads
-------
`run` executes the first processor on the calling thread and each further one on a thread of its own, for
as long as the call lasts. `stop`, `pause`, `resume` and `close` may be called from any thread, from
devices and from signal handlers; everything else belongs to the thread that runs, or to a pause.

All of the control state is guarded by one condition, `_control`, which is never held while a guest
or a device runs. It may be taken while a device lock is held (a device that stops the machine).
"""

from __future__ import annotations

import threading
from dataclasses import replace

from pykvm.backends import choose
from pykvm.bus import Bus
from pykvm.errors import ConfigurationError
from pykvm.exits import Debug, EmulationFailure, Interrupted, Shutdown, Stopped, Unhandled
from pykvm.layout import HOLE_END, HOLE_START
from pykvm.memory import Memory, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from pykvm.boot import Entry, Module
    from pykvm.bus import Attachment
    from pykvm.exits import Exit
    from pykvm.interfaces import Device, IrqLine, Vcpu
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
        size = parse_size(memory) if memory else 0
        self.backend, self.fallback_reason = choose(backend)
        self.ports = Bus("port", PORTS)
        self.mmio = Bus("mmio", PHYSICAL_ADDRESSES)
        # The VM is the IO that its processors run against.
        self.port_read, self.port_write = self.ports.read, self.ports.write
        self.mmio_read, self.mmio_write = self.mmio.read, self.mmio.write
        self.irqchip = irqchip
        self.vcpus: tuple[Vcpu, ...] = ()
        self.entry: Entry | None = None
        self._control = threading.Condition()
        self._ending: Exit | None = None  # why the run ends, or the next one will
        self._runners: set[int] = set()  # threads that are in run, by ident
        self._parked: set[int] = set()  # processors that wait for resume, by index
        self._paused = False
        self._we_kicked = False
        self._closed = False
        self._timer: threading.Timer | None = None  # the one that may end the present run
        self.machine = self.backend.machine(irqchip=irqchip, cpus=cpus)
        self.memory = Memory(on_add=self._map, on_remove=self._unmap)
        try:
            if size:
                self._add_ram(size)
            self.vcpus = tuple(self.machine.vcpu(index) for index in range(cpus))
        except BaseException:
            self._release()
            raise

    # Construction

    def _add_ram(self, size: int) -> None:
        self.memory.add(0, min(size, HOLE_START), name="ram")
        if size > HOLE_START:
            self.memory.add(HOLE_END, size - HOLE_START, name="ram above 4G")

    def _map(self, slot: Slot) -> None:
        self.machine.map(slot.index, slot.address, slot, readonly=slot.readonly, log_dirty=slot.log_dirty)

    def _unmap(self, slot: Slot) -> None:
        self.machine.unmap(slot.index)

    def attach(
        self, device: Device, *, port: int | None = None, address: int | None = None, size: int
    ) -> Attachment:
        """Let `device` answer `size` ports from `port` on, or `size` bytes of MMIO from `address` on.

        Memory slots win over MMIO devices at the same address. Raises BusError if the range overlaps
        another device or does not exist.
        """
        if (port is None) == (address is None):
            raise ConfigurationError("attach a device at either port= or address=")
        space, bus, start = ("port", self.ports, port) if port is not None else ("mmio", self.mmio, address)
        assert start is not None
        attachment = bus.attach(device, start, size)
        self.machine.serve(space, start, size, device)
        return attachment

    def detach(self, device: Device) -> None:
        """Remove a device from both buses. Raises BusError if it is on neither."""
        self.machine.unserve(device)
        on = [bus for bus in (self.ports, self.mmio) if any(each.device is device for each in bus)]
        for bus in on or [self.ports]:
            bus.detach(device)

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
        Raises ConfigurationError if the machine is closed or already running.
        """
        self._begin()
        timer = self._start_timer(timeout) if timeout is not None else None
        try:
            result = self._run_vcpu(self.vcpus[0]) if len(self.vcpus) == 1 else self._run_all()
        finally:
            if timer is not None:
                timer.cancel()
            self._finish()
        return self._with_failure(result)

    async def run_async(self, timeout: float | None = None) -> Exit:
        """As `run`, on a thread of the event loop's executor. Cancelling it stops the guest first."""
        import asyncio

        future = asyncio.get_running_loop().run_in_executor(None, self.run, timeout)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            while not future.done():  # it may not have started yet
                self._end(Interrupted(0, "cancel"), only_if_running=True)
                await asyncio.wait([future], timeout=0.01)
            raise

    def step(self, vcpu: int = 0) -> Exit:
        """Execute one instruction of one processor; `Debug` with kind "step" if all went well."""
        self._begin()
        try:
            result = self.vcpus[vcpu].step(self)
            ending = self._ending
        finally:
            self._finish()
        if ending is not None and type(result) in (Interrupted, Debug):
            result = ending
        return self._with_failure(result)

    def stop(self, status: int = 0, reason: str = "stop") -> None:
        """End the run, or else the next one, with `Stopped`. From any thread, also from a device."""
        self._end(Stopped(0, status, reason))

    def pause(self) -> None:
        """Hold all processors where they are, inside `run`; returns when they stand still.

        State can then be read and set from the calling thread. From within a device, which cannot wait
        for itself, it returns at once and takes effect when the device returns.
        """
        with self._control:
            if not self._paused:
                self._paused = True
                self._kick_all()
            if threading.get_ident() not in self._runners:
                self._control.wait_for(lambda: len(self._parked) == len(self._runners) or not self._paused)

    def resume(self) -> None:
        """Let a paused machine go on."""
        with self._control:
            self._paused = False
            self._control.notify_all()

    def _begin(self) -> None:
        with self._control:
            if self._closed:
                raise ConfigurationError("the machine is closed")
            if self._runners:
                raise ConfigurationError("the machine is already running on another thread")
            self._runners.add(threading.get_ident())

    def _finish(self) -> None:
        with self._control:
            if self._we_kicked:
                for vcpu in self.vcpus:
                    vcpu.clear_kick()
                self._we_kicked = False
            self._timer = None
            self._ending = None
            self._runners.clear()
            self._control.notify_all()

    def _end(self, exit: Exit, *, only_if_running: bool = False) -> None:
        with self._control:
            if only_if_running and not self._runners:
                return
            if self._ending is None:
                self._ending = exit
            self._kick_all()
            self._control.notify_all()

    def _kick_all(self) -> None:
        """Make every processor that is not parked look at the control state. Kicks are sticky, so one that
        needs none must get none: its next run would return for nothing."""
        if self._runners:
            self._we_kicked = True
            for vcpu in self.vcpus:
                if vcpu.index not in self._parked:
                    vcpu.kick()

    def _start_timer(self, timeout: float) -> threading.Timer:
        if timeout < 0:
            raise ConfigurationError(f"a timeout of {timeout} seconds")

        def time_out() -> None:
            with self._control:
                if self._timer is timer:
                    self._end(Interrupted(0, "timeout"))

        self._timer = timer = threading.Timer(timeout, time_out)
        timer.daemon = True
        timer.start()
        return timer

    def _run_vcpu(self, vcpu: Vcpu) -> Exit:
        """Run one processor until the machine ends, through pauses."""
        exit: Exit | None = None
        while True:
            if self._ending is None and not self._paused:
                exit = vcpu.run(self)
                if type(exit) is not Interrupted:
                    return exit
            with self._control:
                if self._ending is not None:
                    return self._ending
                if self._paused:
                    self._park(vcpu.index)
                elif exit is not None:
                    return exit  # a kick of this processor that was not ours
            exit = None

    def _park(self, index: int) -> None:
        """Wait for resume or the end, with `_control` held."""
        self._parked.add(index)
        self._control.notify_all()
        self._control.wait_for(lambda: not self._paused or self._ending is not None)
        self._parked.discard(index)

    def _run_all(self) -> Exit:
        """Run all processors; the first one to end ends the machine."""
        results: list[Exit] = []
        errors: list[BaseException] = []

        def drive(vcpu: Vcpu) -> None:
            with self._control:
                self._runners.add(threading.get_ident())
            try:
                results.append(self._run_vcpu(vcpu))
                self._end(results[0])
            except BaseException as error:  # goes on in the caller of run
                errors.append(error)
                self._end(Interrupted(vcpu.index, "error"))

        threads = [
            threading.Thread(target=drive, args=(vcpu,), name=f"vcpu{vcpu.index}", daemon=True)
            for vcpu in self.vcpus[1:]
        ]
        for thread in threads:
            thread.start()
        drive(self.vcpus[0])
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results[0]

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
            if threading.get_ident() in self._runners:
                raise ConfigurationError("a device cannot close its own machine: call stop() instead")
            self._closed = True
            if self._runners:
                self._end(Stopped(0, 0, "close"))
                self._control.wait_for(lambda: not self._runners)
        self._release()

    def _release(self) -> None:
        self.machine.close()
        self.memory.close()

    def __enter__(self) -> VM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        size = sum(slot.size for slot in self.memory)
        return f"<VM on {self.backend.name}, {size >> 20} MiB, {len(self.vcpus)} vCPU>"
