"""Approximates the sum of LoRAs, whatever their ranks, by one of a chosen rank."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli, console
from library.lora import block_weights
from library.options.svd_merge_lora import SvdMergeLoraOptions
from library.tool_files import check_inputs, check_output


def main() -> None:
    console.setup(None)
    options = cli.parse((SvdMergeLoraOptions,), description=__doc__)[SvdMergeLoraOptions]
    check_inputs("--models", options.networks)
    check_output("--save_to", options.target, options.networks)
    lbws = block_weights.read_all(options.lbws, len(options.networks))
    with console.quiet_dependencies():
        from library.devices import usable_device
        from library.lora.joining import svd_merge
        from library.models.number_formats import NUMBER_FORMATS
    svd_merge(
        options.networks,
        options.strengths,
        options.target,
        rank=options.new_rank,
        conv_rank=options.new_conv_rank or options.new_rank,
        device=usable_device(options.device, decomposing=True),
        dtype=NUMBER_FORMATS[options.saved_as],
        lbws=lbws,
        no_metadata=options.no_metadata,
    )
    print(f"{options.target} written")


if __name__ == "__main__":
    cli.run(main, "nothing is written")
