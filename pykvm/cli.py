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
130          interrupted (SIGINT); 143 and 129 for SIGTERM and SIGHUP
===========  ======================================================

KVM sets up interrupt controllers in the background, for up to 8 ms. So a boot asks for them first and
imports the rest meanwhile; what is imported before that, or after, adds to the time that it takes.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager, suppress

from pykvm import backends
from pykvm.errors import PykvmError
from pykvm.options import Option, UsageError, parse, render

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import SimpleNamespace
    from typing import NoReturn

    from pykvm.boot import Module
    from pykvm.exits import Exit
    from pykvm.vm import VM

__all__ = ["main"]

WRONG_USAGE = 2
TIMED_OUT = 124
FAILED = 125
GUEST_DIED = 126
INTERRUPTED = 130
SIGNALLED = 128  # plus the number of the signal

HELP = """\
usage: pykvm COMMAND ...

Virtual machines inside Python.

  boot IMAGE              boot an image; see pykvm boot --help
  doctor                  say what KVM this host has and which backend would be used
  --version               print the version
"""

BOOT_HELP = """\
usage: pykvm boot [OPTIONS] IMAGE
       pykvm boot [OPTIONS] --bios FILE

Boot an image: flat binary, boot sector, ELF, Multiboot 1 or 2, or firmware. The guest's COM1 is standard
output and input. On a terminal, Ctrl-A x leaves and Ctrl-A a sends Ctrl-A.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status. Raises nothing that a user can cause, except SystemExit."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    _open_standard_files()
    try:
        status = _command(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except UsageError as error:
        command = " boot" if arguments[:1] == ["boot"] else ""
        _say(f"pykvm{command}: {error}\nTry: pykvm{command} --help")
        return WRONG_USAGE
    except PykvmError as error:
        return _fail(str(error))
    except BrokenPipeError:  # reading help or doctor's report
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would try again at its end
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("PYKVM_DEBUG"):
            raise
        return _fail(f"internal error: {type(error).__name__}: {error} (PYKVM_DEBUG=1 shows where)")


def _command(arguments: list[str]) -> int:
    match arguments:
        case ["boot", *rest]:
            return boot(rest)
        case ["doctor", *rest]:
            from pykvm.doctor import main as doctor

            return doctor(rest)
        case ["--help"]:
            print(HELP, end="")
            return 0
        case ["--version"]:
            import pykvm

            print(f"pykvm {pykvm.__version__}")
            return 0
        case []:
            raise UsageError("say what to do: boot or doctor")
    raise UsageError(f"there is no command {arguments[0]!r}: the commands are boot and doctor")


def _open_standard_files() -> None:
    """Open what the caller has closed of standard input, output and error, as /dev/null.

    Otherwise the next file opened would take the number: the guest's output would go to its own memory.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one


def _say(message: str) -> None:
    """A message to the user, if there still is anyone who reads it."""
    if sys.stderr is not None:  # the caller may have closed it
        with suppress(OSError):
            print(message, file=sys.stderr)


def _fail(message: str) -> int:
    _say(f"pykvm: {message}")
    return FAILED


def _usage(message: str) -> NoReturn:
    raise UsageError(message)


def _size(text: str) -> int:
    from pykvm.layout import PAGE_SIZE
    from pykvm.memory import parse_size

    size = parse_size(text)
    return size if size % PAGE_SIZE == 0 else _usage(f"{text} is not a multiple of {PAGE_SIZE} bytes")


def _processors(text: str) -> int:
    from pykvm.vm import MAX_CPUS

    count = int(text) if text.isdecimal() else 0
    return count if 1 <= count <= MAX_CPUS else _usage(f"{text!r} is not a number from 1 to {MAX_CPUS}")


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


def _one_of(*choices: str) -> Callable[[str], str]:
    def convert(text: str) -> str:
        return text if text in choices else _usage(f"{text!r} is not one of {', '.join(choices)}")

    return convert


OPTIONS = (
    Option("IMAGE", "IMAGE", "the image; its format is told by its magic"),
    Option("--bios", "FILE", "firmware to start from the reset vector, instead of IMAGE"),
    Option(
        "--backend", "NAME", "kvm, emulator or auto (the default)", _one_of("auto", *backends.NAMES), "auto"
    ),
    Option("--memory", "SIZE", "RAM, such as 64M (the default)", _size, 64 << 20),
    Option("--cpus", "N", "number of processors (1)", _processors, 1),
    Option(
        "--mode",
        "MODE",
        "how a flat binary starts: real (the default), protected or long",
        _one_of("real", "protected", "long"),
    ),
    Option("--load-address", "A", "where a flat binary goes (0x8000 in real mode, else 0x100000)", _address),
    Option("--append", "S", "command line for a Multiboot kernel", default=""),
    Option("--module", "'FILE ARGS'", "Multiboot module and its arguments; repeatable", repeat=True),
    Option("--timeout", "S", "give up after S seconds, with status 124", _seconds),
    Option("--qemu-exit", help="exit status (value << 1) | 1, as QEMU's isa-debug-exit"),
    Option("--debug-port", "P", "one more debug console port (with --bios: 0x402)", _address),
    Option("--trace", "FILE", "write every port and MMIO access to FILE (- is standard error)"),
    Option("--stats", help="print exits by kind, and times, to standard error"),
    Option("--help", help="print this"),
)


def boot(arguments: Sequence[str]) -> int:
    """The boot command. Raises PykvmError for what keeps the guest from running."""
    from types import SimpleNamespace

    options = SimpleNamespace(**parse(arguments, OPTIONS))
    if options.help:
        print(BOOT_HELP, render(OPTIONS), sep="\n")
        return 0
    if (options.image is None) == (options.bios is None):
        raise UsageError("give either an IMAGE or --bios FILE")
    if options.backend != "emulator":
        backends.get("kvm").prepare()
    return _status(_run(options))


def _run(options: SimpleNamespace) -> Exit:
    """Make the machine, and run the guest with our input and output as its serial line."""
    from pykvm.boot import read_image
    from pykvm.console import Console, writer
    from pykvm.pc import Pc
    from pykvm.vm import VM

    image = read_image(options.bios or options.image)
    modules = [_module(text) for text in options.module]
    backend, why_not_kvm = backends.choose(options.backend)
    if why_not_kvm is not None:
        _say(f"pykvm: using the emulator: {why_not_kvm}")
    with (
        _signals_as_exceptions(),
        VM(options.memory, backend=backend.name, cpus=options.cpus, irqchip=True) as vm,
        Pc(
            vm,
            output=writer(1, "standard output"),
            debug_output=writer(2, "standard error"),
            debug_port=_debug_port(options),
            qemu_exit=options.qemu_exit,
        ) as pc,
        _trace(vm, options.trace),
    ):
        vm.load(
            image,
            format="firmware" if options.bios else None,
            mode=options.mode,
            load_address=options.load_address,
            command_line=options.append,
            modules=modules,
        )
        with Console(pc.serial, lambda: vm.stop(0, "leave")):
            if options.stats:
                vm.measure_time()
            exit = vm.run(options.timeout)
        if options.stats:
            _print_statistics(vm)
        return exit


def _module(text: str) -> Module:
    from pykvm.boot import Module, read_image

    path, _, _ = text.partition(" ")
    return Module(read_image(path), text)


def _debug_port(options: SimpleNamespace) -> int | None:
    from pykvm.layout import FIRMWARE_DEBUG

    if options.debug_port is None and options.bios:
        return FIRMWARE_DEBUG
    port: int | None = options.debug_port
    return port


def _status(exit: Exit) -> int:
    """The exit status for how the run ended."""
    from pykvm.exits import Debug, Halt, Interrupted, Stopped

    match exit:
        case Stopped():
            return exit.status & 0xFF
        case Halt():
            return 0
        case Interrupted(reason="timeout"):
            _say("pykvm: the guest was still running when the time was up")
            return TIMED_OUT
        case Interrupted():
            return INTERRUPTED
        case Debug():
            raise AssertionError("nobody has set a breakpoint")
    _say(exit.explain())
    return GUEST_DIED


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """While inside, SIGTERM and SIGHUP unwind the stack, so that the terminal is put back.

    Not those that the caller has us ignore, as nohup does.
    """
    import signal

    def unwind(number: int, frame: object) -> NoReturn:
        raise SystemExit(SIGNALLED + number)

    ours = [
        number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL
    ]
    for number in ours:
        signal.signal(number, unwind)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _trace(vm: VM, path: str | None) -> Iterator[None]:
    """While inside, each access to a device is a line of the file: time, bus, direction, address, value."""
    if path is None:
        yield
        return
    import time

    start = time.perf_counter()
    what = f"the trace to {path}"
    with _writing(what):
        # Line by line, so that it can be watched, and is complete however this process ends.
        file = open(2 if path == "-" else path, "w", buffering=1, closefd=path != "-")  # noqa: SIM115

    def trace_to(bus: str) -> Callable[[str, int, int, int], None]:
        def trace(direction: str, address: int, size: int, value: int) -> None:
            elapsed = time.perf_counter() - start
            with _writing(what):
                file.write(f"{elapsed:.6f} {bus} {direction} {address:#x} size {size} value {value:#x}\n")

        return trace

    vm.ports.trace, vm.mmio.trace = trace_to("port"), trace_to("mmio")
    try:
        yield
    finally:
        vm.ports.trace = vm.mmio.trace = None
        with _writing(what):
            file.close()


@contextmanager
def _writing(what: str) -> Iterator[None]:
    """While inside, what the system raises is an error of ours."""
    try:
        yield
    except OSError as error:
        raise PykvmError(f"cannot write {what}: {error.strerror}") from error


def _print_statistics(vm: VM) -> None:
    """What happened, on standard error."""
    statistics = vm.statistics()
    total = statistics.guest_seconds + statistics.host_seconds
    lines = [f"{count:>12,} {name}" for name, count in sorted(statistics.exits.items(), key=lambda e: -e[1])]
    if statistics.instructions is not None:
        lines.append(f"{statistics.instructions:>12,} instructions")
    if statistics.served:
        lines.append(f"{statistics.served:>12,} accesses served in C")
    lines.append(f"{statistics.guest_seconds * 1e3:>12,.3f} ms in the guest and KVM")
    lines.append(f"{statistics.host_seconds * 1e3:>12,.3f} ms in devices and pykvm, of {total * 1e3:,.3f} ms")
    for bus in (vm.ports, vm.mmio):
        if bus.unclaimed.reads or bus.unclaimed.writes:
            lines.append(
                f"{bus.unclaimed.reads:>12,} reads and {bus.unclaimed.writes:,} writes that no "
                f"{bus.name} device claimed"
            )
    _say("\n".join(lines))
