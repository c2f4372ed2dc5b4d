"""Extracts LoRAs from a DyLoRA: writes one of every rank that it was trained at."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli, console
from library.options.extract_lora_from_dylora import ExtractLoraFromDyloraOptions
from library.tool_files import check_inputs, check_output


def main() -> None:
    console.setup(None)
    options = cli.parse((ExtractLoraFromDyloraOptions,), description=__doc__)[ExtractLoraFromDyloraOptions]
    model, save_to = Path(options.model), Path(options.save_to)
    check_inputs("--model", [model])
    check_output("--save_to", save_to, [])
    with console.quiet_dependencies():
        from library.lora.nested_ranks import extract_ranks
    for path in extract_ranks(model, save_to, options.unit):
        print(f"{path} written")


if __name__ == "__main__":
    cli.run(main)
