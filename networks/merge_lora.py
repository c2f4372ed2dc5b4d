"""Merges networks such as LoRAs into a model, or into one another."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli, console
from library.errors import UserError
from library.models.files.hub import find_model
from library.options.merge_lora import MergeLoraOptions, SdxlMergeLoraOptions
from library.suffixes import WEIGHTS_SUFFIXES
from library.tool_files import check_apart, check_ending, check_inputs, check_output, check_writable

if TYPE_CHECKING:
    from library.lora.block_weights import BlockWeights

Options = MergeLoraOptions | SdxlMergeLoraOptions


def main() -> None:
    merge(MergeLoraOptions, __doc__)


def merge(group: type[Options], description: str) -> None:
    """The whole program, for a script with these options."""
    console.setup(None)
    options = cli.parse((group,), description=description)[group]
    check_inputs("--models", options.networks)
    into_model(options) if options.sd_model else into_network(options)
    print(f"{options.target} written")


def into_model(options: Options) -> None:
    path = find_model(options.sd_model, "--sd_model")
    if options.target.suffix.lower() in WEIGHTS_SUFFIXES:
        check_output("--save_to", options.target, [path, *options.networks])
    else:
        check_apart("--save_to", options.target, [path, *options.networks])
        check_ending("--save_to", options.target)
        check_writable("--save_to", options.target)
        console.notice(f"{options.target} has not the ending of a file, so a Diffusers folder is written")
    if options.concat or options.shuffle:
        console.notice("--concat and --shuffle have no effect where networks become part of a model")
    blocks = block_weights(options)
    with console.quiet_dependencies():
        from library.lora.merging import merge_into_model
        from library.lora.sources import Addition
        from library.models.number_formats import NUMBER_FORMATS
        from library.models.registry import inspect_model
    info = inspect_model(options.sd_model)
    check_family(f"--sd_model: {info.name} is {info.family.as_kind()}", info.family.name, options)
    additions = [Addition(*parts) for parts in zip(options.networks, options.strengths, blocks, strict=True)]
    merge_into_model(
        info,
        additions,
        options.target,
        NUMBER_FORMATS[options.saved_as],
        no_metadata=options.no_metadata,
        allow_partial=options.allow_partial,
    )


def into_network(options: Options) -> None:
    check_output("--save_to", options.target, options.networks)
    blocks = block_weights(options)
    with console.quiet_dependencies():
        from library.lora.joining import join_networks
        from library.lora.metadata import base_of
        from library.lora.reading import open_network
        from library.models.number_formats import NUMBER_FORMATS
    for path in options.networks:
        with open_network(path) as network:
            if base := base_of(network):
                check_family(f"--models: {path} is for {base.title}", base.name, options)
    if len(options.networks) == 1:
        console.notice("--models: it is written anew by itself; to make it part of a model, add --sd_model")
    join_networks(
        options.networks,
        options.strengths,
        options.target,
        dtype=NUMBER_FORMATS[options.saved_as],
        concat=options.concat,
        shuffle=options.shuffle,
        lbws=blocks,
        no_metadata=options.no_metadata,
        family=family_of(options),
        tool=f"networks/{'sdxl_' if family_of(options) == 'sdxl' else ''}merge_lora.py",
    )


def block_weights(options: Options) -> "tuple[BlockWeights | None, ...]":
    """For each network those of --lbws, where there is the flag."""
    if isinstance(options, MergeLoraOptions) or not options.lbws:
        return (None,) * len(options.networks)
    from library.lora.block_weights import read_all

    return read_all(options.lbws, len(options.networks), sdxl=True)


def family_of(options: Options) -> str | None:
    """The family that the script or its flags name; None if they leave 1.x and 2.x open."""
    if isinstance(options, SdxlMergeLoraOptions):
        return "sdxl"
    return "sd2" if options.v2 else None


def check_family(what: str, family: str, options: Options) -> None:
    """UserError that begins with `what` if that is not of a family that the script, or a flag, is for."""
    told = family_of(options)
    if (family == "sdxl") != (told == "sdxl"):
        raise UserError(f"{what}: use networks/{'sdxl_' if family == 'sdxl' else ''}merge_lora.py")
    if told == "sd2" and family != "sd2":
        raise UserError(f"{what}: drop --v2")


if __name__ == "__main__":
    cli.run(main, "nothing is written")
