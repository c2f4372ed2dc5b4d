"""Writes a caption beside each picture of a folder, by GIT."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli, console
from library.options.make_captions_by_git import MakeCaptionsByGitOptions
from library.options.work import WorkOptions
from library.preprocessing.captioning.folder import caption_folder
from library.preprocessing.captioning.remarks import without_remarks


def main() -> None:
    console.setup(None)
    settings = cli.parse((MakeCaptionsByGitOptions, WorkOptions), description=__doc__)
    options = settings[MakeCaptionsByGitOptions]
    finish = without_remarks if options.remove_words else str
    model, choice = ("--model_id", options.model_id), {"max_length": options.max_length}
    caption_folder(options, settings[WorkOptions], model, choice, finish=finish)


if __name__ == "__main__":
    cli.run(main, "what is finished stays, the same command goes on from there")
