"""Runs a guest as its contract asks, on any backend, and returns everything that can be compared."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from pykvm import Pc, Registers
from pykvm.exits import Exit, Halt, Interrupted, Shutdown, Stopped
from pykvm.vm import VM
from tests.conformance.guest_contracts import GuestContract, GuestExit

COUNTER_ADDRESS = 0xD000_0000
FIFO_PORT = 0x510
SAFETY_LIMIT = 60.0  # seconds: far more than any guest needs on any backend
SPIN_FOR = 0.3  # seconds after which a guest that never ends has shown that it does not


class Counter:
    """A write of any width sets the number; a read counts and returns it."""

    def __init__(self) -> None:
        self.n = 0

    def read(self, offset: int, size: int) -> int:
        self.n += 1
        return self.n

    def write(self, offset: int, size: int, value: int) -> None:
        self.n = value


class Fifo:
    """Bytes come out in the order they went in."""

    def __init__(self) -> None:
        self.bytes: deque[int] = deque()

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(bytes(self.bytes.popleft() for _ in range(size)), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.bytes.extend(value.to_bytes(size, "little"))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a guest did: its exit, what it printed, and the first processor's registers."""

    exit: Exit
    output: bytes
    registers: Registers


def run_guest(guest: GuestContract, backend: str, *, image: bytes | None = None) -> Outcome:
    """Boot `guest` on `backend` with the devices that it asks for."""
    output = bytearray()
    with VM("64M", backend=backend, cpus=guest.cpus, irqchip="irqchip" in guest.devices) as vm:
        pc = Pc(vm, output=output.extend)
        vm.attach(Counter(), address=COUNTER_ADDRESS, size=0x1000)
        vm.attach(Fifo(), port=FIFO_PORT, size=4)
        pc.serial.receive(guest.input)
        vm.load(image or guest.image.read_bytes(), mode=guest.mode)
        exit = vm.run(timeout=SPIN_FOR if guest.exit.kind == "timeout" else SAFETY_LIMIT)
        pc.close()
        return Outcome(exit, bytes(output), vm.vcpus[0].registers())


def ended_as(expected: GuestExit, outcome: Outcome) -> bool:
    """Whether the guest ended the way its contract says."""
    match expected.kind, outcome.exit:
        case "debug-exit", Stopped(status=status, reason="debug-exit"):
            return status == expected.status
        case "halt", Halt():
            return all(getattr(outcome.registers, name) == value for name, value in expected.registers)
        case "shutdown", Shutdown():
            return True
        case "timeout", Interrupted(reason="timeout"):
            return True
    return False
