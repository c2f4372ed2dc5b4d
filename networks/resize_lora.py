"""Makes a network smaller: writes it with lower ranks, as close to the original as these allow."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli, console
from library.options.resize_lora import ResizeLoraOptions
from library.tool_files import check_inputs, check_output


def main() -> None:
    console.setup(None)
    options = cli.parse((ResizeLoraOptions,), description=__doc__)[ResizeLoraOptions]
    check_inputs("--model", [options.source])
    check_output("--save_to", options.target, [options.source])
    with console.quiet_dependencies():
        from library.devices import usable_device
        from library.lora.resizing import Choice, resize_network
        from library.models.number_formats import NUMBER_FORMATS
    choice = Choice(options.new_rank, options.conv_rank, options.dynamic_method, options.dynamic_param)
    resize_network(
        options.source,
        options.target,
        choice,
        NUMBER_FORMATS.get(options.save_precision),
        usable_device(options.device, decomposing=True),
        options.verbose,
    )
    print(f"{options.target} written")


if __name__ == "__main__":
    cli.run(main, "nothing is written")
