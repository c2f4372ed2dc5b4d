"""Extracts a LoRA: approximates the difference of two models of one family, layer by layer, at low rank."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli, console
from library.errors import UserError
from library.models.files.hub import find_model
from library.options.extract_lora import ExtractLoRAOptions
from library.tool_files import check_output


def main() -> None:
    console.setup(None)
    options = cli.parse((ExtractLoRAOptions,), description=__doc__)[ExtractLoRAOptions]
    original = find_model(options.model_org, "--model_org")
    tuned, output = find_model(options.model_tuned, "--model_tuned"), Path(options.save_to)
    if original.samefile(tuned):
        raise UserError(f"--model_tuned: {tuned} is what --model_org names, too, so there is no difference to extract")
    check_output("--save_to", output, [original, tuned])
    if options.load_original_model_to or options.load_tuned_model_to:
        console.notice(
            "--load_original_model_to and --load_tuned_model_to have no effect: layers are read one by one, and "
            "computed with on --device"
        )
    with console.quiet_dependencies():
        from library.devices import usable_device
        from library.lora.extraction import Recipe, extract_network
        from library.models.number_formats import NUMBER_FORMATS
    recipe = Recipe(
        rank=options.dim,
        conv_rank=options.conv_dim,
        clamp_quantile=options.clamp_quantile,
        least_difference=options.min_diff,
        exact=options.exact,
        loaded=NUMBER_FORMATS.get(options.load_precision),
        stored=NUMBER_FORMATS[options.save_precision or "float"],
        device=usable_device(options.device, decomposing=True),
        family="sd2" if options.v2 else "sdxl" if options.sdxl else None,
        v_prediction=bool(options.v_parameterization),
        no_metadata=options.no_metadata,
    )
    for kept in extract_network(original, tuned, output, recipe):
        print(kept)
    print(f"{output} written")


if __name__ == "__main__":
    cli.run(main, "nothing is written")
