"""The source distribution, the wheel, and what they install in a clean environment."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HELLO = ROOT / "guests/hello.bin"
MISLEADING = {"PYTHONPATH", "PYKVM_REQUIRE_EXTENSION"}

pytestmark = [pytest.mark.packaging, pytest.mark.timeout(600)]


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """What `command` did and printed; a failure is an error that shows it."""
    inherited = {name: value for name, value in os.environ.items() if name not in MISLEADING}
    done = subprocess.run(command, cwd=cwd, env=inherited | variables, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
    return done


class Environment:
    """A virtual environment with nothing but `requirement` and what it depends on."""

    def __init__(self, directory: Path, requirement: Path, **variables: str) -> None:
        self.directory = directory
        run(sys.executable, "-m", "venv", "--without-pip", directory, cwd=directory.parent)
        pip = (sys.executable, "-m", "pip", "--python", directory / "bin/python")
        installation = run(*pip, "install", "--verbose", requirement, cwd=directory, **variables)
        self.build_log = installation.stderr

    def run(self, program: str, *arguments: str | Path) -> str:
        """The standard output of an installed program."""
        return run(self.directory / "bin" / program, *arguments, cwd=self.directory).stdout


def contents(sdist: Path) -> set[str]:
    """The files of a source distribution, below its only directory."""
    with tarfile.open(sdist) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the sdist, built from this tree, and the wheel, built from that sdist."""
    output = tmp_path_factory.mktemp("dist")
    # What the compiler optimises is not tested here, and unoptimised it is done in two seconds.
    run(sys.executable, "-m", "build", "--outdir", output, ROOT, cwd=output, CFLAGS="-O0 -g0")
    return output


@pytest.fixture(scope="module")
def sdist(distributions: Path) -> Path:
    (archive,) = distributions.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    (archive,) = distributions.glob("*.whl")
    return archive


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("wheel") / "venv", wheel)


@pytest.fixture(scope="module")
def without_compiler(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("sdist") / "venv", sdist, CC="false")


@pytest.mark.parametrize(
    "name",
    [
        "ext/pykvm/_kvm.pyx",
        "ext/pykvm/run.pxi",
        "ext/pykvm/device.pxd",
        "guests/hello.S",
        "guests/hello.bin",
        "guests/common.inc",
        "pykvm/cli.py",
        "pykvm/py.typed",
        "tests/conftest.py",
        "tools/setup.sh",
        "Makefile",
        "LICENSE",
        "CHANGELOG.md",
    ],
)
def test_sdist_carries(name: str, sdist: Path) -> None:
    assert name in contents(sdist)


def test_sdist_carries_nothing_that_was_built(sdist: Path) -> None:
    built = [name for name in contents(sdist) if name.endswith((".so", ".pyc", "device.c", "_kvm.c"))]
    assert built == []


@pytest.mark.parametrize(
    "name",
    [
        "pykvm/__init__.pxd",
        "pykvm/device.pxd",
        "pykvm/_kvm.pyi",
        "pykvm/device.pyi",
        "pykvm/py.typed",
        "pykvm/cli.py",
    ],
)
def test_wheel_carries(name: str, wheel: Path) -> None:
    assert name in zipfile.ZipFile(wheel).namelist()


def test_wheel_installs_the_package_and_nothing_else(wheel: Path) -> None:
    top = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"pykvm"}


@pytest.mark.skipif(
    importlib.util.find_spec("pykvm._kvm") is None,
    reason="the KVM extension is not built here: see `make build`",
)
def test_installed_wheel_has_the_extension(installed: Environment) -> None:
    assert "site-packages" in installed.run("python", "-c", "import pykvm._kvm as m; print(m.__file__)")


@pytest.mark.parametrize("command", [("pykvm",), ("python", "-m", "pykvm")], ids=" ".join)
def test_installed_wheel_boots_a_guest(command: tuple[str, ...], installed: Environment) -> None:
    assert installed.run(*command, "boot", HELLO) == "Hello, world!\n"


def test_install_without_a_compiler_says_what_is_left_out(without_compiler: Environment) -> None:
    assert "pykvm._kvm was not built: there will be no kvm backend" in without_compiler.build_log


def test_install_without_a_compiler_has_no_extension(without_compiler: Environment) -> None:
    find = "from importlib.util import find_spec; print(find_spec('pykvm._kvm'), find_spec('pykvm.device'))"
    assert without_compiler.run("python", "-c", find) == "None None\n"


@pytest.mark.parametrize("backend", ["auto", "emulator"])
def test_install_without_a_compiler_boots_a_guest(backend: str, without_compiler: Environment) -> None:
    assert without_compiler.run("pykvm", "boot", HELLO, "--backend", backend) == "Hello, world!\n"


def test_extension_can_be_required(sdist: Path, tmp_path: Path) -> None:
    shutil.unpack_archive(sdist, tmp_path)
    (source,) = tmp_path.iterdir()
    with pytest.raises(AssertionError, match=r"pykvm\.device was not built"):
        run(sys.executable, "setup.py", "build_ext", cwd=source, CC="false", PYKVM_REQUIRE_EXTENSION="1")
