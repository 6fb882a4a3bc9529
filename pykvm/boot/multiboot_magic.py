"""Multiboot headers: where they are in an image (Multiboot 0.6.96 section 3.1, Multiboot2 3.1)."""

from __future__ import annotations

MULTIBOOT_MAGIC = 0x1BADB002
MULTIBOOT_SEARCH = 8192
MULTIBOOT_HEADER_SIZE = 12  # magic, flags, checksum

MULTIBOOT2_MAGIC = 0xE85250D6
MULTIBOOT2_SEARCH = 32768
MULTIBOOT2_HEADER_SIZE = 16  # magic, architecture, length, checksum


def find_multiboot(image: bytes) -> int | None:
    """Return the offset of the Multiboot header of `image`, or None."""
    return _find(image, MULTIBOOT_MAGIC, limit=MULTIBOOT_SEARCH, align=4, size=MULTIBOOT_HEADER_SIZE)


def find_multiboot2(image: bytes) -> int | None:
    """Return the offset of the Multiboot2 header of `image`, or None."""
    return _find(image, MULTIBOOT2_MAGIC, limit=MULTIBOOT2_SEARCH, align=8, size=MULTIBOOT2_HEADER_SIZE)


def _find(image: bytes, magic: int, *, limit: int, align: int, size: int) -> int | None:
    """Find an aligned header of `size` bytes whose 32-bit words, checksum included, sum to zero."""
    pattern = magic.to_bytes(4, "little")
    limit = min(limit, len(image))
    offset = image.find(pattern, 0, limit)
    while offset != -1 and offset + size <= limit:
        words = (int.from_bytes(image[at : at + 4], "little") for at in range(offset, offset + size, 4))
        if offset % align == 0 and sum(words) & 0xFFFF_FFFF == 0:
            return offset
        offset = image.find(pattern, offset + 1, limit)
    return None
