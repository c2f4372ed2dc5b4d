"""LoRAs of random weights for the tiny models, and what they make of them."""

import torch

from networks.lora import find_layers
from tests.tiny import make_model

Tensors = dict[str, torch.Tensor]
PARTS = ("lora_up.weight", "lora_down.weight", "alpha")


def random_lora(family: str, rank: int, seed: int, kernels: bool = True) -> Tensors:
    """Random weights for every linear layer, and convolution if asked for, of the tiny model of a family."""
    points = make_model(family).attach_points()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in find_layers(points.text_encoder, points.unet).items():
        shape = module.weight.shape
        if kernels or len(shape) == 2:
            up, down = (shape[0], rank, *(1,) * (len(shape) - 2)), (rank, *shape[1:])
            tensors[f"{name}.lora_up.weight"] = torch.randn(up, generator=generator) * 0.1
            tensors[f"{name}.lora_down.weight"] = torch.randn(down, generator=generator) * 0.1
            tensors[f"{name}.alpha"] = torch.tensor(rank / 2)
    return tensors


def expected(family: str, *loras: tuple[Tensors, float]) -> Tensors:
    """The model in the original layout with the formula applied in float64, through the model's own modules."""
    model = make_model(family).double()
    points = model.attach_points()
    layers = find_layers(points.text_encoder, points.unet)
    for tensors, ratio in loras:
        for name in {key.partition(".")[0] for key in tensors}:
            up, down, alpha = (tensors[f"{name}.{part}"].double() for part in PARTS)
            weight = layers[name].weight.data
            weight += ratio * alpha / len(down) * (up.flatten(1) @ down.flatten(1)).view(weight.shape)
    return dict(model.tensors())


def assert_rounded(ours: Tensors, wanted: Tensors, dtype: torch.dtype) -> None:
    """Whether each number is the wanted one to within the rounding of its format, and of sums in float32."""
    assert ours.keys() == wanted.keys()
    for key, tensor in wanted.items():
        if not tensor.is_floating_point():
            assert torch.equal(ours[key], tensor)
            continue
        assert ours[key].dtype == dtype
        size = torch.finfo(dtype).eps / 2 * 1.01
        torch.testing.assert_close(ours[key].double(), tensor.double(), rtol=size, atol=1e-6)
