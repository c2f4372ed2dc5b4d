"""How long a training step waits for its batch, with latents cached on disk and two loader processes.

    python benchmarks/batch_delivery.py [--pictures N] [--steps N] [--workers N]

Trains a LoRA on the miniature model with `train_network.py`, as a user does, on drawn pictures whose latents were
cached by a first run, and reads the share of its time that each step waited for data from the log. The baseline, in the
same run, is the same training without loader processes, where every batch is made while the step waits.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.miniature import shapes

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--pictures", type=int, default=400, help="how many are trained on")
    arguments.add_argument("--steps", type=int, default=200, help="of each run")
    arguments.add_argument("--workers", type=int, default=2, help="loader processes")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw(folder / "pictures" / "1_shape", options.pictures)
        train(folder, "caching", steps=1, workers=0)
        for workers in (0, options.workers):
            share = train(folder, f"{workers} workers", options.steps, workers)
            print(f"--max_data_loader_n_workers={workers}: a step waits for its batch {share:.1%} of its time")


def draw(folder: Path, count: int) -> None:
    """Pictures with captions."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        scene = shapes.random_scene(rng)
        Image.fromarray(shapes.draw(scene)).save(folder / f"{number}.png")
        (folder / f"{number}.caption").write_text(scene.caption, encoding="utf-8")


def train(folder: Path, name: str, steps: int, workers: int) -> float:
    """One run; the share of the time of its last 100 steps in which there was no batch."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = folder / "logs" / name
    words = {
        "pretrained_model_name_or_path": ROOT / "examples" / "miniature" / "miniature.safetensors",
        "train_data_dir": folder / "pictures",
        "resolution": 64,
        "train_batch_size": 4,
        "max_train_steps": steps,
        "max_data_loader_n_workers": workers,
        "network_module": "networks.lora",
        "seed": 1,
        "output_dir": folder / "out",
        "logging_dir": logs,
    }
    flags = [f"--{flag}={value}" for flag, value in words.items()]
    command = [sys.executable, ROOT / "train_network.py", *flags, "--cache_latents_to_disk", "--skip_cache_check"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (events,) = logs.glob("*/*/events.*")
    log = EventAccumulator(str(events.parent), {"scalars": 0})
    log.Reload()
    return log.Scalars("waiting_for_data")[-1].value


if __name__ == "__main__":
    main()
