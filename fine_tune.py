"""Trains a Stable Diffusion 1.x or 2.x model itself, on pictures whose captions are in metadata files."""

from library import cli
from library.data.config import FINETUNING
from library.options import FineTuneOptions
from library.training.entry import train_model


def main() -> None:
    train_model(__doc__, FineTuneOptions, sdxl=False, counterpart="sdxl_train.py", kinds=frozenset({FINETUNING}))


if __name__ == "__main__":
    cli.run(main)
