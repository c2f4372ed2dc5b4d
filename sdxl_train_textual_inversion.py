"""Teaches an SDXL model a new word: only the word's own vectors, of both text encoders, are trained."""

from library import cli
from library.training.entry import textual_inversion


def main() -> None:
    textual_inversion(__doc__, sdxl=True, counterpart="train_textual_inversion.py")


if __name__ == "__main__":
    cli.run(main)
