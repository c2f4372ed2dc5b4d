"""LoRA of which every rank can be used (DyLoRA, Valipour et al. 2022, https://arxiv.org/abs/2210.07558).

Each micro-batch uses the first ranks only, as many as are drawn, in steps of `unit`; gradients reach the last `unit`
of these. Those of all others are 0 and not missing, as in the authors' own code: the optimizer's momentum and weight
decay move them, too. The factors' first r ranks make a LoRA of rank r then, which networks/extract_lora_from_dylora.py
writes. The files are those of networks/lora.py, which explains everything else.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import lora


class DyLoRAModule(lora.LoRAModule):
    """A branch that uses the first `used` of its ranks while training, and all of them else.

    With r ranks it is alpha / rank * sqrt(rank / r) * up @ down, so that its size depends less on r. `unit` divides
    `lora_dim`.
    """

    def __init__(self, *args: Any, unit: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.unit = unit
        self.used = self.lora_dim

    def _trained(self, weight: Tensor, axis: int) -> Tensor:
        """The ranks in use, along `axis`; gradients reach the last `unit` of them."""
        before = self.used - self.unit
        return torch.cat((weight.detach().narrow(axis, 0, before), weight.narrow(axis, before, self.unit)), axis)

    def _project(self, x: Tensor) -> Tensor:
        if not self.training:
            return super()._project(x)
        down = self._trained(self.lora_down.weight, 0)
        if isinstance(self.lora_down, nn.Conv2d):
            return F.conv2d(x, down, None, self.lora_down.stride, self.lora_down.padding, self.lora_down.dilation)
        return F.linear(x, down)

    def _add_branch(self, x: Tensor, base: Tensor, hidden: Tensor, scale: float) -> Tensor:
        if not self.training:
            return super()._add_branch(x, base, hidden, scale)
        up = self._trained(self.lora_up.weight, 1)
        hidden = hidden * (scale * math.sqrt(self.lora_dim / self.used))
        branch = F.conv2d(hidden, up) if up.dim() == 4 else F.linear(hidden, up)
        return base + branch.to(base.dtype)


class DyLoRANetwork(lora.LoRANetwork):
    """All branches of a model, which have one rank and use the same part of it."""

    module_class = DyLoRAModule
    trains_by_chance = True
    known_arguments = (lora.ARGUMENTS | {"unit"}) - {"dora_wd", "train_norm"}

    @classmethod
    def module_keywords(cls, arguments: lora.NetworkArguments) -> dict[str, Any]:
        if arguments.rank_dropout:
            raise ValueError("rank_dropout: DyLoRA chooses itself which ranks a step uses, leave it out")
        return super().module_keywords(arguments) | {"unit": _unit(arguments)}

    @classmethod
    def check_arguments(cls, arguments: lora.NetworkArguments, rank: int) -> None:
        if arguments.block_dims or arguments.conv_block_dims:
            raise ValueError("block_dims, conv_block_dims: DyLoRA has one rank for all blocks, leave them out")
        if arguments.conv_dim not in (None, rank):
            raise ValueError(f"conv_dim {arguments.conv_dim}: DyLoRA has one rank for all layers, give {rank}")
        if rank % (unit := _unit(arguments)):
            raise ValueError(f"rank {rank} is no multiple of unit {unit}: give another network_dim or unit")

    @classmethod
    def from_weights(cls, *args: Any) -> tuple["DyLoRANetwork", dict[str, Tensor]]:
        network, weights_sd = super().from_weights(*args)
        modules = network.branches()
        ranks = sorted({module.lora_dim for module in modules})
        if len(ranks) > 1:
            raise ValueError(f"DyLoRA has one rank for all layers, and the file has {', '.join(map(str, ranks))}")
        if ranks[0] % (unit := modules[0].unit):
            raise ValueError(f"rank {ranks[0]} of these weights is no multiple of unit {unit}: give another unit")
        return network, weights_sd

    def on_step_start(self) -> None:
        """Draws how many ranks are used until the next call, from torch's generator for the CPU."""
        modules = self.branches()
        number = int(torch.randint(modules[0].lora_dim // modules[0].unit, (), device="cpu"))
        for module in modules:
            module.used = (number + 1) * module.unit


# A new network has one rank in all layers, and `unit` among its arguments, 1 if left out, which divides that rank.
create_network, create_network_from_weights, check_network_args = lora.network_functions(DyLoRANetwork)


def _unit(arguments: lora.NetworkArguments) -> int:
    return lora.read_whole_number("unit", arguments.others.get("unit", 1), least=1)
