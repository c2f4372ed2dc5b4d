"""What a model file says of what its denoiser predicts, and what that means for the flags of a run."""

import torch
from torch import Tensor

from library import console
from library.errors import UserError
from library.models.files.checkpoint import WeightsFile
from library.models.noise import Prediction
from library.models.sgm_keys import V_PREDICTION_MARKER, ZERO_TERMINAL_SNR_MARKER

MARKERS = (V_PREDICTION_MARKER, ZERO_TERMINAL_SNR_MARKER)
# As in the metadata key modelspec.prediction_type.
_SPEC_NAMES = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}


def markers(prediction: Prediction) -> dict[str, Tensor]:
    """The empty tensors (0,) by which an original file says what it predicts; none for the noise."""
    said = {
        V_PREDICTION_MARKER: prediction.kind == "v_prediction",
        ZERO_TERMINAL_SNR_MARKER: prediction.zero_terminal_snr,
    }
    return {name: torch.zeros(0) for name, applies in said.items() if applies}


def prediction_of(file: WeightsFile) -> Prediction | None:
    """What a file says its denoiser predicts, by marker tensors, a scheduler's configuration, or metadata; or None."""
    keys, scheduler = set(file.keys()), file.configs.get("scheduler", {})
    kind = scheduler.get("prediction_type") or _SPEC_NAMES.get(file.metadata.get("modelspec.prediction_type", ""))
    if V_PREDICTION_MARKER in keys:
        kind = "v_prediction"
    zero = ZERO_TERMINAL_SNR_MARKER in keys or bool(scheduler.get("rescale_betas_zero_snr"))
    if kind not in _SPEC_NAMES.values():
        return Prediction(zero_terminal_snr=True) if zero else None
    return Prediction(kind, zero)


def settle_prediction(path: str, said: Prediction | None, wanted: Prediction) -> Prediction:
    """What a run trains towards: `wanted`, by its flags, if the file's own word does not rule it out.

    UserError for a file of v-prediction that is to be trained on the noise: its denoiser would have to start over.
    """
    if said is None:
        return wanted
    if said.kind == "v_prediction" and wanted.kind == "epsilon":
        raise UserError(f"{path} predicts v, not the noise: add --v_parameterization")
    if said.kind == "epsilon" and wanted.kind == "v_prediction":
        console.warn(f"{path} predicts the noise: with --v_parameterization it first has to unlearn that")
    if said.zero_terminal_snr and not wanted.zero_terminal_snr:
        console.warn(f"{path} was trained with zero terminal SNR: without --zero_terminal_snr it unlearns that")
    return wanted
