"""Which pictures a tool works on, and which text file belongs to each."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from library.console import notice, warn
from library.data.scanning.files import IMAGE_SUFFIXES, folder_problem, is_image, subfolders
from library.data.scanning.listing import normalised
from library.data.scanning.wording import counted
from library.errors import UserError, some
from library.replacing import clean_up


def find_pictures(flag: str, folder: Path, *, recursive: bool = False) -> list[Path]:
    """The pictures in the folder that `flag` names, `recursive`: and in all folders below it, in an order that is the
    same everywhere. Each begins with `folder` as it was given. Without `recursive`, says if folders below are left out.
    UserError if the folder cannot be read or has none.

    Hidden files and folders are left out; a folder below that cannot be read is left out with a warning. Links to
    folders are followed, but no folder is gone through twice.
    """
    if problem := folder_problem(folder):
        raise UserError(f"{flag}: {problem}")
    pictures = sorted(_pictures(folder, recursive), key=_place)
    if not pictures:
        raise no_pictures(flag, folder, recursive)
    if not recursive and (below := subfolders(folder)):
        places = counted(len(below), "folder", "folders")
        notice(f"{folder}: what lies in the {places} below is left out, --recursive takes it along")
    return pictures


def no_pictures(flag: str, folder: Path, recursive: bool) -> UserError:
    """That the folder that `flag` names has none, and where there are some."""
    hint = f": {', '.join(sorted(IMAGE_SUFFIXES))} are taken"
    if not recursive and any(_pictures(folder, True)):
        hint = ", but in those below it: add --recursive"
    return UserError(f"{flag}: there are no pictures in {folder}{hint}")


def _place(path: Path) -> tuple[list[str], str]:
    """Where a path stands among others, whatever the system's separator; names that look the same keep an order."""
    return [normalised(part) for part in path.parts], os.fspath(path)


def _pictures(folder: Path, recursive: bool) -> Iterator[Path]:
    return (Path(place, name) for place, names in folders(folder, recursive) for name in names if is_image(name))


def folders(folder: Path, recursive: bool) -> Iterator[tuple[str, list[str]]]:
    """The folder and, if `recursive`, those below it, as `find_pictures` goes through them, with the names of the files
    in each.
    """

    def unreadable(error: OSError) -> None:
        warn(f"{error.filename}: this folder cannot be read and is left out ({error.strerror})")

    seen: set[str] = set()
    links = [os.fspath(folder)]
    while links:  # a folder that is there itself is gone through under its own name, not under that of a link to it
        later: list[str] = []
        for link in links:
            for place, inside, names in os.walk(link, onerror=unreadable):
                real = os.path.realpath(place)
                if real in seen:
                    inside.clear()
                    continue
                seen.add(real)
                inside[:] = sorted(name for name in inside if recursive and not name.startswith("."))
                below = [os.path.join(place, name) for name in inside]
                later += [path for path in below if os.path.islink(path)]
                yield place, names
        links = sorted(later)


def text_file(picture: Path, extension: str) -> Path:
    """The file beside a picture that holds its caption or its tags; `extension` with its dot."""
    return picture.with_name(picture.stem + extension)


def with_files_of_their_own(pictures: list[Path], extension: str) -> list[Path]:
    """The pictures whose `text_file` is no other's: of several with one, the first. Says which are left out."""
    owners: dict[str, Path] = {}
    for picture in pictures:
        owners.setdefault(os.path.normcase(text_file(picture, extension)), picture)
    own = set(owners.values())
    others = [picture.name for picture in pictures if picture not in own]
    if others:
        warn(
            f"left out, since another picture has the same name but for its ending, and so the same {extension} file: "
            f"{some(others)}"
        )
    return [picture for picture in pictures if picture in own]


def clean_up_beside(pictures: Iterable[Path], extension: str) -> None:
    """Remove what killed runs left of text files of this extension in the folders of the pictures."""
    for folder in {picture.parent for picture in pictures}:
        clean_up(folder, f".*{re.escape(extension)}")


def with_dot(extension: str) -> str:
    """The ending of text files as it is in names: `txt` is meant to be `.txt`. UserError if it is none, or that of
    pictures, which such files would overwrite.
    """
    dotted = f".{extension}" if extension.isalnum() else extension
    if not dotted.strip(".") or any(sign in dotted for sign in "/\\"):
        raise UserError(f"--caption_extension: {extension!r} is no ending of a file's name, give one like .txt")
    if os.path.splitext(f"x{dotted}")[1].lower() in IMAGE_SUFFIXES:
        raise UserError(f"--caption_extension: {extension} is an ending of pictures, give one like .txt")
    return dotted
