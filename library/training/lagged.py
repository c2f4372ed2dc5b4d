"""Values of a device that are read without waiting for it."""

import torch
from torch import Tensor


class LaggedCopy:
    """A device tensor on its way to the CPU: read one step later, so that reading never waits for the device."""

    def __init__(self, tensor: Tensor):
        self.host = tensor.detach().to("cpu", non_blocking=tensor.is_cuda)
        self.arrived = None
        if tensor.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> list[float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.host.tolist()
