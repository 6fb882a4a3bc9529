"""Register files: a device as a list of named registers, the way data sheets describe them.

A timer with a control register, a counter and a status whose bits are cleared by writing ones:

    >>> class Timer(RegisterFile):
    ...     control = Register(0x00, size=4, writable=0x03)
    ...     count = Register(0x04, size=2, reset=1000)
    ...     status = Register(0x06, size=1, reset=0x80, writable=0, write_one_to_clear=0x0F)
    ...
    ...     @control.on_write
    ...     def start(self, value):
    ...         if self.control & 1:
    ...             self.status |= 0x01
    ...
    ...     @count.on_read
    ...     def elapse(self):
    ...         self.count -= 1
    ...         return self.count
    >>> timer = Timer()
    >>> timer.write(0x00, 4, 0xFFFFFFFF)     # the guest's side: offset, size, value
    >>> hex(timer.control), hex(timer.status)
    ('0x3', '0x81')
    >>> timer.read(0x04, 2)
    999
    >>> timer.write(0x06, 1, 0x01)
    >>> hex(timer.status)
    '0x80'
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload

from pykvm.errors import ConfigurationError, SnapshotError
from pykvm.interfaces import Device
from pykvm.values import Value

if TYPE_CHECKING:
    from collections.abc import Callable

    ReadCallback = TypeVar("ReadCallback", bound=Callable[[Any], int])
    WriteCallback = TypeVar("WriteCallback", bound=Callable[[Any, int], object])

__all__ = ["Register", "RegisterFile", "RegisterFileState"]


class Register:
    """One little-endian register at `offset`, `size` bytes (1, 2, 4 or 8) wide.

    The masks are of bits. `writable`: the guest's writes change them; all, unless
    `write_one_to_clear` takes some; 0 makes the register read-only. `write_one_to_clear`: writing a 1
    clears the bit, a 0 leaves it. `read_to_clear`: reading clears the bit. `reset`: the first content.

    On a device, the register is an attribute that holds its content; host code may set any bit of it.

    Raises ConfigurationError for a size or a mask that cannot be.
    """

    def __init__(
        self,
        offset: int,
        *,
        size: int = 4,
        reset: int = 0,
        writable: int | None = None,
        write_one_to_clear: int = 0,
        read_to_clear: int = 0,
    ) -> None:
        if size not in (1, 2, 4, 8) or offset < 0:
            raise ConfigurationError(
                f"a register of {size} bytes at offset {offset}: sizes are 1, 2, 4 and 8"
            )
        self.mask = (1 << (8 * size)) - 1
        if writable is None:
            writable = self.mask & ~write_one_to_clear
        for what, bits in (
            ("reset", reset),
            ("writable", writable),
            ("write_one_to_clear", write_one_to_clear),
            ("read_to_clear", read_to_clear),
        ):
            if not 0 <= bits <= self.mask:
                raise ConfigurationError(f"{what}={bits:#x} does not fit a register of {size} bytes")
        if writable & write_one_to_clear:
            raise ConfigurationError("bits cannot be both writable and write_one_to_clear")
        self.name = ""  # until __set_name__
        self.offset = offset
        self.size = size
        self.end = offset + size
        self.reset = reset
        self.writable = writable
        self.write_one_to_clear = write_one_to_clear
        self.read_to_clear = read_to_clear
        self._on_read: Callable[[Any], int] | None = None
        self._on_write: Callable[[Any, int], object] | None = None

    def on_read(self, function: ReadCallback) -> ReadCallback:
        """Decorator: call ``function(self)`` at each read, for the value that the guest gets."""
        self._on_read = function
        return function

    def on_write(self, function: WriteCallback) -> WriteCallback:
        """Decorator: call ``function(self, value)`` after each write, even to a read-only register.

        `value` is what the guest wrote, with the old content in bytes that it did not touch; the attribute
        already has the new content, masks applied. If the function raises, the content is put back.
        """
        self._on_write = function
        return function

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, device: None, owner: type) -> Register: ...
    @overload
    def __get__(self, device: RegisterFile, owner: type) -> int: ...
    def __get__(self, device: RegisterFile | None, owner: type) -> Register | int:
        if device is None:
            return self
        content: int = device.__dict__.get(self.name, self.reset)
        return content

    def __set__(self, device: RegisterFile, value: int) -> None:
        device.__dict__[self.name] = value & self.mask

    def guest_read(self, device: RegisterFile) -> int:
        """The register's value, with all effects of reading it."""
        value = self.__get__(device, type(device)) if self._on_read is None else self._on_read(device)
        if self.read_to_clear:
            self.__set__(device, self.__get__(device, type(device)) & ~self.read_to_clear)
        return value & self.mask

    def guest_write(self, device: RegisterFile, value: int, touched: int) -> None:
        """Write the bits of `value` that `touched` has, with all effects of writing them."""
        old = self.__get__(device, type(device))
        written = old & ~touched | value & touched
        taken = self.writable & touched
        new = old & ~taken | value & taken
        self.__set__(device, new & ~(value & touched & self.write_one_to_clear))
        if self._on_write is not None:
            try:
                self._on_write(device, written)
            except BaseException:
                self.__set__(device, old)
                raise


class RegisterFileState(Value):
    """The contents of a register file, by name, in order of offset."""

    registers: tuple[tuple[str, int], ...]


class RegisterFile(Device):
    """Base of devices that are made of `Register` attributes.

    Accesses of any size, at any offset, reach the registers they touch in order of offset, each once. Bytes
    that belong to no register read as zero and ignore writes. Registers may not overlap, nor
    be named like a method: ConfigurationError when the class is made.
    """

    registers: ClassVar[tuple[Register, ...]] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        found = [getattr(cls, name, None) for name in dir(cls)]
        registers = sorted(
            (each for each in found if isinstance(each, Register)), key=lambda register: register.offset
        )
        for register in registers:
            if hasattr(RegisterFile, register.name):
                raise ConfigurationError(
                    f"{cls.__name__}: {register.name!r} cannot be the name of a register"
                )
        for first, second in pairwise(registers):
            if second.offset < first.end:
                raise ConfigurationError(
                    f"{cls.__name__}: register {second.name} at {second.offset:#x} overlaps "
                    f"{first.name} at {first.offset:#x}..{first.end:#x}"
                )
        cls.registers = tuple(registers)

    def read(self, offset: int, size: int) -> int:
        result = 0
        for register in self.registers:
            if register.offset < offset + size and offset < register.end:
                result |= _shift(register.guest_read(self), register.offset - offset)
        return result & ((1 << (8 * size)) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        touched = (1 << (8 * size)) - 1
        for register in self.registers:
            if register.offset < offset + size and offset < register.end:
                distance = offset - register.offset
                register.guest_write(self, _shift(value, distance), _shift(touched, distance) & register.mask)

    def reset(self) -> None:
        """Put every register to its reset value. Callbacks are not called."""
        for register in self.registers:
            self.__dict__[register.name] = register.reset

    def save(self) -> RegisterFileState:
        return RegisterFileState(tuple((each.name, getattr(self, each.name)) for each in self.registers))

    def restore(self, state: RegisterFileState) -> None:
        """Take over all contents. Callbacks are not called. SnapshotError if the names differ."""
        ours = [register.name for register in self.registers]
        theirs = [name for name, _ in state.registers]
        if ours != theirs:
            raise SnapshotError(f"{type(self).__name__} has registers {ours}, the state has {theirs}")
        for name, value in state.registers:
            setattr(self, name, value)


def _shift(value: int, distance: int) -> int:
    """Move `value` up by `distance` bytes, or down if that is negative."""
    return value << (8 * distance) if distance >= 0 else value >> (-8 * distance)
