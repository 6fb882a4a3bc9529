"""Options: a command's grammar as a table, what a user typed as values.

This is the little of argparse that the command needs. All of it would bring regular expressions, enum
and message translation, and take 6 ms of a boot that lasts 30.
"""

from __future__ import annotations

from pykvm.errors import PykvmError
from pykvm.values import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["Option", "UsageError", "parse", "render"]

HELP_COLUMN = 24


class UsageError(PykvmError):
    """The command line cannot be understood."""


class Option(Value):
    """One row of the table: ``--name``, or an argument if `name` has no dashes.

    `metavar` stands for the value in the help; without one the option is a flag. `convert` makes the value
    from its text and raises PykvmError for a bad one. `repeat` collects all values in a tuple.
    """

    name: str
    metavar: str = ""
    help: str = ""
    convert: Callable[[str], object] = str
    default: object = None
    repeat: bool = False

    @property
    def key(self) -> str:
        """The name in the result of `parse`."""
        return self.name.lstrip("-").replace("-", "_").lower()


def parse(arguments: Sequence[str], options: Sequence[Option]) -> dict[str, object]:
    """The value of every option by its key, the default where it was not given, False for a flag.

    ``--`` ends the options. Given twice, the last one counts. Raises UsageError.
    """
    result = {option.key: _default(option) for option in options}
    places = [option for option in options if not option.name.startswith("-")]
    for option, text in _pairs(arguments, {option.name: option for option in options}, places):
        value = _value(option, text)
        before = result[option.key]
        result[option.key] = (*before, value) if isinstance(before, tuple) else value
    return result


def _default(option: Option) -> object:
    if option.repeat:
        return ()
    return option.default if option.metavar else False


def _pairs(
    arguments: Sequence[str], named: dict[str, Option], places: list[Option]
) -> Iterator[tuple[Option, str]]:
    """Each option given and the text of its value."""
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            break
        if not argument.startswith("-") or argument == "-":
            yield _place(places, argument), argument
            continue
        name, equals, text = argument.partition("=")
        option = named.get(name)
        if option is None:
            raise UsageError(f"there is no option {name}")
        if not option.metavar and equals:
            raise UsageError(f"{name} takes no value")
        if option.metavar and not equals:
            given = next(rest, None)
            if given is None:
                raise UsageError(f"{name} needs a value: {name} {option.metavar}")
            text = given
        yield option, text
    for argument in rest:
        yield _place(places, argument), argument


def _place(places: list[Option], argument: str) -> Option:
    if not places:
        raise UsageError(f"{argument!r} is one argument too many")
    return places.pop(0)


def _value(option: Option, text: str) -> object:
    if not option.metavar:
        return True
    try:
        return option.convert(text)
    except PykvmError as error:
        raise UsageError(f"{option.name}: {error}") from error


def render(options: Sequence[Option]) -> str:
    """The options as lines of help."""
    lines = []
    for option in options:
        form = option.name if option.metavar in ("", option.name) else f"{option.name} {option.metavar}"
        lines.append(f"  {form:<{HELP_COLUMN}}{option.help}")
    return "\n".join(lines)
