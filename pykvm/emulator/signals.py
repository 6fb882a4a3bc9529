"""Ctrl-C between instructions: Python would raise KeyboardInterrupt in the middle of one."""

from __future__ import annotations

import threading
from contextlib import contextmanager

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from pykvm.emulator.accesses import Accesses
    from pykvm.emulator.execution import Execution


@contextmanager
def deferred_interrupts(execution: Execution, accesses: Accesses) -> Iterator[None]:
    """Hold SIGINT's handler back until an instruction is complete, so that the run can be continued.

    While a device is being called, the handler runs at once: the device may wait for something, and
    its access is repeated anyway. Signals come to the main thread only; on others this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    import signal

    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):
        yield
        return
    previous = handler

    def hold(number: int, frame: FrameType | None) -> None:
        if accesses.busy:
            previous(number, frame)
        else:
            execution.call_between_instructions(lambda: previous(number, frame))

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        # What comes too late for the run is not lost.
        signal.signal(signal.SIGINT, previous)
        execution.call_held()
