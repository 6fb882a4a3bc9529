"""Runs the command as a user does: another process, its files and its exit status."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE, CompletedProcess, Popen

ROOT = Path(__file__).parents[2]
GUESTS = ROOT / "guests"
STRANGER = ROOT / "tests/data/stranger/stranger.elf"
COMMAND = (sys.executable, "-m", "pykvm")
BOOT = (*COMMAND, "boot")
LIMIT = 60  # seconds: far more than any of these needs

EOT = b"\x04"

# Prints ">", then sends back what it receives on COM1, up to EOT: status 7.
TALK = bytes.fromhex(
    "ba f8 03  b0 3e  ee"  # mov dx, 0x3f8; mov al, '>'; out dx, al
    "ba fd 03"  #        1: mov dx, 0x3fd
    "ec  a8 01  74 fb"  # 2: in al, dx; test al, 1; jz 2b
    "b2 f8  ec"  #          mov dl, 0xf8; in al, dx
    "3c 04  74 03"  #       cmp al, 4; je 3f
    "ee  eb ee"  #          out dx, al; jmp 1b
    "b0 07  e6 f4"  #    3: mov al, 7; out 0xf4, al
)
# Prints ">", then spins with interrupts off.
SPIN = bytes.fromhex("ba f8 03  b0 3e  ee  fa  eb fe")
HALT = bytes.fromhex("fa  f4")  # cli; hlt
# Long mode: clears the page tables at 0x1000 and reloads CR3.
DESTROY_PAGE_TABLES = bytes.fromhex(
    "bf 00100000  b9 000e0000  31 c0  f3 48 ab"  # mov edi, 0x1000; mov ecx, 7*512; xor eax, eax; rep stosq
    "0f 20 d8  0f 22 d8  eb fe"  # mov rax, cr3; mov cr3, rax; jmp $
)


def exit_with(status: int) -> bytes:
    """A guest that ends with `status`: mov al, status; out 0xf4, al."""
    return bytes([0xB0, status, 0xE6, 0xF4])


def pykvm(*arguments: object, input: bytes = b"") -> CompletedProcess[bytes]:
    """Run ``pykvm`` with these arguments to its end."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], cwd=ROOT, input=input, capture_output=True, timeout=LIMIT
    )


def boot(*arguments: object, input: bytes = b"") -> CompletedProcess[bytes]:
    """Run ``pykvm boot`` with these arguments to its end."""
    return pykvm("boot", *arguments, input=input)


def start(*arguments: object) -> Popen[bytes]:
    """Start ``pykvm boot``, with pipes to it. Use it in a with block that ends it."""
    return Popen([*BOOT, *map(str, arguments)], cwd=ROOT, stdin=PIPE, stdout=PIPE, stderr=PIPE, bufsize=0)


def patched(patch: str, *arguments: object) -> list[str]:
    """A command line that runs ``pykvm`` after the statements of `patch`."""
    program = f"import sys\n{patch}\nfrom pykvm.cli import main\nsys.exit(main())"
    return [sys.executable, "-c", program, *map(str, arguments)]


def run(command: list[str]) -> CompletedProcess[bytes]:
    """Run any command line to its end, without input."""
    return subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT)


def read_until(fd: int, text: bytes) -> bytes:
    """All that can be read from `fd` up to and including `text`, or to its end."""
    result = b""
    while not result.endswith(text):
        byte = os.read(fd, 1)
        if not byte:
            return result
        result += byte
    return result
