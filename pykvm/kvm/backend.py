"""The KVM backend: machines on /dev/kvm, in the terms of `pykvm.interfaces`.

This is the policy above `pykvm._kvm`: which capabilities are turned on, what CPUID a guest sees, how
stepping and breakpoints use KVM_SET_GUEST_DEBUG.
"""

from __future__ import annotations

from pykvm.errors import BackendUnavailable, ConfigurationError, KvmError
from pykvm.exits import Debug, Shutdown
from pykvm.layout import KVM_IDENTITY_MAP, KVM_TSS, PAGE_SIZE, PIT, PORT_B
from pykvm.registers import CR4_DE
from pykvm.values import replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from pykvm import _kvm
    from pykvm.bus import Served
    from pykvm.exits import Exit
    from pykvm.interfaces import IO, Device, Region
    from pykvm.registers import Registers, SystemRegisters
    from pykvm.state import DebugRegisters, FpuState, VcpuEvents
    from pykvm.statistics import Statistics

__all__ = ["KvmBackend", "KvmIrqLine", "KvmMachine", "KvmVcpu"]

DEVICE = "/dev/kvm"

# The few numbers of <linux/kvm.h> that every boot needs; `pykvm.kvm.abi` has them all, but costs ctypes.
KVM_API_VERSION = 12
KVM_MEM_LOG_DIRTY_PAGES = 1 << 0
KVM_MEM_READONLY = 1 << 1
KVM_GUESTDBG_ENABLE = 1 << 0
KVM_GUESTDBG_SINGLESTEP = 1 << 1
KVM_GUESTDBG_USE_HW_BP = 1 << 17

DR7_FIXED = 1 << 10  # reads as one (SDM volume 3, 17.2.4)
BREAKPOINTS = 4


class KvmIrqLine:
    """One GSI of the in-kernel interrupt controllers."""

    __slots__ = ("_gsi", "_vm")

    def __init__(self, vm: _kvm.Vm, gsi: int) -> None:
        self._vm = vm
        self._gsi = gsi

    def set(self, level: bool) -> None:
        """Drive the line to `level`."""
        self._vm.irq_line(self._gsi, level)

    def pulse(self) -> None:
        """Raise and lower the line: one edge."""
        self._vm.irq_line(self._gsi, True)
        self._vm.irq_line(self._gsi, False)


class KvmVcpu:
    """A processor on KVM. `fd` is the layer below, with an ioctl a method."""

    def __init__(self, fd: _kvm.Vcpu) -> None:
        self.fd = fd
        self.index = fd.index
        self._breakpoints: tuple[int, ...] = ()
        self._debug = 0  # the KVM_GUESTDBG_* control word that is in force

    def registers(self) -> Registers:
        return self.fd.get_regs()

    def set_registers(self, value: Registers) -> None:
        self.fd.set_regs(value)

    def system_registers(self) -> SystemRegisters:
        return self.fd.get_sregs()

    def set_system_registers(self, value: SystemRegisters) -> None:
        self.fd.set_sregs(value)

    def fpu(self) -> FpuState:
        return self.fd.get_fpu()

    def set_fpu(self, value: FpuState) -> None:
        self.fd.set_fpu(value)

    def debug_registers(self) -> DebugRegisters:
        return self.fd.get_debugregs()

    def set_debug_registers(self, value: DebugRegisters) -> None:
        self.fd.set_debugregs(value)

    def events(self) -> VcpuEvents:
        return self.fd.get_vcpu_events()

    def set_events(self, value: VcpuEvents) -> None:
        self.fd.set_vcpu_events(value)

    def msrs(self, indices: Sequence[int]) -> dict[int, int]:
        """Read MSRs by index. Raises KvmError naming the first that KVM refuses."""
        return self.fd.get_msrs(indices)

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """Set MSRs in order. Raises KvmError naming the first that KVM refuses."""
        self.fd.set_msrs(values)

    def set_breakpoints(self, addresses: Sequence[int]) -> None:
        """Break before these linear addresses, at most 4: they use the debug registers."""
        if len(addresses) > BREAKPOINTS:
            raise ConfigurationError(
                f"{len(addresses)} breakpoints: the processor has {BREAKPOINTS} debug registers"
            )
        self._breakpoints = tuple(addresses)
        self._set_debug(stepping=False)

    def run(self, io: IO) -> Exit:
        """Execute until something ends it."""
        if self._debug & KVM_GUESTDBG_SINGLESTEP:
            self._set_debug(stepping=False)
        if self._breakpoints and self._at_breakpoint():
            # The debug register would fire again before this instruction: get past it first.
            exit = self.step(io)
            if type(exit) is not Debug or exit.kind != "step" or exit.address in self._breakpoints:
                return exit
            self._set_debug(stepping=False)
        return self._enter(io)

    def step(self, io: IO) -> Exit:
        """Execute one instruction."""
        if not self._debug & KVM_GUESTDBG_SINGLESTEP:
            self._set_debug(stepping=True)
        return self._enter(io)

    def kick(self) -> None:
        self.fd.kick()

    def clear_kick(self) -> None:
        self.fd.clear_kick()

    def close(self) -> None:
        self.fd.close()

    def measure_time(self) -> None:
        """Measure the time in the guest from now on."""
        self.fd.measure_time()

    def statistics(self) -> Statistics:
        """Exits by name, and times if measured."""
        guest_ns, elapsed_ns, served = self.fd.times()  # before the imports, which take longer than guests
        from pykvm.kvm.abi import EXIT_REASONS
        from pykvm.statistics import Statistics

        counts = {EXIT_REASONS.get(number, str(number)): n for number, n in self.fd.exit_counts().items()}
        host_ns = max(0, elapsed_ns - guest_ns)
        return Statistics(counts, served, None, guest_ns / 1e9, host_ns / 1e9)

    def recent_exits(self) -> list[str]:
        """The last exits as text, oldest first, for `pykvm.explain`."""
        from pykvm.kvm.abi import EXIT_REASONS

        return [
            _describe_exit(EXIT_REASONS.get(reason, f"exit {reason}"), write, address, size, count, value)
            for reason, write, address, size, count, value in self.fd.recent_exits()
        ]

    def _enter(self, io: IO) -> Exit:
        exit = self.fd.run(io)
        if type(exit) is Shutdown:
            self._reset_mmu()
        return exit

    def _reset_mmu(self) -> None:
        """Have KVM load its own page tables for this processor again.

        On a triple fault kvm_amd resets the processor and forgets them, but loads them again only if the
        guest's paging was on. Without them the next run would not get to its first instruction, and KVM
        would not say so. A change of CR4 loads them; reading the events hands it to KVM.
        """
        system = self.fd.get_sregs()
        for cr4 in (system.cr4 ^ CR4_DE, system.cr4):
            self.fd.set_sregs(replace(system, cr4=cr4))
            self.fd.get_vcpu_events()

    def _at_breakpoint(self) -> bool:
        return self.fd.get_sregs().cs.base + self.fd.get_regs().rip in self._breakpoints

    def _set_debug(self, *, stepping: bool) -> None:
        control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP if stepping else 0
        debugreg = [0] * 8
        if self._breakpoints and not stepping:
            control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP
            debugreg[: len(self._breakpoints)] = self._breakpoints
            debugreg[7] = DR7_FIXED | sum(2 << (2 * i) for i in range(len(self._breakpoints)))
        self.fd.set_guest_debug(control, debugreg)
        self._debug = control


def _describe_exit(name: str, write: bool, address: int, size: int, count: int, value: int) -> str:
    if name not in ("KVM_EXIT_IO", "KVM_EXIT_MMIO"):
        return name
    times = f" x{count}" if count > 1 else ""
    direction = f"write {value:#x} to" if write else "read of"
    return f"{name}: {size}-byte {direction} {address:#x}{times}"


class KvmMachine:
    """A VM on KVM. `fd` is the layer below, with an ioctl a method."""

    def __init__(self, system: _kvm.System, fd: _kvm.Vm, *, irqchip: bool, cpus: int) -> None:
        self._system = system
        self._cpus = cpus
        self._vcpus: list[KvmVcpu] = []
        self._sizes: dict[int, int] = {}
        self.irqchip = irqchip
        self.fd = fd

    def map(
        self, slot: int, address: int, region: Region, *, readonly: bool = False, log_dirty: bool = False
    ) -> None:
        """Put `region` at guest-physical `address`."""
        flags = KVM_MEM_READONLY * readonly | KVM_MEM_LOG_DIRTY_PAGES * log_dirty
        self.fd.set_user_memory_region(slot, flags, address, region.buffer)
        self._sizes[slot] = region.size

    def unmap(self, slot: int) -> None:
        """Take the slot away."""
        self.fd.set_user_memory_region(slot, 0, 0, None)
        self._sizes.pop(slot, None)

    def dirty(self, slot: int) -> NDArray[np.bool_]:
        """Which pages were written since the last call, or read for the first time; one bool a page."""
        import numpy as np

        pages = self._sizes[slot] // PAGE_SIZE
        bitmap = np.frombuffer(self.fd.get_dirty_log(slot, pages), dtype=np.uint8)
        return np.unpackbits(bitmap, count=pages, bitorder="little").view(np.bool_)

    def vcpu(self, index: int) -> KvmVcpu:
        """A new processor with everything in its CPUID that KVM supports."""
        fd = self.fd.create_vcpu(index)
        try:
            fd.set_supported_cpuid(self._system, self._cpus)
        except BaseException:
            fd.close()
            raise
        vcpu = KvmVcpu(fd)
        self._vcpus.append(vcpu)
        return vcpu

    def irq(self, gsi: int) -> KvmIrqLine:
        """The interrupt line `gsi`. Raises ConfigurationError without an interrupt controller."""
        if not self.irqchip:
            raise ConfigurationError("this machine has no interrupt controller: make it with irqchip=True")
        return KvmIrqLine(self.fd, gsi)

    def devices(self) -> list[tuple[Device, int, int]]:
        """The timer's ports, until the guest has touched it and KVM takes over."""
        if not self.irqchip:
            return []
        from pykvm.kvm.pit import LazyPit

        pit = LazyPit(self.fd)
        return [(pit, PIT, 4), (pit.port_b, PORT_B, 1)]

    def serve(self, space: str, entries: Served) -> None:
        """Have the run loop call these devices."""
        self.fd.serve(space, entries)

    def new_lock(self) -> _kvm.DeviceLock:
        """A lock that the run loop takes itself."""
        from pykvm._kvm import DeviceLock

        return DeviceLock()

    def close(self) -> None:
        """Close the processors and the VM."""
        for vcpu in self._vcpus:
            vcpu.close()
        self.fd.close()


class KvmBackend:
    """Machines on /dev/kvm. One instance serves any number of machines and threads."""

    name = "kvm"

    def __init__(self) -> None:
        self._system: _kvm.System | None = None
        self._spare: list[_kvm.Vm] = []  # made by prepare, for the next machine with an irqchip

    def system(self) -> _kvm.System:
        """The open /dev/kvm. Raises BackendUnavailable with what to do."""
        if self._system is None or self._system.fileno() < 0:
            why, self._system = _open_system()
            if self._system is None:
                raise BackendUnavailable(f"KVM cannot be used here: {why}")
        return self._system

    def why_unavailable(self) -> str | None:
        """None, or what is missing and what to do."""
        if self._system is None:
            why, self._system = _open_system()
            return why
        return None

    def machine(self, *, irqchip: bool = False, cpus: int = 1) -> KvmMachine:
        """A new, empty machine. Raises BackendUnavailable or KvmError."""
        system = self.system()
        fd = self._spare.pop() if irqchip and self._spare else _create_vm(system, irqchip)
        return KvmMachine(system, fd, irqchip=irqchip, cpus=cpus)

    def prepare(self) -> None:
        """Begin to make the next machine that has interrupt controllers, if KVM can be used.

        Linux sets them up in the background, and makes whoever maps memory before that is done wait
        (for an SRCU grace period: 8 ms at HZ=250). Call it first and do something else meanwhile.
        """
        if self.why_unavailable() is None:
            self._spare.append(_create_vm(self.system(), irqchip=True))


def _create_vm(system: _kvm.System, irqchip: bool) -> _kvm.Vm:
    vm = system.create_vm()
    try:
        vm.set_identity_map_addr(KVM_IDENTITY_MAP)
        vm.set_tss_addr(KVM_TSS)
        if irqchip:
            vm.create_irqchip()
    except BaseException:
        vm.close()
        raise
    return vm


def _open_system() -> tuple[str | None, _kvm.System | None]:
    try:
        from pykvm._kvm import System
    except ImportError as error:
        return (
            f"the extension pykvm._kvm is not built ({error}); install gcc, the Python headers and the "
            "kernel headers (apt-get install gcc python3-dev linux-libc-dev) and install pykvm again",
            None,
        )
    try:
        system = System(DEVICE)
    except KvmError as error:
        return _why_not_open(error), None
    try:
        version = system.get_api_version()
    except KvmError as error:
        return f"{DEVICE} is something else than KVM ({error})", None
    if version != KVM_API_VERSION:
        system.close()
        return f"{DEVICE} speaks KVM API version {version}, not {KVM_API_VERSION}", None
    return None, system


def _why_not_open(error: KvmError) -> str:
    from pykvm.kvm.probe import Host, obstacle

    problem, remedy = obstacle(Host.read())
    return f"{problem}; {remedy}" if problem else str(error)
