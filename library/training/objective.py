"""What the model is punished for: pure functions on tensors."""

import torch.nn.functional as F
from torch import Tensor


def squared_error(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of each sample: (B, C, h, w) and (B, C, h, w) -> (B,), in float32 (Ho et al. 2020, eq. 14).

    `mask` (B, 1, h, w) is a factor of each element; the mean is over all of them, so what is masked out counts as 0.
    """
    errors = F.mse_loss(prediction.float(), target.float(), reduction="none")
    return (errors if mask is None else errors * mask).mean(dim=(1, 2, 3))
