"""What a model file says of what its denoiser predicts, and what that means for the flags of a run."""

import math
import re

import torch
from torch import Tensor

from library import console
from library.errors import UserError, some
from library.models.files.checkpoint import WeightsFile
from library.models.noise import DDPM, Prediction
from library.models.sgm_keys import UNET_PREFIX, V_PREDICTION_MARKER, ZERO_TERMINAL_SNR_MARKER, usual_keys

MARKERS = (V_PREDICTION_MARKER, ZERO_TERMINAL_SNR_MARKER)
# As in the metadata key modelspec.prediction_type and in schedulers' configurations.
_KINDS = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}
# The beginning of the name of a scheduler's class for models of another kind, whatever else it says.
_OTHER_PROCESSES = {"FlowMatch": "flow_prediction", "EDM": "EDM"}
# What a scheduler says of the noise of training -> Stable Diffusion's.
_SCHEDULE = {
    "beta_schedule": DDPM.beta_schedule,
    "beta_start": DDPM.beta_start,
    "beta_end": DDPM.beta_end,
    "num_train_timesteps": DDPM.steps,
    "trained_betas": None,
}
# The bias of the first norm in the last block of the U-Net that has attention. Its spread tells models of Stable
# Diffusion 2.x apart: ComfyUI takes those above this for models of v-prediction.
_TELLTALE = re.compile(rf"{re.escape(UNET_PREFIX)}output_blocks\.(\d+)\.1\.transformer_blocks\.0\.norm1\.bias")
_SPREAD_OF_V = 0.09


def markers(prediction: Prediction) -> dict[str, Tensor]:
    """The empty tensors (0,) by which an original file says what it predicts; none for the noise."""
    said = {
        V_PREDICTION_MARKER: prediction.kind == "v_prediction",
        ZERO_TERMINAL_SNR_MARKER: prediction.zero_terminal_snr,
    }
    return {name: torch.zeros(0) for name, applies in said.items() if applies}


def prediction_of(file: WeightsFile) -> Prediction | None:
    """What a file says its denoiser predicts, by marker tensors, a scheduler's configuration, or metadata; or None.

    UserError if that is neither the noise nor v.
    """
    keys, scheduler = set(file.keys()), file.configs.get("scheduler", {})
    said = "v_prediction" if V_PREDICTION_MARKER in keys else _kind_said(file)
    zero = ZERO_TERMINAL_SNR_MARKER in keys or bool(scheduler.get("rescale_betas_zero_snr"))
    if not said:
        return Prediction(zero_terminal_snr=True) if zero else None
    if said not in _KINDS:
        raise UserError(
            f"{file.path} is a model of another kind: it says that it predicts {said!r}, not the noise or v, give one "
            "that does"
        )
    return Prediction(_KINDS[said], zero)


def _kind_said(file: WeightsFile) -> str:
    """The kind in a scheduler's configuration or in the metadata, by whatever name; empty if there is none."""
    scheduler = file.configs.get("scheduler", {})
    for start, kind in _OTHER_PROCESSES.items():
        if str(scheduler.get("_class_name", "")).startswith(start):
            return kind
    return str(scheduler.get("prediction_type") or file.metadata.get("modelspec.prediction_type", "")).strip().lower()


def check_schedule(file: WeightsFile) -> None:
    """Warn if the scheduler beside a model adds noise in another way than every model is trained with here."""
    scheduler = file.configs.get("scheduler", {})
    other = [name for name, usual in _SCHEDULE.items() if not _same(scheduler.get(name), usual)]
    if other:
        console.warn(
            f"{file.path}: its scheduler has another {some(other)} than Stable Diffusion, whose noise schedule is used "
            "here for every model"
        )


def _same(value: object, usual: object) -> bool:
    """Whether a value is the usual one; None, as where nothing is said, is."""
    if isinstance(value, int | float) and isinstance(usual, int | float):
        return math.isclose(value, usual, rel_tol=1e-6)
    return value is None or value == usual


def looks_like_v(file: WeightsFile) -> bool:
    """Whether the weights of a Stable Diffusion 2.x model, which reads nothing but latents, are very probably those of
    one that predicts v. For files that say nothing of it; reads one tensor.
    """
    keys = usual_keys(file)
    blocks = [(int(match[1]), match[0]) for match in map(_TELLTALE.fullmatch, keys) if match]
    if not blocks:
        return False
    return file.get(keys[max(blocks)[1]]).float().std(unbiased=False).item() > _SPREAD_OF_V


def warn_of_v(path: str) -> None:
    """Warn of a model that says nothing, `looks_like_v`, and is about to be taken for one that predicts the noise."""
    console.warn(
        f"{path} does not say what it predicts, and by its weights that is very probably v, as with the 768-pixel "
        "models: add --v_parameterization if it is"
    )


def settle_prediction(
    path: str, said: Prediction | None, wanted: Prediction, *, looks_like_v: bool = False
) -> Prediction:
    """What a run trains towards: `wanted`, by its flags, if the file's own word does not rule it out.

    A file that says nothing and `looks_like_v` gets a warning where it is trained on the noise. UserError for a file of
    v-prediction that is to be trained on the noise: its denoiser would have to start over.
    """
    if wanted.zero_terminal_snr and wanted.kind == "epsilon":
        console.warn(
            "--zero_terminal_snr is for models that predict v: predicted noise says nothing of a picture that is gone"
        )
    if said is None:
        if looks_like_v and wanted.kind == "epsilon":
            warn_of_v(path)
        return wanted
    if said.kind == "v_prediction" and wanted.kind == "epsilon":
        raise UserError(f"{path} predicts v, not the noise: add --v_parameterization")
    if said.kind == "epsilon" and wanted.kind == "v_prediction":
        console.warn(f"{path} predicts the noise: with --v_parameterization it first has to unlearn that")
    if said.zero_terminal_snr and not wanted.zero_terminal_snr:
        console.warn(f"{path} was trained with zero terminal SNR: without --zero_terminal_snr it unlearns that")
    return wanted
