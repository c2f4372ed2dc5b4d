"""Samplers by their command-line names: Diffusers' schedulers, configured as Stable Diffusion's own.

Names can be checked without importing torch; only `make_scheduler` needs it.
"""

import importlib.util
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from library.errors import UserError, suggest
from library.options.preview import SAMPLERS as NAMES

if TYPE_CHECKING:
    import torch
    from diffusers import SchedulerMixin

    from library.models.noise import DDPM


@dataclass(frozen=True)
class Sampler:
    """A Diffusers scheduler class and what distinguishes this sampler from the class's other uses."""

    scheduler: str
    config: Mapping[str, Any] = field(default_factory=dict)
    needs_scipy: bool = False


_SAMPLERS = {
    "ddim": Sampler("DDIMScheduler"),
    "pndm": Sampler("PNDMScheduler"),
    "lms": Sampler("LMSDiscreteScheduler", needs_scipy=True),
    "euler": Sampler("EulerDiscreteScheduler"),
    "euler_a": Sampler("EulerAncestralDiscreteScheduler"),
    "heun": Sampler("HeunDiscreteScheduler"),
    "dpm_2": Sampler("KDPM2DiscreteScheduler"),
    "dpm_2_a": Sampler("KDPM2AncestralDiscreteScheduler"),
    # The first DPM-Solver is undefined at zero noise, so it stops at the smallest sigma of training.
    "dpmsolver": Sampler(
        "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
    ),
    "dpmsolver++": Sampler("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsingle": Sampler("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
}
# The flag also knows some by the names that k-diffusion's have in web UIs.
SAMPLERS: Mapping[str, Sampler] = {name: _SAMPLERS[name.removeprefix("k_")] for name in NAMES}

# The scheduler configuration published with Stable Diffusion 1.x. Each scheduler takes the part it knows, as it does
# in Diffusers when the scheduler of a pipeline is exchanged with `from_config`. Without it most would clip latents to
# -1..1 or space their steps for models trained otherwise.
_STABLE_DIFFUSION: Mapping[str, Any] = {
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def find_sampler(name: str) -> Sampler:
    """The sampler called `name` in `--sample_sampler` and `--ss`. Imports no torch.

    Raises UserError for an unknown name, and for a sampler whose package is not installed.
    """
    sampler = SAMPLERS.get(name)
    if sampler is None:
        hint = suggest(name, SAMPLERS) or f"; there are {', '.join(SAMPLERS)}"
        raise UserError(f"there is no sampler {name!r}{hint}")
    if sampler.needs_scipy and importlib.util.find_spec("scipy") is None:
        raise UserError(f"the sampler {name} needs scipy: install it with pip install scipy, or choose euler")
    return sampler


def make_scheduler(name: str, process: "DDPM") -> "SchedulerMixin":
    """The Diffusers scheduler of the sampler `name`, stepping through the very betas that `process` trains with and
    reading the denoiser's answers as `process` predicts.

    Schedulers hold the state of one denoising run: make a new one for each picture. Raises UserError as
    `find_sampler` does.
    """
    sampler = find_sampler(name)
    import diffusers

    from library.models.noise import scheduler_config

    scheduler_class = getattr(diffusers, sampler.scheduler)
    known = inspect.signature(scheduler_class.__init__).parameters
    config = {**_STABLE_DIFFUSION, **sampler.config, **scheduler_config(process.prediction)}
    if process.prediction.zero_terminal_snr and not _copes_without_signal(sampler, process, known):
        config |= {"rescale_betas_zero_snr": False, "trained_betas": _betas_with_some_signal(process)}
    with warnings.catch_warnings():
        # Diffusers announces that it will drop the first DPM-Solver in its version 1.0; users can do nothing about it.
        warnings.simplefilter("ignore", FutureWarning)
        return scheduler_class(**{key: value for key, value in config.items() if key in known})


def _copes_without_signal(sampler: Sampler, process: "DDPM", known: Mapping[str, Any]) -> bool:
    """Whether the scheduler can be told of zero terminal SNR. DDIM can, but then divides the predicted noise by 0."""
    divides = sampler.scheduler == "DDIMScheduler" and process.prediction.kind == "epsilon"
    return "rescale_betas_zero_snr" in known and not divides


def _betas_with_some_signal(process: "DDPM") -> list[float]:
    """The betas of a process with zero terminal SNR but for the last, which leaves an alpha_bar of 2**-24 and so a
    finite sigma, 4096: as the schedulers of Diffusers that know zero terminal SNR do it."""
    last = 1.0 - 2**-24 / float(process.alphas_cumprod[-2])
    return [*process.betas[:-1].tolist(), last]


def set_timesteps(scheduler: "SchedulerMixin", steps: int, device: "torch.device | str | None" = None) -> None:
    """Ready a scheduler of `make_scheduler` for a picture of `steps` steps.

    A few numbers of steps (61 is the smallest) that do not divide 1000 evenly make Diffusers' trailing steps go one
    too far, to a timestep below 0, where a sampler would spoil the finished picture: these get one step less.
    """
    scheduler.set_timesteps(steps, device=device)
    while min(scheduler.timesteps) < 0:
        steps -= 1
        scheduler.set_timesteps(steps, device=device)
