"""Guest memory for the loaders to fill."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pykvm.memory import Memory


@pytest.fixture
def memory() -> Iterator[Memory]:
    """16 MiB from address 0 on."""
    with Memory() as result:
        result.add(0, "16M")
        yield result
