"""Merges tags into metadata: the lists beside the pictures of a folder become the tags of its entries."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli, console
from library.options.merge_metadata import MergeTagsOptions


def main() -> None:
    console.setup(None)
    options = cli.parse((MergeTagsOptions,), description=__doc__)[MergeTagsOptions]
    with console.quiet_dependencies():
        from library.preprocessing.metadata.merging import TAGS, merge_texts
    merge_texts(options, TAGS)


if __name__ == "__main__":
    cli.run(main, "the metadata file is as it was, the same command begins anew")
