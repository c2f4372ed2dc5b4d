"""A LoRA training step at the width of Stable Diffusion 1.5, against the loop one would write with Diffusers + PEFT.

    python benchmarks/train_step.py [--steps N] [--rounds N] [--resolutions 128 256]

Both train the same layers of random weights made on the spot, U-Net and text encoder, on the CPU in float32 with AdamW
and batches of 2 captions and given latents. Each has its own process, which rests while the other one works: they take
turns, round by round, so that a machine that gets slower or busier does so for both. Memory is the most a process has
held so far.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.full_size import SD15

# torch is imported by the workers alone: a process inherits the memory peak of the one that starts it.
if TYPE_CHECKING:
    from torch import Tensor, nn

BATCH_SIZE = 2
RANK, ALPHA = 4, 1.0
LEARNING_RATE = 1e-4
CLIP_NORM = 1.0
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
CLIP_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
CAPTIONS = ["a photo of a cat sitting on a red sofa by the window"] * BATCH_SIZE

Run = Callable[[int, int], list[float]]  # (pixels, steps) -> seconds of each step


# --- The two sides ---


def plain() -> tuple[Run, "nn.Module"]:
    """The loop of the Diffusers examples, without what has no part in the step."""
    import torch
    import torch.nn.functional as F
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from diffusers.optimization import get_scheduler
    from peft import LoraConfig
    from transformers import CLIPTextConfig, CLIPTextModel

    from library.models.text import clip_tokenizer  # transformers' own, which otherwise has to be downloaded

    unet = UNet2DConditionModel(**SD15["unet_config"])
    text_encoder = CLIPTextModel(CLIPTextConfig(**SD15["clip_config"]))
    model = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    model.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=UNET_TARGETS))
    text_encoder.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=CLIP_TARGETS))
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    lr_scheduler = get_scheduler("constant", optimizer)
    noise_scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    tokenizer = clip_tokenizer()

    def step(latents: "Tensor") -> None:
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(latents),))
        noisy = noise_scheduler.add_noise(latents, noise, timesteps)
        tokens = tokenizer(CAPTIONS, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        hidden_states = text_encoder(tokens.input_ids)[0]
        prediction = unet(noisy, timesteps, hidden_states).sample
        F.mse_loss(prediction.float(), noise.float()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()

    def run(pixels: int, steps: int) -> list[float]:
        latents = torch.randn(BATCH_SIZE, 4, pixels // 8, pixels // 8)
        seconds: list[float] = []
        for _ in timed(range(steps), seconds):
            step(latents)
        return seconds

    return run, model


def ours() -> tuple[Run, "nn.Module"]:
    """The trainer's own loop, with its progress bar, on batches that are ready."""
    from accelerate import Accelerator

    from library.models.sd import StableDiffusion1
    from library.options.network import NetworkOptions
    from library.options.optimizer import OptimizerOptions
    from library.training.events import Schedule
    from library.training.methods.network import NetworkMethod
    from library.training.optimization.optimizers import make_optimizer
    from library.training.optimization.schedulers import make_scheduler
    from library.training.optimization.stepper import Stepper
    from library.training.resuming.state import Progress
    from library.training.step import TrainingStep
    from library.training.tracking import Tracker
    from library.training.trainer import train

    # An autoencoder of the right depth and no size: the other side has none, since latents are given.
    tiny = {"block_out_channels": [32] * 4, "latent_channels": 4}
    tiny |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    model = StableDiffusion1.from_configs(**{**SD15, "vae_config": tiny})
    options = OptimizerOptions(learning_rate=LEARNING_RATE, max_grad_norm=CLIP_NORM)
    method = NetworkMethod(NetworkOptions("networks.lora", network_dim=RANK, network_alpha=ALPHA), options)
    trained = method.build(model)
    groups = method.parameter_groups()
    optimizer = make_optimizer(options, groups)
    scheduler = make_scheduler(options, optimizer, total_steps=1)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    step = TrainingStep(model, trained, model.noise_process())
    root, prepared = accelerator.prepare(step, optimizer)
    stepper = Stepper(accelerator, root, prepared, scheduler, [group.name for group in groups], options.clip_norm)

    def run(pixels: int, steps: int) -> list[float]:
        progress = Progress(total_steps=steps, total_epochs=1)
        seconds: list[float] = []
        train(
            loader=timed([_batch(pixels, step) for step in range(steps)], seconds),
            root=root,
            method=method,
            stepper=stepper,
            schedule=Schedule([]),
            tracker=Tracker(accelerator, step.timesteps_of, str),
            progress=progress,
            seed=0,
            device=accelerator.device,
        )
        return seconds

    return run, root


def _batch(pixels: int, step: int):
    """A ready batch of two captioned latents, as the data loader hands it over."""
    import torch

    from library.data.batch import Batch
    from library.data.plan import BatchPlan, Item

    seeds = [BATCH_SIZE * step + i for i in range(BATCH_SIZE)]
    plan = BatchPlan(
        epoch=1,
        step=step,
        micro=0,
        last_micro=True,
        items=tuple(Item(record=i, repeat=0, seed=seed) for i, seed in enumerate(seeds)),
        bucket=(pixels, pixels),
        dataset=0,
        images_in_step=BATCH_SIZE,
        filler=False,
        last_of_epoch=False,
    )
    return Batch(
        plan=plan,
        seeds=seeds,
        records=list(range(BATCH_SIZE)),
        captions=CAPTIONS,
        images=None,
        latents=torch.randn(BATCH_SIZE, 4, pixels // 8, pixels // 8),
        sizes=torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]] * BATCH_SIZE, dtype=torch.float32),
        text=None,
        loss_mask=None,
        weights=torch.ones(BATCH_SIZE),
    )


# --- Measuring ---

SIDES = {"plain": plain, "ours": ours}


class Turn(NamedTuple):
    """What a worker answers."""

    seconds: list[float]
    peak: int  # bytes, since the worker's start


def timed(items: Iterable, seconds: list[float]) -> Iterator:
    """Yields the items and notes how long the consumer was busy with each."""
    for item in items:
        start = time.perf_counter()
        yield item
        seconds.append(time.perf_counter() - start)


def peak_memory() -> int:
    """The most memory this process has held, in bytes."""
    if os.name == "nt":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def work(side: str) -> None:
    """A worker: builds its side, says how much it trains, then answers one line per request."""
    import torch

    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not get between the answers
    torch.manual_seed(0)
    run, model = SIDES[side]()
    print(sum(p.numel() for p in model.parameters() if p.requires_grad), file=answers, flush=True)
    for request in sys.stdin:
        seconds = run(**json.loads(request))
        print(json.dumps([seconds, peak_memory()]), file=answers, flush=True)


class Worker:
    """The other end of `work`."""

    def __init__(self, side: str) -> None:
        command = [sys.executable, __file__, "--worker", side]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115, it lives as long as the worker
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.log, text=True)
        self.trained = int(self._answer())

    def run(self, pixels: int, steps: int) -> Turn:
        print(json.dumps({"pixels": pixels, "steps": steps}), file=self.process.stdin, flush=True)
        return Turn(*json.loads(self._answer()))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise SystemExit(f"{self.log.read()}\n{' '.join(self.process.args)} ended without an answer")
        return line


def compare(workers: dict[str, Worker], pixels: int, steps: int, rounds: int) -> str:
    """One row of the table: median step time and peak memory of both sides, and their ratios with the rounds' range."""
    for worker in workers.values():
        worker.run(pixels, 1)  # first steps choose kernels and allocate
    turns: dict[str, list[Turn]] = {side: [] for side in workers}
    for number in range(rounds):
        for side in sorted(workers, reverse=number % 2 == 0):
            turns[side].append(workers[side].run(pixels, steps))
    times = {side: [median(turn.seconds) for turn in turns[side]] for side in turns}
    ratios = [mine / other for mine, other in zip(times["ours"], times["plain"], strict=True)]
    cells = [f"{pixels}x{pixels}"]
    for side in SIDES:
        cells.append(f"{median(times[side]):.2f} s, {turns[side][-1].peak / 2**30:.2f} GB")
    cells.append(f"{median(times['ours']) / median(times['plain']):.3f} ({min(ratios):.3f}–{max(ratios):.3f})")
    cells.append(f"{turns['ours'][-1].peak / turns['plain'][-1].peak:.3f}")
    return row(cells)


def row(cells: list[str]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, (10, 18, 18, 20, 12), strict=True)).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of a LoRA training step, against Diffusers + PEFT.")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="timed steps in a round (default 3)")
    parser.add_argument("--rounds", type=int, default=4, metavar="N", help="turns of each side (default 4)")
    parser.add_argument(
        "--resolutions",
        type=int,
        nargs="+",
        default=[128, 256],
        metavar="PIXELS",
        help="picture sizes (multiples of 64)",
    )
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments.worker)

    workers = {side: Worker(side) for side in SIDES}
    if len({worker.trained for worker in workers.values()}) > 1:
        raise SystemExit(f"the sides train different layers: { {s: w.trained for s, w in workers.items()} } parameters")
    print(row(["pixels", "diffusers + peft", "ours", "time ratio (rounds)", "memory ratio"]))
    for pixels in sorted(arguments.resolutions):  # memory only ever rises, so the small ones come first
        print(compare(workers, pixels, arguments.steps, arguments.rounds), flush=True)
    for worker in workers.values():
        worker.close()


if __name__ == "__main__":
    main()
