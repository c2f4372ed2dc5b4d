"""Converts models between single files and Diffusers folders."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli, console
from library.errors import UserError
from library.models.files.hub import find_model
from library.options.convert import ConvertOptions

if TYPE_CHECKING:
    import torch

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
    if target.exists() and target.samefile(path):
        raise UserError(f"{target} is the model to load, choose another name for what is written")
    with console.quiet_dependencies():
        from library.models.diffusers_writer import check_replaceable, write_folder
        from library.models.registry import inspect_model
    if not options.to_file:
        check_replaceable(target, keep=(path,) if reference is None else (path, reference))
    info = inspect_model(path, variant=options.variant)
    for flag, name in _FAMILIES.items():
        if getattr(options, flag) and info.family.name != name:
            raise UserError(f"--{flag}: {path} is a {info.family.title} model, leave the flag out")
    prediction = predicted(info, options)
    metadata = said(info, options) | options.fields()
    formats = number_formats()
    model = info.load(formats[options.loaded_as])
    model.prediction = prediction
    saved = formats[options.saved_as]
    if options.to_file:
        model.save(target, saved, metadata, options.counts)
    else:
        write_folder(model, target, saved, safetensors=options.use_safetensors, metadata=metadata, reference=reference)
    print(f"{target} written")


def number_formats() -> dict[str | None, "torch.dtype | None"]:
    import torch

    return {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, None: None}


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
    cli.run(main)
