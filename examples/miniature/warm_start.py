"""A miniature of another family out of a finished one: what fits is taken over, the rest is fresh."""

import torch
from torch import nn

from examples.miniature.autoencoder import rescale
from examples.miniature.configs import Structure
from library.models.family import Family


def grown(source: Family, structure: Structure) -> Family:
    """A model of this structure with the autoencoder of `source`, whose latents get the family's scale, and with all
    weights of its first text encoder and its U-Net that have a place there.
    """
    model = structure.build().eval()
    model.vae.load_state_dict(source.vae.state_dict())
    rescale(model.vae, source.latents.scale / model.latents.scale)
    take_over(source.text_encoders[0], model.text_encoders[0])
    take_over(source.unet, model.unet)
    return model


@torch.no_grad()
def take_over(source: nn.Module, target: nn.Module) -> int:
    """Copies every tensor of `source` that `target` has under the same name in the same shape, up to trailing ones, by
    which a linear layer and a 1x1 convolution differ. Returns how many.
    """
    theirs, ours = source.state_dict(), target.state_dict()
    fitting = [name for name in ours if name in theirs and _shape(ours[name]) == _shape(theirs[name])]
    for name in fitting:
        ours[name].copy_(theirs[name].reshape(ours[name].shape))
    return len(fitting)


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape[:2]) if tensor.shape[2:] == (1, 1) else tuple(tensor.shape)
