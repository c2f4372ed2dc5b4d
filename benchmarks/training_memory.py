"""Memory and time of a LoRA training step with each option that saves memory, as ratios to the step without any.

    python benchmarks/training_memory.py [--divide N] [--pixels N] [--batch-size N] [--steps N] [--compile]

The model is a Stable Diffusion 1.5 of random weights whose U-Net has 1/N of the channels, in half precision. Every
option has a process of its own, one after the other. Memory is the most that was held in the steps, all weights
included: of the GPU if there is one, else of the process, less what it held before it had a model.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.full_size import SD15

# torch is imported by the processes that measure alone
if TYPE_CHECKING:
    from library.models.family import Family

OPTIONS: dict[str, dict[str, Any]] = {
    "no option": {},
    "--fp8_base_unet": {"fp8": ["unet"]},
    "--fp8_base": {"fp8": ["unet", "text_encoder"]},
    "--mem_eff_attn": {"attention": "mem_eff_attn"},
    "--xformers": {"attention": "xformers"},
    "--gradient_checkpointing": {"checkpointing": True},
    "--gradient_checkpointing --cpu_offload_checkpointing": {"checkpointing": True, "offload": True},
    "--gradient_checkpointing --fp8_base": {"checkpointing": True, "fp8": ["unet", "text_encoder"]},
}
COMPILED = {"--torch_compile": {"compile": True}}
CAPTION = "a photo of a cat sitting on a red sofa by the window"
RANK = 4


class Measured(NamedTuple):
    """What a process answers."""

    weights: int  # bytes of the model's weights
    peak: int  # bytes
    seconds: float  # of a step


def make_model(divide: int) -> "Family":
    """The model on its device, without an autoencoder to speak of, which has no part in a step."""
    import torch

    from library.models.sd import StableDiffusion1

    tiny = {"block_out_channels": [32] * 4, "latent_channels": 4}
    tiny |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    channels = tuple(count // divide // 32 * 32 for count in SD15["unet_config"]["block_out_channels"])
    unet = SD15["unet_config"] | {"block_out_channels": channels}
    with torch.device("meta"):
        model = StableDiffusion1.from_configs(unet_config=unet, vae_config=tiny, clip_config=SD15["clip_config"])
    model = model.to(torch.bfloat16).to_empty(device=device())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.rebuild_buffers(device())
    return model.train()


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def measure(option: dict[str, Any], divide: int, pixels: int, batch_size: int, steps: int) -> Measured | None:
    """Train a few steps; None where the option cannot be used here."""
    import torch
    import torch.nn.functional as F

    from library.models import attention, float8
    from library.options.network import NetworkOptions
    from library.options.optimizer import OptimizerOptions
    from library.training.device.compilation import compile_blocks
    from library.training.device.offload import offload_checkpoints
    from library.training.methods.network import NetworkMethod

    before = held()
    model = make_model(divide)
    place = torch.device(device())
    if way := option.get("attention"):
        if not attention.works(way, model.unet, place, torch.bfloat16):
            return None
        attention.use(way, model.unet)
    for name in option.get("fp8", ()):
        float8.store_in_8_bits(model.components()[name].module)
    network = NetworkMethod(NetworkOptions("networks.lora", network_dim=RANK), OptimizerOptions()).build(model)
    if option.get("checkpointing"):
        model.enable_gradient_checkpointing(text_encoders=True)
    if option.get("offload"):
        offload_checkpoints(model)
    if option.get("compile"):
        compile_blocks(model.unet, "inductor")
    weights = sum(parameter.nbytes for parameter in (*model.unet.parameters(), *model.text_encoders.parameters()))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    reset_peak()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        with torch.autocast(place.type, torch.bfloat16):
            noise = torch.randn(batch_size, 4, pixels // 8, pixels // 8, device=place)
            timesteps = torch.randint(0, 1000, (batch_size,), device=place)
            condition = model.condition(model.encode_text([CAPTION] * batch_size), noise)
            loss = F.mse_loss(model.denoise(noise, timesteps, condition).float(), noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if place.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return Measured(weights, peak() - before, median(seconds[1:] or seconds))


# --- memory ---


def held() -> int:
    """Bytes of the GPU, or else of the process, that are in use now."""
    import psutil
    import torch

    return torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def reset_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the most that was held


def peak() -> int:
    """The most bytes in use since then."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


# --- the table ---


def row(cells: list[str]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, (54, 12, 8, 12, 8, 8), strict=False)).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of a LoRA training step with each option that saves some.")
    parser.add_argument("--divide", type=int, default=1, metavar="N", help="1/N of the U-Net's channels (default 1)")
    parser.add_argument("--pixels", type=int, default=512, metavar="N", help="size of the pictures (default 512)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="pictures in a step (default 1)")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="steps, of which the first is not timed")
    parser.add_argument("--compile", action="store_true", help="--torch_compile, too, which takes minutes")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = [arguments.divide, arguments.pixels, arguments.batch_size, arguments.steps]
    options = OPTIONS | (COMPILED if arguments.compile else {})
    if arguments.worker:
        print(json.dumps(measure((OPTIONS | COMPILED)[arguments.worker], *size)))
        return
    print(row(["", "weights", "ratio", "memory", "ratio", "time"]))
    plain = None
    for name in options:
        command = [sys.executable, __file__, *sys.argv[1:], f"--worker={name}"]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise SystemExit(f"{ended.stderr}\n{name} ended without an answer")
        answer = json.loads(ended.stdout.splitlines()[-1])
        if answer is None:
            print(row([name, "cannot be used here"]), flush=True)
            continue
        measured = Measured(*answer)
        plain = plain or measured
        shown = [f"{count / 2**20:.0f} MB" for count in (measured.weights, measured.peak)]
        ratios = [f"{mine / other:.2f}" for mine, other in zip(measured, plain, strict=True)]
        print(row([name, shown[0], ratios[0], shown[1], ratios[1], ratios[2]]), flush=True)


if __name__ == "__main__":
    main()
