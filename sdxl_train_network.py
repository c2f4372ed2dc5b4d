"""Trains a network (LoRA or a relative) beside an SDXL model."""

from library import cli
from library.training.entry import train_network


def main() -> None:
    train_network(__doc__, sdxl=True, counterpart="train_network.py")


if __name__ == "__main__":
    cli.run(main)
