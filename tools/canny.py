"""Draws the edges of pictures, white on black, as ControlNet models of edges are trained with."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli, console
from library.data.scanning.files import IMAGE_SUFFIXES
from library.errors import UserError, suggest_path
from library.options.canny import CannyOptions
from library.options.work import WorkOptions
from library.tool_files import check_apart


def main() -> None:
    console.setup(None)
    settings = cli.parse((CannyOptions, WorkOptions), description=__doc__)
    options, work = settings[CannyOptions], settings[WorkOptions]
    source = options.input
    if not source.exists():
        like = suggest_path(source, IMAGE_SUFFIXES) if source.suffix else suggest_path(source, folder=True)
        raise UserError(f"--input: {source} does not exist{like}")
    if source.is_dir() and options.output.suffix.lower() in IMAGE_SUFFIXES and not options.output.exists():
        raise UserError(f"--output: {options.output} would be a folder, as {source} is one: give it another name")
    check_apart("--output", options.output, [source], recursive=options.recursive)
    with console.quiet_dependencies():
        from library.preprocessing.edges import Thresholds, edges_of
    edges_of(
        source,
        options.output,
        Thresholds(options.thres1, options.thres2),
        recursive=options.recursive,
        force=work.force,
        threads=work.threads,
    )


if __name__ == "__main__":
    cli.run(main, "what is finished stays, the same command goes on from there")
