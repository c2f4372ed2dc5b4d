"""What an options group is made of: typed fields that know how to become a flag, and the settings of one run.

A group is a frozen dataclass whose fields are made with `option`. The field's name is the flag (`--name`) and its key
in a config file; the field's type says how a value is read: `bool` is a switch, `int`, `float`, `str` and `Path` take
one value, `int | float` takes a number of steps or a fraction of them, `tuple[X, ...]` takes several values. `| None`
only says that the default is None. The class variable `title` heads the group in --help and in a written config file.
"""

import dataclasses
import math
import re
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from library.errors import UserError, suggest

Group = TypeVar("Group")

STEPS_OR_FRACTION = int | float
_KEY = "option"
_PAIR_STARTS = re.compile(r",(?=\s*[A-Za-z_][\w.]*\s*=)")


@dataclasses.dataclass(frozen=True)
class _Details:
    """What a field carries besides its type and default."""

    help: str
    metavar: str
    choices: tuple[Any, ...]
    aliases: tuple[str, ...]
    minimum: float | None
    secret: bool
    positional: bool
    short: str | None


def option(
    default: Any,
    help: str,
    *,
    metavar: str = "VALUE",
    choices: Sequence[Any] = (),
    aliases: Sequence[str] = (),
    minimum: float | None = None,
    secret: bool = False,
    positional: bool = False,
    short: str | None = None,
) -> Any:
    """A dataclass field that is a flag, or, if `positional`, a word that has to be given without one.

    `metavar` stands for the value in --help. `aliases` are old spellings (without dashes) that still work but are not
    shown; `short` is a letter that stands for the flag behind a single dash. `minimum` is the smallest value accepted.
    A `secret` value is never written or shown anywhere.
    """
    details = _Details(help, metavar, tuple(choices), tuple(aliases), minimum, secret, positional, short)
    return dataclasses.field(default=default, repr=not secret, metadata={_KEY: details})


@dataclasses.dataclass(frozen=True)
class Option:
    """One flag: its name, type and default, and how text or a TOML value becomes its value."""

    name: str
    kind: Any  # bool, int, float, str, Path or STEPS_OR_FRACTION; of each value where `many`
    many: bool
    default: Any
    details: _Details

    @property
    def spelling(self) -> str:
        """Its name as in a sentence."""
        return self.name if self.details.positional else f"--{self.name}"

    def from_text(self, text: str) -> Any:
        """One value as written on the command line. Raises ValueError with the reason, which quotes the value."""
        value = _READERS[self.kind](text)
        choices, minimum = self.details.choices, self.details.minimum
        if choices and value not in choices:
            names = [str(choice) for choice in choices]
            raise ValueError(f"{text!r} is none of {', '.join(names)}{suggest(text, names)}")
        if minimum is not None and not value >= minimum:
            raise ValueError(f"{text} is too small, use {minimum} or more")
        return value

    def from_toml(self, value: Any) -> Any:
        """The value of a config file's key. Numbers may be written as text, as front ends do. Raises ValueError."""
        if self.kind is bool:
            if value not in (True, False):
                raise ValueError(f"{value!r} is neither true nor false")
            return bool(value)
        if self.many:
            values = value if isinstance(value, list) else [value]
            return tuple(self._scalar(one) for one in values)
        return self._scalar(value)

    def _scalar(self, value: Any) -> Any:
        if type(value) not in (str, int, float):  # a bool is an int to isinstance
            shown = "its value" if self.details.secret else repr(value)
            raise ValueError(f"{shown} is not {_NOUNS[self.kind]}")
        return self.from_text(str(value))


def options_of(group: type) -> list[Option]:
    """The flags of a group, in the order of its fields."""
    hints = typing.get_type_hints(group)
    found = []
    for field in dataclasses.fields(group):
        kind, many = _kind(hints[field.name])
        found.append(Option(field.name, kind, many, field.default, field.metadata[_KEY]))
    return found


def _kind(hint: Any) -> tuple[Any, bool]:
    """(type of one value, whether there are several) from a field's annotation."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not types.NoneType]
        return _kind(members[0]) if len(members) == 1 else (STEPS_OR_FRACTION, False)
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def _read_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = _read_float(text, noun=_NOUNS[int])  # 1e3 and 1000.0 are whole numbers too
        if not number.is_integer():
            raise ValueError(f"{text!r} is not {_NOUNS[int]}") from None
        return int(number)


def _read_float(text: str, noun: str = "a number") -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{text!r} is not {noun}")
    return number


def _read_path(text: str) -> Path:
    if not text:
        raise ValueError("'' is not a path")
    return Path(text)


def _read_steps_or_fraction(text: str) -> int | float:
    """A whole number of steps as int, a fraction below 1 (also written `10%`) as float."""
    noun = _NOUNS[STEPS_OR_FRACTION]
    if text.endswith("%"):
        number = _read_float(text[:-1], noun) / 100
    else:
        number = _read_float(text, noun)
        if number.is_integer():
            return int(number)
    if not 0 <= number < 1:
        raise ValueError(f"{text!r} is not {noun}")
    return number


_READERS = {
    int: _read_int,
    float: _read_float,
    str: str,
    Path: _read_path,
    STEPS_OR_FRACTION: _read_steps_or_fraction,
}
_NOUNS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
    STEPS_OR_FRACTION: "a whole number of steps or a fraction below 1",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything a run was asked for: one instance per options group, and which names the user set."""

    groups: Mapping[type, Any]
    given: frozenset[str]  # set on the command line or in the config file, whatever the value

    def __getitem__(self, group: type[Group]) -> Group:
        return self.groups[group]

    def flat(self) -> dict[str, Any]:
        """Every option's value by name, defaults included, secrets left out."""
        return {
            field.name: getattr(group, field.name)
            for group in self.groups.values()
            for field in dataclasses.fields(group)
            if not field.metadata[_KEY].secret
        }


@dataclasses.dataclass(frozen=True)
class MethodOptions(ABC):
    """A method's own group of options, of which a training script has one."""

    scripts: ClassVar[tuple[str, ...]]
    """Those that take it."""
    instead: ClassVar[Mapping[str, str]] = types.MappingProxyType({})
    """By flags of other scripts, what these are to do without them."""

    @property
    @abstractmethod
    def trains_text_encoder(self) -> bool:
        """Whether gradients may pass through a text encoder, as far as flags tell."""

    def check(self, settings: Settings) -> None:  # noqa: B027
        """UserError for files that are missing and for what contradicts other groups. Says what has no effect."""


def parse_key_values(words: Iterable[str], flag: str) -> dict[str, str]:
    """The pairs in the values of a flag such as --network_args: `a=1 b=2`, `a=1,b=2`, or a mixture.

    A value may hold commas (`betas=.9,.999`), so a comma starts a new pair only in front of `name=`. Of a name given
    twice the last value counts. Raises UserError naming `flag` for a word that is no pair.
    """
    pairs = {}
    for word in words:
        for pair in _PAIR_STARTS.split(word.strip().rstrip(",")):
            name, equals, value = pair.partition("=")
            if not pair:
                continue
            if not equals or not name.strip():
                raise UserError(f"{flag}: {pair.strip()!r} is not written as name=value, without spaces")
            pairs[name.strip()] = value.strip()
    return pairs
