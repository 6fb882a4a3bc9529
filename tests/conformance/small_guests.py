"""Guests of a few bytes, in real mode at 0x8000 where `VM.load` puts them, and a device that remembers."""

from __future__ import annotations

from pykvm import VM

LIMIT = 20.0  # seconds that no run here needs

HALT = b"\xf4"
SPIN = b"\xeb\xfe"  # jmp $
HALT_AGAIN = b"\xf4\xeb\xfd"  # 1: hlt; jmp 1b
OUT_INC_HALT = b"\xe6\x10\x40\xf4"  # out 0x10, al; inc ax; hlt
IN_HALT = b"\xe4\x10\xf4"  # in al, 0x10; hlt
SEGMENT = b"\xb8\x00\x20\x8e\xd8"  # mov ax, 0x2000; mov ds, ax: offsets count from 0x20000
STORE_55 = SEGMENT + b"\xc6\x06\x04\x00\x55\xf4"  # mov byte [4], 0x55; hlt
FETCH = SEGMENT + b"\xa0\x06\x00\xf4"  # mov al, [6]; hlt
HIGH = 0x2_0000


def rax(vm: VM) -> int:
    return vm.vcpus[0].registers().rax


class Recorder:
    """Remembers what it is asked; reads answer with `value`."""

    def __init__(self, value: int = 0) -> None:
        self.value = value
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        self.reads.append((offset, size))
        return self.value

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))
