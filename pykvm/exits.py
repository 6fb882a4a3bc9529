"""Exits: why `run` came back, as values to match on.

Everything that a guest can do ends in one of these; a guest never raises a host exception.
Each is a frozen, slotted dataclass whose first field is the index of the vCPU that ended the run::

    match vm.run(timeout=2.0):
        case Halt(): ...
        case Stopped(status=0): ...
        case Shutdown() as end: print(end.explain())
"""

from __future__ import annotations

from pykvm.values import Value, replace

TYPE_CHECKING = False  # typing costs milliseconds at start-up; type checkers know this name
if TYPE_CHECKING:
    from pykvm.registers import Registers, SystemRegisters

__all__ = [
    "Debug",
    "EmulationFailure",
    "Exit",
    "Failure",
    "Halt",
    "Interrupted",
    "Shutdown",
    "Stopped",
    "Unhandled",
]


class Failure(Value):
    """What the machine looked like when its guest died. Made by `pykvm.explain`.

    The tuples hold lines of text, ready to print; empty where there is nothing to tell.
    """

    registers: Registers
    system_registers: SystemRegisters
    register_dump: tuple[str, ...] = ()
    recent_exits: tuple[str, ...] = ()
    descriptors: tuple[str, ...] = ()
    page_walk: tuple[str, ...] = ()
    disassembly: tuple[str, ...] = ()

    def is_at_reset(self) -> bool:
        """Whether the processor is where a reset puts it (SDM volume 3, 10.1.4)."""
        return self.registers.rip == 0xFFF0 and self.system_registers.cs.base == 0xFFFF_0000

    def lines(self) -> list[str]:
        """All sections with their headings, as lines."""
        sections = (
            ("registers", self.register_dump),
            ("last exits, newest last", self.recent_exits),
            ("descriptor tables", self.descriptors),
            ("page walk", self.page_walk),
            ("code at rip", self.disassembly),
        )
        result: list[str] = []
        for heading, body in sections:
            if body:
                result.append(f"{heading}:")
                result.extend(f"  {line}" for line in body)
        return result


def _explain(headline: str, failure: Failure | None) -> str:
    return "\n".join([headline, *(failure.lines() if failure is not None else ())])


class Halt(Value):
    """The vCPU executed HLT and nothing is left that could wake it."""

    vcpu: int = 0


class Stopped(Value):
    """The machine was asked to end: by a device (debug exit, power-off, reset) or by `VM.stop`.

    `status` is the code that the guest or the caller gave, 0 if none; `reason` is one of
    ``"debug-exit"``, ``"power-off"``, ``"reset"``, ``"stop"`` or what a custom device passed.
    """

    vcpu: int = 0
    status: int = 0
    reason: str = "stop"


class Interrupted(Value):
    """The run was cut short from outside; running again continues where it left off.

    `reason` is ``"kick"``, ``"timeout"``, ``"pause"`` (of a step), ``"cancel"`` (of `VM.run_async`) or
    ``"close"`` (of the processor, by another thread).
    """

    vcpu: int = 0
    reason: str = "kick"


class Debug(Value):
    """A single step is done, or a breakpoint was reached.

    `kind` is ``"step"`` or ``"breakpoint"``; `address` is the linear address of the next
    instruction; `dr6` and `dr7` as the processor reports them.
    """

    vcpu: int = 0
    kind: str = "step"
    address: int = 0
    dr6: int = 0
    dr7: int = 0


class Shutdown(Value):
    """A triple fault: an exception while delivering a double fault (SDM volume 3, 6.15).

    On AMD-V, KVM then resets the processor: what its registers were is lost (APM volume 2, 15.14.3).
    """

    vcpu: int = 0
    failure: Failure | None = None

    def explain(self) -> str:
        """Tell what happened, with everything that is known about it."""
        headline = f"vCPU {self.vcpu}: triple fault"
        if self.failure is None or not self.failure.is_at_reset():
            return _explain(headline, self.failure)
        headline += "; AMD-V then resets the processor, so its registers are lost (the emulator keeps them)"
        return _explain(headline, replace(self.failure, descriptors=(), page_walk=(), disassembly=()))


class EmulationFailure(Value):
    """The backend met an instruction that it cannot execute.

    `code` holds the instruction's bytes where they are known, `suberror` is KVM's
    ``internal.suberror`` (1 for emulation), `detail` names the cause.
    """

    vcpu: int = 0
    code: bytes = b""
    suberror: int = 0
    detail: str = ""
    failure: Failure | None = None

    def explain(self) -> str:
        """Tell what happened, with everything that is known about it."""
        code = f" [{self.code.hex(' ')}]" if self.code else ""
        detail = f": {self.detail}" if self.detail else ""
        return _explain(f"vCPU {self.vcpu}: cannot execute instruction{code}{detail}", self.failure)


class Unhandled(Value):
    """An exit that nothing in the machine handles.

    `reason` is KVM's name for it (``"KVM_EXIT_FAIL_ENTRY"``), `data` its payload by field name.
    """

    vcpu: int = 0
    reason: str = ""
    data: tuple[tuple[str, int], ...] = ()
    failure: Failure | None = None

    def explain(self) -> str:
        """Tell what happened, with everything that is known about it."""
        data = ", ".join(f"{name}={value:#x}" for name, value in self.data)
        return _explain(f"vCPU {self.vcpu}: unhandled {self.reason} ({data})", self.failure)


Exit = Halt | Stopped | Interrupted | Debug | Shutdown | EmulationFailure | Unhandled
