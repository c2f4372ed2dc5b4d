"""Float32 numbers rounded at random to half precision: small steps, which plain rounding loses, add up on average.

Stochastic rounding in training: Gupta et al. 2015, https://arxiv.org/abs/1502.02551; of bf16 weights: Zamirai et al.
2020, https://arxiv.org/abs/2010.06192.
"""

import torch
from torch import Tensor

from library.randomness import address

_BF16_STEP = 1 << 16  # a bf16 number is a float32 whose last 16 bits are 0
_EXPONENT = 0x7F800000
_FP16_NORMAL, _FP16_FRACTION = 2.0**-14, 2.0**-10


class Rounding:
    """Stochastic rounding whose chances follow from (seed, step, parameter): the same in every process of a device
    type, and after a restart.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def __call__(self, target: Tensor, exact: Tensor, step: int, parameter: int) -> None:
        """Give `target`, the parameter of this number, the `exact` values, rounded for this step."""
        device = exact.device
        if device not in self.generators:
            self.generators[device] = torch.Generator(device)
        generator = self.generators[device].manual_seed(address(self.seed, "rounding", step, parameter))
        target.copy_(rounded(exact, target.dtype, generator))


@torch.no_grad()
def rounded(exact: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """`exact` (float32, any shape) in bf16 or fp16: of the two neighbours of each value, one at random, the nearer one
    more often, so that their mean is the value.

    Values that `dtype` has stay as they are. What is too large, infinite or no number becomes what plain rounding makes
    of it; what that leaves finite stays finite.
    """
    plain = exact.to(dtype)
    drawn = _to_bf16(exact, generator) if dtype == torch.bfloat16 else _to_fp16(exact, generator)
    limit = torch.finfo(dtype).max
    return torch.where(plain.isfinite(), drawn.clamp_(-limit, limit).to(dtype), plain)


def _to_bf16(exact: Tensor, generator: torch.Generator) -> Tensor:
    """Adds up to 16 random bits to the magnitude and cuts as many off, which goes through all exponents alike."""
    drawn = torch.empty(exact.shape, dtype=torch.int32, device=exact.device).random_(_BF16_STEP, generator=generator)
    return drawn.add_(exact.contiguous().view(torch.int32)).bitwise_and_(-_BF16_STEP).view(torch.float32)


def _to_fp16(exact: Tensor, generator: torch.Generator) -> Tensor:
    """Counts steps of fp16 at each value's exponent; below its normal numbers they stay the same."""
    power = (exact.contiguous().view(torch.int32) & _EXPONENT).view(torch.float32)  # the one at or below |exact|
    step = power.clamp_min_(_FP16_NORMAL).mul_(_FP16_FRACTION)
    steps = exact.abs().div_(step)
    whole = steps.floor()
    up = torch.rand(exact.shape, device=exact.device, generator=generator) < steps.sub_(whole)
    return whole.add_(up).mul_(step).copysign_(exact)
