"""Cleans the captions and tags of all entries of a metadata file, by rules that can be edited."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli, console
from library.options.clean_captions import CleanCaptionsOptions

RULES = Path(__file__).resolve().with_name("cleaning_rules.toml")


def main() -> None:
    console.setup(None)
    options = cli.parse((CleanCaptionsOptions,), description=__doc__)[CleanCaptionsOptions]
    with console.quiet_dependencies():
        from library.preprocessing.metadata.cleaning import clean_metadata
        from library.preprocessing.metadata.rules import read_rules
    clean_metadata(options.in_json, options.out_json, read_rules(options.rules or RULES), debug=options.debug)


if __name__ == "__main__":
    cli.run(main, "the metadata file is as it was, the same command begins anew")
