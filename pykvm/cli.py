"""The command line: ``pykvm boot IMAGE`` and ``pykvm doctor``.

Guest output goes to standard output byte for byte, everything of ours to standard error. Exit status of boot:

===========  ======================================================
status       meaning
===========  ======================================================
0 to 255     what the guest wrote to the debug-exit port
0            final halt, power-off or reset; left with Ctrl-A x
2            wrong usage
124          --timeout passed
125          our own failure: no KVM, a bad image
126          the guest died; the explanation is on standard error
130          interrupted
===========  ======================================================
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager

from pykvm import backends
from pykvm.errors import ConfigurationError, PykvmError
from pykvm.exits import Halt, Interrupted, Stopped

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence
    from typing import NoReturn, TextIO

    from pykvm.boot import Module
    from pykvm.exits import Exit
    from pykvm.pc import Pc
    from pykvm.vm import VM

__all__ = ["main"]

TIMED_OUT = 124
FAILED = 125
GUEST_DIED = 126
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status. Never raises for anything that a user can cause."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["doctor"]:
        from pykvm.doctor import main as doctor

        return doctor(arguments[1:])
    try:
        if arguments[:1] == ["boot"]:
            backends.get("kvm").prepare()  # KVM works in the background while we parse and import
        options = _parser(arguments).parse_args(arguments)
        return boot(options)
    except PykvmError as error:
        return _fail(str(error))
    except BrokenPipeError:
        return _fail("standard output was closed while the guest was still writing to it")
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("PYKVM_DEBUG"):
            raise
        return _fail(f"internal error: {type(error).__name__}: {error} (PYKVM_DEBUG=1 shows where)")


def _fail(message: str) -> int:
    print(f"pykvm: {message}", file=sys.stderr)
    return FAILED


def _parser(arguments: list[str]) -> argparse.ArgumentParser:
    """The parser for these arguments: of boot itself, or of all commands if it is not boot."""
    import argparse

    def formatter(prog: str) -> argparse.HelpFormatter:
        return argparse.HelpFormatter(prog, width=100)  # a given width spares asking for the terminal's

    if arguments[:1] == ["boot"]:
        parser = argparse.ArgumentParser(
            "pykvm boot",
            description="Boot an image: flat binary, boot sector, ELF, Multiboot 1 or 2, or firmware.",
            formatter_class=formatter,
        )
        parser.add_argument("command", choices=["boot"], help=argparse.SUPPRESS)
        _add_boot_arguments(parser)
        parser.set_defaults(error=parser.error)
        return parser
    parser = argparse.ArgumentParser("pykvm", description="Virtual machines inside Python.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("boot", help="boot an image")
    commands.add_parser("doctor", help="say what KVM this host has and which backend would be used")
    return parser


def _add_boot_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("image", nargs="?", metavar="IMAGE", help="the image; its format is told by its magic")
    add("--bios", metavar="FILE", help="firmware to start from the reset vector, instead of IMAGE")
    add("--backend", choices=("auto", "kvm", "emulator"), default="auto")
    add("--memory", metavar="SIZE", type=_size, default=64 << 20, help="RAM, such as 64M (the default)")
    add("--cpus", metavar="N", type=int, default=1, help="number of processors (1)")
    add("--mode", choices=("real", "protected", "long"), help="processor mode of a flat binary (real)")
    add("--load-address", metavar="A", type=_address, help="where a flat binary goes")
    add("--append", metavar="S", default="", help="command line for the kernel")
    add("--module", metavar="FILE[ ARGS]", action="append", default=[], help="Multiboot module; repeatable")
    add("--timeout", metavar="S", type=_seconds, help="give up after S seconds, with status 124")
    add("--qemu-exit", action="store_true", help="exit status (value << 1) | 1, as QEMU's isa-debug-exit")
    add("--debug-port", metavar="P", type=_address, help="one more debug console port (with --bios: 0x402)")
    add("--trace", metavar="FILE", help="write every port and MMIO access to FILE (- is standard error)")
    add("--stats", action="store_true", help="print exits by kind and times to standard error")


def _usage(message: str) -> NoReturn:
    import argparse

    raise argparse.ArgumentTypeError(message)


def _size(text: str) -> int:
    from pykvm.memory import parse_size

    try:
        return parse_size(text)
    except ConfigurationError as error:
        _usage(str(error))


def _address(text: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        _usage(f"{text!r} is not a number such as 0x8000")
    return value if value >= 0 else _usage(f"{text} is negative")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        _usage(f"{text!r} is not a number of seconds")
    return value if 0 <= value < float("inf") else _usage(f"{text} is not a length of time")


def boot(options: argparse.Namespace) -> int:
    """The boot command. Raises PykvmError for what keeps the guest from running."""
    if (options.image is None) == (options.bios is None):
        options.error("give either an IMAGE or --bios FILE")
    from pykvm.boot import read_image
    from pykvm.pc import Pc
    from pykvm.vm import VM

    image = read_image(options.bios or options.image)
    modules = [_module(text) for text in options.module]
    with VM(options.memory, backend=options.backend, cpus=options.cpus, irqchip=True) as vm:
        if vm.fallback_reason is not None:
            print(f"pykvm: using the emulator: {vm.fallback_reason}", file=sys.stderr)
        pc = Pc(
            vm,
            output=_writer(1),
            debug_output=_writer(2),
            debug_port=_debug_port(options),
            qemu_exit=options.qemu_exit,
        )
        try:
            vm.load(
                image,
                format="firmware" if options.bios else None,
                mode=options.mode,
                load_address=options.load_address,
                command_line=options.append,
                modules=modules,
            )
            return _run(vm, pc, options)
        finally:
            pc.close()


def _module(text: str) -> Module:
    from pykvm.boot import Module, read_image

    path, _, _ = text.partition(" ")
    return Module(read_image(path), text)


def _debug_port(options: argparse.Namespace) -> int | None:
    from pykvm.layout import FIRMWARE_DEBUG

    if options.debug_port is None and options.bios:
        return FIRMWARE_DEBUG
    port: int | None = options.debug_port
    return port


def _writer(fd: int) -> Callable[[bytes], None]:
    from pykvm.console import write_all

    def write(data: bytes) -> None:
        write_all(fd, data)

    return write


def _run(vm: VM, pc: Pc, options: argparse.Namespace) -> int:
    from pykvm.console import Console

    with _signals_as_exceptions(), _trace(vm, options.trace):
        if options.stats:
            vm.measure_time()
        with Console(pc.serial.receive, lambda: vm.stop(0, "leave")):
            exit = vm.run(options.timeout)
    if options.stats:
        _print_statistics(vm)
    return _status(exit)


def _status(exit: Exit) -> int:
    """The exit status for how the run ended."""
    if isinstance(exit, Stopped):
        return exit.status & 0xFF
    if isinstance(exit, Halt):
        return 0
    if isinstance(exit, Interrupted):
        if exit.reason == "timeout":
            print("pykvm: the guest was still running when the time was up", file=sys.stderr)
            return TIMED_OUT
        return INTERRUPTED
    print(exit.explain() if hasattr(exit, "explain") else str(exit), file=sys.stderr)
    return GUEST_DIED


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """While inside, SIGTERM and SIGHUP unwind the stack, so that the terminal is put back."""
    import signal

    def unwind(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, unwind) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _trace(vm: VM, path: str | None) -> Iterator[None]:
    """While inside, each access to a device is a line of the file: time, bus, direction, address, value."""
    if path is None:
        yield
        return
    import time

    start = time.perf_counter()

    def trace_to(file: TextIO, bus: str) -> Callable[[str, int, int, int], None]:
        def trace(direction: str, address: int, size: int, value: int) -> None:
            elapsed = time.perf_counter() - start
            print(f"{elapsed:.6f} {bus} {direction} {address:#x} size {size} value {value:#x}", file=file)

        return trace

    with _open_trace(path) as file:
        vm.ports.trace = trace_to(file, "port")
        vm.mmio.trace = trace_to(file, "mmio")
        yield


@contextmanager
def _open_trace(path: str) -> Iterator[TextIO]:
    if path == "-":
        yield sys.stderr
        return
    try:
        file = open(path, "w")  # noqa: SIM115 - closed below, the error is ours alone here
    except OSError as error:
        raise ConfigurationError(f"cannot write the trace to {path}: {error.strerror}") from error
    with file:
        yield file


def _print_statistics(vm: VM) -> None:
    """What happened, on standard error."""
    statistics = vm.statistics()
    total = statistics.guest_seconds + statistics.host_seconds
    lines = [f"{count:>12,} {name}" for name, count in sorted(statistics.exits.items(), key=lambda e: -e[1])]
    if statistics.instructions is not None:
        lines.append(f"{statistics.instructions:>12,} instructions")
    lines.append(f"{statistics.guest_seconds * 1e3:>12,.3f} ms in the guest and KVM")
    lines.append(f"{statistics.host_seconds * 1e3:>12,.3f} ms in devices and pykvm, of {total * 1e3:,.3f} ms")
    for bus in (vm.ports, vm.mmio):
        if bus.unclaimed.reads or bus.unclaimed.writes:
            lines.append(
                f"{bus.unclaimed.reads:>12,} reads and {bus.unclaimed.writes:,} writes that no "
                f"{bus.name} device claimed"
            )
    print("\n".join(lines), file=sys.stderr)
