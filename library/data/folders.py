"""The folder convention: `<repeats>_<class tokens>` folders of images under --train_data_dir and --reg_data_dir."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from library.console import notice
from library.data.scanning.files import count_images, folder_problem, subfolders
from library.data.scanning.wording import counted
from library.errors import UserError

_NAME = re.compile(r"(\d+)_(.*)", re.DOTALL)


@dataclass(frozen=True)
class ImageFolder:
    """One folder of the convention."""

    path: Path
    repeats: int
    class_tokens: str


def image_folders(root: str, flag: str) -> list[ImageFolder]:
    """The folders under `root` that follow the convention; others are left out with a notice.

    Raises UserError, naming `flag` and the value it should have, if there are none.
    """
    root_path = Path(root).expanduser()
    problem = folder_problem(root_path)
    if problem:
        raise UserError(f"{flag}: {problem}")
    folders = []
    for path in subfolders(root_path):
        match = _NAME.fullmatch(path.name)
        if match and int(match[1]) > 0:
            folders.append(ImageFolder(path, int(match[1]), match[2]))
        elif match:
            notice(f"{path} is left out: its name asks for 0 repeats")
        else:
            notice(f"{path} is left out: its name does not start with a number of repeats, as in 10_{path.name}")
    if not folders:
        raise UserError(_nothing_found(root_path, flag))
    loose = count_images(root_path)
    if loose:
        notice(
            f"{loose} images directly in {root_path} are left out: only those in its <repeats>_<name> folders are used"
        )
    return folders


def _nothing_found(root: Path, flag: str) -> str:
    """What is wrong with a root that holds no folder of the convention, and the value or name to use instead."""
    images = count_images(root)
    name = Path(os.path.abspath(root)).name
    is_reg = flag == "--reg_data_dir"
    repeats, tokens = (1, "class") if is_reg else (10, "class tokens")
    if images and _NAME.fullmatch(name):
        parent = root.parent if root.name not in ("", "..") else Path(os.path.abspath(root)).parent
        return f"{flag}={root} is one of the folders to look for, not the folder that holds them: use {flag}={parent}"
    if images:
        folder, further = root / f"{repeats}_{'<class>' if is_reg else name}", " and is_reg = true" if is_reg else ""
        return (
            f"{flag}={root} holds {images} images itself where folders named <repeats>_<{tokens}> are looked for: "
            f"move the images into {folder}, or give a dataset file with image_dir = '{root}'{further} "
            "as --dataset_config"
        )
    children = subfolders(root)
    for child in children:
        if any(_NAME.fullmatch(path.name) and count_images(path) for path in subfolders(child)):
            return f"{flag}={root} holds no folders named <repeats>_<{tokens}>, but {child} does: use {flag}={child}"
    for child in children:
        if count_images(child):
            return (
                f"{flag}={root} holds no folder named <repeats>_<{tokens}>: rename {child} to "
                f"{root / f'{repeats}_{child.name}'} for {counted(repeats, 'repeat', 'repeats')} of each image"
            )
    example = root / f"{repeats}_name of what they show"
    return f"{flag}={root} holds no images: put them into a folder named like {example}"
