"""``python -m pykvm``: the same as the command ``pykvm``."""

import gc
import sys

from pykvm.cli import main


def run() -> int:
    """The command as a whole process: its exit status, and no collection of garbage as Python ends (3 ms)."""
    status = main()
    gc.freeze()
    return status


if __name__ == "__main__":
    sys.exit(run())
