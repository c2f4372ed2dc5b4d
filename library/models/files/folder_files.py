"""What the files in a Diffusers folder are called, and which of several weights files is read. Imports no torch."""

import re
from collections.abc import Collection

# Which folders of a pipeline hold weights, and what their files are called: the stem of safetensors, that of .bin.
_STEMS = {
    "unet": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "vae": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "text_encoder": ("model", "pytorch_model"),
    "text_encoder_2": ("model", "pytorch_model"),
}
COMPONENTS = tuple(_STEMS)
INDEX = "model_index.json"
CONFIG = "config.json"
SCHEDULER = "scheduler/scheduler_config.json"
# What a component's folder cannot hold of an original file, under its original names.
ORIGINAL_LAYOUT = "original_layout.safetensors"
# Rounded weights are read where there are no others; weights before averaging last.
_VARIANTS = ("", "fp16", "bf16", "non_ema")


def weights_name(component: str, names: Collection[str], variant: str | None = None) -> str | None:
    """Which of the `names` in a component's folder is read: the weights, or the index of weights in several files.

    Full precision before `fp16`, safetensors before `.bin`; a `variant` before all others. None if there are none.
    """
    variants = _VARIANTS if variant is None else (variant, *(other for other in _VARIANTS if other != variant))
    for stem, suffix in zip(_STEMS[component], ("safetensors", "bin"), strict=True):
        for own in variants:
            dotted = f".{own}" if own else ""
            for name in (f"{stem}{dotted}.{suffix}", f"{stem}.{suffix}.index{dotted}.json"):
                if name in names:
                    return name
    return None


def shard_pattern(index: str) -> str:
    """A pattern (`*` is anything) for the files that an index names, as `x-00001-of-00002.safetensors`."""
    stem, suffix, variant = re.fullmatch(r"(.+)\.(safetensors|bin)\.index(\.\w+)?\.json", index).groups()
    return f"{stem}{variant or ''}-*-of-*.{suffix}"


def is_index(name: str) -> bool:
    """Whether a weights file is the index of several."""
    return name.endswith(".json")


def weights_file_name(component: str, *, safetensors: bool = True) -> str:
    """What a component's weights are called where they are written."""
    stem, stem_of_bin = _STEMS[component]
    return f"{stem}.safetensors" if safetensors else f"{stem_of_bin}.bin"
