"""The number formats that weights are written in, by their names in flags."""

import torch

NUMBER_FORMATS = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
