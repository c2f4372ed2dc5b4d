"""What the model is punished for: pure functions on tensors."""

import torch.nn.functional as F
from torch import Tensor


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample: (B, C, h, w) and (B, C, h, w) -> (B,), in float32 (Ho et al. 2020, eq. 14)."""
    return F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
