"""The doctor: tell which KVM this host has, what is wrong with it, and how to mend that.

``python -m pykvm doctor`` prints the report, ``--json`` the same for programs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.kvm.probe import HostReport

__all__ = ["main", "render"]

_KINDS = {
    "VT-x": "VT-x (Intel)",
    "AMD-V": "AMD-V",
    "PVM": "PVM, in software: ring 3 runs on the processor",
}
_LINE = 96


def render(report: HostReport) -> str:
    """The report as text for people, lines without a final newline."""
    kind = _KINDS.get(report.kind, "none")
    lines = [
        _row("kernel", report.kernel),
        _row("KVM", kind + (", inside a virtual machine" if report.nested else "")),
    ]
    lines.append(_row("extension", "built" if report.extension else "not built"))
    for problem, remedy in report.problems:
        lines += [_row("problem", problem), _row("to mend it", remedy)]
    if not report.problems:
        lines += _findings(report)
    reason = "; ".join(problem for problem, _ in report.problems) or "KVM works here"
    lines.append(_row("auto picks", f"{report.backend}, because {reason}"))
    return "\n".join(lines)


def _findings(report: HostReport) -> list[str]:
    present = [name if value == 1 else f"{name}={value}" for name, value in report.capabilities if value]
    absent = [name for name, value in report.capabilities if not value]
    ring0 = "native" if report.ring0_native else "interpreted by KVM: slow, and not every instruction works"
    return [
        _row("API version", str(report.api_version)),
        _row("ring 0", ring0),
        _row("fail in ring 0", " ".join(report.ring0_missing) or "none of the instructions tried"),
        _row("an exit costs", f"{report.exit_us:.1f} us (a port write, served in Python)"),
        *_paragraph("present", present),
        *_paragraph("missing", absent),
    ]


def _row(name: str, text: str) -> str:
    return f"{name:<15} {text}"


def _paragraph(name: str, words: list[str]) -> list[str]:
    """Words under a heading, wrapped and indented."""
    import textwrap

    body = textwrap.wrap(" ".join(words) or "none", _LINE - 16, break_on_hyphens=False)
    return [_row(name if number == 0 else "", line) for number, line in enumerate(body)]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report. Returns 0 where KVM is usable, 1 where it is not."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="pykvm doctor", description="Tell which KVM this host has and what is wrong with it."
    )
    parser.add_argument("--json", action="store_true", help="print the report as a JSON object")
    arguments = parser.parse_args(argv)

    from pykvm.kvm.probe import probe

    report = probe()
    print(_as_json(report) if arguments.json else render(report))
    return 1 if report.problems else 0


def _as_json(report: HostReport) -> str:
    import json
    from dataclasses import asdict

    fields = asdict(report) | {"capabilities": dict(report.capabilities), "backend": report.backend}
    return json.dumps(fields, indent=2)


if __name__ == "__main__":
    sys.exit(main())
