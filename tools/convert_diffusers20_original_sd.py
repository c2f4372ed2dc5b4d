"""Converts models between single files and Diffusers folders: MODEL_TO_LOAD MODEL_TO_SAVE [options]."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli, console
from library.errors import UserError
from library.models.files.hub import find_model
from library.options.base import options_of
from library.options.convert import ConvertOptions

if TYPE_CHECKING:
    import torch

    from library.models.family import Family

_POSITIONAL = ("model_to_load", "model_to_save")
_FAMILIES = {"v1": "sd1", "v2": "sd2"}


def main() -> None:
    console.setup(None)
    options = cli.parse((ConvertOptions,), named(sys.argv[1:]), description=__doc__)[ConvertOptions]
    path = find_model(options.model_to_load, "model_to_load", options.variant)
    target = options.model_to_save
    if target.exists() and target.samefile(path):
        raise UserError(f"{target} is the model to load, choose another name for what is written")
    reference = find_model(options.reference_model, "--reference_model") if options.reference_model else None
    with console.quiet_dependencies():
        from library.models.diffusers_writer import write_folder
    formats = number_formats()
    model, metadata = load(path, options, formats)
    metadata |= options.fields()
    if options.to_file:
        save_file(model, metadata, options, formats)
    else:
        saved = formats[options.saved_as]
        write_folder(model, target, saved, safetensors=options.use_safetensors, metadata=metadata, reference=reference)
    print(f"{target} written")


def named(words: Sequence[str]) -> list[str]:
    """A command line whose words without a flag have got their flags."""
    takes_value = {f"--{option.name}" for option in options_of(ConvertOptions) if option.kind is not bool}
    left, answer, before = list(_POSITIONAL), [], ""
    for word in words:
        if left and not word.startswith("-") and before not in takes_value:
            answer.append(f"--{left.pop(0)}")
        answer.append(word)
        before = word
    return answer


def number_formats() -> dict[str | None, "torch.dtype | None"]:
    import torch

    return {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, None: None}


def load(
    path: Path, options: ConvertOptions, formats: dict[str | None, "torch.dtype | None"]
) -> tuple["Family", dict[str, str]]:
    """The model and what its file says of itself, but for hashes. UserError if it is not of the family asked for."""
    from library.models import loading
    from library.models.files.checkpoint import open_weights
    from library.models.files.diffusers_folder import open_folder
    from library.models.noise import Prediction
    from library.models.prediction import prediction_of
    from library.models.registry import detect

    with open_folder(path, options.variant) if path.is_dir() else open_weights(path) as file:
        family = detect(file)
        for flag, name in _FAMILIES.items():
            if getattr(options, flag) and family.name != name:
                raise UserError(f"--{flag}: {path} is a {family.title} model, leave the flag out")
        model = loading.load(family, file, formats[options.loaded_as])
        model.prediction = prediction_of(file) or Prediction()
        return model, {name: text for name, text in file.metadata.items() if "hash" not in name}


def save_file(
    model: "Family",
    metadata: dict[str, str],
    options: ConvertOptions,
    formats: dict[str | None, "torch.dtype | None"],
) -> None:
    """Write a single file with the numbers of epochs and steps where its format has a place for them."""
    import torch

    from library.models.files.checkpoint import replacing, stores_metadata

    path, dtype = options.model_to_save, formats[options.saved_as]
    counts = {"epoch": options.epoch, "global_step": options.global_step}
    if stores_metadata(path) or not any(counts.values()):
        noted = {"ss_epoch": str(options.epoch), "ss_steps": str(options.global_step)} if any(counts.values()) else {}
        model.save(path, dtype, metadata | noted)
        return
    tensors = {
        name: tensor.to(dtype if dtype and tensor.is_floating_point() else tensor.dtype).clone(
            memory_format=torch.contiguous_format
        )
        for name, tensor in model.tensors().items()
    }
    with replacing(path) as file:
        torch.save({"state_dict": tensors, **counts}, file)


if __name__ == "__main__":
    cli.run(main)
