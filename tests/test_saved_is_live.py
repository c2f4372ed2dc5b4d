"""A saved file, loaded in a process of its own, answers as the live model did when it was saved, to the last bit."""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library.models.number_formats import NUMBER_FORMATS
from tests.answers import RAW, Order
from tests.trajectories import data_for

LORA = {"network_module": "networks.lora", "learning_rate": 0.02, "network_alpha": 2}
WORD = {"network_module": None, "token_string": "sks", "init_word": "circle", "learning_rate": 0.05}
WORDS = WORD | {"num_vectors_per_token": 3}
SEVERAL = WORD | {"token_string": "sks,zwx", "num_vectors_per_token": 2, "caption_suffix": "zwx"}
STOPPED = {"stop_text_encoder_training": 2}
MODEL = {"network_module": None, "learning_rate": 1e-3}
TEXT = {"train_text_encoder": True}
FILES = ("safetensors", "ckpt", "pt")
MODELS = ("safetensors", "ckpt", "diffusers", "diffusers_safetensors")
# Each method: what its files are, the script, the family, its flags and the formats of its files.
METHODS = {
    "lora": ("network", "train_network", "sd1", LORA, FILES),
    "lora sd2": ("network", "train_network", "sd2", LORA, FILES),
    "lora sdxl": ("network", "sdxl_train_network", "sdxl", LORA, FILES),
    "fine_tune": ("model", "fine_tune", "sd1", MODEL | TEXT, MODELS),
    "train_db": ("model", "train_db", "sd2", MODEL, MODELS),
    "train_db stopped": ("model", "train_db", "sd1", MODEL | STOPPED, MODELS),
    "sdxl_train": ("model", "sdxl_train", "sdxl", MODEL | TEXT, MODELS),
    "word": ("word", "train_textual_inversion", "sd1", WORD, FILES),
    "words": ("word", "train_textual_inversion", "sd1", WORDS, FILES),
    "word sdxl": ("word", "sdxl_train_textual_inversion", "sdxl", WORD, FILES),
    "several words": ("word", "train_textual_inversion", "sd1", SEVERAL, FILES),
    "words sdxl": ("word", "sdxl_train_textual_inversion", "sdxl", WORDS, FILES),
}
HALF = {"mixed_precision": "bf16"}
FEATURES = {
    "average": {"ema": True, "ema_decay": 0.5},
    "schedule free": {"optimizer_type": "AdamWScheduleFree"},
    "half": HALF,
    "full half": HALF | {"full_bf16": True},
    "8 bits": HALF | {"fp8_base": True},
    "checkpointing": {"gradient_checkpointing": True},
    "dropout": {"network_dropout": 0.5},
    "norms": {"scale_weight_norms": 0.2},
    "numbered": {
        "save_every_n_steps": 2,
        "validation_split": 0.34,
        "validate_every_n_steps": 2,
        "save_best": True,
    },
    "compiled": {"torch_compile": True, "dynamo_backend": "eager"},
    "two processes": {},
}
OF_NETWORKS = {"dropout", "norms"}
COMPILED = {"lora", "sdxl_train", "words"}
"""It takes a minute each."""


@dataclass(frozen=True)
class Case:
    """A run: what is trained, what is written, and what is special."""

    method: str
    format: str
    precision: str
    features: tuple[str, ...]

    def __str__(self) -> str:
        return "-".join((self.method, self.format, self.precision, *self.features)).replace(" ", "_")


QUICK = [
    Case("lora", "safetensors", "fp16", ("8 bits", "average", "dropout", "norms", "two processes", "checkpointing")),
    Case("lora sd2", "pt", "bf16", ("half", "numbered")),
    Case("lora sdxl", "ckpt", "float", ("schedule free", "dropout")),
    Case("fine_tune", "diffusers", "fp16", ("full half", "average")),
    Case("train_db", "ckpt", "float", ("full half", "schedule free")),
    Case("train_db stopped", "safetensors", "bf16", ("schedule free",)),
    Case("sdxl_train", "diffusers_safetensors", "bf16", ("checkpointing",)),
    Case("words", "safetensors", "fp16", ("average",)),
    Case("several words", "safetensors", "fp16", ("average",)),
    Case("word sdxl", "pt", "float", ("schedule free",)),
]


def all_cases() -> list[Case]:
    """Every method in every format and precision, and with every feature that it has."""
    cases = []
    for method, (kind, *_, formats) in METHODS.items():
        left_out = (set() if kind == "network" else OF_NETWORKS) | (set() if method in COMPILED else {"compiled"})
        features = [name for name in FEATURES if name not in left_out]
        written = list(itertools.product(formats, NUMBER_FORMATS))
        for number in range(max(len(features), len(written))):
            feature = features[number % len(features)]
            cases.append(Case(method, *written[number % len(written)], (feature,)))
    return cases


@dataclass(frozen=True)
class Saved:
    """The files of a run, and the answers: of the live model, of the files, and of what was there before."""

    files: dict[str, Path]
    live: dict[str, dict[str, Tensor]]
    loaded: dict[str, dict[str, Tensor]]
    base: dict[str, Tensor]


Saving = Callable[[Case], Saved]


@pytest.fixture
def saving(fork_server, flags, model_files, tmp_path) -> Saving:
    """`saving(case)`: a run of it, and answers."""

    def run(case: Case) -> Saved:
        kind, script, family, own, _ = METHODS[case.method]
        places = {name: tmp_path / name for name in ("out", "live", "loaded")}
        for place in places.values():
            place.mkdir()
        special = {name: value for feature in case.features for name, value in FEATURES[feature].items()}
        base = model_files(family)
        values = {"pretrained_model_name_or_path": base, "v2": True if family == "sd2" else None, **own, **special}
        values |= {"save_model_as": case.format, "save_precision": case.precision, "caption_extension": None}
        values |= data_for(script, tmp_path / "data")
        words = ["train", str(places["live"]), script, *flags(places["out"], **values)]
        ended = fork_server.run(words, "tests.answers", processes=2 if "two processes" in case.features else 1)
        assert ended.status == 0, ended.said
        files = {path.stem: path for path in places["out"].iterdir()}
        order: Order = {
            "files": [str(path) for path in files.values()],
            "kind": kind,
            "base": str(base),
            "mixed_precision": special.get("mixed_precision", "no"),
            "fp8_base": special.get("fp8_base", False),
            "folder": str(places["loaded"]),
        }
        ended = fork_server.run(["load", json.dumps(order)], "tests.answers")
        assert ended.status == 0, ended.said
        live, loaded = ({path.stem: load_file(path) for path in places[name].iterdir()} for name in ("live", "loaded"))
        return Saved(files, live, loaded, loaded.pop("base"))

    return run


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two predictions differ by more than any rounding."""
    return (one["prediction"] - other["prediction"]).abs().max().item() > 1e-3


def tensors_of(path: Path) -> dict[str, Tensor]:
    """What a file holds, or all files of a folder."""
    if path.is_dir():
        files = [file for file in path.rglob("*.*") if file.suffix in (".safetensors", ".bin", ".ckpt", ".pt")]
        return {f"{file.parent.name}/{name}": tensor for file in files for name, tensor in tensors_of(file).items()}
    if path.suffix == ".safetensors":
        return load_file(path)
    content = torch.load(path, weights_only=True)
    return content.get("state_dict", content)


def check_tensors(case: Case, path: Path) -> None:
    tensors = tensors_of(path)
    assert tensors
    assert not [name for name in tensors if "_orig_mod" in name or "module." in name]
    numbers = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in numbers} == {NUMBER_FORMATS[case.precision]}
    assert all(tensor.isfinite().all() for tensor in numbers)
    if METHODS[case.method][0] == "network":
        layers = {name.rsplit(".", 2)[0] for name in tensors if name.endswith(".lora_down.weight")}
        parts = ("lora_down.weight", "lora_up.weight", "alpha")
        assert tensors.keys() == {f"{layer}.{part}" for layer in layers for part in parts}


def check(case: Case, saved: Saved) -> None:
    """Of every file, that it is what was published, and that this is what it should be."""
    published = {stem: answers for stem, answers in saved.live.items() if not stem.startswith(RAW)}
    assert published.keys() == saved.files.keys() == saved.loaded.keys()
    expected = {"run"}
    if "average" in case.features:
        expected |= {f"{stem}-ema" for stem in expected}
    if "numbered" in case.features:
        expected |= {"run-best", "run-step00000002", "run-step00000004"}
        assert differ(published["run-step00000002"], published["run"])
    assert published.keys() == expected
    for stem, path in saved.files.items():
        assert same(saved.loaded[stem], published[stem]), stem
        assert differ(published[stem], saved.base)
        check_tensors(case, path)
        raw = saved.live[f"{RAW}{stem.removesuffix('-ema')}"]
        if stem.endswith("-ema") or "schedule free" in case.features:
            assert differ(published[stem], raw)
        else:
            assert same(published[stem], raw)


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_a_file_is_the_live_model(saving, case):
    check(case, saving(case))


@pytest.mark.slow
@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_every_file_of_every_method_is_the_live_model(saving, case):
    check(case, saving(case))
