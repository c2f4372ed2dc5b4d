"""Trains an SDXL model itself: fine-tuning with metadata files, or DreamBooth."""

from library import cli
from library.data.config import BOTH_KINDS
from library.options import SdxlFineTuneOptions
from library.training.entry import train_model


def main() -> None:
    train_model(__doc__, SdxlFineTuneOptions, sdxl=True, counterpart="fine_tune.py or train_db.py", kinds=BOTH_KINDS)


if __name__ == "__main__":
    cli.run(main)
