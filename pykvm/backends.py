"""Backends by name. Only `pykvm.vm` and the command line choose one."""

from __future__ import annotations

from pykvm.errors import BackendUnavailable, ConfigurationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm.interfaces import Backend

__all__ = ["NAMES", "choose"]

NAMES = ("kvm", "emulator")

_made: dict[str, Backend] = {}


def get(name: str) -> Backend:
    """The backend called `name`, made on first use. Raises ConfigurationError for an unknown name."""
    if name not in _made:
        if name == "kvm":
            from pykvm.kvm.backend import KvmBackend

            _made[name] = KvmBackend()
        elif name == "emulator":
            from pykvm.emulator.backend import EmulatorBackend

            _made[name] = EmulatorBackend()
        else:
            raise ConfigurationError(f"unknown backend {name!r}: choose auto, {' or '.join(NAMES)}")
    return _made[name]


def choose(name: str = "auto") -> tuple[Backend, str | None]:
    """The backend to use for `name`, and, if "auto" had to do without KVM, the reason.

    Raises BackendUnavailable if a backend asked for by name does not work here.
    """
    if name != "auto":
        backend = get(name)
        why = backend.why_unavailable()
        if why is not None:
            raise BackendUnavailable(f"the {name} backend cannot be used here: {why}")
        return backend, None
    why = get("kvm").why_unavailable()
    return (get("kvm"), None) if why is None else (get("emulator"), why)
