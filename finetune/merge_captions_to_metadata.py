"""Merges captions into metadata: the texts beside the pictures of a folder become the captions of its entries."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli, console
from library.options.merge_metadata import MergeCaptionsOptions


def main() -> None:
    console.setup(None)
    options = cli.parse((MergeCaptionsOptions,), description=__doc__)[MergeCaptionsOptions]
    with console.quiet_dependencies():
        from library.preprocessing.metadata.merging import CAPTIONS, merge_texts
    merge_texts(options, CAPTIONS)


if __name__ == "__main__":
    cli.run(main, "the metadata file is as it was, the same command begins anew")
