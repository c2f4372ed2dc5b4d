"""Small stand-ins for the models that a LoRA is made for."""

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from library.models.sgm_keys import UNET_PREFIX, unet_key_map
from library.models.views import original_view
from networks.lora import LoRAModule, LoRANetwork, create_network


class Transformer2DModel(nn.Module):
    """Stands in for the Diffusers class of this name: one Linear, one 1x1 and one 3x3 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_in = nn.Conv2d(6, 8, 1)
        self.to_q = nn.Linear(8, 10)
        self.conv = nn.Conv2d(6, 8, 3, stride=2, padding=1)


class CLIPMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 12)


def text_model() -> nn.Module:
    return nn.ModuleDict({"text_model": nn.ModuleDict({"mlp": CLIPMLP()})})


def unet() -> nn.Module:
    return nn.ModuleDict({"mid": Transformer2DModel(), "conv_out": nn.Conv2d(8, 4, 1)})


def randomise(network: LoRANetwork) -> LoRANetwork:
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def small_network(model: nn.Module, **arguments: object) -> LoRANetwork:
    defaults = {"multiplier": 1.0, "network_dim": 2, "network_alpha": 1.0, "vae": None, "text_encoder": None}
    return randomise(create_network(**{**defaults, "unet": model, **arguments}))


def expected_weight(weight: torch.Tensor, lora: LoRAModule, multiplier: float) -> torch.Tensor:
    product = lora.lora_up.weight.double().flatten(1) @ lora.lora_down.weight.double().flatten(1)
    return weight.double() + multiplier * lora.alpha.item() / lora.lora_dim * product.view(weight.shape)


def original_name(unet: UNet2DConditionModel, path: str) -> str:
    """The original layout's path of the module that Diffusers calls `path`."""
    return unet_key_map(unet.config).original(f"{path}.weight").removeprefix(UNET_PREFIX).removesuffix(".weight")


def original_tree(unet: UNet2DConditionModel) -> nn.Module:
    """The U-Net as the trainer hands it to networks for SDXL."""
    return original_view(unet, unet_key_map(unet.config))
