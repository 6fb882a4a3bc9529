"""Loaders against arbitrary and mutated images: an entry, or one of our errors, nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.boot import FORMATS, Entry, LoadOptions, Module, detect, load
from pykvm.boot.firmware import load_firmware
from pykvm.errors import ConfigurationError, ImageError
from pykvm.memory import Memory
from tests.unit.boot.images import (
    CODE,
    Load,
    Part,
    elf,
    multiboot2_elf,
    multiboot2_header,
    multiboot_header,
    tag,
    words,
)

AT = 0x10_0000
SEEDS = {
    "elf": (
        elf((Load(AT, memsz=0x100), Load(AT + 0x1000))),
        elf((Load(AT, virtual=(1 << 64) - 0x1000), Load(AT + 0x1000)), bits=64, entry=(1 << 64) - 0x1000),
    ),
    "multiboot": (
        elf(
            (Load(AT, multiboot_header(3) + CODE),),
            entry=AT + 12,
            parts=(Part(b"names"), Part(CODE, address=AT)),
        ),
        multiboot_header(1 << 16, (AT, AT, 0, AT + 0x1000, AT + 32)) + CODE,
    ),
    "multiboot2": (
        multiboot2_elf(tag(1, words(1, 6)), tag(10, words(AT, 0xFFFF_FFFF, 16, 1)), parts=(Part(b"names"),)),
        multiboot2_header(tag(2, words(AT, AT, 0, 0)), tag(3, words(AT + 56))) + CODE,
    ),
}
MODES = st.sampled_from([None, "real", "protected", "long"])


@pytest.fixture(scope="module")
def shared_memory() -> Iterator[Memory]:
    """Two MiB that all examples load into: what is there before must not matter."""
    with Memory() as memory:
        memory.add(0, "2M")
        yield memory


def outcome(image: bytes, memory: Memory, options: LoadOptions) -> Entry | None:
    """The entry, None for one of our errors; any other exception is the test's failure."""
    try:
        return load(image, memory, options=options)
    except (ImageError, ConfigurationError):
        return None


@given(image=st.binary(max_size=2048), name=st.sampled_from([None, *FORMATS]), mode=MODES)
def test_arbitrary_bytes_load_or_are_refused(
    shared_memory: Memory, image: bytes, name: str | None, mode: str | None
) -> None:
    entry = outcome(image, shared_memory, LoadOptions(format=name, mode=mode))

    assert entry is None or entry.format == (name or detect(image))


@pytest.mark.parametrize("name", SEEDS)
@given(data=st.data())
def test_mutated_images_load_or_are_refused(shared_memory: Memory, name: str, data: st.DataObject) -> None:
    image = bytearray(data.draw(st.sampled_from(SEEDS[name])))
    field = st.tuples(st.integers(0, len(image) - 1), st.binary(min_size=1, max_size=8) | interesting())
    for offset, value in data.draw(st.lists(field, max_size=4)):
        image[offset : offset + len(value)] = value
    cut = data.draw(st.integers(0, len(image)) | st.just(len(image)))
    modules = (Module(b"module", "name"),) if name.startswith("multiboot") else ()

    entry = outcome(bytes(image[:cut]), shared_memory, LoadOptions(format=name, modules=modules))

    assert entry is None or entry.registers.rip < 2 << 20


def interesting() -> st.SearchStrategy[bytes]:
    """Numbers at the borders of 16, 32 and 64 bits."""
    return st.sampled_from(
        [
            (value & (1 << bits) - 1).to_bytes(bits // 8, "little")
            for bits in (16, 32, 64)
            for value in (0, 1, -1, -16, 1 << (bits - 1), AT, 0x9_0000)
        ]
    )


@pytest.mark.parametrize("name", SEEDS)
def test_every_seed_loads_unmutated(shared_memory: Memory, name: str) -> None:
    entries = [outcome(seed, shared_memory, LoadOptions()) for seed in SEEDS[name]]

    assert [entry and entry.format for entry in entries] == [name] * len(entries)


@pytest.mark.parametrize("name", SEEDS)
def test_every_truncation_loads_or_is_refused(shared_memory: Memory, name: str) -> None:
    truncations = [seed[:size] for seed in SEEDS[name] for size in range(len(seed))]

    entries = [outcome(image, shared_memory, LoadOptions(format=name)) for image in truncations]

    assert None in entries


@given(
    mode=MODES,
    address=st.integers(-1, 1 << 64) | st.integers(0, 0x30_0000),
    size=st.sampled_from([1, 512, 0x1000, 0x10_0000]),
)
def test_flat_images_load_anywhere_or_are_refused(
    shared_memory: Memory, mode: str | None, address: int, size: int
) -> None:
    image = b"\xf4" * size

    entry = outcome(image, shared_memory, LoadOptions(format="flat", mode=mode, load_address=address))

    assert entry is None or shared_memory.read(address, size) == image


@given(size=st.integers(0, 0x5_0000))
def test_firmware_of_any_size_loads_or_is_refused(shared_memory: Memory, size: int) -> None:
    good = size > 0 and size % 0x1000 == 0 and size <= 0x4_0000
    try:
        loaded = bool(load_firmware(bytes(size), shared_memory).roms)
    except ImageError:
        loaded = False

    assert loaded == good
