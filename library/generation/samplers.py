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
    """The Diffusers scheduler of the sampler `name`, stepping through the very betas that `process` trains with.

    Schedulers hold the state of one denoising run: make a new one for each picture. Raises UserError as
    `find_sampler` does.
    """
    sampler = find_sampler(name)
    import diffusers

    scheduler_class = getattr(diffusers, sampler.scheduler)
    known = inspect.signature(scheduler_class.__init__).parameters
    config = {key: value for key, value in _STABLE_DIFFUSION.items() if key in known} | sampler.config
    with warnings.catch_warnings():
        # Diffusers announces that it will drop the first DPM-Solver in its version 1.0; users can do nothing about it.
        warnings.simplefilter("ignore", FutureWarning)
        return scheduler_class(
            num_train_timesteps=process.steps,
            beta_start=process.beta_start,
            beta_end=process.beta_end,
            beta_schedule=process.beta_schedule,
            prediction_type=process.prediction_type,
            **config,
        )
