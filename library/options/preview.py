"""Pictures painted while training."""

from dataclasses import dataclass
from typing import ClassVar

from library.options.base import option

SAMPLERS = (
    "ddim",
    "pndm",
    "lms",
    "euler",
    "euler_a",
    "heun",
    "dpm_2",
    "dpm_2_a",
    "dpmsolver",
    "dpmsolver++",
    "dpmsingle",
    "k_lms",
    "k_euler",
    "k_euler_a",
    "k_dpm_2",
    "k_dpm_2_a",
)


@dataclass(frozen=True)
class PreviewOptions:
    """Previews. They never change the run: its random numbers and weights stay as they were."""

    title: ClassVar[str] = "previews"

    sample_prompts: str | None = option(None, "file of prompts to paint: .txt, .toml or .json", metavar="FILE")
    sample_every_n_steps: int | None = option(None, "paint them after every N optimizer steps", metavar="N", minimum=0)
    sample_every_n_epochs: int | None = option(
        None, "paint them after every N epochs; overrules --sample_every_n_steps", metavar="N", minimum=0
    )
    sample_at_first: bool = option(False, "paint them before the first step, too")
    sample_sampler: str = option("ddim", "sampler of prompts that do not choose one", metavar="NAME", choices=SAMPLERS)

    @property
    def step_interval(self) -> int | None:
        """Optimizer steps between previews, None where an interval in epochs is given or none at all."""
        return None if self.epoch_interval else self.sample_every_n_steps or None

    @property
    def epoch_interval(self) -> int | None:
        """Epochs between previews, None for none."""
        return self.sample_every_n_epochs or None
