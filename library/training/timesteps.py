"""Which timesteps a run trains at. What is drawn follows from the sample's seed and, where it learns from the losses,
from those of earlier steps.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from library.console import notice
from library.models.noise import NoiseProcess, torch_generator
from library.options.objective import ObjectiveOptions
from library.training.lagged import LaggedCopy
from library.transfer import to_device

_BINS = 20
_REMEMBERED = 0.9  # of a bin's losses when another comes: about the last ten count
_WARM_UP = 10  # losses of each bin before they decide anything
_UNIFORM = 0.1  # part of the draws that all timesteps share alike; its inverse is the largest weight of a loss


class Timesteps:
    """Uniform over low <= t < high."""

    learns = False
    """Whether what is drawn follows from the losses of earlier steps."""

    def __init__(self, process: NoiseProcess, low: int, high: int):
        self.process = process
        self.low = low
        self.high = high

    def draw(self, seeds: Sequence[int]) -> Tensor:
        """One timestep per sample, (B,) int64 on the CPU."""
        return self.process.sample_timesteps(seeds, self.low, self.high)

    def importance(self, timesteps: Tensor) -> Tensor | None:
        """What losses at these timesteps (B,) are multiplied with, (B,) float32 on the CPU; None if they are all alike.
        With it the mean over what is drawn is that over all timesteps.
        """
        return None

    def weigh(self, losses: Tensor, timesteps: Tensor, counted: Tensor) -> Tensor:
        """The losses (B,) to train on, of which the `counted` ones (B,) are of use; `timesteps` (B,) are on the CPU."""
        return losses

    def forget(self) -> None:
        """Nothing of the step under way counts."""

    def learn(self, add_up: Callable[[Tensor], Tensor]) -> None:
        """Called after every step where this `learns`; `add_up` gives the sum of all processes' tensors."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what another run has learned."""


class LogitNormal(Timesteps):
    """The place of the timestep between low and high is sigmoid(N(mean, deviation)) (Esser et al. 2024,
    arXiv:2403.03206, section 3.1). It is a choice of what to train, so nothing makes up for it.
    """

    def __init__(self, process: NoiseProcess, low: int, high: int, mean: float, deviation: float):
        super().__init__(process, low, high)
        self.mean = mean
        self.deviation = deviation

    def draw(self, seeds: Sequence[int]) -> Tensor:
        normal = torch.stack([torch.randn((), generator=torch_generator(seed, "timestep")) for seed in seeds])
        places = torch.sigmoid(self.mean + self.deviation * normal)
        return (self.low + (places * (self.high - self.low)).long()).clamp(max=self.high - 1)


class LossAware(Timesteps):
    """More often where losses are large, which then count less (Nichol and Dhariwal 2021, arXiv:2102.09672, section
    3.2): p_t is proportional to the root of the mean squared loss, and weights are 1 / (n p_t) for n timesteps, so that
    the expectation is that of uniform draws and varies less.

    A run is too short to learn that of a thousand timesteps apart, so neighbours share a bin. Until each bin has been
    met some times, draws are uniform. Losses count from the step after next on, since reading them at once would
    stall the device.
    """

    learns = True

    def __init__(self, process: NoiseProcess, low: int, high: int):
        super().__init__(process, low, high)
        count = min(_BINS, high - low)
        self.edges = [low + (high - low) * number // count for number in range(count + 1)]
        """The first timestep of each bin, and `high`."""
        self.sizes = torch.tensor(self.edges).diff().double()
        self._start()

    def _start(self) -> None:
        self.squares = torch.zeros_like(self.sizes)
        """Of each bin: the sum of its squared losses, of which older ones count less, ..."""
        self.numbers = torch.zeros_like(self.sizes)
        """... how many they count for, ..."""
        self.seen = torch.zeros_like(self.sizes)
        """... and how many there were in all."""
        self.values: Tensor | None = None
        """(2, bins) on the device, of the step that is under way: sums of squared losses and their numbers."""
        self.pending: LaggedCopy | None = None
        """The same of the step before, of all processes."""

    def bins(self, timesteps: Tensor) -> Tensor:
        """The bin of each timestep (B,)."""
        return torch.bucketize(timesteps, torch.tensor(self.edges[1:-1]), right=True)

    def probabilities(self) -> Tensor | None:
        """Of each bin, float64; None while all timesteps are alike."""
        if self.seen.min() < _WARM_UP:
            return None
        wanted = self.sizes * (self.squares / self.numbers).sqrt()
        if not wanted.sum() > 0:
            return None
        return (1 - _UNIFORM) * wanted / wanted.sum() + _UNIFORM * self.sizes / self.sizes.sum()

    def draw(self, seeds: Sequence[int]) -> Tensor:
        probabilities = self.probabilities()
        if probabilities is None:
            return super().draw(seeds)
        ends = probabilities.cumsum(0)[:-1]
        drawn = []
        for seed in seeds:
            generator = torch_generator(seed, "timestep")
            chance = torch.rand((), generator=generator, dtype=torch.float64)
            number = int(torch.searchsorted(ends, chance, right=True))
            drawn.append(torch.randint(self.edges[number], self.edges[number + 1], (), generator=generator))
        return torch.stack(drawn)

    def importance(self, timesteps: Tensor) -> Tensor | None:
        probabilities = self.probabilities()
        if probabilities is None:
            return None
        return (self.sizes / self.sizes.sum() / probabilities)[self.bins(timesteps)].float()

    def weigh(self, losses: Tensor, timesteps: Tensor, counted: Tensor) -> Tensor:
        own = losses.detach().float()
        counted = counted & torch.isfinite(own)
        places = to_device(self.bins(timesteps)[:, None] == torch.arange(len(self.sizes)), own.device)  # (B, bins)
        of_bins = places & counted[:, None]
        values = torch.stack([torch.where(of_bins, own[:, None].square(), 0).sum(dim=0), of_bins.sum(dim=0).float()])
        self.values = values if self.values is None else self.values + values
        importance = self.importance(timesteps)
        return losses if importance is None else losses * to_device(importance, losses.device)

    def forget(self) -> None:
        self.values = None

    def learn(self, add_up: Callable[[Tensor], Tensor]) -> None:
        """Learn from the step before, and keep this one for the next time."""
        values = add_up(self.values)
        self._learn()
        self.pending, self.values = LaggedCopy(values), None

    def _learn(self) -> None:
        if self.pending is None:
            return
        squares, numbers = torch.tensor(self.pending.read(), dtype=torch.float64)
        kept = _REMEMBERED**numbers
        self.squares = self.squares * kept + squares
        self.numbers = self.numbers * kept + numbers
        self.seen += numbers

    def state_dict(self) -> dict[str, Any]:
        known = {name: getattr(self, name).tolist() for name in ("squares", "numbers", "seen")}
        return {**known, "edges": self.edges, "pending": self.pending and self.pending.read()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is taken over, which is said, where the other run drew between other bounds or in another way."""
        if not state:
            return
        if state["edges"] != self.edges:
            notice("timesteps are between other bounds than in the state, so which have large losses is learned anew")
            return
        for name in ("squares", "numbers", "seen"):
            setattr(self, name, torch.tensor(state[name], dtype=torch.float64))
        self.pending = None if state["pending"] is None else LaggedCopy(torch.tensor(state["pending"]))


def timesteps_for(options: ObjectiveOptions, process: NoiseProcess) -> Timesteps:
    """What --timestep_distribution names."""
    bounds = options.timesteps
    if options.timestep_distribution == "logit_normal":
        return LogitNormal(process, *bounds, options.logit_mean, options.logit_std)
    return (LossAware if options.timestep_distribution == "loss_aware" else Timesteps)(process, *bounds)
