"""Prints what a .safetensors file tells about itself, as JSON."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli, console
from library.errors import UserError
from library.options import option

_SHOWN = 100  # characters of a data URL


@dataclass(frozen=True)
class ShowMetadataOptions:
    """The file to look into."""

    title: ClassVar[str] = "showing metadata"

    model: Path | None = option(  # noqa: RUF009 - makes a field, as dataclasses.field does
        None, "the file; its name alone does, too", metavar="FILE"
    )

    def __post_init__(self) -> None:
        if self.model is None:
            raise UserError("--model: no file is given, give a .safetensors file")


def main() -> None:
    console.setup(None)
    words = sys.argv[1:]
    if words and not words[0].startswith("-"):
        words.insert(0, "--model")
    path = cli.parse((ShowMetadataOptions,), words, description=__doc__)[ShowMetadataOptions].model
    with console.quiet_dependencies():
        from library.models.files.checkpoint import open_weights
    with open_weights(path) as file:
        metadata = file.metadata
    if not metadata:
        console.notice(f"{path} holds no metadata{'' if is_safetensors(path) else ': PyTorch files never do'}")
        return
    sys.stdout.reconfigure(errors="backslashreplace")  # text that the console, or UTF-8 itself, cannot show
    print(json.dumps(decoded(metadata), indent=2, ensure_ascii=False, sort_keys=True))


def is_safetensors(path: Path) -> bool:
    """Whether the content, not the name, is that of a safetensors file: its header begins at the ninth byte."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def decoded(metadata: dict[str, str]) -> dict[str, Any]:
    """The metadata with JSON objects and lists in place of the text that they are stored as; numbers stay text. Of
    pictures (data URLs) only the beginning and the size.
    """
    return {name: _decode(value) for name, value in metadata.items()}


def _decode(text: str) -> Any:
    if text.startswith("data:") and len(text) > _SHOWN:
        return f"{text.partition(',')[0][:_SHOWN]},... ({len(text)} characters)"
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return text
    return value if isinstance(value, dict | list) else text


if __name__ == "__main__":
    cli.run(main)
