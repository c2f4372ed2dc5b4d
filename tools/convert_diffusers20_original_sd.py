"""Converts models between single files and Diffusers folders."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli, console
from library.errors import UserError, some
from library.models.files.folder_files import COMPONENTS
from library.models.files.hub import find_model
from library.options.convert import ConvertOptions
from library.tool_files import check_apart

if TYPE_CHECKING:
    from library.models.noise import Prediction
    from library.models.registry import ModelInfo

_FAMILIES = {"v1": "sd1", "v2": "sd2"}
# What a file says of itself that is for the one who writes it to say.
_SAID_ANEW = tuple(f"modelspec.{name}" for name in ("implementation", "implementation_version", "prediction_type"))


def main() -> None:
    console.setup(None)
    options = cli.parse((ConvertOptions,), description=__doc__)[ConvertOptions]
    path = find_model(options.model_to_load, "model_to_load", options.variant)
    target = options.model_to_save
    reference = find_model(options.reference_model, "--reference_model") if options.reference_model else None
    vae = find_model(options.vae, "--vae") if options.vae else None
    check_apart("model_to_save", target, [source for source in (path, vae, reference) if source])
    with console.quiet_dependencies():
        from library.models.diffusers_writer import check_replaceable, write_folder
        from library.models.number_formats import NUMBER_FORMATS
        from library.models.registry import inspect_model
        from library.models.writing import overflowing
    if not options.to_file:
        check_replaceable(target, keep=[place for place in (path, vae, reference) if place])
    if options.variant and not has_variant(path, options.variant):
        console.notice(f"--variant {options.variant}: {path} has no such weights, those that it has are read")
    info = inspect_model(path, vae, options.variant)
    check_family(info, options)
    prediction = predicted(info, options)
    metadata = said(info, options) | options.fields()
    model = info.load(NUMBER_FORMATS.get(options.loaded_as))
    model.prediction = prediction
    saved = NUMBER_FORMATS.get(options.saved_as)
    if names := overflowing(model, saved):
        console.warn(
            f"{target}: {len(names)} tensors hold values that are too large for --save_precision_as "
            f"{options.saved_as}, use float or bf16: {some(names)}"
        )
    if options.to_file:
        model.save(target, saved, metadata, options.counts)
    else:
        write_folder(model, target, saved, safetensors=options.use_safetensors, metadata=metadata, reference=reference)
    print(f"{target} written")


def has_variant(path: Path, variant: str) -> bool:
    """Whether a folder has weights of a variant; a file has none."""
    names = (file.name for component in COMPONENTS for file in path.glob(f"{component}/*"))
    return any(f".{variant}." in name for name in names)


def check_family(info: "ModelInfo", options: ConvertOptions) -> None:
    """UserError if the model is not of the family that a flag names."""
    for flag, name in _FAMILIES.items():
        if getattr(options, flag) and info.family.name != name:
            raise UserError(f"--{flag}: {info.name} is {info.family.as_kind()}, leave the flag out")


def predicted(info: "ModelInfo", options: ConvertOptions) -> "Prediction":
    """What the model that is written says it predicts: what it says already, or what the flag says."""
    from library.models.noise import Prediction
    from library.models.prediction import warn_of_v

    if not options.v_parameterization:
        if info.prediction is None and info.looks_like_v:
            warn_of_v(info.name)
        return info.prediction or Prediction()
    if info.prediction and info.prediction.kind == "epsilon":
        console.warn(f"{info.name} says that it predicts the noise: by --v_parameterization what is written says v")
    return Prediction("v_prediction", info.prediction is not None and info.prediction.zero_terminal_snr)


def said(info: "ModelInfo", options: ConvertOptions) -> dict[str, str]:
    """The metadata of the model that hold for what is written, too; those of a file get the numbers to note in it."""
    with info.open() as file:
        told = {name: text for name, text in file.metadata.items() if "hash" not in name and name not in _SAID_ANEW}
    if options.v_parameterization:
        told.pop("modelspec.architecture", None)  # which may be that of models that predict the noise
    if options.to_file and options.counts:
        told |= {"ss_epoch": str(options.epoch), "ss_steps": str(options.global_step)}
    return told


if __name__ == "__main__":
    cli.run(main, "nothing is written")
