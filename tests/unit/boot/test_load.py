"""Telling formats apart, flat images, boot sectors, firmware, and reading files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pykvm import layout
from pykvm.boot import IMAGE_MAX, LoadOptions, Module, detect, load, read_image
from pykvm.boot.firmware import load_firmware
from pykvm.errors import ConfigurationError, ImageError
from pykvm.memory import Memory
from pykvm.registers import RESET_REGISTERS, RFLAGS_FIXED, SystemRegisters
from tests.unit.boot.images import CODE, describe, elf, multiboot2_header, multiboot_header

BOOT_SECTOR = b"\xf4".ljust(510, b"\0") + b"\x55\xaa"
BZIMAGE = BOOT_SECTOR + b"\xeb\x6aHdrS" + bytes(600)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (CODE, "flat"),
        (BOOT_SECTOR, "boot-sector"),
        (BOOT_SECTOR[:-1] + b"\xab", "flat"),
        (BOOT_SECTOR + bytes(512), "flat"),
        (elf(), "elf"),
        (elf(bits=64), "elf"),
        (bytes(8) + multiboot_header(), "multiboot"),
        (bytes(6) + multiboot_header(), "flat"),
        (bytes(8192 - 12) + multiboot_header(), "multiboot"),
        (bytes(8192 - 8) + multiboot_header(), "flat"),
        (multiboot_header()[:-1] + b"\0", "flat"),
        (bytes(8) + multiboot2_header(), "multiboot2"),
        (bytes(4) + multiboot2_header(), "flat"),
        (bytes(32768 - 24) + multiboot2_header(), "multiboot2"),
        (bytes(32768 - 8) + multiboot2_header(), "flat"),
        (multiboot_header() + bytes(4) + multiboot2_header(), "multiboot2"),
        (BZIMAGE, "linux"),
        (b"", "flat"),
    ],
    ids=describe,
)
def test_formats_are_told_apart_by_their_magic_numbers(image: bytes, expected: str) -> None:
    assert detect(image) == expected


def test_a_decoy_magic_number_does_not_hide_the_real_header() -> None:
    assert detect(b"\x02\xb0\xad\x1b" * 5 + multiboot_header()) == "multiboot"


def test_a_flat_image_starts_in_real_mode_at_its_first_byte(memory: Memory) -> None:
    entry = load(CODE, memory)

    assert entry.format == "flat"
    assert memory.read(layout.REAL_MODE_IMAGE, len(CODE)) == CODE
    assert (entry.system_registers.cs.base, entry.registers.rip) == (0, layout.REAL_MODE_IMAGE)
    assert entry.registers.rsp == layout.REAL_MODE_STACK_TOP
    assert entry.registers.rflags == RFLAGS_FIXED


@pytest.mark.parametrize(
    ("address", "selector", "ip"),
    [(0, 0, 0), (0xFFFF, 0, 0xFFFF), (0x1_0000, 0x1000, 0), (0x1_2345, 0x1234, 5), (0xF_FFFF, 0xFFFF, 0xF)],
)
def test_real_mode_reaches_the_load_address_through_cs(
    memory: Memory, address: int, selector: int, ip: int
) -> None:
    entry = load(CODE, memory, options=LoadOptions(load_address=address))

    assert (entry.system_registers.cs.selector, entry.registers.rip) == (selector, ip)
    assert entry.system_registers.cs.base + entry.registers.rip == address
    assert memory.read(address, len(CODE)) == CODE


@pytest.mark.parametrize("mode", ["protected", "long"])
def test_a_flat_image_in_other_modes_starts_at_1_mib_with_a_stack(memory: Memory, mode: str) -> None:
    entry = load(CODE, memory, options=LoadOptions(mode=mode))

    assert memory.read(layout.FLAT_IMAGE, len(CODE)) == CODE
    assert entry.registers.rip == layout.FLAT_IMAGE
    assert entry.registers.rsp == layout.BOOT_STACK_TOP


def test_a_boot_sector_starts_at_7c00_with_the_boot_drive_in_dl(memory: Memory) -> None:
    entry = load(BOOT_SECTOR, memory)

    assert entry.format == "boot-sector"
    assert memory.read(layout.BOOT_SECTOR, 512) == BOOT_SECTOR
    assert (entry.registers.rip, entry.registers.rdx) == (0x7C00, 0x80)


def test_of_a_disk_image_only_the_first_sector_is_loaded(memory: Memory) -> None:
    load(BOOT_SECTOR + b"\xaa" * 512, memory, options=LoadOptions(format="boot-sector"))

    assert memory.read(0x7C00, 1024) == BOOT_SECTOR + bytes(512)


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (b"", LoadOptions(), "empty"),
        (BZIMAGE, LoadOptions(), "Linux"),
        (CODE, LoadOptions(format="boot-sector"), "0x55 0xaa"),
        (CODE, LoadOptions(format="elf"), "does not start with"),
        (CODE, LoadOptions(format="multiboot"), "no valid header"),
        (CODE, LoadOptions(format="multiboot2"), "no valid header"),
        (CODE, LoadOptions(load_address=0x10_0000), "out of reach of real mode"),
        (CODE, LoadOptions(mode="protected", load_address=0x500), "overlaps the boot GDT"),
        (CODE, LoadOptions(mode="long", load_address=0x7FF8), "overlaps the boot page tables"),
        (CODE, LoadOptions(mode="long", load_address=0xFEE0_0000), "belongs to devices"),
        (CODE, LoadOptions(load_address=1 << 60), "52 bits"),
    ],
    ids=describe,
)
def test_images_that_cannot_start_are_refused_with_the_reason(
    memory: Memory, image: bytes, options: LoadOptions, message: str
) -> None:
    with pytest.raises(ImageError, match=message):
        load(image, memory, options=options)

    assert memory.read(0, 1 << 20) == bytes(1 << 20)


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (CODE, LoadOptions(format="pe"), "choose one of flat"),
        (CODE, LoadOptions(mode="virtual"), "choose real, protected or long"),
        (CODE, LoadOptions(load_address=-1), "negative"),
        (CODE, LoadOptions(command_line="quiet"), "no place for a command line"),
        (CODE, LoadOptions(modules=(Module(b"x"),)), "no place for a command line or modules"),
        (elf(), LoadOptions(load_address=0x1000), "drop the load address"),
        (BOOT_SECTOR, LoadOptions(mode="long"), "starts in real mode, not long"),
        (multiboot_header(), LoadOptions(mode="long"), "starts in protected mode, not long"),
        (CODE, LoadOptions(load_address=0xFF_FFF8), "at least 17 MiB"),
        (bytes(17 << 20), LoadOptions(mode="long"), "at least 18 MiB"),
        (CODE, LoadOptions(mode="long", load_address=0x1_0000_0000), r"at least 3073 MiB"),
    ],
    ids=describe,
)
def test_options_that_do_not_fit_the_image_or_the_memory_are_refused(
    memory: Memory, image: bytes, options: LoadOptions, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load(image, memory, options=options)


def test_a_missing_stack_says_how_much_memory_it_takes() -> None:
    with Memory() as memory:
        memory.add(0, 0x2_0000)

        with pytest.raises(ConfigurationError, match=r"for the boot stack.*576 KiB"):
            load(CODE, memory, options=LoadOptions(mode="protected", load_address=0x1_0000))


def test_an_image_may_cross_from_one_slot_into_the_next() -> None:
    with Memory() as memory:
        memory.add(0, 0x9000)
        memory.add(0x9000, 0x7000)

        load(bytes(range(256)) * 32, memory)

        assert memory.read(0x8000, 0x2000) == bytes(range(256)) * 32


@pytest.mark.parametrize("size", [0x1000, 0x1_0000, 0x2_0000, 0x4_0000])
def test_firmware_ends_at_4_gib_as_rom_and_at_1_mib_as_ram(memory: Memory, size: int) -> None:
    image = os.urandom(size)

    entry = load_firmware(image, memory)

    (rom,) = entry.roms
    assert (rom.address + len(rom.data), rom.data) == (1 << 32, image)
    assert memory.read((1 << 20) - size, size) == image
    assert entry.registers == RESET_REGISTERS
    assert entry.system_registers == SystemRegisters()
    assert entry.system_registers.cs.base + entry.registers.rip == layout.RESET_VECTOR


@pytest.mark.parametrize("size", [0, 1, 0x1001, 0x4_1000])
def test_firmware_of_other_sizes_is_refused(memory: Memory, size: int) -> None:
    with pytest.raises(ImageError, match=rf"multiple of 4 KiB, up to 256 KiB; this has {size} bytes"):
        load_firmware(bytes(size), memory)


def test_firmware_needs_the_first_mib() -> None:
    with Memory() as memory:
        memory.add(0, 0x8_0000)

        with pytest.raises(ConfigurationError, match="at least 1 MiB"):
            load_firmware(bytes(0x2_0000), memory)


def test_read_image_returns_the_file(tmp_path: Path) -> None:
    (tmp_path / "guest.bin").write_bytes(CODE)

    assert read_image(tmp_path / "guest.bin") == CODE


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.bin", "No such file"),
        (".", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        ("empty.bin", "the file is empty"),
        ("huge.bin", "images go up to 1024 MiB"),
        ("a\0b", "null"),
        ("x" * 5000, "name too long"),
        ("empty.bin/x", "Not a directory"),
    ],
)
def test_files_that_are_no_images_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.bin").touch()
    with open("huge.bin", "wb") as huge:
        huge.truncate(IMAGE_MAX + 1)

    with pytest.raises(ImageError, match=message):
        read_image(path)


def test_an_unreadable_file_is_an_image_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "secret.bin").write_bytes(CODE)
    monkeypatch.setattr("builtins.open", refuse)

    with pytest.raises(ImageError, match="Permission denied"):
        read_image(tmp_path / "secret.bin")


def test_importing_the_loaders_is_cheap() -> None:
    code = "import sys, pykvm.boot.multiboot2; print({'numpy', 'typing'} & set(sys.modules))"

    output = subprocess.run(
        [sys.executable, "-S", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
    ).stdout

    assert output == "set()\n"
