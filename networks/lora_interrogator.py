"""Lists the words that a network reacts to: those to whose meaning its part for text encoders makes most difference."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli, console
from library.options.lora_interrogator import LoraInterrogatorOptions
from library.tool_files import check_inputs

_MOST, _LEAST = 50, 10  # words that are listed


def main() -> None:
    console.setup(None)
    options = cli.parse((LoraInterrogatorOptions,), description=__doc__)[LoraInterrogatorOptions]
    check_inputs("--model", [options.network])
    with console.quiet_dependencies():
        import torch

        from library.lora.interrogation import interrogate
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = interrogate(options.sd_model, options.network, options.batch_size, options.clip_skip, device, options.v2)
    sys.stdout.reconfigure(errors="backslashreplace")  # text that the console cannot show
    with console.long_list():
        print("the words whose meaning it changes most, and how much more than that of other words:")
        print(*(f"{difference:.5f}  {word}" for word, difference in found[:_MOST]), sep="\n")
        print("and least:")
        print(*(f"{difference:.5f}  {word}" for word, difference in found[-_LEAST:]), sep="\n")


if __name__ == "__main__":
    cli.run(main, "nothing is written")
