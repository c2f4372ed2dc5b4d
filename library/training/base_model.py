"""The model that a run starts from: whether the flags and the script fit it, and what it is trained towards."""

from dataclasses import dataclass

from library.errors import UserError
from library.models.noise import Prediction
from library.models.prediction import settle_prediction
from library.models.registry import ModelInfo, inspect_model
from library.options.base import Settings
from library.options.cache_tool import CacheToolOptions
from library.options.model import ModelOptions


@dataclass(frozen=True)
class Script:
    """Which models a script trains: SDXL models, or all others. `counterpart` is the script for those it does not."""

    sdxl: bool
    counterpart: str


def inspect_base_model(settings: Settings, script: Script | None = None) -> ModelInfo:
    """What the settings name, from its headers. UserError if it is no model, does not fit the flags, or is not for this
    `script`; without one, for a tool, every family will do.
    """
    options = settings[ModelOptions]
    info = inspect_model(options.pretrained_model_name_or_path, options.vae)
    family = info.family.name
    what = f"{info.name} is {'an' if family == 'sdxl' else 'a'} {info.family.title} model"
    if script and script.sdxl != (family == "sdxl"):
        flag = " with --v2" if family == "sd2" else ""
        raise UserError(f"{what}: train it with {script.counterpart}{flag}")
    if options.v2 and family != "sd2":
        raise UserError(f"{what}: drop --v2")
    if family == "sd2" and not options.v2:
        raise UserError(f"{what}: add --v2, and --v_parameterization if it predicts v, as the 768-pixel models do")
    if script and info.kind:
        raise UserError(
            f"{info.name} is {info.kind}, whose U-Net reads {info.input_channels} channels: it cannot be trained here, "
            "give the model it was made from"
        )
    return info


def inspect_for_tool(settings: Settings) -> ModelInfo:
    """The same for the tools that cache ahead, which can be told that the model is an SDXL model."""
    info = inspect_base_model(settings)
    if settings[CacheToolOptions].sdxl and info.family.name != "sdxl":
        raise UserError(f"{info.name} is a {info.family.title} model: drop --sdxl")
    return info


def prediction_for(options: ModelOptions, info: ModelInfo) -> Prediction:
    """What the model is trained to predict. UserError if that contradicts what its file says of it."""
    kind = "v_prediction" if options.v_parameterization else "epsilon"
    return settle_prediction(
        info.name, info.prediction, Prediction(kind, options.zero_terminal_snr), looks_like_v=info.looks_like_v
    )
