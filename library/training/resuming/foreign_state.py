"""States that accelerate wrote by itself, as the toolkit does whose command lines we take: what can be had of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.console import warn
from library.errors import UserError
from library.models.files.checkpoint import open_weights
from library.training.resuming.packing import check_constant, raw

_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
_OPTIMIZERS = ("optimizer.bin", "optimizer.pt")
# What the state of each parameter is called, by the optimizer's class: it must have the first and not the others.
_SIGNS = {
    "AdamW": ("exp_avg_sq", "s", "z", "RMS"),
    **dict.fromkeys(("AdamW8bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit", "AdEMAMix8bit"), ("state2",)),
    **dict.fromkeys(("Lion8bit", "PagedLion8bit", "SGD8bit"), ("state1", "state2")),
    "Lion": ("exp_avg", "exp_avg_sq", "s"),
    "SGD": ("momentum_buffer",),
    "Adafactor": ("RMS",),
    "Prodigy": ("p0",),
    "DAdaptAdaGrad": ("alphak",),
    "DAdaptLion": ("s", "exp_avg_sq", "x0"),
    "DAdaptSGD": ("x0", "alphak"),
    **dict.fromkeys(("DAdaptAdan", "DAdaptAdanIP"), ("pre_grad",)),
    **dict.fromkeys(("DAdaptAdam", "DAdaptAdamPreprint"), ("s", "p0", "x0", "pre_grad")),
    **dict.fromkeys(("AdamWScheduleFree", "RAdamScheduleFree"), ("z", "x0")),
    "SGDScheduleFree": ("z", "exp_avg_sq", "x0"),
}


@torch.no_grad()
def load_trained(folder: Path, trained: nn.Module) -> None:
    """Give the trained module the weights in the folder. ValueError that says what does not fit."""
    files = sorted(file for pattern in _WEIGHTS for file in folder.glob(pattern))
    if not files:
        raise UserError(f"{folder} holds no weights to go on with: give another state")
    theirs: dict[str, Tensor] = {}
    for path in files:
        with open_weights(path) as file:
            file.verify()
            theirs |= file.tensors()
    needed = dict(trained.named_parameters())
    for name, tensor in raw(trained).items():
        found = _named(name, theirs)
        if found is None and name not in needed:
            continue  # a buffer that the other version of a package has no more, or not yet
        if found is None or found.numel() != tensor.numel():
            what = "is missing" if found is None else f"is {list(found.shape)} there"
            raise ValueError(f"{name} {what}")
        if name not in needed:
            check_constant(name, tensor, found)
        tensor.copy_(found.reshape(tensor.shape))


def _named(name: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The tensor of that name, or of what is left of the name without the parts it begins with: we train parts of a
    model as one module, others prepare each by itself. Their text encoders may have one level more.
    """
    while True:
        for spelling in (name, f"text_model.{name}"):
            if spelling in tensors:
                return tensors[spelling]
        _, dot, name = name.partition(".")
        if not dot:
            return None


def objects(folder: Path, optimizer: str, step: int) -> dict[str, Any]:
    """The state of the optimizer, if there is one that can be read without running code and that is of this class;
    says what is lacking.
    """
    lacking = "The images come in another order from here on, and the log begins anew"
    place = f"it counts as of step {step}" if step else "steps are counted from 1 again, unless --initial_step is given"
    warn(f"{folder} was written by accelerate alone and gives weights and optimizer, but no more: {place}. {lacking}")
    for name in _OPTIMIZERS:
        if (folder / name).is_file():
            try:
                state = torch.load(folder / name, map_location="cpu", weights_only=True)
                entry = dict(next(iter(state["state"].values()), {}))
                for hidden in [value for value in entry.values() if isinstance(value, dict)]:
                    entry |= hidden  # as bitsandbytes keeps what is quantised
            except Exception as problem:  # whatever a damaged or foreign file makes of the reader
                warn(f"{folder / name} cannot be read, so the optimizer starts anew: {problem}")
                return {}
            own, *others = _SIGNS.get(optimizer, (None,))
            if own and (own not in entry or any(other in entry for other in others)):
                warn(f"{folder / name} is of another optimizer than {optimizer}, so this one starts anew")
                return {}
            return {"optimizer": state}
    warn(f"{folder} has no optimizer that can be read, so it starts anew")
    return {}
