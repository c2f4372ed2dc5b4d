"""What a model knows and paints, measured in the same way whatever it was trained by."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from examples.miniature.evaluate import SAMPLER, SCALE, STEPS

if TYPE_CHECKING:
    from library.models.family import Family
    from networks.lora import LoRANetwork

TIMESTEPS = range(50, 1000, 100)


def mean_loss(model: "Family", folder: Path, draws: int = 1) -> float:
    """The mean loss over the pictures of a folder, each at the same timesteps and with the same noise every time.

    The folder is laid out like that of --train_data_dir; `draws` is how many different noises each timestep has.
    """
    import torch
    from torch import nn

    from library.data.config import load_datasets
    from library.data.dataset import ImageDataset
    from library.data.plan import RunPlan
    from library.data.records import scan
    from library.models.noise import sample_noise
    from library.options import DatasetOptions
    from library.training.step import TrainingStep

    count = len(list(folder.glob("*/*.png")))
    datasets = load_datasets(
        DatasetOptions(train_data_dir=str(folder), resolution="64", train_batch_size=count), frozenset()
    )
    table = scan(datasets)
    (plan,) = RunPlan(table, datasets, seed=0).iterate(0, 1)
    batch = ImageDataset(table, datasets)[plan]
    step = TrainingStep(model, nn.Module(), model.noise_process())
    losses = []
    with torch.no_grad():
        latents = step.latents_of(batch)
        for draw, timestep in itertools.product(range(draws), TIMESTEPS):
            noise = sample_noise(latents.shape[1:], [seed + 1000 * draw + timestep for seed in batch.seeds])
            losses.append(step.losses(batch, latents, noise, torch.full((len(latents),), timestep)))
    return float(torch.stack(losses).mean())


def painted(model: "Family", prompts: Sequence[str]) -> list[Image.Image]:
    """A picture of 64 x 64 pixels for each prompt, the first with seed 0, the next with 1 and so on."""
    from library.generation.paint import paint
    from library.generation.prompts import PromptLine

    return [
        paint(model, PromptLine(prompt, None, 64, 64, seed, SCALE, STEPS, SAMPLER))
        for seed, prompt in enumerate(prompts)
    ]


def with_lora(model: "Family", file: Path) -> "LoRANetwork":
    """Have a LoRA act on a model. What is returned sets how strongly: `set_multiplier`."""
    from networks.lora import create_network_from_weights

    points = model.attach_points()
    network, weights = create_network_from_weights(1.0, file, model.vae, points.text_encoders, points.unet)
    network.apply_to(points.text_encoders, points.unet)
    network.load_state_dict(weights)
    return network


def with_word(model: "Family", word: str, file: Path) -> None:
    """Have a model read a word as the vectors in a file of a Textual Inversion."""
    from library.models.added_words import AddedRows, read_embedding
    from library.models.text import VOCABULARY_SIZE

    encoders = zip(model.embedding_names, model.text_encoders, strict=True)
    widths = {name: encoder.clip.embeddings.token_embedding.embedding_dim for name, encoder in encoders}
    rows = read_embedding(file, widths)
    count = len(next(iter(rows.values())))
    ids = range(VOCABULARY_SIZE, VOCABULARY_SIZE + count)
    model.add_words({word: ids}, [AddedRows(rows[name]) for name in widths])
