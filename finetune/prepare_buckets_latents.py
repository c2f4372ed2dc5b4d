"""Sorts pictures into buckets by their shapes and encodes them ahead of fine-tuning, into files beside them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli, console
from library.errors import UserError
from library.models.files.hub import find_model
from library.options.prepare_latents import PrepareLatentsOptions
from library.options.work import WorkOptions
from library.preprocessing.metadata.keys import Keys
from library.preprocessing.metadata.resolutions import check_metadata
from library.preprocessing.pictures import find_pictures


def main() -> None:
    console.setup(None)
    settings = cli.parse((PrepareLatentsOptions, WorkOptions), description=__doc__)
    options, work = settings[PrepareLatentsOptions], settings[WorkOptions]
    if options.skip_existing and work.force:
        raise UserError("--skip_existing: with --force all latents are made again, drop one of the two")
    pictures = find_pictures("train_data_dir", options.train_data_dir, recursive=options.recursive)
    keys = Keys(pictures, full_path=options.full_path)
    known = check_metadata(options.in_json, options.out_json, keys)
    model = find_model(options.model_name_or_path, "model_name_or_path")
    vae = None if options.vae is None else find_model(options.vae, "--vae")
    with console.quiet_dependencies():
        from library.training.bucket_latents import prepare
    prepare(pictures, keys, known, model, vae, options, work)


if __name__ == "__main__":
    cli.run(main, "what is finished stays, the same command goes on from there")
