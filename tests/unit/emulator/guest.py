"""A guest on the emulator without the rest of a machine: memory, a recording bus, processor modes."""

from __future__ import annotations

import mmap

from pykvm.emulator.backend import EmulatorBackend
from pykvm.exits import Exit
from pykvm.registers import (
    CR0_ET,
    CR0_NE,
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_OSFXSR,
    CR4_PAE,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    EFER_SCE,
    DescriptorTable,
    Registers,
    Segment,
    SystemRegisters,
)

GDT = 0x500
TSS = 0x600
PAGE_TABLES = 0x1000
IDT = 0x4000
CODE = 0x8000
STACK = 0x7000

DESCRIPTORS = (
    0,
    0x00CF_9B00_0000_FFFF,  # 0x08 32-bit code, ring 0
    0x00CF_9300_0000_FFFF,  # 0x10 data, ring 0
    0x00AF_9B00_0000_FFFF,  # 0x18 64-bit code, ring 0
    0x00CF_F300_0000_FFFF,  # 0x20 data, ring 3
    0x00AF_FB00_0000_FFFF,  # 0x28 64-bit code, ring 3
    0x00CF_FB00_0000_FFFF,  # 0x30 32-bit code, ring 3
    0x0000_8900_0600_0067,  # 0x38 TSS at 0x600
    0,
    0x0000_9300_0000_0FFF,  # 0x48 data, 4 KiB
    0x0000_9100_0000_FFFF,  # 0x50 data, read-only
    0x0000_1300_0000_FFFF,  # 0x58 data, not present
)


class Region:
    """Host memory for a slot."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.buffer = mmap.mmap(-1, size)


class Bus:
    """Answers reads from lists by address, all ones where there is none, and records every access."""

    def __init__(self) -> None:
        self.inputs: dict[int, list[int]] = {}
        self.log: list[tuple[object, ...]] = []
        self.error: Exception | None = None

    def _read(self, kind: str, address: int, size: int) -> int:
        self._raise()
        self.log.append((kind, address, size))
        values = self.inputs.get(address)
        return values.pop(0) if values else (1 << 8 * size) - 1

    def _write(self, kind: str, address: int, size: int, value: int) -> None:
        self._raise()
        self.log.append((kind, address, size, value))

    def _raise(self) -> None:
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def port_read(self, port: int, size: int) -> int:
        return self._read("in", port, size)

    def port_write(self, port: int, size: int, value: int) -> None:
        self._write("out", port, size, value)

    def mmio_read(self, address: int, size: int) -> int:
        return self._read("read", address, size)

    def mmio_write(self, address: int, size: int, value: int) -> None:
        self._write("write", address, size, value)


class Guest:
    """A machine with 4 MiB of RAM at 0."""

    def __init__(self, *, irqchip: bool = False) -> None:
        self.machine = EmulatorBackend().machine(irqchip=irqchip)
        self.vcpu = self.machine.vcpu(0)
        self.region = Region(4 << 20)
        self.ram = self.region.buffer
        self.bus = Bus()
        self.machine.map(0, 0, self.region)

    def put(self, address: int, value: int, size: int = 8) -> None:
        """Store an integer in memory."""
        self.ram[address : address + size] = value.to_bytes(size, "little")

    def get(self, address: int, size: int = 8) -> int:
        """Load an integer from memory."""
        return int.from_bytes(self.ram[address : address + size], "little")

    def real(self) -> None:
        """16-bit real mode, all segments at 0."""
        self.vcpu.set_system_registers(
            SystemRegisters(cs=Segment(type=0xB), idt=DescriptorTable(0, 0x3FF), cr0=CR0_ET)
        )

    def protected(self, *, user: bool = False) -> None:
        """32-bit protected mode without paging, flat segments."""
        self.write_tables()
        dpl = 3 if user else 0
        self.vcpu.set_system_registers(
            SystemRegisters(
                cs=_code(0x33 if user else 0x08, dpl, db=1),
                **_data(0x23 if user else 0x10, dpl),
                tr=Segment(TSS, 0x67, 0x38, type=0xB, s=0),
                gdt=DescriptorTable(GDT, 0x5F),
                idt=DescriptorTable(IDT, 0x7FF),
                cr0=CR0_PE | CR0_ET | CR0_NE,
            )
        )

    def long(self, *, user: bool = False) -> None:
        """64-bit mode; 2 MiB identity pages for 4 MiB, user-accessible."""
        self.write_tables()
        self.put(PAGE_TABLES, PAGE_TABLES + 0x1000 | 7)
        self.put(PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2000 | 7)
        for index in range(2):
            self.put(PAGE_TABLES + 0x2000 + 8 * index, index << 21 | 0x87)
        dpl = 3 if user else 0
        self.vcpu.set_system_registers(
            SystemRegisters(
                cs=_code(0x2B if user else 0x18, dpl, long=1),
                **_data(0x23 if user else 0x10, dpl),
                tr=Segment(TSS, 0x67, 0x38, type=0xB, s=0),
                gdt=DescriptorTable(GDT, 0x5F),
                idt=DescriptorTable(IDT, 0xFFF),
                cr0=CR0_PE | CR0_PG | CR0_ET | CR0_WP | CR0_NE,
                cr3=PAGE_TABLES,
                cr4=CR4_PAE | CR4_OSFXSR,
                efer=EFER_LME | EFER_LMA | EFER_SCE | EFER_NXE,
            )
        )

    def small_pages(self) -> int:
        """In long mode: map the lowest 2 MiB with 4 KiB pages. Returns the page table's address."""
        table = PAGE_TABLES + 0x4_0000
        for index in range(512):
            self.put(table + 8 * index, index << 12 | 7)
        self.put(PAGE_TABLES + 0x2000, table | 7)
        return table

    def write_tables(self) -> None:
        """Put the GDT into memory."""
        for index, descriptor in enumerate(DESCRIPTORS):
            self.put(GDT + 8 * index, descriptor)

    def gate64(self, vector: int, handler: int, *, ist: int = 0, dpl: int = 0, kind: int = 0xE) -> None:
        """An entry of the 64-bit IDT."""
        low = handler & 0xFFFF | 0x18 << 16 | ist << 32 | (0x80 | dpl << 5 | kind) << 40
        self.put(IDT + 16 * vector, low | (handler >> 16 & 0xFFFF) << 48)
        self.put(IDT + 16 * vector + 8, handler >> 32)

    def gate32(self, vector: int, handler: int, *, dpl: int = 0, kind: int = 0xE) -> None:
        """An entry of the 32-bit IDT."""
        low = handler & 0xFFFF | 0x08 << 16 | (0x80 | dpl << 5 | kind) << 40
        self.put(IDT + 8 * vector, low | (handler >> 16 & 0xFFFF) << 48)

    def load(self, code: bytes, address: int = CODE) -> None:
        """Put code into memory."""
        self.ram[address : address + len(code)] = code

    def run(self, code: bytes, address: int = CODE, **registers: int) -> Exit:
        """Load `code` and run it."""
        self.load(code, address)
        self.start(address, **registers)
        return self.vcpu.run(self.bus)

    def start(self, address: int = CODE, **registers: int) -> None:
        """Set RIP, RSP and the given registers."""
        self.vcpu.set_registers(Registers(**{"rip": address, "rsp": STACK, **registers}))

    def resume(self) -> Exit:
        """Run on."""
        return self.vcpu.run(self.bus)

    @property
    def registers(self) -> Registers:
        """The general registers."""
        return self.vcpu.registers()


def _code(selector: int, dpl: int, *, db: int = 0, long: int = 0) -> Segment:
    return Segment(0, 0xFFFF_FFFF, selector, type=0xB, dpl=dpl, db=db, l=long, g=1)


def _data(selector: int, dpl: int) -> dict[str, Segment]:
    segment = Segment(0, 0xFFFF_FFFF, selector, type=3, dpl=dpl, db=1, g=1)
    return dict.fromkeys(("ds", "es", "fs", "gs", "ss"), segment)
