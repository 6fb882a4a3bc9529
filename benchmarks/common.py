"""What the benchmarks share: building the floor in C, measuring in pairs, statistics, reports.

The hosts of virtual machines are noisy, and nested ones more so. Therefore nothing is compared across
runs: the candidates take turns in many short rounds, each round is compared with the floor's of the same
turn, and what counts is the median of these pairs, with its confidence interval. A claim holds
if the whole interval does, fails if none of it does, and is undecided in between.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from types import TracebackType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BUILD = HERE / "build"
GUESTS = ROOT / "guests"

CFLAGS = ("-O2", "-Wall", "-Wextra")


class Impossible(Exception):
    """This host cannot run the benchmark; the message says what is missing."""


# Building


def _run_tool(*command: str | Path) -> None:
    BUILD.mkdir(exist_ok=True)
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True, cwd=HERE)
    if done.returncode:
        raise Impossible(f"{' '.join(map(str, command))}: {done.stderr.strip()}")


def _compiler() -> str:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise Impossible("no C compiler: apt-get install gcc libc6-dev, or set CC")
    return compiler


def build_program(name: str, *sources: str, flags: Sequence[str] = ()) -> Path:
    """Compile sources of this directory into build/`name`."""
    program = BUILD / name
    _run_tool(_compiler(), *CFLAGS, *flags, "-o", program, *sources)
    return program


def build_image(source: str) -> Path:
    """Assemble a source of this directory into a flat image."""
    target = BUILD / Path(source).stem
    _run_tool(_compiler(), "-c", f"-Wa,-I{GUESTS}", "-o", target.with_suffix(".o"), source)
    _run_tool("objcopy", "-O", "binary", "-j", ".text", target.with_suffix(".o"), target.with_suffix(".bin"))
    return target.with_suffix(".bin")


def build_extension(source: str) -> Path:
    """Compile a Cython source of this directory, against pykvm's own .pxd files, into build/."""
    name = Path(source).stem
    library = BUILD / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    c_source = BUILD / f"{name}.c"
    _run_tool(sys.executable, "-m", "cython", "-3", "-I", ROOT / "ext", "-I", ROOT, source, "-o", c_source)
    include = f"-I{sysconfig.get_path('include')}"
    _run_tool(_compiler(), "-O2", "-shared", "-fPIC", include, "-o", library, c_source)
    return library


class Floor:
    """A C program that does one round for each line it is given, and answers with a line of numbers."""

    def __init__(self, program: Path, *arguments: object) -> None:
        self._process = subprocess.Popen(
            [str(program), *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def round(self, count: int) -> list[int]:
        """Do a round of `count`; the first number is nanoseconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(count, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise Impossible(f"{self._process.args!r} stopped with status {self._process.wait()}")
        return [int(number) for number in answer.split()]

    def __enter__(self) -> Floor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()


# Measuring


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median and the interval that holds the true one with 95 % probability, or min and max of few."""

    median: float
    low: float
    high: float

    def text(self, digits: int = 2) -> str:
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}..{self.high:.{digits}f}]"


def estimate(samples: Sequence[float]) -> Estimate:
    """The median; its interval comes from the ranks, so it assumes no distribution."""
    ordered = sorted(samples)
    count = len(ordered)
    margin = 0.98 * count**0.5  # 1.96 standard deviations of a binomial with p = 1/2
    low = max(0, int(count / 2 - margin))
    return Estimate(statistics.median(ordered), ordered[low], ordered[count - 1 - low])


def interleave(candidates: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Let all candidates measure themselves `rounds` times, in turns, each round in another order."""
    names = list(candidates)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        candidates[name]()  # warm up
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(candidates[name]())
    return samples


def ratio(samples: Sequence[float], floor: Sequence[float]) -> Estimate:
    """By what factor `samples` exceed the floor, pair by pair."""
    return estimate([each / base for each, base in zip(samples, floor, strict=True)])


def difference(samples: Sequence[float], floor: Sequence[float]) -> Estimate:
    """By how much `samples` exceed the floor, pair by pair."""
    return estimate([each - base for each, base in zip(samples, floor, strict=True)])


def stay_on_one_cpu() -> None:
    """Keep this process, and those it starts, on one CPU, so that floor and candidate run on the same."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


# Reporting


@dataclass(frozen=True, slots=True)
class Claim:
    """A promise of the project: `measured` is to be at most (or at least) `limit`."""

    text: str
    measured: Estimate
    limit: float
    at_least: bool = False

    @property
    def verdict(self) -> str:
        low, high = self.measured.low, self.measured.high
        if self.at_least:
            return "met" if low >= self.limit else "missed" if high < self.limit else "undecided"
        return "met" if high <= self.limit else "missed" if low > self.limit else "undecided"

    def __str__(self) -> str:
        comparison = "at least" if self.at_least else "at most"
        return f"{self.verdict}: {self.text}: {self.measured.text(3)}, {comparison} {self.limit:g}"


@dataclass(slots=True)
class Report:
    """What one script found: a table and the claims it decides."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def row(self, *cells: str) -> None:
        self.rows.append(cells)

    def markdown(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(map(str.ljust, cells, widths)) + " |"

        rule = ["-" * width for width in widths]
        table = [line(self.columns), line(rule), *map(line, self.rows)]
        remarks = [*(f"- {claim}" for claim in self.claims), *(f"- {note}" for note in self.notes)]
        return "\n".join([f"## {self.title}", "", *table, *([""] if remarks else []), *remarks])

    def json(self, machine: Mapping[str, str]) -> str:
        content = {
            "title": self.title,
            "machine": machine,
            "rows": [dict(zip(self.columns, row, strict=True)) for row in self.rows],
            "claims": [{**asdict(claim), "verdict": claim.verdict} for claim in self.claims],
            "notes": self.notes,
        }
        return json.dumps(content, indent=2)


def machine() -> dict[str, str]:
    """Where and when this was measured."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")]
    kinds = [name for name in ("kvm_intel", "kvm_amd", "kvm_pvm") if Path("/sys/module", name).exists()]
    return {
        "date": date.today().isoformat(),
        "cpu": f"{models[0] if models else 'unknown'}, {os.cpu_count()} CPUs",
        "kernel": platform.release(),
        "kvm": ", ".join(kinds) or "none",
        "python": platform.python_version(),
        "load": f"{os.getloadavg()[0]:.1f}",
    }


def main(description: str, measure: Callable[[bool], Report]) -> None:
    """The command line of a benchmark; `measure` is called with whether to be quick."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="few rounds: that it works, not how fast")
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    where = machine()
    try:
        report = measure(options.quick)
    except Impossible as reason:
        sys.exit(f"{Path(sys.argv[0]).name}: {reason}")
    if options.json:
        print(report.json(where))
        return
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print()
    print(report.markdown())


def require_kvm() -> None:
    """Raises Impossible, with what to do, where pykvm cannot use KVM."""
    from pykvm.backends import get

    why = get("kvm").why_unavailable()
    if why is not None:
        raise Impossible(why)
