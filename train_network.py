"""Trains a network (LoRA or a relative) beside a Stable Diffusion 1.x or 2.x model."""

from library import cli
from library.training.entry import train_network


def main() -> None:
    train_network(__doc__, sdxl=False, counterpart="sdxl_train_network.py")


if __name__ == "__main__":
    cli.run(main)
