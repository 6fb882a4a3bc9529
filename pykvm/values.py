"""Values: frozen, slotted dataclasses that cost next to nothing to define.

Exits, registers and saved states are such values. They are dataclasses to everyone who asks
(`dataclasses.replace`, `fields`, `asdict` and `match` work). But the dataclasses module, what it imports,
and the code that it generates for each class would take 15 ms of a boot that lasts 30. So the fields that
it wants to see are made when it first asks for them.

    class Point(Value):
        x: int
        y: int = 0
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

    V = TypeVar("V", bound="Value")
else:

    def dataclass_transform(**options):
        return lambda cls: cls


__all__ = ["Value", "replace"]


class _Fields:
    """`__dataclass_fields__`, by which the dataclasses module knows its own."""

    def __get__(self, instance: object, owner: type[Value]) -> dict[str, Any]:
        from dataclasses import field, make_dataclass

        def described(name: str) -> tuple[str, Any, Any]:
            kind = owner.__annotations__[name]
            return (name, kind, field(default=owner._defaults[name]) if name in owner._defaults else field())

        names = owner.__match_args__
        made = make_dataclass(owner.__name__, [described(name) for name in names], frozen=True)
        fields: dict[str, Any] = getattr(made, "__dataclass_fields__")  # noqa: B009 - typeshed hides it
        return fields


@dataclass_transform(eq_default=True, frozen_default=True)
class ValueType(type):
    """Turns the annotations of a class body into slots, as ``@dataclass(slots=True)`` does."""

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> ValueType:
        names = tuple(namespace.get("__annotations__", ()))
        namespace["_defaults"] = {each: namespace.pop(each) for each in names if each in namespace}
        namespace["__slots__"] = names
        namespace["__match_args__"] = names
        return super().__new__(mcs, name, bases, namespace)


class Value(metaclass=ValueType):
    """Base of all values: comparable, hashable if its fields are, picklable, and never changed."""

    if TYPE_CHECKING:
        __dataclass_fields__: ClassVar[dict[str, Any]]
        __match_args__: ClassVar[tuple[str, ...]]
        _defaults: ClassVar[dict[str, object]]
    else:
        __dataclass_fields__ = _Fields()

        def __init__(self, *args, **kwargs):
            names = self.__match_args__
            for name, value in zip(names, args, strict=False):
                _set(self, name, value)
            if len(args) != len(names) or kwargs:
                self._fill(args, kwargs)

    def _fill(self, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Set the fields that were not given by position."""
        names = self.__match_args__
        title = f"{type(self).__name__}()"
        if len(args) > len(names):
            raise TypeError(f"{title} takes {len(names)} values but {len(args)} were given")
        for name in names[len(args) :]:
            if name in kwargs:
                _set(self, name, kwargs.pop(name))
            elif name in self._defaults:
                _set(self, name, self._defaults[name])
            else:
                raise TypeError(f"{title} lacks a value for {name!r}")
        for name in kwargs:
            why = "got two values for" if name in names else "has no field"
            raise TypeError(f"{title} {why} {name!r}")

    def _values(self) -> tuple[object, ...]:
        return tuple([getattr(self, name) for name in self.__match_args__])

    def __repr__(self) -> str:
        pairs = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.__match_args__)
        return f"{type(self).__qualname__}({pairs})"

    def __eq__(self, other: object) -> bool:
        if other.__class__ is not self.__class__:
            return NotImplemented
        assert isinstance(other, Value)
        return self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def __reduce__(self) -> tuple[type[Self], tuple[object, ...]]:
        return type(self), self._values()

    def __setattr__(self, name: str, value: object) -> None:
        raise _frozen(f"cannot assign to field {name!r} of {type(self).__name__}; use replace()")

    def __delattr__(self, name: str) -> None:
        raise _frozen(f"cannot delete field {name!r} of {type(self).__name__}")


_set = object.__setattr__


def _frozen(message: str) -> AttributeError:
    from dataclasses import FrozenInstanceError

    return FrozenInstanceError(message)


def replace(value: V, **changes: Any) -> V:
    """A copy of `value` with some fields changed. Raises TypeError for fields that it does not have."""
    names = value.__match_args__
    values = [changes.pop(name) if name in changes else getattr(value, name) for name in names]
    return type(value)(*values, **changes)
