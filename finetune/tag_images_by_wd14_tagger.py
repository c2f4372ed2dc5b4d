"""Tags pictures: writes what a WD14 tagger finds in each, into a text file beside it or into one file for all."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli, console
from library.errors import UserError
from library.options.tag_images import TagImagesOptions
from library.options.work import WorkOptions
from library.tool_files import check_writable


def main() -> None:
    console.setup(None)
    settings = cli.parse((TagImagesOptions, WorkOptions), description=__doc__)
    options, work = settings[TagImagesOptions], settings[WorkOptions]
    if options.append_tags and work.force:
        raise UserError("--force replaces tags and --append_tags adds to them, drop one of the two")
    if options.output_path is not None:
        if options.output_path.is_dir():
            raise UserError(f"--output_path: {options.output_path} is a folder, give the name of a file in it")
        check_writable("--output_path", options.output_path)
    with console.quiet_dependencies():
        from library.preprocessing.tagging.folder import tag_folder
    tag_folder(options, work, named="repo_id" in settings.given)


if __name__ == "__main__":
    cli.run(main, "what is finished stays, the same command goes on from there")
