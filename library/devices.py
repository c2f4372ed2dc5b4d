"""Where a tool computes."""

import os

import torch

from library.errors import UserError


def usable_device(name: str | None, decomposing: bool = False) -> torch.device:
    """The device that --device names, the CPU without a name. UserError if it cannot be used here, or, for a tool that
    is `decomposing` matrices, cannot do that in float64.
    """
    name = name or "cpu"
    try:
        torch.empty(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device: {name} cannot be used on this machine, leave it out for cpu") from error
    if decomposing:
        try:
            torch.linalg.svd(torch.linalg.qr(torch.ones(1, 1, dtype=torch.float64).to(name)).R)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise UserError(f"--device: {name} cannot decompose matrices in float64, leave it out for cpu") from error
    return torch.device(name)


def fastest_device() -> torch.device:
    """A GPU of this machine if torch can use one, else the CPU. Of several processes each has its own; its number is
    told by whatever started it, with which nothing else need be shared.
    """
    from accelerate.utils import parse_flag_from_env

    if parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.device(torch.accelerator.current_accelerator().type, int(os.environ.get("LOCAL_RANK", "0")))
