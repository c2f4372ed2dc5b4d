"""Prompt lines and prompt files: which pictures to paint. Imports no torch, so that mistakes show at once.

A prompt line is a prompt followed by options, `a red circle --n blurry --w 512 --h 768 --d 7 --l 7.5 --s 30`.
A prompt file is a .txt of such lines (`#` starts a comment line), a .toml with defaults in `[prompt]` and one
`[[prompt.subset]]` per picture, or a .json list of lines and objects.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from library.console import warn
from library.errors import UserError, nearest, suggest
from library.generation.samplers import find_sampler
from library.toml_file import read_json, read_text, read_toml

MAX_STEPS = 998  # with more, Diffusers' schedulers step outside the model's 1000 noise levels
MAX_SEED = 2**64 - 1  # what a torch generator takes
_WHAT = "prompt file"


@dataclass(frozen=True)
class PromptLine:
    """One picture to paint. What is None was not said and is left to whoever paints."""

    prompt: str
    negative_prompt: str | None = None
    width: int | None = None  # pixels as written; the model may have to round them
    height: int | None = None
    seed: int | None = None
    scale: float | None = None  # of classifier-free guidance
    sample_steps: int | None = None
    sampler: str | None = None
    control_image: str | None = None


def parse_line(line: str, where: str = "prompt line") -> PromptLine:
    """Parse one prompt line; `where` names its origin in messages.

    Text after " --" that is no option is left out with a warning. Raises UserError for an option with an impossible
    value.
    """
    prompt, *pieces = re.split(r"\s--", line)
    values: dict[str, Any] = {"prompt": prompt.strip()}
    for piece in pieces:
        name, value = re.fullmatch(r"(\S*)\s*(.*)", piece.rstrip(), re.DOTALL).groups()
        option = _OPTIONS.get(name.lower())
        if option is None:
            warn(f'{where}: "--{piece.rstrip()}" is not an option of prompt lines and is left out{_closest(name)}')
            continue
        if option.parse is not _text:
            value, *rest = value.split(maxsplit=1) or [""]
            value = value.rstrip(",;")
            if rest:
                warn(f'{where}: "{rest[0]}" after --{name} {value} is left out')
        values[option.field] = _parse(option, value, f"{where}: --{name}")
    return PromptLine(**values)


def read_prompts(path: str | Path) -> tuple[PromptLine, ...]:
    """Read a prompt file: .txt, .toml or .json. Raises UserError naming the file and the place in it."""
    path = Path(path)
    readers = {".txt": _read_lines, ".toml": _read_toml, ".json": _read_json}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: a prompt file has to end in {', '.join(readers)}")
    prompts = tuple(reader(path))
    if not prompts:
        raise UserError(f"{path}: the file holds no prompt")
    return prompts


def _read_lines(file: Path) -> list[PromptLine]:
    text = read_text(file, _WHAT, [".txt"])
    lines = ((number, line.strip()) for number, line in enumerate(text.split("\n"), 1))
    return [parse_line(line, f"{file}, line {number}") for number, line in lines if line and not line.startswith("#")]


def _read_toml(file: Path) -> list[PromptLine]:
    defaults = read_toml(file, _WHAT).get("prompt")
    if not isinstance(defaults, dict):
        raise UserError(f"{file}: the file needs one [[prompt.subset]] for each picture")
    subsets = defaults.pop("subset", [])
    if not isinstance(subsets, list):
        raise UserError(f"{file}: prompt.subset has to be written [[prompt.subset]], with two brackets")
    shared = _parse_keys(defaults, f"{file}: prompt")
    return [_from_keys(subset, f"{file}: prompt.subset[{i}]", shared) for i, subset in enumerate(subsets)]


def _read_json(file: Path) -> list[PromptLine]:
    document = read_json(file, _WHAT)
    if not isinstance(document, list):
        raise UserError(f"{file}: the file has to be a list of prompts, [...]")
    return [
        parse_line(entry.strip(), f"{file}: [{i}]") if isinstance(entry, str) else _from_keys(entry, f"{file}: [{i}]")
        for i, entry in enumerate(document)
    ]


def _from_keys(table: Any, where: str, shared: Mapping[str, Any] | None = None) -> PromptLine:
    if not isinstance(table, dict):
        raise UserError(f"{where} has to be a prompt or a table of options, not {table!r}")
    values = {**(shared or {}), **_parse_keys(table, where)}
    if "prompt" not in values:
        raise UserError(f"{where} has no prompt")
    return PromptLine(**values)


def _parse_keys(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a table of a .toml or .json file; null says nothing, unknown keys are left out with a warning."""
    values = {}
    for key, value in table.items():
        if key in _KEYS and value is not None:
            values[_KEYS[key].field] = _parse(_KEYS[key], value, f"{where}.{key}")
        elif key not in _KEYS:
            warn(f"{where}.{key} is not a known key and is left out{suggest(key, _KEYS)}")
    return values


class _Option(NamedTuple):
    field: str  # of PromptLine
    key: str  # in .toml and .json files
    parse: Callable[[Any], Any]  # what was written -> the field's value; raises ValueError("a ... ")


def _parse(option: _Option, value: Any, where: str) -> Any:
    try:
        return option.parse(value)
    except ValueError as error:
        raise UserError(f"{where} has to be {error}, not {value!r}") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    raise ValueError("a text")


def _number(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("a number")
    return number


def _integer(value: Any) -> int:
    try:
        if isinstance(value, str):
            return int(value)
        if _number(value) == int(value):
            return int(value)
    except ValueError:
        pass
    raise ValueError("a whole number")


def _pixels(value: Any) -> int:
    if (pixels := _integer(value)) < 1:
        raise ValueError("at least 1")
    return pixels


def _steps(value: Any) -> int:
    return min(max(_integer(value), 1), MAX_STEPS)


def _seed(value: Any) -> int | None:
    """A seed; -1 asks for a new one each time, as it does in the web UIs."""
    if not -1 <= (seed := _integer(value)) <= MAX_SEED:
        raise ValueError(f"a seed from 0 to {MAX_SEED}")
    return None if seed == -1 else seed


def _sampler(value: Any) -> str:
    find_sampler(_text(value))
    return value


_OPTIONS = {
    "n": _Option("negative_prompt", "negative_prompt", _text),
    "w": _Option("width", "width", _pixels),
    "h": _Option("height", "height", _pixels),
    "d": _Option("seed", "seed", _seed),
    "l": _Option("scale", "scale", _number),
    "s": _Option("sample_steps", "sample_steps", _steps),
    "ss": _Option("sampler", "sample_sampler", _sampler),
    "cn": _Option("control_image", "controlnet_image", _text),
}
_KEYS = {option.key: option for option in (_Option("prompt", "prompt", _text), *_OPTIONS.values())}


def _closest(name: str) -> str:
    """The end of a warning about an unknown option, which may be the long name of a known one."""
    letters = {name: name for name in _OPTIONS} | {option.key: name for name, option in _OPTIONS.items()}
    match = nearest(name.lower(), letters)
    return f", did you mean --{letters[match]}?" if match else ""
