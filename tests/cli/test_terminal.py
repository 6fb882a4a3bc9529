"""The terminal: raw while the guest runs, as before afterwards, whatever happens."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import termios
from collections.abc import Callable, Iterator

import pytest

from tests.cli.command import BOOT, DESTROY_PAGE_TABLES, EOT, LIMIT, ROOT, SPIN, TALK, patched, read_until
from tests.cli.conftest import MakeImage

CTRL_A = b"\x01"
CTRL_C = b"\x03"
ECHO_AND_SIGNALS = termios.ECHO | termios.ICANON | termios.ISIG


class Terminal:
    """A command with a pseudo-terminal as its standard files and controlling terminal."""

    def __init__(self, command: list[str]) -> None:
        self.screen, self._line = pty.openpty()
        self.before = termios.tcgetattr(self._line)
        self.process = subprocess.Popen(command, cwd=ROOT, preexec_fn=lambda: os.login_tty(self._line))

    @property
    def attributes(self) -> list[object]:
        """As `termios.tcgetattr`: local modes are number 3."""
        return termios.tcgetattr(self._line)

    def type(self, keys: bytes) -> None:
        os.write(self.screen, keys)

    def see(self, text: bytes) -> bytes:
        """What is printed up to `text`."""
        return read_until(self.screen, text)

    def end(self) -> int:
        """The exit status, once the command has ended."""
        return self.process.wait(LIMIT)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.screen)
        os.close(self._line)


Open = Callable[..., Terminal]


@pytest.fixture
def terminal() -> Iterator[Open]:
    """Starts a command on a terminal of its own."""
    terminals: list[Terminal] = []

    def start(*command: object) -> Terminal:
        terminals.append(Terminal([str(word) for word in command]))
        return terminals[-1]

    yield start
    for each in terminals:
        each.close()


def test_every_key_goes_to_the_guest_unechoed(backend: str, terminal: Open, image: MakeImage) -> None:
    opened = terminal(*BOOT, image(TALK), "--backend", backend)
    opened.see(b">")
    raw = opened.attributes
    opened.type(b"x\r\x1a" + CTRL_C + b".")

    seen = opened.see(b".")
    opened.type(EOT)

    assert int(str(raw[3])) & ECHO_AND_SIGNALS == 0
    assert seen == b"x\r\x1a" + CTRL_C + b"."
    assert opened.end() == 7
    assert opened.attributes == opened.before


def test_a_newline_starts_at_the_left(terminal: Open, image: MakeImage) -> None:
    opened = terminal(*BOOT, image(TALK))
    opened.see(b">")
    opened.type(b"a\nb.")

    assert opened.see(b".") == b"a\r\nb."


def test_ctrl_a_x_leaves(backend: str, terminal: Open, image: MakeImage) -> None:
    opened = terminal(*BOOT, image(SPIN), "--backend", backend)
    opened.see(b">")
    opened.type(CTRL_A + b"x")

    assert opened.end() == 0
    assert opened.attributes == opened.before


@pytest.mark.parametrize("second", [b"a", CTRL_A])
def test_ctrl_a_twice_sends_one(terminal: Open, image: MakeImage, second: bytes) -> None:
    opened = terminal(*BOOT, image(TALK))
    opened.see(b">")
    opened.type(CTRL_A + second + b"x.")

    assert opened.see(b".") == CTRL_A + b"x."


def test_what_was_typed_before_the_guest_started_is_kept(terminal: Open, image: MakeImage) -> None:
    opened = terminal("sh", "-c", 'echo "$"; sleep 0.3; exec "$@"', "sh", *BOOT, image(TALK))
    opened.see(b"$")
    opened.type(b"early.")

    opened.see(b">")

    assert opened.see(b".") == b"early."


def test_it_is_restored_when_the_guest_dies(terminal: Open, image: MakeImage) -> None:
    opened = terminal(*BOOT, image(DESTROY_PAGE_TABLES), "--mode", "long")

    opened.see(b"triple fault")

    assert opened.attributes == opened.before
    opened.see(b"efer")
    assert opened.end() == 126


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_it_is_restored_when_a_signal_ends_the_run(
    backend: str, terminal: Open, image: MakeImage, number: signal.Signals
) -> None:
    opened = terminal(*BOOT, image(SPIN), "--backend", backend)
    opened.see(b">")
    opened.process.send_signal(number)

    assert opened.end() == 128 + number
    assert opened.attributes == opened.before


@pytest.mark.parametrize("error", ["RuntimeError", "PykvmError", "KeyError"])
def test_it_is_restored_when_a_device_raises(terminal: Open, image: MakeImage, error: str) -> None:
    patch = f"""
from pykvm.errors import PykvmError
from pykvm.devices.debug import DebugExit
def write(*arguments):
    raise {error}("the device is broken")
DebugExit.write = write"""
    opened = terminal(*patched(patch, "boot", image(TALK)))
    opened.see(b">")
    opened.type(EOT)

    opened.see(b"the device is broken")

    assert opened.end() == 125
    assert opened.attributes == opened.before


def test_it_is_restored_when_time_is_up(terminal: Open, image: MakeImage) -> None:
    opened = terminal(*BOOT, image(SPIN), "--timeout", 0.2)

    opened.see(b"time was up")

    assert opened.end() == 124
    assert opened.attributes == opened.before


def test_a_terminal_that_goes_away_ends_the_run(terminal: Open, image: MakeImage) -> None:
    opened = terminal(*BOOT, image(SPIN))
    opened.see(b">")
    os.close(opened.screen)
    opened.screen = os.open(os.devnull, os.O_RDONLY)

    assert opened.end() == 129
