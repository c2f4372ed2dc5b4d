"""LoRA whose down is drawn once and stays; up alone is trained (LoRA-FA, Zhang et al. 2023,
https://arxiv.org/abs/2308.03303).

That needs less memory: no gradients nor optimizer state for down, and of a layer's input nothing is kept for the
backward pass. Files are those of networks/lora.py, which explains everything else.
"""

from typing import Any

from torch import Tensor

from networks import lora


class LoRAFAModule(lora.LoRAModule):
    """A branch in which down is a constant: a buffer, so that files and states have it, and nothing trains it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        down = self.lora_down.weight.detach()
        del self.lora_down.weight
        self.lora_down.register_buffer("weight", down)

    def scale_down(self, ratio: Tensor) -> None:
        """Multiplies up with `ratio`, scalar."""
        self.lora_up.weight.copy_(self.lora_up.weight.float() * ratio)


class LoRAFANetwork(lora.LoRANetwork):
    """All branches of a model; its parameters are those of up."""

    module_class = LoRAFAModule
    # it tells the two factors' rates apart
    known_arguments = frozenset(name for name in lora.ARGUMENTS if not name.startswith("loraplus_"))


create_network, create_network_from_weights, check_network_args = lora.network_functions(LoRAFANetwork)
