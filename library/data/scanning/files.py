"""Which files in a folder are images, and how a folder that is not there is reported."""

import os
from pathlib import Path

from PIL import Image

from library.errors import suggest_path

_OPTIONAL = {".avif", ".jxl"}  # as far as this Pillow was built with them, or a plugin has added them
IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".bmp"} | (_OPTIONAL & set(Image.registered_extensions()))
)


def is_image(name: str) -> bool:
    """Whether a file of this name counts as an image. Hidden files do not: some systems keep such shadows of images."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def file_names(folder: Path) -> list[str]:
    """The names of all files directly in a folder."""
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if entry.is_file()]


def count_images(folder: Path) -> int:
    """How many images lie directly in a folder."""
    return sum(is_image(name) for name in file_names(folder))


def subfolders(folder: Path) -> list[Path]:
    """The visible folders in a folder, by name."""
    with os.scandir(folder) as entries:
        return [folder / name for name in sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))]


def folder_problem(folder: Path) -> str | None:
    """Why `folder` cannot be read as a folder, with the nearest one that exists; None if it can."""
    if folder.is_dir():
        return None if os.access(folder, os.R_OK | os.X_OK) else f"the folder {folder} cannot be read"
    if folder.exists():
        return f"{folder} is a file, not a folder"
    return f"the folder {folder} does not exist{suggest_path(folder, folder=True)}"
