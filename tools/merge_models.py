"""Merges checkpoints: writes the weighted sum of two or more models of one family."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli, console
from library.errors import UserError, suggest_path
from library.options.merge_models import MergeModelsOptions
from library.suffixes import WEIGHTS_SUFFIXES


def main() -> None:
    console.setup(None)
    options = cli.parse((MergeModelsOptions,), description=__doc__)[MergeModelsOptions]
    check_files(options)
    with console.quiet_dependencies():
        import torch

        from library.models.merging import Recipe, merge_models
    formats = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, None: None}
    try:
        torch.empty(1, device=options.device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device: {options.device} cannot be used on this machine, leave it out for cpu") from error
    recipe = Recipe(
        options.shares,
        unet_only=options.unet_only,
        dtype=formats[options.precision],
        stored=formats[options.saving_precision],
        device=options.device,
    )
    merge_models(options.models, options.output, recipe, options.show_skipped)
    print(f"{options.output} written")


def check_files(options: MergeModelsOptions) -> None:
    """Raise UserError for missing models, and for an output that cannot be one."""
    for path in options.models:
        if not path.exists():
            raise UserError(f"--models: {path} does not exist{suggest_path(path, WEIGHTS_SUFFIXES)}")
        if options.output.exists() and options.output.samefile(path):
            raise UserError(f"--output: {options.output} is one of the models to merge, choose another name")
    if options.output.suffix.lower() not in WEIGHTS_SUFFIXES:
        raise UserError(f"--output: {options.output} ends in none of {', '.join(WEIGHTS_SUFFIXES)}")
    if options.output.is_dir():
        raise UserError(f"--output: {options.output} is a folder, give the name of a file in it")


if __name__ == "__main__":
    cli.run(main)
