"""The root module: everything that is differentiated, from a batch to one loss per sample."""

import torch
from torch import Tensor, nn

from library.data.batch import Batch
from library.models.family import Family
from library.models.noise import NoiseProcess, sample_noise
from library.options.objective import ObjectiveOptions
from library.training.objective import Objective
from library.training.preservation import Preservation, preserved
from library.transfer import to_device

_PLAIN = ObjectiveOptions()


class TrainingStep(nn.Module):
    """Encodes the captions, adds noise, asks the denoiser and compares.

    Accelerate prepares this one module, so that whatever engine runs it sees every trained parameter, and sees it used
    in `forward`. `trained` is a child only for that reason: it acts through the model's own layers.
    """

    def __init__(
        self,
        model: Family,
        trained: nn.Module,
        noise: NoiseProcess,
        options: ObjectiveOptions = _PLAIN,
        preservation: Preservation | None = None,
    ):
        """`preservation`: for batches with samples that are to keep what the model says of them."""
        super().__init__()
        self.model = model
        self.trained = trained
        self.noise = noise
        self.text_steps: int | None = None
        """So many of the run's first steps train the text encoders, if not all."""
        self.objective = Objective(options, noise)
        self.preservation = preservation
        self.unusable: list[tuple[Tensor, list[int]]] = []
        """Of each batch whose images were encoded: which latents were not finite (B,), and its records."""

    def forward(self, batch: Batch) -> Tensor:
        """(B,) float32: each sample's loss times its weights, 0 for latents that are not finite."""
        latents = self.latents_of(batch)
        finite: Tensor | bool = True
        if batch.latents is None:
            finite = torch.isfinite(latents).flatten(1).all(dim=1)
            self.unusable.append((~finite, batch.records))
            latents = torch.where(finite[:, None, None, None], latents, 0)
        drawn = self.timesteps_of(batch)
        timesteps = to_device(drawn, latents.device)
        noise = to_device(sample_noise(latents.shape[1:], batch.seeds), latents.device)
        noise, added = self.objective.colour(noise, latents, batch.seeds)
        losses = self.losses(batch, latents, noise, timesteps, added) * finite
        counted = (batch.weights != 0) & finite
        if rows := preserved(batch):  # their losses say nothing of what is hard to learn
            counted = counted.index_fill(0, to_device(torch.tensor(rows), counted.device), False)
        return self.objective.timesteps.weigh(losses, drawn, counted)

    def timesteps_of(self, batch: Batch) -> Tensor:
        """(B,) int64 on the CPU: the timesteps that a batch is trained at. They follow from its seeds, and may from
        what was learned before this step.
        """
        return self.objective.timesteps.draw(batch.seeds)

    def losses(
        self, batch: Batch, latents: Tensor, noise: Tensor, timesteps: Tensor, added: Tensor | None = None
    ) -> Tensor:
        """(B,) float32 for scaled latents and noise (B, C, h, w) and timesteps (B,) of the caller's choice. The latents
        get the noise that is `added`, if it is not the same.
        """
        text = self.text_of(batch)
        condition = self.model.condition(text, batch.sizes)
        noisy = self.noise.add_noise(latents, noise if added is None else added, timesteps)
        target = self.noise.target(latents, noise, timesteps)
        if rows := preserved(batch):
            target = self.preservation.targets(self.model, batch, rows, noisy, timesteps, target)
        prediction = self.model.denoise(noisy, timesteps, condition)
        return self.objective.losses(prediction, target, timesteps, batch.loss_mask, batch.weights)

    def text_of(self, batch: Batch) -> dict[str, Tensor]:
        """What the text encoders say of the captions: cached, or asked now. After the last step that trains them they
        get no gradients, and optimizers leave them as they are: their parameters stay in place, because DDP counts on
        `requires_grad` being what it was.
        """
        if batch.text is not None:
            return batch.text
        over = self.text_steps is not None and batch.plan.step >= self.text_steps
        with torch.set_grad_enabled(torch.is_grad_enabled() and not over):
            return self.model.encode_text(batch.captions)

    def forget(self) -> None:
        """What was noted of the micro-batches of this step does not count."""
        self.unusable.clear()
        self.objective.timesteps.forget()

    @torch.no_grad()
    def latents_of(self, batch: Batch) -> Tensor:
        """Scaled latents (B, C, h, w) float32: cached, or encoded now in the autoencoder's own precision."""
        latents = batch.latents
        if latents is None:
            with torch.autocast(batch.images.device.type, enabled=False):
                latents = self.model.encode_images(batch.images, batch.seeds)
        return latents * self.model.latents.scale
