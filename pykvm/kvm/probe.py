"""Probe this host: which KVM it has, what stands in its way, what it can do and what an exit costs.

`/dev/kvm` is not one thing. Besides VT-x and AMD-V there are nested ones and PVM, a KVM in software that runs
ring 3 natively and interprets ring 0; its interpreter lacks instructions. So what counts is tried out with
tiny guests; names of modules only label the result.
"""

from __future__ import annotations

import os
from functools import cache
from itertools import pairwise
from pathlib import Path

from pykvm.errors import KvmError
from pykvm.exits import Halt
from pykvm.registers import (
    CR0_ET,
    CR0_NE,
    CR0_PE,
    CR0_PG,
    CR4_OSFXSR,
    CR4_OSXMMEXCPT,
    CR4_OSXSAVE,
    CR4_PAE,
    EFER_LMA,
    EFER_LME,
    PTE_P,
    PTE_PS,
    PTE_RW,
    DescriptorTable,
    Registers,
    Segment,
    SystemRegisters,
)
from pykvm.values import Value, replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    import mmap

    from pykvm.exits import Exit
    from pykvm.interfaces import Backend, Vcpu
    from pykvm.kvm.backend import KvmBackend

__all__ = ["Host", "HostReport", "exit_cost", "missing_in_ring0", "obstacle", "probe", "ring0_native"]

REPORTED_CAPABILITIES = (
    *("USER_MEMORY", "USER_MEMORY2", "READONLY_MEM", "NR_MEMSLOTS", "NR_VCPUS", "MAX_VCPUS"),
    *(
        "IMMEDIATE_EXIT",
        "SYNC_REGS",
        "SET_GUEST_DEBUG",
        "VCPU_EVENTS",
        "DEBUGREGS",
        "XCRS",
        "XSAVE2",
        "SREGS2",
    ),
    *("IRQCHIP", "SPLIT_IRQCHIP", "PIT2", "IRQ_ROUTING", "SIGNAL_MSI", "IRQFD", "IOEVENTFD"),
    *("COALESCED_MMIO", "COALESCED_PIO", "MANUAL_DIRTY_LOG_PROTECT2", "DIRTY_LOG_RING", "BINARY_STATS_FD"),
    *(
        "EXIT_ON_EMULATION_FAILURE",
        "X86_USER_SPACE_MSR",
        "X86_MSR_FILTER",
        "GUEST_MEMFD",
        "MEMORY_ATTRIBUTES",
    ),
    *("TSC_CONTROL", "X86_SMM", "NESTED_STATE", "PMU_CAPABILITY", "PRE_FAULT_MEMORY", "DEVICE_CTRL"),
)
"""The capabilities that a report lists, without ``KVM_CAP_``."""


# --- What the host says of itself -------------------------------------------------------------------------


class Host(Value):
    """What can be read without KVM: kernel, processor flags, loaded KVM modules, and the device node.

    `device_error` is the errno of opening the node, 0 if that works; `device_group` the name of its group
    where that may read and write it, else empty.
    """

    kernel: str
    flags: frozenset[str]
    modules: frozenset[str]
    in_container: bool
    device_error: int
    device_group: str

    @classmethod
    def read(cls, root: Path = Path("/")) -> Host:
        """Look at the system below `root`."""
        modules = root / "sys/module"
        device = root / "dev/kvm"
        return cls(
            kernel=os.uname().release,
            flags=_processor_flags(root / "proc/cpuinfo"),
            modules=frozenset(name for name in _KINDS if (modules / name).is_dir()),
            in_container=any((root / mark).exists() for mark in (".dockerenv", "run/.containerenv")),
            device_error=_open_error(device),
            device_group=_usable_group(device),
        )

    @property
    def kind(self) -> str:
        """``"VT-x"``, ``"AMD-V"`` or ``"PVM"`` by the module that is loaded; empty if none is."""
        return next((kind for module, kind in _KINDS.items() if module in self.modules), "")

    @property
    def nested(self) -> bool:
        """Whether this host is itself a virtual machine."""
        return "hypervisor" in self.flags


_LOOK_AT_LOG = "look at the kernel's log: sudo dmesg"
_KINDS = {"kvm_pvm": "PVM", "kvm_intel": "VT-x", "kvm_amd": "AMD-V"}


def _processor_flags(cpuinfo: Path) -> frozenset[str]:
    """The feature flags of the first processor."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), ()))


def _open_error(device: Path) -> int:
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return error.errno or -1
    return 0


def _usable_group(device: Path) -> str:
    """The group that may use the node; empty if there is none worth joining."""
    import grp

    try:
        status = device.stat()
        group = grp.getgrgid(status.st_gid).gr_name
    except (OSError, KeyError):
        return ""
    return group if status.st_mode & 0o060 == 0o060 and group != "root" else ""


def obstacle(host: Host) -> tuple[str, str]:
    """Why /dev/kvm cannot be used, and the command or step that mends it; both empty if it can."""
    import errno

    if not host.device_error:
        return "", ""
    if host.device_error == errno.EPERM and host.in_container:
        return "the container does not allow /dev/kvm", "start it with --device /dev/kvm"
    if host.device_error in (errno.EACCES, errno.EPERM):
        if host.device_group:
            join = f"sudo usermod -aG {host.device_group} $USER"
            return "no permission to open /dev/kvm", f"{join}, then log in again"
        return "no permission to open /dev/kvm", "sudo chmod 666 /dev/kvm"
    if host.device_error not in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return f"/dev/kvm cannot be opened: {os.strerror(host.device_error)}", _LOOK_AT_LOG
    if host.in_container:
        return "there is no /dev/kvm in this container", "start it with --device /dev/kvm"
    if host.kind:
        return "KVM is loaded, but there is no /dev/kvm", "sudo mknod /dev/kvm c 10 232"
    for flag, module in (("vmx", "kvm_intel"), ("svm", "kvm_amd")):
        if flag in host.flags:
            return f"there is no /dev/kvm: {module} is not loaded", f"sudo modprobe {module}"
    if host.nested:
        return (
            "there is no /dev/kvm: this virtual machine has no VT-x or AMD-V",
            "let the hypervisor around it offer nested virtualization",
        )
    return (
        "there is no /dev/kvm: the processor shows neither VT-x nor AMD-V",
        "enable virtualization in the firmware setup",
    )


# --- Tiny guests ------------------------------------------------------------------------------------------

_PML4, _PDPT, _PD, _CODE, _STACK, _SIZE = 0x1000, 0x2000, 0x3000, 0x8000, 0xA000, 0x1_0000
_HLT = b"\xf4"
_RUN_LIMIT = 1.0  # seconds after which a probe is given up


class _Instruction(Value):
    """An instruction to try in ring 0, needing a `feature` of /proc/cpuinfo and bits of `cr4`."""

    name: str
    feature: str
    code: bytes
    cr4: int = 0


_BASELINE = (
    _Instruction("fld1", "fpu", b"\xd9\xe8"),
    _Instruction("fwait", "fpu", b"\x9b"),
    _Instruction("addps", "sse", b"\x0f\x58\xc0"),
)
"""Every 64-bit processor has these, so where one fails, ring 0 is interpreted."""

_EXTENSIONS = (
    _Instruction("popcnt", "popcnt", b"\xf3\x0f\xb8\xc0"),
    _Instruction("crc32", "sse4_2", b"\xf2\x0f\x38\xf0\xc0"),
    _Instruction("movbe", "movbe", b"\x0f\x38\xf0\x04\x24"),  # movbe eax, [rsp]
    _Instruction("andn", "bmi1", b"\xc4\xe2\x78\xf2\xc0"),
    _Instruction("rorx", "bmi2", b"\xc4\xe3\x7b\xf0\xc0\x01"),
    _Instruction("cmpxchg16b", "cx16", b"\x48\x0f\xc7\x0c\x24"),  # [rsp]
    _Instruction("xgetbv", "xsave", b"\x31\xc9\x0f\x01\xd0", CR4_OSXSAVE),  # of XCR0
    _Instruction("xsave", "xsave", b"\x31\xd2\x8d\x42\x03\x0f\xae\x24\x24", CR4_OSXSAVE),  # x87, SSE to [rsp]
    # xsetbv of x87, SSE and AVX; then vaddps ymm0, ymm0, ymm0
    _Instruction("vaddps", "avx", b"\x31\xc9\x31\xd2\x8d\x41\x07\x0f\x01\xd1\xc5\xfc\x58\xc0", CR4_OSXSAVE),
)


class _Region:
    """Anonymous memory of the probe guests."""

    def __init__(self) -> None:
        import mmap

        self.buffer: mmap.mmap = mmap.mmap(-1, _SIZE)
        self.size = _SIZE

    def put(self, address: int, data: bytes) -> None:
        self.buffer[address : address + len(data)] = data


class _Silence:
    """Ports and MMIO that nobody answers."""

    def port_read(self, port: int, size: int) -> int:
        return (1 << (8 * size)) - 1

    def port_write(self, port: int, size: int, value: int) -> None: ...

    def mmio_read(self, address: int, size: int) -> int:
        return (1 << (8 * size)) - 1

    def mmio_write(self, address: int, size: int, value: int) -> None: ...


class _Stopwatch(_Silence):
    """Notes when each port write arrives, in nanoseconds."""

    def __init__(self) -> None:
        from time import perf_counter_ns

        self.times: list[int] = []
        self._now = perf_counter_ns

    def port_write(self, port: int, size: int, value: int) -> None:
        self.times.append(self._now())


def _run(vcpu: Vcpu, io: _Silence) -> Exit:
    """Run, but not forever: what a strange KVM does with an instruction is not known."""
    from threading import Timer

    guard = Timer(_RUN_LIMIT, vcpu.kick)
    guard.start()
    try:
        return vcpu.run(io)
    finally:
        guard.cancel()


def _long_mode(initial: SystemRegisters, cr4: int) -> SystemRegisters:
    """64-bit mode in ring 0 on the tables that `_works_in_ring0` writes; any exception is a triple fault."""
    data = Segment(limit=0xFFFF_FFFF, selector=0x10, type=0x3, db=1, g=1)
    return replace(
        initial,
        cs=Segment(limit=0xFFFF_FFFF, selector=0x08, type=0xB, l=1, g=1),
        ds=data,
        es=data,
        fs=data,
        gs=data,
        ss=data,
        idt=DescriptorTable(0, 0),
        cr0=CR0_PE | CR0_ET | CR0_NE | CR0_PG,
        cr3=_PML4,
        cr4=CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT | cr4,
        efer=EFER_LME | EFER_LMA,
    )


def _works_in_ring0(backend: Backend, instruction: _Instruction) -> bool:
    """Whether a guest gets through `instruction` in 64-bit ring 0."""
    region = _Region()
    for table, entry in ((_PML4, _PDPT | PTE_P | PTE_RW), (_PDPT, _PD | PTE_P | PTE_RW)):
        region.put(table, entry.to_bytes(8, "little"))
    region.put(_PD, (PTE_P | PTE_RW | PTE_PS).to_bytes(8, "little"))
    region.put(_CODE, instruction.code + _HLT)
    machine = backend.machine()
    try:
        machine.map(0, 0, region)
        vcpu = machine.vcpu(0)
        vcpu.set_system_registers(_long_mode(vcpu.system_registers(), instruction.cr4))
        vcpu.set_registers(Registers(rip=_CODE, rsp=_STACK))
        return isinstance(_run(vcpu, _Silence()), Halt)
    except KvmError:  # refused registers: the control bit that the instruction needs is not supported
        return False
    finally:
        machine.close()


def missing_in_ring0(backend: Backend, flags: frozenset[str]) -> tuple[str, ...]:
    """Instructions that the processor has (by its `flags`) but a guest in ring 0 cannot execute."""
    return tuple(
        instruction.name
        for instruction in (*_BASELINE, *_EXTENSIONS)
        if instruction.feature in flags and not _works_in_ring0(backend, instruction)
    )


def exit_cost(backend: Backend, count: int = 2000) -> float:
    """Median time in microseconds of a port write served in Python, over `count` of them."""
    region = _Region()
    # mov cx, count; out 0x80, al; loop -4; hlt
    region.put(_CODE, b"\xb9" + count.to_bytes(2, "little") + b"\xe6\x80\xe2\xfc" + _HLT)
    machine = backend.machine()
    try:
        machine.map(0, 0, region)
        vcpu = machine.vcpu(0)
        system = vcpu.system_registers()
        vcpu.set_system_registers(replace(system, cs=replace(system.cs, base=0, selector=0)))
        vcpu.set_registers(Registers(rip=_CODE))
        stopwatch = _Stopwatch()
        _run(vcpu, stopwatch)
    finally:
        machine.close()
    gaps = sorted(after - before for before, after in pairwise(stopwatch.times))
    return gaps[len(gaps) // 2] / 1000 if gaps else 0.0


@cache
def ring0_native() -> bool:
    """Whether KVM runs ring 0 on the processor itself; False if it interprets it or there is no KVM.

    Tried out once a process, in about a millisecond a try.
    """
    from pykvm.kvm.backend import KvmBackend

    backend = KvmBackend()
    if backend.why_unavailable() is not None:
        return False
    return all(_works_in_ring0(backend, instruction) for instruction in _BASELINE)


# --- The report -------------------------------------------------------------------------------------------


class HostReport(Value):
    """This host as a place to run guests.

    `problems` are pairs of what stands in the way of KVM and what mends it. Where there is none, the rest
    is filled in: `capabilities` with their values, `ring0_missing` the instructions that fail in ring 0,
    `exit_us` in microseconds.
    """

    kernel: str
    kind: str
    nested: bool
    extension: bool
    problems: tuple[tuple[str, str], ...] = ()
    api_version: int = 0
    capabilities: tuple[tuple[str, int], ...] = ()
    ring0_native: bool = False
    ring0_missing: tuple[str, ...] = ()
    exit_us: float = 0.0

    @property
    def backend(self) -> str:
        """What ``backend="auto"`` picks: ``"kvm"`` where it is usable, else ``"emulator"``."""
        return "emulator" if self.problems else "kvm"


def probe() -> HostReport:
    """Look at this host and try out its KVM, in well under a second. Never raises for what is missing."""
    from pykvm.kvm.backend import KvmBackend

    host = Host.read()
    obstacles = [obstacle(host), _extension_obstacle()]
    report = HostReport(
        kernel=host.kernel,
        kind=host.kind,
        nested=host.nested,
        extension=not obstacles[1][0],
        problems=tuple(pair for pair in obstacles if pair[0]),
    )
    if report.problems:
        return report
    backend = KvmBackend()
    why = backend.why_unavailable()
    if why is not None:
        return replace(report, problems=((why, _LOOK_AT_LOG),))
    try:
        return _try_out(report, host, backend)
    except KvmError as error:
        return replace(report, problems=((f"KVM fails: {error}", _LOOK_AT_LOG),))


def _extension_obstacle() -> tuple[str, str]:
    from importlib import import_module

    try:
        import_module("pykvm._kvm")
    except ImportError as error:
        remedy = "sudo apt-get install gcc python3-dev linux-libc-dev, then install pykvm again"
        return f"the extension pykvm._kvm is not built ({error})", remedy
    return "", ""


def _try_out(report: HostReport, host: Host, backend: KvmBackend) -> HostReport:
    from pykvm.kvm.abi import CAPABILITIES

    system = backend.system()
    return replace(
        report,
        api_version=system.get_api_version(),
        capabilities=tuple(
            (name, system.check_extension(CAPABILITIES[f"KVM_CAP_{name}"])) for name in REPORTED_CAPABILITIES
        ),
        ring0_native=ring0_native(),
        ring0_missing=missing_in_ring0(backend, host.flags),
        exit_us=exit_cost(backend),
    )
