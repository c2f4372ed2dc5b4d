"""The root module: everything that is differentiated, from a batch to one loss per sample."""

import torch
from torch import Tensor, nn

from library.data.batch import Batch
from library.models.family import Family
from library.models.noise import NoiseProcess, sample_noise
from library.training.objective import squared_error
from library.transfer import to_device


class TrainingStep(nn.Module):
    """Encodes the captions, adds noise, asks the denoiser and compares.

    Accelerate prepares this one module, so that whatever engine runs it sees every trained parameter, and sees it used
    in `forward`. `trained` is a child only for that reason: it acts through the model's own layers.
    """

    def __init__(self, model: Family, trained: nn.Module, noise: NoiseProcess):
        super().__init__()
        self.model = model
        self.trained = trained
        self.noise = noise
        self.unusable: list[tuple[Tensor, list[int]]] = []
        """Of each batch whose images were encoded: which latents were not finite (B,), and its records."""

    def forward(self, batch: Batch) -> Tensor:
        """(B,) float32: each sample's loss times its weight, 0 for latents that are not finite."""
        latents = self.latents_of(batch)
        finite = 1
        if batch.latents is None:
            finite = torch.isfinite(latents).flatten(1).all(dim=1)
            self.unusable.append((~finite, batch.records))
            latents = torch.where(finite[:, None, None, None], latents, 0)
        timesteps = to_device(self.timesteps_of(batch), latents.device)
        noise = to_device(sample_noise(latents.shape[1:], batch.seeds), latents.device)
        return self.losses(batch, latents, noise, timesteps) * finite

    def timesteps_of(self, batch: Batch) -> Tensor:
        """(B,) int64 on the CPU: the timesteps that a batch is trained at. They follow from its seeds."""
        return self.noise.sample_timesteps(batch.seeds)

    def losses(self, batch: Batch, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(B,) float32 for scaled latents and noise (B, C, h, w) and timesteps (B,) of the caller's choice."""
        text = self.model.encode_text(batch.captions) if batch.text is None else batch.text
        condition = self.model.condition(text, batch.sizes)
        noisy = self.noise.add_noise(latents, noise, timesteps)
        prediction = self.model.denoise(noisy, timesteps, condition)
        target = self.noise.target(latents, noise, timesteps)
        return squared_error(prediction, target, batch.loss_mask) * batch.weights

    @torch.no_grad()
    def latents_of(self, batch: Batch) -> Tensor:
        """Scaled latents (B, C, h, w) float32: cached, or encoded now in the autoencoder's own precision."""
        latents = batch.latents
        if latents is None:
            with torch.autocast(batch.images.device.type, enabled=False):
                latents = self.model.encode_images(batch.images, batch.seeds)
        return latents * self.model.latents.scale
