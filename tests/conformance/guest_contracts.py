"""Guest contracts: what each guest in guests/ promises, parsed from the comment at its top.

The comment names the guest, describes it in prose, and ends in a paragraph of fields::

    /*
     * echo: sends a line from COM1 back in upper case.
     *
     * Waits for each byte by polling the line status register.
     *
     * Mode:      real
     * Input:     "abc\\n"
     * Prints:    "ABC\\n"
     * Exit:      debug-exit 0
     */

guests/README.md explains the fields. A line that is indented further continues the one before.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

GUESTS = Path(__file__).resolve().parents[2] / "guests"

MODES = ("real", "protected", "long")
DEVICES = ("cmos", "counter", "fifo", "irqchip")
BACKENDS = ("kvm", "emulator")
REQUIRED = ("Mode", "Prints", "Exit")
OPTIONAL = ("Input", "Devices", "Cpus", "Parameter", "Backends")


class ContractError(ValueError):
    """A guest's contract is missing, incomplete or cannot be understood."""


@dataclass(frozen=True, slots=True)
class GuestExit:
    """How a guest ends.

    `kind` is ``"debug-exit"`` (with `status`), ``"halt"`` (with the `registers` that count, by
    name), ``"shutdown"`` (a triple fault) or ``"timeout"`` (it never ends by itself).
    """

    kind: str
    status: int = 0
    registers: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class GuestContract:
    """What a guest needs and what it does.

    `prints` is the exact output on COM1, or a pattern that all of it matches; `input` is what
    COM1 receives; `parameter` is the default of the quadword at offset 8 of the image, or None.
    """

    name: str
    summary: str
    mode: str
    prints: bytes | re.Pattern[bytes]
    exit: GuestExit
    input: bytes = b""
    devices: tuple[str, ...] = ()
    cpus: int = 1
    parameter: int | None = None
    backends: tuple[str, ...] = BACKENDS

    @property
    def image(self) -> Path:
        """The flat binary that guests/Makefile builds from the source."""
        return GUESTS / f"{self.name}.bin"

    def accepts(self, output: bytes) -> bool:
        """Whether `output` is what the guest promised to print."""
        if isinstance(self.prints, bytes):
            return output == self.prints
        return self.prints.fullmatch(output) is not None


def parse(path: Path) -> GuestContract:
    """Parse the contract of the guest source `path`. Raises ContractError."""
    try:
        return _contract(path.stem, _paragraphs(path.read_text()))
    except (ValueError, SyntaxError, re.error) as error:
        raise ContractError(f"{path}: {error}") from error


def all_guests() -> list[GuestContract]:
    """The contracts of all guests, by name."""
    return [parse(path) for path in sorted(GUESTS.glob("*.S"))]


def _paragraphs(source: str) -> list[list[str]]:
    comment = re.match(r"/\*\n(.*?)\n \*/\n", source, re.DOTALL)
    if comment is None:
        raise ContractError("does not begin with a contract between /* and */")
    lines = [line.removeprefix(" *").removeprefix(" ") for line in comment[1].split("\n")]
    return [block.split("\n") for block in "\n".join(lines).split("\n\n")]


def _contract(name: str, paragraphs: list[list[str]]) -> GuestContract:
    title, separator, summary = " ".join(paragraphs[0]).partition(": ")
    if not separator or title != name:
        raise ContractError(f'the first line must be "{name}: " and a summary')
    fields = _fields(paragraphs[-1])
    return GuestContract(
        name=name,
        summary=summary,
        mode=_chosen("Mode", [fields["Mode"]], MODES)[0],
        prints=_output(fields["Prints"]),
        exit=_exit(fields["Exit"]),
        input=_literal(fields.get("Input", '""')),
        devices=_chosen("Devices", re.findall(r"[^,\s]+", fields.get("Devices", "")), DEVICES),
        cpus=int(fields.get("Cpus", "1")),
        parameter=int(fields["Parameter"], 0) if "Parameter" in fields else None,
        backends=_chosen("Backends", fields.get("Backends", "kvm emulator").split(), BACKENDS),
    )


def _fields(lines: list[str]) -> dict[str, str]:
    fields: dict[str, str] = {}
    for entry in re.split(r"\n(?! )", "\n".join(lines)):
        key, separator, value = entry.partition(":")
        if not separator or key not in REQUIRED + OPTIONAL or key in fields:
            raise ContractError(f"unknown or repeated field in {entry!r}")
        fields[key] = value.strip()
    missing = [key for key in REQUIRED if key not in fields]
    if missing:
        raise ContractError(f"lacks {', '.join(missing)}")
    return fields


def _chosen(key: str, words: list[str], known: tuple[str, ...]) -> tuple[str, ...]:
    unknown = [word for word in words if word not in known]
    if unknown:
        raise ContractError(f"{key} has {', '.join(unknown)}; known are {', '.join(known)}")
    return tuple(words)


def _literal(text: str) -> bytes:
    value = ast.literal_eval(f"({text})")
    if not isinstance(value, str):
        raise ContractError(f"not a string literal: {text}")
    return value.encode("latin-1")


def _output(text: str) -> bytes | re.Pattern[bytes]:
    if text.startswith("/") and text.endswith("/") and len(text) > 1:
        return re.compile(text[1:-1].encode("latin-1"))
    return _literal(text)


def _exit(text: str) -> GuestExit:
    kind, *arguments = text.split()
    match kind, arguments:
        case "debug-exit", [status]:
            return GuestExit(kind, status=int(status, 0))
        case "halt", [*pairs]:
            split = (pair.split("=", 1) for pair in pairs)
            return GuestExit(kind, registers=tuple((name, int(value, 0)) for name, value in split))
        case (("shutdown" | "timeout"), []):
            return GuestExit(kind)
    raise ContractError(f"unknown exit: {text!r}")
