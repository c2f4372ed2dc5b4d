"""Teaches a Stable Diffusion 1.x or 2.x model a new word: only the word's own vectors are trained."""

from library import cli
from library.training.entry import textual_inversion


def main() -> None:
    textual_inversion(__doc__, sdxl=False, counterpart="sdxl_train_textual_inversion.py")


if __name__ == "__main__":
    cli.run(main)
