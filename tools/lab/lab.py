#!/usr/bin/env python3
"""The lab: a Debian machine with the genuine kvm_amd module, to run the tests in, wherever QEMU runs.

QEMU's TCG emulates AMD-V with nested paging (APM volume 2, chapter 15), so a Linux in it has a real /dev/kvm.
The host needs none, and none of its files is changed: the machine writes to copies that end with it.

    lab.py test -k timer -x         pytest on this checkout, with these arguments
    lab.py run benchmarks/exits.py  a Python script of this checkout
    lab.py shell                    a shell in this checkout

The exit status is that of what ran; 125 if the lab itself failed. The image is kept in ~/.cache/pykvm/lab
until what it is made of changes, and so is the KVM extension, which the image's own compiler builds.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INIT = Path(__file__).with_name("init")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pykvm/lab"

SUITE = "bookworm"
PACKAGES = (
    *("linux-image-cloud-amd64", "initramfs-tools", "kmod", "mount"),  # to start
    *("python3", "python3-dev", "python3-venv", "gcc", "libc6-dev"),  # to build the extension
    *("binutils", "git", "make", "seabios"),  # what tests use
)

# What the host has to have: its programs, by the Debian packages that they come from.
TOOLS = {
    "git": "git",
    "mke2fs": "e2fsprogs",
    "mmdebstrap": "mmdebstrap",
    "newuidmap": "uidmap",
    "qemu-system-x86_64": "qemu-system-x86",
}

# With -no-reboot a panic or a reset ends the machine.
QEMU = (
    *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-machine", "q35", "-cpu", "max,+svm,-la57"),
    *("-smp", "2", "-m", "3072", "-nodefaults", "-no-reboot", "-display", "none"),
)
# TCG's time-stamp counters agree, but Linux cannot know. An emulated processor needs no mitigations.
KERNEL_ARGUMENTS = "console=ttyS2 quiet panic=-1 mitigations=off tsc=reliable root=/dev/vda rw init=/lab/init"
FAILED = 125
TIME_LIMIT = 3600  # seconds, for what is not interactive

# Packaging needs a network, and the emulator does here what it does anywhere, only slower. Everything takes
# longer than its usual limit. A later -m, -k or --timeout replaces these.
DEFAULTS = ("-m", "not packaging", "-k", "not emulator and not 80286", "--timeout", "600")


class LabError(Exception):
    """Why the lab cannot be used, and what to do."""


def say(message: str) -> None:
    print(f"lab: {message}", file=sys.stderr, flush=True)


def run(*command: str | Path) -> None:
    """Run a command of the host, its output on our standard error."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    if done.returncode != 0:
        raise LabError(f"exit status {done.returncode} of: {shlex.join(map(str, command))}")


def run_as_root(*command: str | Path) -> None:
    """Run a command to which our own files are root's; a user namespace does that without a password."""
    run(*([] if os.geteuid() == 0 else ["unshare", "--map-root-user"]), *command)


def install_tools() -> None:
    """Install the tools that are missing where that needs no password; elsewhere say how."""
    packages = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if not packages:
        return
    install = ["apt-get", "-qq", "-y", "--no-install-recommends", "install", *packages]
    if shutil.which("apt-get") is None:
        raise LabError(f"the lab needs, by their Debian names: {' '.join(packages)}")
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if sudo and subprocess.run([*sudo, "true"], capture_output=True).returncode != 0:
        raise LabError(f"please run: sudo {shlex.join(install)}")
    say(f"installing Debian packages: {' '.join(packages)}")
    run(*sudo, "apt-get", "-qq", "update")
    run(*sudo, "env", "DEBIAN_FRONTEND=noninteractive", *install)


# --- The image --------------------------------------------------------------------------------------------


class Image:
    """A Debian system with what pykvm and its tests need, as files in `root` and as the disk `disk`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.root = directory / "root"
        self.disk = directory / "root.img"

    def run(self, *command: str) -> None:
        """Run a command among the image's files, but natively, on the host's kernel and network."""
        run_as_root(
            "chroot",
            self.root,
            "env",
            "-u",
            "PIP_FIND_LINKS",
            "PATH=/opt/venv/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            *command,
        )

    def build(self) -> None:
        """Make it from Debian's and Python's packages."""
        archive = self.directory / "root.tar"
        run(
            "mmdebstrap",
            "--variant=apt",
            "--skip=check/canmount",
            f"--include={','.join(PACKAGES)}",
            SUITE,
            archive,
        )
        self.root.mkdir()
        # Without devices: only root may make them. Linux brings its own, and to build, a file can stand in.
        run("tar", "-x", "-f", archive, "-C", self.root, "--no-same-owner", "--exclude=./dev/*")
        archive.unlink()
        (self.root / "dev/null").touch()
        self._install_python_packages()
        (self.root / "lab/work").mkdir(parents=True)
        shutil.copy(INIT, self.root / "lab")
        write_disk(self.disk, self.root, 4 << 30)

    def _install_python_packages(self) -> None:
        for borrowed in ("etc/resolv.conf", "etc/ssl/certs/ca-certificates.crt"):  # the way to PyPI
            (self.root / borrowed).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path("/", borrowed), self.root / borrowed)
        self.run("python3", "-m", "venv", "/opt/venv")
        self.run("pip", "install", "--quiet", "--disable-pip-version-check", *requirements())


def requirements() -> list[str]:
    """What pykvm and its tests need from the Python package index."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["test"],
    ]


def write_disk(disk: Path, tree: Path, size: int) -> None:
    """Make `disk` a sparse file of `size` bytes: an ext4 file system with what is in `tree`."""
    disk.touch()
    os.truncate(disk, size)
    run_as_root("mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, disk)


def the_image() -> Image:
    """The image for what this checkout asks of it; built if there is none, in place of older ones."""
    inputs = [Path(__file__).read_bytes(), INIT.read_bytes(), *map(str.encode, requirements())]
    wanted = CACHE / f"image-{digest(inputs)}"
    if wanted.exists():
        return Image(wanted)
    say("building the image (a few minutes, once)")
    for older in CACHE.glob("image-*"):
        shutil.rmtree(older)
    unfinished = CACHE / "image-unfinished"
    unfinished.mkdir()
    Image(unfinished).build()
    return Image(unfinished.rename(wanted))


def digest(inputs: list[bytes]) -> str:
    return hashlib.sha256(b"\0".join(inputs)).hexdigest()[:16]


# --- The checkout -----------------------------------------------------------------------------------------


def copy_checkout(destination: Path) -> None:
    """Copy this checkout as it is, with changes that are not committed, without files that git ignores."""
    # The checkout may belong to another user than the one who runs this.
    git: list[str | Path] = [
        "git",
        "-c",
        "safe.directory=*",
        "-C",
        ROOT,
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
        "-z",
    ]
    for name in subprocess.run(git, check=True, capture_output=True, text=True).stdout.split("\0"):
        source, copy = ROOT / name, destination / name
        if name and source.exists():  # one deleted since the last commit does not
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)


def build_extension(image: Image, checkout: Path) -> None:
    """Put the extension into `checkout`, which lies below the image's root; kept until its sources change."""
    sources = [checkout / "setup.py", *sorted((checkout / "ext").rglob("*.p*"))]
    built = image.directory / f"extension-{digest([path.read_bytes() for path in sources])}"
    if not built.exists():
        say("building the extension")
        inside = "/" / checkout.relative_to(image.root)
        image.run(
            "sh", "-c", f"cd {inside} && PYKVM_REQUIRE_EXTENSION=1 python setup.py -q build_ext --inplace"
        )
        for older in image.directory.glob("extension-*"):
            shutil.rmtree(older)
        built.mkdir()
        for product in (*checkout.glob("pykvm/*.so"), *checkout.glob("pykvm/*.pxd")):
            shutil.copy2(product, built)
    shutil.copytree(built, checkout / "pykvm", dirs_exist_ok=True)


def prepare_work(image: Image, disk: Path, command: list[str]) -> None:
    """Make the machine's second disk: the checkout, and the command to run in it."""
    work = image.root / "lab/work"
    shutil.rmtree(work)
    work.mkdir()
    copy_checkout(work / "checkout")
    build_extension(image, work / "checkout")
    (work / "command").write_text(f"{environment()}\n{shlex.join(command)}\n")
    write_disk(disk, work, 1 << 30)


def environment() -> str:
    """Shell assignments that make the machine's terminal like ours."""
    columns, lines = shutil.get_terminal_size()
    settings = {"COLUMNS": str(columns), "LINES": str(lines), "TERM": os.environ.get("TERM", "dumb")}
    if not sys.stdout.isatty():
        settings["NO_COLOR"] = "1"
    if "CI" in os.environ:
        settings["CI"] = os.environ["CI"]
    return "export " + " ".join(f"{name}={shlex.quote(value)}" for name, value in settings.items())


# --- The machine ------------------------------------------------------------------------------------------


def start(image: Image, work: Path, *, interactive: bool) -> int:
    """Run the machine until it ends, and return the exit status that it left.

    Its serial ports are: our terminal or output, the exit status, and what Linux has to say.
    """
    status, log = work.with_name("status"), work.with_name("log")
    kernel, initrd = (next(image.root.glob(f"boot/{name}-*")) for name in ("vmlinuz", "initrd.img"))
    drives = [f"file={disk},format=raw,if=virtio,snapshot=on" for disk in (image.disk, work)]
    console = "stdio,id=console,signal=off,mux=on" if interactive else "stdio,id=console"
    command: list[str | Path] = [*QEMU, "-kernel", kernel, "-initrd", initrd, "-append", KERNEL_ARGUMENTS]
    command += [*("-drive", drives[0]), *("-drive", drives[1])]
    command += ["-chardev", console, "-serial", "chardev:console"]
    command += ["-serial", f"file:{status}", "-serial", f"file:{log}"]
    stdin, limit = (None, None) if interactive else (subprocess.DEVNULL, TIME_LIMIT)
    try:
        machine = subprocess.run(command, stdin=stdin, timeout=limit)
    except subprocess.TimeoutExpired:
        raise LabError(f"the machine did not end within {TIME_LIMIT // 60} minutes") from None
    report = status.read_text() if status.exists() else ""
    if not report:
        last_words = log.read_text(errors="replace") if log.exists() else ""
        raise LabError(f"the machine ended without a result (QEMU: {machine.returncode})\n{last_words}")
    return int(report)


@contextmanager
def only_one() -> Iterator[None]:
    """Keep other labs of this user from preparing theirs at the same time."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        os.lockf(lock.fileno(), os.F_LOCK, 0)
        yield


def main(arguments: list[str]) -> int:
    match arguments:
        case ["test", *rest]:
            command = ["pytest", *DEFAULTS, *rest]
        case ["run", script, *rest]:
            command = ["python", script, *rest]
        case ["shell"]:
            command = ["bash"]
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    try:
        install_tools()
        with tempfile.TemporaryDirectory(prefix="pykvm-lab-") as scratch:
            work = Path(scratch, "work.img")
            with only_one():
                image = the_image()
                prepare_work(image, work, command)
            return start(image, work, interactive=arguments == ["shell"])
    except LabError as error:
        say(str(error))
        return FAILED
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
