"""Which tensors a run changes, by hashes of all of them. As a program, `-m tests.changes CASES OUTPUT`, it is one of
several processes that make one run after the other.
"""

import hashlib
import importlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from library import cli, console
from library.training import launch

Hashes = dict[str, str]
LORA = {"network_module": "networks.lora", "network_dim": 2}
WORD = {"token_string": "sks", "num_vectors_per_token": 2, "init_word": "circle"}
# What is trained -> its script, and what that is started with besides.
METHODS: dict[str, tuple[str, dict[str, object]]] = {
    "lora": ("train_network", LORA),
    "lora of the U-Net": ("train_network", LORA | {"network_train_unet_only": True}),
    "lora of the text encoder": ("train_network", LORA | {"network_train_text_encoder_only": True}),
    "lora of SDXL": ("sdxl_train_network", LORA),
    "U-Net": ("fine_tune", {"train_data_dir": "", "caption_extension": None}),
    "U-Net and text encoder": (
        "fine_tune",
        {"train_data_dir": "", "caption_extension": None, "train_text_encoder": True},
    ),
    "SDXL itself": ("sdxl_train", {"train_text_encoder": True}),
    "word": ("train_textual_inversion", WORD),
    "word of SDXL": ("sdxl_train_textual_inversion", WORD),
}
# What each of them is to change, by the names of tensors in the root module: decided here, not by what asks for
# gradients. SDXL takes the answer of the first text encoder before its last layer, the tiny one's second.
FACTOR = r"\.lora_(up|down)\.weight"
INTENDED = {
    "lora": rf"trained\.lora_(te|unet)_\w+{FACTOR}",
    "lora of the U-Net": rf"trained\.lora_unet_\w+{FACTOR}",
    "lora of the text encoder": rf"trained\.lora_te_\w+{FACTOR}",
    "lora of SDXL": rf"trained\.lora_(te1_(?!text_model_encoder_layers_1_)|te2_|unet_)\w+{FACTOR}",
    "U-Net": r"(model|trained)\.unet\..*",
    "U-Net and text encoder": r"(model|trained)\.(unet|text_encoders?)\..*(weight|bias)",
    "SDXL itself": (
        r"(model|trained)\.(unet\..*"
        r"|(text_encoders\.0|text_encoder_1)\.model\.(embeddings|encoder\.layers\.0)\..*(weight|bias)"
        r"|(text_encoders\.1|text_encoder_2)\..*(weight|bias))"
    ),
    "word": r"trained\.emb_params\.rows",
    "word of SDXL": r"trained\.clip_[lg]\.rows",
}
CACHED = {"lora of the U-Net", "U-Net"}  # what leaves the text encoder as it is


@dataclass(frozen=True)
class Case:
    """A run."""

    method: str
    checkpointing: bool
    cached: bool
    bf16: bool

    def __str__(self) -> str:
        settings = ("checkpointing", "cached", "bf16")
        return ", ".join([self.method, *(name for name in settings if getattr(self, name))])

    @property
    def is_quick(self) -> bool:
        """Of the cases that are, any two settings of one of the smaller models come together in all ways."""
        number = list(METHODS).index(self.method)
        if "SDXL" in self.method:
            return self.method == "word of SDXL" and self.checkpointing and self.bf16
        if self.method in CACHED:
            return self.checkpointing == self.bf16 == (self.cached if number % 2 else not self.cached)
        return self.checkpointing == (self.bf16 if number % 4 else not self.bf16)

    def words(
        self, flags: Callable[..., list[str]], output: Path, models: Callable[[str], Path], data: Path
    ) -> list[str]:
        """What its script is started with; `data`: a folder with the pictures of each script."""
        script, own = METHODS[self.method]
        changes = {
            "network_module": None,
            "pretrained_model_name_or_path": models("sdxl" if "SDXL" in self.method else "sd1"),
        }
        if script == "fine_tune":
            images = data / "1_sks shape"
            own = own | {"train_data_dir": images, "in_json": data / "captions.json"}
        else:
            own = own | {"train_data_dir": data}
        changes |= own | {"optimizer_type": "AdamW", "optimizer_args": "weight_decay=0.1", "max_train_steps": 3}
        changes |= {
            "gradient_checkpointing": self.checkpointing or None,
            "mixed_precision": "bf16" if self.bf16 else "no",
        }
        return flags(output, **changes, cache_text_encoder_outputs=self.cached or None, output_name=None)


CASES = [
    Case(method, *values)
    for method in METHODS
    for values in itertools.product((False, True), (False, True) if method in CACHED else (False,), (False, True))
]


def hashes(root: nn.Module) -> Hashes:
    """Of every parameter and buffer by all of its names, whether it is saved or not."""
    named = (*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False))
    return {
        name.removeprefix("module."): hashlib.sha256(
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for name, tensor in named
    }


@contextmanager
def watching() -> Iterator[list[Hashes]]:
    """Gets the hashes before the first and after the last step of a run that is made while it lasts."""
    train, seen = launch.train, []

    def watched(*, root: nn.Module, **others: object) -> None:
        seen.append(hashes(root))
        train(root=root, **others)
        seen.append(hashes(root))

    launch.train = watched
    try:
        yield seen
    finally:
        launch.train = train


def assert_intended(method: str, before: Hashes, after: Hashes) -> None:
    """All of what the method is to change has changed, and nothing else."""
    assert before.keys() == after.keys()
    assert {name.split(".")[1] for name in before if name.startswith("model.")} == {"unet", "vae", "text_encoders"}
    intended = {name for name in before if re.fullmatch(INTENDED[method], name)}
    changed = {name for name in before if before[name] != after[name]}
    assert intended
    assert changed - intended == set(), "these were to stay"
    assert intended - changed == set(), "these were to change"


def main(runs: Sequence[tuple[str, list[str]]]) -> list[list[Hashes]]:
    """What `watching` sees in each run, (script, words)."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    Accelerator.end_training = lambda self: None  # the processes stay connected for the next run
    found = []
    for script, words in runs:
        AcceleratorState._reset_state()
        GradientState._reset_state()
        sys.argv = [f"{script}.py", *words]
        with watching() as seen:
            cli.run(importlib.import_module(script).main)
        found.append(seen)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    output = Path(sys.argv[2])
    output.with_name(f"{output.name}.{console.rank()}").write_text(
        json.dumps(main(json.loads(Path(sys.argv[1]).read_text())))
    )
