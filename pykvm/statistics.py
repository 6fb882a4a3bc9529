"""Statistics: what a processor did and where the time went."""

from __future__ import annotations

from types import MappingProxyType

from pykvm.values import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Statistics"]


class Statistics(Value):
    """Counts since the machine was made, and times since `VM.measure_time`; seconds.

    `exits` counts by the exit's name (``"KVM_EXIT_IO"``); `served` are the accesses that devices written
    in C answered without returning to Python; `instructions` is known on the emulator only.
    """

    exits: Mapping[str, int] = MappingProxyType({})
    served: int = 0
    instructions: int | None = None
    guest_seconds: float = 0.0
    host_seconds: float = 0.0

    def __add__(self, other: Statistics) -> Statistics:
        exits = dict(self.exits)
        for name, count in other.exits.items():
            exits[name] = exits.get(name, 0) + count
        known = [each.instructions for each in (self, other) if each.instructions is not None]
        return Statistics(
            exits,
            self.served + other.served,
            sum(known) if known else None,
            self.guest_seconds + other.guest_seconds,
            self.host_seconds + other.host_seconds,
        )
