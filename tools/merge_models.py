"""Merges checkpoints: writes the weighted sum of two or more models of one family."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli, console
from library.options.merge_models import MergeModelsOptions
from library.tool_files import check_inputs, check_output


def main() -> None:
    console.setup(None)
    options = cli.parse((MergeModelsOptions,), description=__doc__)[MergeModelsOptions]
    check_inputs("--models", options.models)
    check_output("--output", options.output, options.models)
    with console.quiet_dependencies():
        from library.devices import usable_device
        from library.models.merging import Recipe, merge_models
        from library.models.number_formats import NUMBER_FORMATS
    recipe = Recipe(
        options.shares,
        unet_only=options.unet_only,
        dtype=NUMBER_FORMATS[options.precision],
        stored=NUMBER_FORMATS.get(options.saving_precision),
        device=usable_device(options.device),
    )
    merge_models(options.models, options.output, recipe, options.show_skipped)
    print(f"{options.output} written")


if __name__ == "__main__":
    cli.run(main, "nothing is written")
