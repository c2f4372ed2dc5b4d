"""What the model is punished for: pure functions on tensors, and what a run makes of them by its options."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from library.models import coloured_noise
from library.models.noise import NoiseProcess
from library.options.objective import ObjectiveOptions
from library.training.timesteps import timesteps_for
from library.transfer import to_device

_LARGEST_SNR = 1000.0  # where weights that divide by it stop falling
_AREA = 1e-6  # below any that a mask can leave, in latents

# --- errors ---


def element_losses(prediction: Tensor, target: Tensor, kind: str = "l2", c: Tensor | None = None) -> Tensor:
    """The loss of each element, (B, C, h, w) and (B, C, h, w) -> the same shape, in float32.

    Of an error d, "l2" is d^2 (Ho et al. 2020, arXiv:2006.11239, eq. 14), "l1" |d|, "huber" 2c (sqrt(d^2 + c^2) - c)
    and "smooth_l1" the same over c, with `c` (B,) (the pseudo-Huber loss, Charbonnier et al. 1997).
    """
    prediction, target = prediction.float(), target.float()
    if kind == "l2":
        return F.mse_loss(prediction, target, reduction="none")
    if kind == "l1":
        return F.l1_loss(prediction, target, reduction="none")
    c, errors = c.view(-1, 1, 1, 1), prediction - target
    excess = errors**2 / (torch.hypot(errors, c) + c)  # sqrt(d^2 + c^2) - c without the cancellation
    return 2 * excess if kind == "smooth_l1" else 2 * c * excess


def mean_of_samples(errors: Tensor, mask: Tensor | None = None, *, normalize: bool = False) -> Tensor:
    """The mean of each sample: (B, C, h, w) -> (B,).

    `mask` (B, 1, h, w) is a factor of each element. The mean is over all elements, so what is masked out counts as 0;
    if `normalize`, over those that the mask leaves, and 0 where it leaves none.
    """
    if mask is None:
        return errors.mean(dim=(1, 2, 3))
    if not normalize:
        return (errors * mask).mean(dim=(1, 2, 3))
    area = mask.sum(dim=(1, 2, 3)) * errors.shape[1]
    return (errors * mask).sum(dim=(1, 2, 3)) / area.clamp(min=_AREA)


def huber_c(schedule: str, c: float, scale: float, snr: Tensor) -> Tensor:
    """The border between small and large errors by timestep, (steps,), for the signal-to-noise ratios (steps,).

    "constant": c scale. "exponential": from scale at the first timestep to c scale after the last. "snr": from nearly 1
    without noise to c without signal, (1 - c) / (1 + sigma)^2 + c with sigma the root of noise to signal; no scale.
    """
    if schedule == "constant":
        return torch.full_like(snr, c * scale)
    if schedule == "exponential":
        return torch.exp(torch.arange(len(snr)) * (math.log(c) / len(snr))) * scale
    return (1 - c) / (1 + snr.rsqrt()) ** 2 + c


# --- weights of timesteps, for signal-to-noise ratios of any shape ---


def min_snr_weight(snr: Tensor, gamma: float, *, v: bool) -> Tensor:
    """min(snr, gamma) / snr, which is 1 at 0; for models that predict `v` over snr + 1 instead (Hang et al. 2023,
    arXiv:2303.09556, eq. 8 and appendix).
    """
    return snr.clamp(max=gamma) / (snr + 1) if v else torch.where(snr > gamma, gamma / snr, 1.0)


def v_scale(snr: Tensor) -> Tensor:
    """snr / (snr + 1): what the squared error of v is multiplied with to become that of the noise (Salimans and Ho
    2022, arXiv:2202.00512).
    """
    snr = snr.clamp(max=_LARGEST_SNR)
    return snr / (snr + 1)


def v_like_weight(snr: Tensor, share: float) -> Tensor:
    """1 + share / `v_scale`: the squared error of the noise, and a share of that of v which belongs to it. Infinite at
    0.
    """
    return 1 + share / v_scale(snr)


def debiased_weight(snr: Tensor, *, v: bool) -> Tensor:
    """1 / sqrt(snr), infinite at 0 (Yu et al. 2023, arXiv:2310.08442); for models that predict `v` 1 / (snr + 1)."""
    snr = snr.clamp(max=_LARGEST_SNR)
    return 1 / (snr + 1) if v else snr.rsqrt()


def timestep_weights(options: ObjectiveOptions, snr: Tensor, *, v: bool) -> Tensor | None:
    """What the loss of each timestep is multiplied with, by all of the options, (steps,); None for nothing."""
    if not options.weighs_timesteps:
        return None
    weights = torch.ones_like(snr)
    if options.min_snr_gamma:
        weights = weights * min_snr_weight(snr, options.min_snr_gamma, v=v)
    if options.scale_v_pred_loss_like_noise_pred:
        weights = weights * v_scale(snr)
    if options.v_pred_like_loss:
        weights = weights * v_like_weight(snr, options.v_pred_like_loss)
    if options.debiased_estimation_loss:
        weights = weights * debiased_weight(snr, v=v)
    return weights


# --- a run's ---


class _Table:
    """Values (steps,) by timestep; with a copy on each device, since copying it anew would stall the step."""

    def __init__(self, values: Tensor):
        self.on = {values.device: values}

    def at(self, timesteps: Tensor) -> Tensor:
        """Those of the timesteps (B,), where these are."""
        device = timesteps.device
        if device not in self.on:
            self.on[device] = next(iter(self.on.values())).to(device)
        return self.on[device][timesteps]


class Objective:
    """The timesteps, noise and loss of a run, by its options."""

    def __init__(self, options: ObjectiveOptions, process: NoiseProcess):
        self.options = options
        self.predicts_v = process.prediction_type == "v_prediction"
        self.timesteps = timesteps_for(options, process)
        snr = process.snr(torch.arange(process.steps))
        self.ends_in_noise = bool(snr[-1] == 0)
        weights = timestep_weights(options, snr, v=self.predicts_v)
        self.weights = None if weights is None else _Table(weights)
        self.huber_c = None
        if options.is_robust:
            self.huber_c = _Table(huber_c(options.huber_schedule, options.huber_c, options.huber_scale, snr))

    def colour(self, noise: Tensor, latents: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """White noise (B, C, h, w) for latents (B, C, h, w) -> the noise that is to be predicted, and that which the
        latents get instead where it is another.
        """
        options, device = self.options, latents.device
        if options.noise_offset:
            random = options.noise_offset_random_strength
            strength = coloured_noise.strengths(options.noise_offset, seeds, "noise offset strength", random=random)
            draws = coloured_noise.normal((latents.shape[1], 1, 1), seeds, "noise offset")
            adaptive = options.adaptive_noise_scale or 0.0
            noise = noise + coloured_noise.offset(
                to_device(draws, device), to_device(strength, device), latents, adaptive
            )
        if options.multires_noise_iterations:
            iterations, discount = options.multires_noise_iterations, options.multires_noise_discount
            shape = latents.shape[1:]
            coarser = torch.stack([coloured_noise.coarser(shape, iterations, discount, seed) for seed in seeds])
            noise = coloured_noise.unit_deviation(noise + to_device(coarser, device))
        if not options.ip_noise_gamma:
            return noise, None
        random = options.ip_noise_gamma_random_strength
        strength = coloured_noise.strengths(options.ip_noise_gamma, seeds, "input perturbation strength", random=random)
        disturbance = strength.view(-1, 1, 1, 1) * coloured_noise.normal(latents.shape[1:], seeds, "input perturbation")
        return noise, noise + to_device(disturbance, device)

    def losses(
        self, prediction: Tensor, target: Tensor, timesteps: Tensor, mask: Tensor | None, weights: Tensor
    ) -> Tensor:
        """(B,) float32: each sample's loss, masked, and times its own weight (B,) and that of its timestep (B,)."""
        c = None if self.huber_c is None else self.huber_c.at(timesteps)
        errors = element_losses(prediction, target, self.options.loss_type, c)
        losses = mean_of_samples(errors, mask, normalize=self.options.masked_loss_normalize) * weights
        return losses if self.weights is None else losses * self.weights.at(timesteps)

    @property
    def fingerprint(self) -> tuple[str, ...]:
        """Of the loss: values of different ones do not compare. Empty for plain squared errors of the noise."""
        names = ("min_snr_gamma", "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss", "debiased_estimation_loss")
        names = (*names, "masked_loss_normalize")
        own = {name: getattr(self.options, name) for name in names}
        if self.options.loss_type != "l2":
            own["loss_type"] = self.options.loss_type
        if self.options.is_robust:
            own |= {name: getattr(self.options, name) for name in ("huber_schedule", "huber_c", "huber_scale")}
        prediction = {"v_prediction": self.predicts_v, "no_signal": self.ends_in_noise}
        return tuple(f"{name}={value}" for name, value in (own | prediction).items() if value)
