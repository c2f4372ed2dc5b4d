"""The command lines and files that users' guides show, run to their end: with other paths, and with sizes, numbers of
steps and models as small as can be; nothing else is changed.
"""

import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library import cli
from library.models.files.checkpoint import open_weights
from library.models.registry import load_model
from library.models.writing import write_model
from library.training.resuming import states
from tests.guides import (
    DREAMBOOTH,
    DREAMBOOTH_BUCKETS,
    DREAMBOOTH_FASTER,
    FINE_TUNE,
    FINE_TUNE_TOML,
    LORA,
    OPTIONS,
    PREPARATION,
    SDXL_FULL,
    SDXL_LORA,
    SDXL_SETTINGS,
    SDXL_WORD,
    WORD,
)
from tests.processes import ROOT, run
from tests.test_options import groups_of
from tests.tiny import draw_pictures, make_model, read_logs, scalars
from tests.trained import with_lora

FILES = Path(__file__).parent / "data" / "command_lines"
MODELS = {"sd1.ckpt": ("sd1", "ckpt"), "sd1.safetensors": ("sd1", "safetensors"), "sd1": ("sd1", "diffusers")}
MODELS |= {"sdxl.safetensors": ("sdxl", "safetensors")}
BF16 = torch.bfloat16
# What is named by its place in the lines that prepare pictures.
WORDS = {"train_data_dir", "in_json", "out_json", "model_name_or_path", "src_img_folder", "dst_img_folder"}


@dataclass(frozen=True)
class Case:
    """A command line, with the working folder as {here}, and what there has to be when it has ended."""

    command: str
    files: Sequence[str]
    """What is in the output folder, `out`, but for previews and states."""
    states: Sequence[str] = ()
    previews: int = 0
    log: str | None = None
    """The folder of the log, as a pattern."""
    dtype: torch.dtype | None = None
    """Of the weights in each file; any when left out."""


CASES = {
    "fine_tune": Case(FINE_TUNE, ["epoch-000004.ckpt", "last.ckpt"], dtype=BF16),
    "fine_tune, dataset file": Case(FINE_TUNE_TOML, ["tuned.safetensors"]),
    "train_db": Case(DREAMBOOTH, ["last.ckpt"], dtype=BF16),
    "train_db, a folder": Case(DREAMBOOTH_FASTER, ["last"]),
    "train_db, buckets": Case(
        DREAMBOOTH_BUCKETS,
        ["epoch-000001.safetensors", "last.safetensors"],
        states=["epoch-000001-state", "last-state"],
        log="??????????????/dreambooth",
        dtype=BF16,
    ),
    "train_network": Case(LORA, ["lora-000001.safetensors", "lora.safetensors"]),
    "train_network, as DreamBooth": Case(
        DREAMBOOTH.replace("train_db", "train_network") + "--network_module=networks.lora", ["last.safetensors"]
    ),
    "train_network, captions": Case(
        LORA.replace("class.toml", "captions.toml"), ["lora-000001.safetensors", "lora.safetensors"]
    ),
    "train_textual_inversion": Case(WORD, ["word.safetensors"]),
    "sdxl_train, settings": Case(SDXL_SETTINGS, ["last.safetensors"], dtype=BF16),
    "sdxl_train_textual_inversion": Case(SDXL_WORD, ["last.pt"]),
}
LAUNCHED = {
    "sdxl_train": Case(
        SDXL_FULL,
        ["fullXL-000001.safetensors", "fullXL.safetensors"],
        states=["fullXL-000001-state", "fullXL-state"],
        previews=2,
        log="??????????????/finetuning",
        dtype=BF16,
    ),
    "sdxl_train_network": Case(
        SDXL_LORA,
        ["loraXL-000001.safetensors", "loraXL.safetensors"],
        previews=2,
        log="??????????????/network_train",
        dtype=BF16,
    ),
}
LAUNCHED_SELDOM = ("fine_tune", "train_db", "train_network", "train_textual_inversion", "sdxl_train_textual_inversion")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, (family, kind) in MODELS.items():
        write_model(make_model(family, clip_config={"num_hidden_layers": 2}), folder / Path(name).stem, kind)
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """What the guides have readers prepare."""
    folder = tmp_path_factory.mktemp("prepared")
    for name in ("plain", "reg", "train/2_sls frog", "train/1_cpc frog", "class/1_frog", "hoge", "piyo"):
        draw_pictures(folder / name, 2, (64, 64))
        draw_pictures(folder / name, 1, (128, 64))
    for caption in (path for name in ("plain", "reg", "train", "class") for path in (folder / name).rglob("*.txt")):
        caption.unlink()
    for caption in (folder / "hoge").glob("*.txt"):
        shutil.copy(caption, caption.with_suffix(".caption"))
    masks = folder / "hoge" / "conditioning"
    masks.mkdir()
    for path in (folder / "hoge").glob("*.png"):
        with Image.open(path) as image:
            Image.new("L", image.size, 128).save(masks / path.name)
    write_metadata(folder / "hoge_full_paths.json", folder / "hoge", "{here}/hoge/")
    write_metadata(folder / "piyo" / "piyo_md.json", folder / "piyo")
    draw_pictures(folder / "train_data", 2, (64, 64))
    write_metadata(folder / "meta_lat.json", folder / "train_data", train_resolution=[32, 32])
    for path in (folder / "train_data").glob("*.png"):
        latents = np.random.default_rng(0).normal(size=(4, 16, 16)).astype(np.float32)
        np.savez(path.with_suffix(".npz"), latents=latents, original_size=[64, 64], crop_ltrb=[0, 0, 32, 32])
    for path in FILES.iterdir():
        shutil.copy(path, folder)
    return folder


def write_metadata(file: Path, images: Path, prefix: str = "", **more: object) -> None:
    """What the scripts that merge captions and tags write, keys beginning with `prefix`."""
    entry = {"tags": "drawn, simple background", **more}
    captions = {path: path.with_suffix(".txt").read_text(encoding="utf-8") for path in images.glob("*.png")}
    named = {prefix + (path.name if prefix else path.stem): text for path, text in captions.items()}
    file.write_text(json.dumps({name: {"caption": text, **entry} for name, text in named.items()}))


@pytest.fixture
def words_of(prepared, models, tmp_path):
    """`words_of(command)`: the words that a shell makes of a command line, with a working folder of its own."""

    def make(command: str) -> list[str]:
        here = tmp_path / "here"
        shutil.copytree(prepared, here)
        for file in (path for path in here.rglob("*") if path.suffix in (".toml", ".json")):
            file.write_text(file.read_text(encoding="utf-8").replace("{here}", str(here)), encoding="utf-8")
        return shlex.split(command.replace("{here}", str(here)).replace("{models}", str(models)))

    return make


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_does_what_the_guide_says(case, words_of, fork_server):
    words = words_of(case.command)
    start = next(number for number, word in enumerate(words) if word.endswith(".py"))
    ended = fork_server.run(words[start + 1 :], words[start].removesuffix(".py"))
    assert ended.status == 0, ended.said
    check(case, words, ended.said)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "more"), OPTIONS, ids=[more for _, more in OPTIONS])
def test_options_do_what_the_guides_say(command, more, words_of, fork_server):
    words = words_of(f"{command} {more}")
    start = next(number for number, word in enumerate(words) if word.endswith(".py"))
    ended = fork_server.run(words[start + 1 :], words[start].removesuffix(".py"))
    assert ended.status == 0, ended.said
    given = values_of(words)
    out = Path(given["output_dir"])
    for path in out.iterdir():
        check_weights(out / path.name, given, None)


@pytest.mark.parametrize("command", PREPARATION)
def test_what_prepares_pictures_is_understood(command):
    """Which script it is, and all of its words: they are run with pictures in tests of their own."""
    _, script, *words = command.split()
    *_, name = script.replace("\\", "/").split("/")
    (path,) = [path for folder in ("finetune", "tools") for path in (ROOT / folder).glob(name)]
    settings = cli.parse(groups_of(f"{path.parent.name}.{path.stem}"), words, description="")
    values = {name: str(value) for name, value in settings.flat().items() if name in settings.given}
    assert sorted(values) == sorted({word[2:] for word in words if word.startswith("--")} | (values.keys() & WORDS))
    assert {word for word in words if not word.startswith("--")} == set(values.values()) - {"True"}


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, id=name) for name, case in LAUNCHED.items()),
        *(pytest.param(CASES[name], id=name, marks=pytest.mark.slow) for name in LAUNCHED_SELDOM),
    ],
)
def test_it_does_so_as_it_is_typed(case, words_of):
    program, *words = words_of(case.command)
    ended = run([Path(sys.executable).parent / program, *words], 300, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    assert ended.returncode == 0, ended.stderr
    check(case, words, ended.stdout + ended.stderr)


def check(case: Case, words: Sequence[str], said: str) -> None:
    """What is in the folders, and what was said."""
    given = values_of(words)
    out = Path(given["output_dir"])
    assert sorted(path.name for path in out.iterdir() if path.name != "sample") == sorted([*case.files, *case.states])
    for name in case.files:
        check_weights(out / name, given, case.dtype)
    for name in case.states:
        assert states.read(out / name).progress["step"] > 0
    check_previews(out / "sample", case.previews)
    assert ("logging_dir" in given) == (case.log is not None)
    if case.log is not None:
        (events,) = Path(given["logging_dir"]).glob(f"{case.log}/events.*")
        losses = scalars(read_logs(events.parents[2]), "loss/current")
        assert list(losses) == list(range(1, int(given["max_train_steps"]) + 1))
        assert np.isfinite(list(losses.values())).all()
    assert said.count("--xformers cannot be used here") == (1 if "--xformers" in words else 0)


def values_of(words: Sequence[str]) -> dict[str, str]:
    return dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--") and "=" in word)


def check_weights(path: Path, given: Mapping[str, str], dtype: torch.dtype | None) -> None:
    """They load, are finite numbers, and not what they were."""
    base = Path(given["pretrained_model_name_or_path"])
    weights = load_model(path, dtype=None).tensors() if path.is_dir() else read(path)
    assert all(tensor.isfinite().all() for tensor in weights.values())
    formats = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    assert dtype is None or formats == {dtype}
    if any(name.startswith("lora_") for name in weights):
        modules = {name.partition(".")[0] for name in weights}
        assert {f"{module}.alpha" for module in modules} <= weights.keys()
        with_lora(load_model(base), path)
    elif "token_string" in given:
        rows = {tensor.shape[0] for tensor in weights.values()}
        assert rows == {int(given["num_vectors_per_token"])}
    else:
        before, after = load_model(base).tensors(), load_model(path).tensors()
        assert any(not torch.equal(before[name].to(tensor), tensor) for name, tensor in weights.items())
        assert before.keys() == after.keys()


def read(path: Path) -> dict[str, torch.Tensor]:
    with open_weights(path) as file:
        file.verify()
        names = file.keys()
        return {name: file.get(name) for name in names}


def check_previews(folder: Path, count: int) -> None:
    shown = sorted(folder.glob("*.png")) if count else []
    assert len(shown) == count
    assert folder.exists() == bool(count)
    sizes = {Image.open(path).size for path in shown}
    assert sizes == ({(64, 64), (64, 128)} if count else set())
