"""The in-kernel interval timer, made when the guest first touches it.

KVM's 8254 (KVM_CREATE_PIT2) makes closing a VM wait for two grace periods, 16 ms on Linux 6.18 with
HZ=250, and most small guests never use it. So its ports first lead here. The first access creates it,
and is applied to its state (KVM_SET_PIT2); KVM answers all later ones itself. Ports: Intel 8254
datasheet, "Programming the 8254"; 0x61: IBM PC AT Technical Reference, "System board".
"""

from __future__ import annotations

from pykvm.values import replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pykvm import _kvm
    from pykvm.kvm.structs import PitChannelState

__all__ = ["LazyPit"]

SPEAKER_DUMMY = 1 << 0  # KVM_PIT_SPEAKER_DUMMY: KVM answers port 0x61 too
SPEAKER_DATA_ON = 1 << 1  # KVM_PIT_FLAGS_SPEAKER_DATA_ON

CONTROL = 3  # offset of the control word register
READ_BACK = 3  # its "channel" that latches instead
GATE_2 = 1 << 0  # port 0x61
SPEAKER_DATA = 1 << 1


class LazyPit:
    """The four ports of the PIT; `port_b` is the fifth, 0x61."""

    def __init__(self, vm: _kvm.Vm) -> None:
        self._vm = vm
        self._made = False
        self.port_b = _PortB(self)

    def make(self) -> None:
        """Create the PIT in KVM, once."""
        if not self._made:
            self._vm.create_pit2(SPEAKER_DUMMY)
            self._made = True

    def read(self, offset: int, size: int) -> int:
        """A counter that nobody has programmed reads as zero; the control register cannot be read."""
        self.make()
        return 0 if offset != CONTROL else (1 << (8 * size)) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """A control word sets up its channel. A count with no control word before it is lost."""
        self.make()
        if offset == CONTROL and (value >> 6) & 3 != READ_BACK:
            self._set_mode((value >> 6) & 3, value)

    def _set_mode(self, channel: int, control: int) -> None:
        access = (control >> 4) & 3
        if access == 0:  # a latch command: there is no count to latch yet
            return
        mode = (control >> 1) & 7
        state = self._vm.get_pit2()
        channels = list(state.channels)
        channels[channel] = replace(
            channels[channel],
            rw_mode=access,
            read_state=access,
            write_state=access,
            mode=mode - 4 if mode > 5 else mode,
            bcd=control & 1,
        )
        self._vm.set_pit2(replace(state, channels=tuple(channels)))

    def gate_channel_2(self, value: int) -> None:
        """What a write to port 0x61 does."""
        self.make()
        state = self._vm.get_pit2()
        channels: list[PitChannelState] = list(state.channels)
        channels[2] = replace(channels[2], gate=value & GATE_2)
        flags = state.flags | SPEAKER_DATA_ON if value & SPEAKER_DATA else state.flags & ~SPEAKER_DATA_ON
        self._vm.set_pit2(replace(state, channels=tuple(channels), flags=flags))


class _PortB:
    """Port 0x61: the gate of channel 2 and the speaker."""

    def __init__(self, pit: LazyPit) -> None:
        self._pit = pit

    def read(self, offset: int, size: int) -> int:
        self._pit.make()
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self._pit.gate_channel_2(value)
