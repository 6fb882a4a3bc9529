"""The emulated processor as a `Vcpu`: its state as frozen values, and running it."""

from __future__ import annotations

from time import perf_counter

from pykvm.emulator import msr
from pykvm.emulator.decode import CS, DS, ES, FS, GS, SS
from pykvm.emulator.execution import Execution
from pykvm.emulator.faults import Fault
from pykvm.emulator.signals import deferred_interrupts
from pykvm.emulator.translate import M64
from pykvm.errors import ConfigurationError, PykvmError
from pykvm.registers import RESET_REGISTERS, RFLAGS_FIXED, DescriptorTable, Registers, SystemRegisters
from pykvm.state import DebugRegisters, FpuState, VcpuEvents

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pykvm.emulator.accesses import Accesses
    from pykvm.emulator.chipset import Chipset
    from pykvm.emulator.cpu import Cpu
    from pykvm.exits import Exit
    from pykvm.interfaces import IO
    from pykvm.statistics import Statistics

# struct kvm_regs in the order of the registers' encoding
GENERAL = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)), "rip")
SEGMENTS = {"es": ES, "cs": CS, "ss": SS, "ds": DS, "fs": FS, "gs": GS}
MAX_BREAKPOINTS = 4
SHADOW_STI = 1  # KVM_X86_SHADOW_INT_STI is 2, MOV SS is 1: both hold interrupts back


class EmulatorVcpu:
    """One virtual processor. All calls but `kick` belong to the thread that runs it."""

    index = 0

    def __init__(self, cpu: Cpu, chipset: Chipset | None, accesses: Accesses) -> None:
        self._cpu = cpu
        self._accesses = accesses
        self._execution = Execution(cpu, chipset, self.index)
        self._closed = False
        self._seconds = 0.0  # spent in run and step
        self.set_system_registers(SystemRegisters())
        self.set_registers(RESET_REGISTERS)

    @property
    def instructions(self) -> int:
        """How many instructions were executed so far."""
        return self._cpu.clock.count

    # State

    def registers(self) -> Registers:
        """The general registers, RIP and RFLAGS."""
        cpu = self._cpu
        return Registers(**dict(zip(GENERAL, cpu.r, strict=True)), rflags=cpu.flags())

    def set_registers(self, value: Registers) -> None:
        """Set the general registers, RIP and RFLAGS."""
        cpu = self._cpu
        for number, name in enumerate(GENERAL):
            cpu.r[number] = getattr(value, name) & M64
        cpu.set_flags(value.rflags | RFLAGS_FIXED, M64)
        cpu.halted = False

    def system_registers(self) -> SystemRegisters:
        """Segments, descriptor tables and control registers."""
        cpu = self._cpu
        bitmap = [0, 0, 0, 0]
        if cpu.injected is not None:
            bitmap[cpu.injected >> 6] = 1 << (cpu.injected & 63)
        first, second, third, fourth = bitmap
        return SystemRegisters(
            **{name: cpu.segments[number].save() for name, number in SEGMENTS.items()},
            tr=cpu.tr.save(),
            ldt=cpu.ldt.save(),
            gdt=DescriptorTable(cpu.gdt_base, cpu.gdt_limit),
            idt=DescriptorTable(cpu.idt_base, cpu.idt_limit),
            cr0=cpu.cr0,
            cr2=cpu.cr2,
            cr3=cpu.cr3,
            cr4=cpu.cr4,
            cr8=cpu.cr8,
            efer=cpu.efer,
            apic_base=cpu.msrs.apic_base,
            interrupt_bitmap=(first, second, third, fourth),
        )

    def set_system_registers(self, value: SystemRegisters) -> None:
        """Set segments, descriptor tables and control registers, as they are, unchecked."""
        cpu = self._cpu
        for name, number in SEGMENTS.items():
            cpu.segments[number].restore(getattr(value, name))
        cpu.tr.restore(value.tr)
        cpu.ldt.restore(value.ldt)
        cpu.gdt_base, cpu.gdt_limit = value.gdt.base, value.gdt.limit
        cpu.idt_base, cpu.idt_limit = value.idt.base, value.idt.limit
        cpu.cr0, cpu.cr2, cpu.cr3 = value.cr0, value.cr2, value.cr3
        cpu.cr4, cpu.cr8, cpu.efer = value.cr4, value.cr8, value.efer
        cpu.msrs.apic_base = value.apic_base
        cpu.cpl = value.ss.dpl if value.cr0 & 1 else 0
        vectors = [
            64 * word + bit
            for word in range(4)
            for bit in range(64)
            if value.interrupt_bitmap[word] >> bit & 1
        ]
        cpu.injected = vectors[0] if vectors else None
        cpu.configure_paging()
        cpu.update_mode()

    def fpu(self) -> FpuState:
        """x87 and SSE registers."""
        cpu = self._cpu
        return FpuState(
            fpr=tuple(cpu.st),
            fcw=cpu.fcw,
            fsw=cpu.fsw,
            ftwx=cpu.ftw,
            xmm=tuple(register.to_bytes(16, "little") for register in cpu.xmm),
            mxcsr=cpu.mxcsr,
        )

    def set_fpu(self, value: FpuState) -> None:
        """Set x87 and SSE registers."""
        cpu = self._cpu
        cpu.st[:] = value.fpr
        cpu.fcw, cpu.fsw, cpu.ftw, cpu.mxcsr = value.fcw, value.fsw, value.ftwx, value.mxcsr
        cpu.xmm[:] = [int.from_bytes(register, "little") for register in value.xmm]

    def debug_registers(self) -> DebugRegisters:
        """DR0..DR3, DR6, DR7."""
        first, second, third, fourth = self._cpu.debug
        return DebugRegisters(db=(first, second, third, fourth), dr6=self._cpu.dr6, dr7=self._cpu.dr7)

    def set_debug_registers(self, value: DebugRegisters) -> None:
        """Set the debug registers. Raises ConfigurationError for enabled breakpoints.

        Breakpoints in the guest's own debug registers are not implemented.
        """
        if value.dr7 & 0xFF:
            raise ConfigurationError(
                f"DR7 {value.dr7:#x}: the emulator has no hardware breakpoints; use set_breakpoints"
            )
        self._cpu.debug[:] = value.db
        self._cpu.dr6, self._cpu.dr7 = value.dr6, value.dr7

    def events(self) -> VcpuEvents:
        """What is in flight: an injected interrupt, the interrupt shadow, NMIs."""
        cpu = self._cpu
        return VcpuEvents(
            interrupt_injected=int(cpu.injected is not None),
            interrupt_nr=cpu.injected or 0,
            interrupt_shadow=SHADOW_STI if cpu.clock.count < cpu.shadow_until else 0,
            nmi_pending=int(cpu.nmi_pending),
            nmi_masked=int(cpu.nmi_masked),
        )

    def set_events(self, value: VcpuEvents) -> None:
        """Set what is in flight. Raises ConfigurationError for a pending exception."""
        if value.exception_injected or value.exception_pending or value.smi_pending:
            raise ConfigurationError(
                "the emulator can take pending interrupts and NMIs, not exceptions or SMIs"
            )
        cpu = self._cpu
        cpu.injected = value.interrupt_nr if value.interrupt_injected else None
        cpu.shadow_until = cpu.clock.count + 1 if value.interrupt_shadow else -1
        cpu.nmi_pending, cpu.nmi_masked = bool(value.nmi_pending), bool(value.nmi_masked)

    def msrs(self, indices: Sequence[int]) -> dict[int, int]:
        """Read MSRs by index. Raises ConfigurationError naming an unknown one."""
        values = {}
        for index in indices:
            try:
                values[index] = msr.read(self._cpu, index)
            except Fault:
                raise ConfigurationError(f"MSR {index:#x}: the emulator does not have it") from None
        return values

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """Write MSRs by index. Raises ConfigurationError naming an unknown one or a bad value."""
        for index, value in values.items():
            try:
                msr.write(self._cpu, index, value)
            except Fault:
                message = f"MSR {index:#x} = {value:#x}: the emulator does not have it, or not that value"
                raise ConfigurationError(message) from None

    def set_breakpoints(self, addresses: Sequence[int]) -> None:
        """Make `run` return `Debug` before executing any of these linear addresses (at most 4)."""
        if len(addresses) > MAX_BREAKPOINTS:
            raise ConfigurationError(f"{len(addresses)} breakpoints: there are at most {MAX_BREAKPOINTS}")
        self._execution.breakpoints = frozenset(addresses)

    # Running

    def run(self, io: IO) -> Exit:
        """Execute until something ends it."""
        return self._timed(io, self._execution.run)

    def step(self, io: IO) -> Exit:
        """Execute one instruction and return `Debug(kind="step")`, or another exit."""
        return self._timed(io, self._execution.step)

    def _timed(self, io: IO, execute: Callable[[], Exit]) -> Exit:
        if self._closed:
            raise PykvmError("the machine of this vCPU is closed")
        self._accesses.io = io
        start = perf_counter()
        try:
            with deferred_interrupts(self._execution, self._accesses):
                return execute()
        finally:
            self._seconds += perf_counter() - start

    def kick(self) -> None:
        """Make the current or else the next `run` return `Interrupted`. Any thread may call this."""
        self._execution.kick()

    def clear_kick(self) -> None:
        """Forget a kick that no run has returned for. Only between runs."""
        self._execution.clear_kick()

    def attend(self) -> None:
        """Make a run look at the interrupt lines soon. Any thread may call this."""
        self._execution.attend()

    def measure_time(self) -> None:
        """Measure the time spent in the guest and in devices, from now on."""
        self._seconds = self._accesses.seconds = 0.0
        self._accesses.timed = True

    def statistics(self) -> Statistics:
        """Device accesses by KVM's names for such exits, instructions, and times if measured."""
        from pykvm.statistics import Statistics

        accesses = self._accesses
        counts = {"KVM_EXIT_IO": accesses.port_accesses, "KVM_EXIT_MMIO": accesses.mmio_accesses}
        guest_seconds = max(0.0, self._seconds - accesses.seconds)
        return Statistics(
            exits={name: count for name, count in counts.items() if count},
            instructions=self.instructions,
            guest_seconds=guest_seconds if accesses.timed else 0.0,
            host_seconds=accesses.seconds,
        )

    def recent_exits(self) -> list[str]:
        """The last device accesses in words, oldest first."""
        return self._accesses.recent()

    def close(self) -> None:
        """Drop translated code and translations, which keep guest memory alive."""
        self._closed = True
        self._cpu.code.clear()
        self._cpu.mmu.flush()
        self._cpu.update_environment()
