"""Writes a caption beside each picture of a folder: by BLIP, or by another model that makes text of pictures."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli, console
from library.options.make_captions import MakeCaptionsOptions
from library.options.work import WorkOptions
from library.preprocessing.captioning.folder import caption_folder

_OF_ONE_WAY = {"num_beams": True, "top_p": False, "seed": False}  # flags, and whether they are for --beam_search


def main() -> None:
    console.setup(None)
    settings = cli.parse((MakeCaptionsOptions, WorkOptions), description=__doc__)
    options = settings[MakeCaptionsOptions]
    for name, searching in _OF_ONE_WAY.items():
        if name in settings.given and searching != options.beam_search:
            console.notice(f"--{name} has no effect {'with' if options.beam_search else 'without'} --beam_search")
    choice = {
        "max_length": options.max_length,
        "min_length": options.min_length,
        "beams": options.num_beams if options.beam_search else None,
        "top_p": options.top_p,
        "seed": options.seed,
    }
    caption_folder(options, settings[WorkOptions], options.model, choice, prompt=options.prompt)


if __name__ == "__main__":
    cli.run(main, "what is finished stays, the same command goes on from there")
