"""From options groups to a command line, and from the user's words to `Settings`."""

import argparse
import json
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from library import console
from library.errors import UserError, suggest
from library.options import METHODS, ConfigOptions, Option, Settings, options_of
from library.program_arguments import hide
from library.toml_file import read_toml

_OF_THE_FILE_ITSELF = frozenset(option.name for option in options_of(ConfigOptions))


def run(main: Callable[[], None], interrupted: str = "what is written so far stays") -> None:
    """Run a script's main function: a user's mistake is one sentence and exit status 2, so is a package that is not
    installed; Ctrl-C is exit status 130, and `interrupted` says what comes of it; SIGTERM is 143. What is to be tidied
    up at the end is tidied up.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except UserError as mistake:
        console.error(str(mistake))
        sys.exit(2)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "library":
            raise
        console.error(_not_installed(error.name))
        sys.exit(2)
    except KeyboardInterrupt:
        console.error(f"interrupted: {interrupted}")
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what ends with the interpreter cannot be left by an exception


def _not_installed(package: str) -> str:
    from library.environment import ROOT, VENV, venv_python

    python = venv_python(VENV)
    remedy = f"run {python} {sys.argv[0]}"
    if not python.exists() or Path(sys.prefix) == VENV:
        remedy = f"run {sys.executable} -m pip install -r {ROOT / 'requirements.txt'}"
    return f"the package {package} is not installed for this Python: {remedy}"


def parse(
    groups: Sequence[type],
    argv: Sequence[str] | None = None,
    *,
    description: str,
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> Settings:
    """The settings of a run from `argv` (by default the program's own) and the config file it names.

    `defaults` are a script's own, in place of those of the groups. Exits after --help and --output_config. Raises
    UserError for an unknown flag and for a value that does not fit.
    """
    options = {option.name: option for group in groups for option in options_of(group)}
    foreign = defaults.keys() - options.keys()
    if foreign:
        raise ValueError(f"defaults for options of no group: {', '.join(sorted(foreign))}")
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser(groups, description, defaults)
    given, rest = parser.parse_known_args(argv)
    _hide_secrets(options, vars(given))
    if rest:
        raise UserError(_stray(rest, argv, groups, options))
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(given).items()}
    config_file, output_config = values.get("config_file"), values.get("output_config", False)
    if config_file is not None and not output_config:
        values = _read_config(Path(config_file), options) | values
    settings = _settings(groups, {**defaults, **values}, frozenset(values))
    if output_config:
        _write_config(config_file, settings)
        sys.exit(0)
    return settings


def _hide_secrets(options: Mapping[str, Option], given: Mapping[str, Any]) -> None:
    """Hide what is given for secret options from whoever lists this machine's processes."""
    for name, value in given.items():
        if options[name].details.secret and value and hide(value):
            console.notice(f"--{name}: others may see it in the list of processes, --help names safer ways")


def _settings(groups: Sequence[type], values: Mapping[str, Any], given: frozenset[str]) -> Settings:
    made = {}
    for group in groups:
        names = [option.name for option in options_of(group)]
        made[group] = group(**{name: values[name] for name in names if name in values})
    return Settings(MappingProxyType(made), given)


# --- the command line ---


class _Parser(argparse.ArgumentParser):
    """Reports mistakes as UserError instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        told = message.removeprefix("argument ")
        raise UserError(told.replace("ignored explicit argument", "this flag takes no value, leave out"))


def make_parser(
    groups: Sequence[type], description: str, defaults: Mapping[str, Any] = MappingProxyType({})
) -> argparse.ArgumentParser:
    """What reads the command line of a script with these groups; see `parse`."""
    words = [option.name for group in groups for option in options_of(group) if option.details.positional]
    parser = _Parser(
        description=description,
        usage=" ".join(["%(prog)s", *words, "[options]"]),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # only what the user gives is in the result
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32),
    )
    for group in groups:
        section = parser.add_argument_group(group.title)
        for option in options_of(group):
            _add(section, option, defaults.get(option.name, option.default))
    return parser


def _add(section: Any, option: Option, default: Any) -> None:
    """Add a flag and, hidden, its old spellings; or a word without a flag."""
    keywords: dict[str, Any] = {}
    help = option.details.help
    if option.kind is bool:
        keywords["action"] = "store_true"
    else:
        keywords["type"] = _reader(option)
        keywords["metavar"] = None if option.details.positional else option.details.metavar
        keywords["nargs"] = "*" if option.many else None
        if option.details.choices:
            help += f" (one of: {', '.join(map(str, option.details.choices))})"
        if default not in (None, ""):
            help += f" [{default}]"
    short = [f"-{option.details.short}"] if option.details.short else []
    section.add_argument(*short, option.spelling, help=help.replace("%", "%%"), **keywords)
    for alias in option.details.aliases:
        section.add_argument(f"--{alias}", help=argparse.SUPPRESS, dest=option.name, **keywords)


def _reader(option: Option) -> Callable[[str], Any]:
    """What argparse calls with a flag's value."""

    def read(text: str) -> Any:
        try:
            return option.from_text(text)
        except ValueError as reason:
            raise UserError(f"{option.spelling}: {reason}") from None

    return read


def _stray(rest: Sequence[str], argv: Sequence[str], groups: Sequence[type], options: Mapping[str, Option]) -> str:
    """The sentence about the first of the words that belong to no flag."""
    for word in rest:
        if word.startswith("-"):
            return _unknown(word.partition("=")[0], groups, options)
    word = rest[0]
    for before, after in pairwise(argv):
        option = options.get(before.removeprefix("--"))
        if after == word and option is not None and option.kind is bool:
            return f"{before}: this flag takes no value, leave out {word!r}"
    return f"{word!r} belongs to no option, put values with spaces in quotes"


def _unknown(flag: str, groups: Sequence[type], options: Mapping[str, Option]) -> str:
    """The sentence about a flag that a script with these groups of options does not have."""
    flags = [option.spelling for option in options.values() if not option.details.positional]
    if numbered := [own for own in flags if own[:-1] == flag and own[-1].isdigit()]:
        return f"{flag}: unknown option, did you mean {' or '.join(numbered)}?"
    for group in groups:
        if flag in getattr(group, "instead", {}):
            return f"{flag}: {group.instead[flag]}"
    takers = [group for group in METHODS if flag in (option.spelling for option in options_of(group))]
    if scripts := [script for group in takers for script in group.scripts]:
        return f"{flag}: this script has no such option, but {' and '.join(scripts)}"
    return f"{flag}: unknown option{suggest(flag, flags)}"


# --- the config file ---


def _config_path(path: Path) -> Path:
    return path if path.suffix == ".toml" else path.with_name(f"{path.name}.toml")


def _read_config(named: Path, options: Mapping[str, Option]) -> dict[str, Any]:
    """The values in a config file by option, old spellings and sections resolved."""
    path = named if named.is_file() else _config_path(named)
    table = read_toml(path, "config file")
    if "datasets" in table:
        raise UserError(f"{path}: this file describes datasets, give it as --dataset_config")
    names = {spelling: option for option in options.values() for spelling in (option.name, *option.details.aliases)}
    values = {}
    for key, value in _flatten(table):
        option = names.get(key)
        if option is None:
            console.warn(f"{path}: {key} is not an option of this script and is ignored{suggest(key, options)}")
        elif option.name in _OF_THE_FILE_ITSELF:
            console.warn(f"{path}: {key} only works on the command line and is ignored")
        elif value != "" or (option.kind is str and not option.details.choices):  # "": not set, say front ends
            if option.name in values:
                console.warn(f"{path}: {key} is set more than once, the last value counts")
            try:
                values[option.name] = option.from_toml(value)
            except ValueError as reason:
                raise UserError(f"{path}: {key}: {reason}") from None
    return values


def _flatten(table: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Keys and values of a table and of all tables in it."""
    pairs = []
    for key, value in table.items():
        pairs += _flatten(value) if isinstance(value, Mapping) else [(key, value)]
    return pairs


def _write_config(config_file: str | None, settings: Settings) -> None:
    """Write every value that is set, one section per group, never over an existing file."""
    if config_file is None:
        raise UserError("--output_config: the file to write is not named, add --config_file NAME.toml")
    if console.rank() != 0:
        return
    path = _config_path(Path(config_file))
    lines = []
    for group, instance in settings.groups.items():
        values = {option.name: getattr(instance, option.name) for option in options_of(group) if _is_written(option)}
        shown = [f"{name} = {_toml(value)}" for name, value in values.items() if value is not None]
        lines += [f"[{group.title.replace(' ', '_')}]", *shown, ""] if shown else []
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write("\n".join(lines))
    except FileExistsError:
        raise UserError(f"{path}: this file exists and is not overwritten, choose another --config_file") from None
    except OSError as problem:
        raise UserError(f"{path}: this config file cannot be written ({problem.strerror})") from None
    console.notice(f"settings written to {path}")


def _is_written(option: Option) -> bool:
    return not option.details.secret and option.name not in _OF_THE_FILE_ITSELF


def _toml(value: Any) -> str:
    """A value as TOML, whose basic strings, numbers, booleans and arrays are written like those of JSON."""
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
