"""Trains a Stable Diffusion 1.x or 2.x model itself, on pictures whose captions are in metadata files."""

from library import cli
from library.training.entry import fine_tune


def main() -> None:
    fine_tune(__doc__)


if __name__ == "__main__":
    cli.run(main)
