"""What the model is punished for: the noise it is shown, the timesteps it is trained at, and how its errors count."""

from dataclasses import dataclass
from typing import ClassVar

from library.console import notice, warn
from library.errors import UserError
from library.options.base import option
from library.options.model import ModelOptions

TIMESTEPS = 1000  # of every model's noise schedule
_ROBUST = ("huber", "smooth_l1")


@dataclass(frozen=True)
class ObjectiveOptions:
    """Noise, timesteps and loss. Where a strength can be set, 0 is the same as leaving it out."""

    title: ClassVar[str] = "objective"

    noise_offset: float | None = option(
        None,
        "add X times one more random number per channel to the noise; about 0.1 for darker and lighter pictures",
        metavar="X",
        minimum=0,
    )
    noise_offset_random_strength: bool = option(False, "draw each image's noise offset between 0 and --noise_offset")
    adaptive_noise_scale: float | None = option(
        None,
        "raise the noise offset by X times how far the mean of the image's channel is from 0; X may be negative",
        metavar="X",
    )
    multires_noise_iterations: int | None = option(
        None,
        "add noise of N resolutions, each two to four times coarser than the one before; 6 to 10 are usual",
        metavar="N",
        minimum=0,
    )
    multires_noise_discount: float = option(
        0.3, "how strong each of these resolutions is beside the one before it", metavar="X", minimum=0
    )
    ip_noise_gamma: float | None = option(
        None,
        "disturb the noisy images by X times more noise, which is not to be predicted; about 0.1",
        metavar="X",
        minimum=0,
    )
    ip_noise_gamma_random_strength: bool = option(False, "draw each image's strength between 0 and --ip_noise_gamma")

    min_timestep: int | None = option(
        None, "the first timestep that is trained, 0 when left out", metavar="T", minimum=0
    )
    max_timestep: int | None = option(
        None, f"train timesteps below this one, {TIMESTEPS} when left out", metavar="T", minimum=1
    )
    timestep_distribution: str = option(
        "uniform",
        "which timesteps are drawn: all alike; logit_normal, more of those in the middle; or loss_aware, more of those "
        "with large losses, which count the less for it",
        metavar="NAME",
        choices=("uniform", "logit_normal", "loss_aware"),
    )
    logit_mean: float = option(
        0.0, "with logit_normal: below 0 for more timesteps with little noise, above for more with much", metavar="X"
    )
    logit_std: float = option(1.0, "with logit_normal: how widely timesteps are spread", metavar="X")

    loss_type: str = option(
        "l2",
        "the loss of an error: its square, its size, or in between: huber and smooth_l1 are squares for small errors "
        "and sizes for large ones",
        metavar="NAME",
        choices=("l1", "l2", *_ROBUST),
    )
    huber_schedule: str = option(
        "snr",
        "how the border between small and large errors moves with the timestep",
        metavar="NAME",
        choices=("constant", "exponential", "snr"),
    )
    huber_c: float = option(0.1, "where that border is, or where it goes to with more noise", metavar="X")
    huber_scale: float = option(
        1.0, "what the border is multiplied with, for the schedules constant and exponential", metavar="X"
    )
    min_snr_gamma: float | None = option(
        None, "let timesteps count less whose signal-to-noise ratio is above X; 5 is usual", metavar="X", minimum=0
    )
    scale_v_pred_loss_like_noise_pred: bool = option(
        False, "for models that predict v: let timesteps count as much as they do for models that predict the noise"
    )
    v_pred_like_loss: float | None = option(
        None,
        "for models that predict the noise: add X times the loss that the error of v would be",
        metavar="X",
        minimum=0,
    )
    debiased_estimation_loss: bool = option(
        False, "let timesteps with much noise count more, by the root of the signal-to-noise ratio"
    )
    masked_loss_normalize: bool = option(
        False, "average the loss over what masks leave, so that images with small masks count as much as others"
    )

    def __post_init__(self) -> None:
        low, high = self.timesteps
        if high > TIMESTEPS:
            raise UserError(f"--max_timestep: {high} is too large, the noise schedule has {TIMESTEPS} timesteps")
        if low >= high:
            raise UserError(
                f"--min_timestep {low} leaves no timestep below {high}, the end: lower it, or drop it"
                if self.max_timestep is None
                else f"no timestep is left from --min_timestep {low} to below --max_timestep {high}: drop one of them"
            )
        if self.adaptive_noise_scale and not self.noise_offset:
            raise UserError(
                "--adaptive_noise_scale changes a noise offset, and there is none: add --noise_offset, or drop it"
            )
        for name in ("huber_c", "huber_scale"):
            if self.is_robust and not getattr(self, name) > 0:
                raise UserError(
                    f"--{name}: {getattr(self, name)} is not above 0, which --loss_type {self.loss_type} needs"
                )
        if self.timestep_distribution == "logit_normal" and not self.logit_std > 0:
            raise UserError(f"--logit_std: {self.logit_std} is not above 0, so there would be one timestep only")

    @property
    def timesteps(self) -> tuple[int, int]:
        """The first timestep that is trained, and the first after it that is not."""
        return self.min_timestep or 0, TIMESTEPS if self.max_timestep is None else self.max_timestep

    @property
    def is_robust(self) -> bool:
        """Whether the loss has a border between small and large errors."""
        return self.loss_type in _ROBUST

    @property
    def weighs_timesteps(self) -> bool:
        """Whether some timesteps count more than others."""
        return bool(
            self.min_snr_gamma
            or self.scale_v_pred_loss_like_noise_pred
            or self.v_pred_like_loss
            or self.debiased_estimation_loss
        )

    def check(self, model: ModelOptions, *, masked: bool) -> None:
        """UserError for what does not fit the model, or the data, which has masks or not. Says what has no effect."""
        if self.scale_v_pred_loss_like_noise_pred and not model.v_parameterization:
            raise UserError(
                "--scale_v_pred_loss_like_noise_pred is for models that predict v: drop it, or add --v_parameterization"
            )
        if self.v_pred_like_loss and model.v_parameterization:
            raise UserError("--v_pred_like_loss is for models that predict the noise, this one predicts v: drop it")
        if self.masked_loss_normalize and not masked:
            raise UserError(
                "--masked_loss_normalize: no mask is used: add --masked_loss or --alpha_mask, or drop this flag"
            )
        if model.zero_terminal_snr:
            self._check_without_signal(model.v_parameterization)
        if self.min_snr_gamma and self.debiased_estimation_loss:
            notice("--min_snr_gamma and --debiased_estimation_loss weigh timesteps twice: usually one of them is given")
        for name, needed in self._unused().items():
            notice(f"--{name} has no effect without {needed}")

    def _check_without_signal(self, v: bool) -> None:
        """The signal-to-noise ratio of the last timestep is 0, which weights may divide by or be multiplied with."""
        infinite = {
            "v_pred_like_loss": self.v_pred_like_loss,
            "debiased_estimation_loss": self.debiased_estimation_loss,
        }
        wrong = [name for name, wanted in infinite.items() if wanted and not v]
        if wrong:
            raise UserError(
                f"--{wrong[0]} divides by the signal-to-noise ratio, which is 0 at the end of --zero_terminal_snr: "
                "drop one of them"
            )
        scaled = {
            "scale_v_pred_loss_like_noise_pred": self.scale_v_pred_loss_like_noise_pred,
            "min_snr_gamma": self.min_snr_gamma,
        }
        for name in (name for name, wanted in scaled.items() if wanted and v):
            warn(
                f"--{name} all but removes the last timesteps, which --zero_terminal_snr is about: their weight goes "
                "down to 0 with the signal"
            )

    def _unused(self) -> dict[str, str]:
        """Flags that were set, and what each of them waits for. Command lines may carry them along."""
        robust = "--loss_type huber or smooth_l1"
        logit = "--timestep_distribution logit_normal"
        needed = {
            "noise_offset_random_strength": ("--noise_offset", self.noise_offset),
            "multires_noise_discount": ("--multires_noise_iterations", self.multires_noise_iterations),
            "ip_noise_gamma_random_strength": ("--ip_noise_gamma", self.ip_noise_gamma),
            "logit_mean": (logit, self.timestep_distribution == "logit_normal"),
            "logit_std": (logit, self.timestep_distribution == "logit_normal"),
            "huber_schedule": (robust, self.is_robust),
            "huber_c": (robust, self.is_robust),
            "huber_scale": (
                f"{robust} and another --huber_schedule than snr",
                self.is_robust and self.huber_schedule != "snr",
            ),
        }
        # a field's default is the class's attribute
        return {
            name: flag
            for name, (flag, is_used) in needed.items()
            if not is_used and getattr(self, name) != getattr(type(self), name)
        }
