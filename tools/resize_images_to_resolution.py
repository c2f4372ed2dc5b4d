"""Copies a folder of pictures, with smaller versions of those that are larger than given resolutions."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli, console
from library.data.scanning.files import folder_problem
from library.errors import UserError
from library.options.resize_images import ResizeImagesOptions
from library.options.work import WorkOptions
from library.tool_files import check_apart


def main() -> None:
    console.setup(None)
    settings = cli.parse((ResizeImagesOptions, WorkOptions), description=__doc__)
    options, work = settings[ResizeImagesOptions], settings[WorkOptions]
    if problem := folder_problem(options.src_img_folder):
        raise UserError(f"src_img_folder: {problem}")
    check_apart("dst_img_folder", options.dst_img_folder, [options.src_img_folder], recursive=options.recursive)
    with console.quiet_dependencies():
        from library.preprocessing.resizing import Versions, resize_folder
    versions = Versions(
        options.resolutions,
        divisible_by=options.divisible_by,
        interpolation=options.interpolation,
        as_png=options.save_as_png,
        with_associated=options.copy_associated_files,
    )
    resize_folder(
        options.src_img_folder,
        options.dst_img_folder,
        versions,
        recursive=options.recursive,
        force=work.force,
        threads=work.threads,
    )


if __name__ == "__main__":
    cli.run(main, "what is finished stays, the same command goes on from there")
