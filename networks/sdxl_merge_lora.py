"""Merges networks such as LoRAs into an SDXL model, or into one another."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli
from library.options.merge_lora import SdxlMergeLoraOptions
from networks.merge_lora import merge


def main() -> None:
    merge(SdxlMergeLoraOptions, __doc__)


if __name__ == "__main__":
    cli.run(main, "nothing is written")
