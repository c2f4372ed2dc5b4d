"""Golden trajectories: the loss of each step of a short run of every method, and a hash of its result.

`python -m tests.trajectories` records them anew, all or those that are named. A change that moves them has to be noted
in CHANGELOG.md.
"""

import hashlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.processes import ROOT, train_script
from tests.tiny import draw_pictures, scalars, stored

EXAMPLES = ROOT / "examples" / "miniature"
FILE = Path(__file__).parent / "data" / "golden" / "trajectories.json"
MODEL, MODEL_SDXL = EXAMPLES / "miniature.safetensors", EXAMPLES / "miniature_sdxl.safetensors"
LORA = {"network_module": "networks.lora", "learning_rate": 1e-2}
WORD = {"token_string": "sks", "init_word": "circle", "num_vectors_per_token": 2}
# Each method: its script and what it is started with besides.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("train_network", {"pretrained_model_name_or_path": MODEL, **LORA}),
    "lora_sdxl": ("sdxl_train_network", {"pretrained_model_name_or_path": MODEL_SDXL, **LORA}),
    "fine_tune": (
        "fine_tune",
        {"pretrained_model_name_or_path": MODEL, "train_text_encoder": True, "learning_rate": 1e-4},
    ),
    "train_db": (
        "train_db",
        {"pretrained_model_name_or_path": MODEL, "stop_text_encoder_training": 3, "learning_rate": 1e-4},
    ),
    "sdxl_train": (
        "sdxl_train",
        {"pretrained_model_name_or_path": MODEL_SDXL, "train_text_encoder": True, "learning_rate": 1e-4},
    ),
    "textual_inversion": (
        "train_textual_inversion",
        {"pretrained_model_name_or_path": MODEL, "learning_rate": 1e-2, "save_model_as": "safetensors", **WORD},
    ),
}
COMMON = {
    "resolution": 32,
    "train_batch_size": 2,
    "max_train_steps": 6,
    "max_data_loader_n_workers": 0,
    "seed": 1,
    "no_rehearsal": True,
    "deterministic": True,
    "output_name": "run",
}


def record(method: str, folder: Path, train: Callable[[Sequence[str], str], Any]) -> dict[str, Any]:
    """The trajectory of a run in `folder`; `train(words, script)` runs a script."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    script, own = METHODS[method]
    values = {**COMMON, **own, **data_for(script, folder / "data")}
    values |= {"output_dir": folder / "out", "logging_dir": folder / "logs"}
    words = [
        word
        for name, value in values.items()
        for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]
    train(words, script)
    (events,) = (folder / "logs").rglob("events.*")
    log = EventAccumulator(str(events.parent), {"scalars": 0})
    log.Reload()
    result = hashlib.sha256(stored(folder / "out" / "run.safetensors")).hexdigest()
    return {"losses": list(scalars(log, "loss/current").values()), "result": result, "machine": machine()}


def data_for(script: str, folder: Path) -> dict[str, Any]:
    """Six pictures, as the script wants them."""
    images = draw_pictures(folder / "1_sks shape", 6)
    if script != "fine_tune":
        return {"train_data_dir": folder, "caption_extension": ".txt"}
    captions = {path.stem: {"caption": path.read_text(encoding="utf-8")} for path in sorted(images.glob("*.txt"))}
    (folder / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    return {"train_data_dir": images, "in_json": folder / "captions.json"}


def machine() -> str:
    """What the last bits of a result depend on, as far as it can be told."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        known = dict(
            line.split(":", 1)
            for line in info.read_text().split("\n\n")[0].replace("\t", "").splitlines()
            if ":" in line
        )
        model = known.get("model name", model).strip()
    kernels = os.environ.get("ONEDNN_MAX_CPU_ISA", "all kernels")
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{model}, torch {torch.__version__}, {capability}, {kernels}, {torch.get_num_threads()} threads"


def _train_apart(words: Sequence[str], script: str) -> None:
    ended = train_script(words, script=f"{script}.py")
    if ended.returncode:
        sys.exit(ended.stderr)


def main(names: Sequence[str]) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)  # as train_script
    golden = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    for name in names or METHODS:
        with tempfile.TemporaryDirectory() as folder:
            golden[name] = record(name, Path(folder), _train_apart)
        print(name, golden[name]["losses"])
    FILE.write_text(json.dumps({name: golden[name] for name in METHODS}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
