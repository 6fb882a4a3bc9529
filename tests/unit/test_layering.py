"""The layers of ARCHITECTURE.md hold: a module imports from its own layer or lower ones, never upwards."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "pykvm"

# By the first part of the name below pykvm: a module, or a package with everything in it.
LAYERS = (
    {"errors", "exits", "layout", "registers", "state", "statistics", "values"},
    {"bus", "device", "interfaces", "memory"},
    {"_kvm", "boot", "devices", "emulator", "kvm"},
    {"backends", "explain", "pc", "vm"},
    {"__main__", "cli", "console", "doctor", "options"},
)
LAYER = {part: number for number, parts in enumerate(LAYERS) for part in parts}
SIBLINGS = 2  # parts of this layer know nothing of each other

# The parts that backends consist of, and who may know them.
BACKENDS = {"_kvm", "kvm", "emulator"}
KNOW_BACKENDS = {"backends", "cli", "doctor"}

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported_names(tree: ast.AST) -> Iterator[str]:
    """The names that `tree` imports when it runs: not those for the type checker alone."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                yield from imported_names(ast.Module(node.orelse, []))
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom(level=0, module=str(module)):
                yield from (f"{module}.{alias.name}" for alias in node.names)
            case ast.ImportFrom():
                raise AssertionError(f"line {node.lineno}: the project writes no relative imports")
            case _:
                yield from imported_names(node)


def may_import(part: str, other: str) -> bool:
    if other in BACKENDS and part not in BACKENDS:
        return part in KNOW_BACKENDS
    if LAYER[part] == LAYER.get(other) == SIBLINGS:
        return part == other or {part, other} == {"kvm", "_kvm"}
    return LAYER[part] >= LAYER.get(other, len(LAYERS))


def objections(part: str, source: str) -> list[str]:
    """What `source`, a module of `part`, imports against the rules."""
    names = imported_names(ast.parse(source))
    used = {name.split(".")[1] for name in names if name.startswith("pykvm.")}
    return [f"{part} imports {other}" for other in sorted(used) if not may_import(part, other)]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_keeps_to_its_layer(path: Path) -> None:
    part = path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert part in LAYER, f"give {part} a layer in {Path(__file__).name} and in ARCHITECTURE.md"
    assert objections(part, path.read_text()) == []


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("errors", "import pykvm.exits, pykvm.memory"),
        ("memory", "def later():\n    from pykvm.vm import VM"),
        ("memory", "from pykvm import vm"),
        ("memory", "from pykvm import VM"),
        ("boot", "from pykvm.devices.serial import Serial"),
        ("emulator", "try:\n    from pykvm.kvm import abi\nexcept ImportError:\n    pass"),
        ("vm", "from pykvm.kvm.backend import KvmBackend"),
        ("vm", "if TYPE_CHECKING:\n    pass\nelse:\n    import pykvm.cli"),
    ],
)
def test_an_import_against_the_rules_is_found(part: str, source: str) -> None:
    assert len(objections(part, source)) == 1


def test_an_import_for_the_type_checker_alone_is_free() -> None:
    assert objections("errors", "if TYPE_CHECKING:\n    from pykvm.vm import VM") == []
