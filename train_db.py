"""Trains a Stable Diffusion 1.x or 2.x model itself on a few pictures of one thing (DreamBooth)."""

from library import cli
from library.data.config import DREAMBOOTH
from library.options import DreamBoothOptions
from library.training.entry import train_model


def main() -> None:
    train_model(__doc__, DreamBoothOptions, sdxl=False, counterpart="sdxl_train.py", kinds=frozenset({DREAMBOOTH}))


if __name__ == "__main__":
    cli.run(main)
