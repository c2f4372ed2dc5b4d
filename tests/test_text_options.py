"""--max_token_length, --clip_skip and --weighted_captions from the command line to the files and pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from library.generation.paint import paint
from library.generation.prompts import PromptLine
from library.models.registry import load_model
from library.models.sd import StableDiffusion1
from library.models.text import TextOptions
from tests import tiny
from tests.pictures import picture
from tests.test_training import PROPORTIONAL, ROUNDING, assert_equal_to_rounding

READ = {"max_token_length": 150, "clip_skip": 2, "weighted_captions": True}
OPTIONS = TextOptions(150, 2, True)
CAPTIONS = ("a (red:1.5) circle, " + "word " * 100, "a [blue] square")


@pytest.fixture(scope="module")
def layered(tmp_path_factory) -> Path:
    """A model whose text encoder has three layers and a final norm that leaves a mean to be restored."""
    path = tmp_path_factory.mktemp("layered") / "model.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = StableDiffusion1.from_configs(tiny.UNET, tiny.VAE, tiny.CLIP | {"num_hidden_layers": 3})
        torch.nn.init.normal_(model.text_encoders[0].model.final_layer_norm.bias, mean=0.3)
    model.save(path)
    return path


@pytest.fixture
def model(layered):
    return load_model(layered)


@pytest.fixture
def folder(tmp_path) -> Path:
    for number, caption in enumerate(CAPTIONS):
        picture(tmp_path / "data" / "1_sks" / f"{number}.png", (32, 32), caption)
    return tmp_path / "data"


@pytest.fixture
def words(flags, layered, folder, tmp_path):
    def make(name: str, **changes: object) -> list[str]:
        own = {"pretrained_model_name_or_path": layered, "train_data_dir": folder, "caption_extension": None}
        return flags(tmp_path / name, **own | READ | changes)

    return make


@torch.no_grad()
def encoded(model: StableDiffusion1, caption: str, **how: bool) -> torch.Tensor:
    return model.encode_text([caption], **how)["hidden_state1"]


def test_weights_are_heeded_in_training_on_request_and_in_painting_always(model):
    plain, caption = encoded(model, "a red circle"), "a (red:1.5) circle"
    assert encoded(model, caption).shape == plain.shape
    assert not torch.allclose(encoded(model, caption), plain, atol=1e-2)
    model.read_captions(TextOptions(weighted=True))
    expected = plain.clone()
    expected[:, 2] *= 1.5
    assert torch.allclose(encoded(model, caption), expected)
    model.read_captions(TextOptions())
    painted = encoded(model, caption, painting=True)
    assert torch.allclose(painted, expected * plain.mean() / expected.mean(), atol=1e-5)
    assert torch.equal(encoded(model, "a red circle", painting=True), plain)


def test_pictures_follow_the_options(model):
    request = PromptLine("word " * 100 + "(end:1.5)", "blurry", 32, 32, 7, 4.0, 2)
    pictures = []
    for options in (TextOptions(), TextOptions(225), TextOptions(clip_skip=2), OPTIONS):
        model.read_captions(options)
        pictures.append(np.asarray(paint(model, request)))
    assert len({picture.tobytes() for picture in pictures}) == 4


def test_gradients_pass_by_the_layers_that_are_skipped(model):
    model.train().enable_gradient_checkpointing(text_encoders=True)
    model.read_captions(OPTIONS)
    model.encode_text([CAPTIONS[0]])["hidden_state1"].square().sum().backward()
    layers = model.text_encoders[0].model.encoder.layers
    assert [layer.mlp.fc1.weight.grad is not None for layer in layers] == [True, True, False]


def test_outputs_in_files_train_as_those_of_every_step(train, words, folder, tmp_path):
    unet_only = {"network_train_unet_only": True, "max_train_steps": 2}
    train(words("fresh", **unet_only))
    train(words("kept", **unet_only, cache_text_encoder_outputs_to_disk=True))
    files = [tmp_path / name / "run.safetensors" for name in ("fresh", "kept")]
    assert tiny.largest_difference(*files) < 1e-5
    with np.load(folder / "1_sks" / "0_sd_te_outputs.npz") as file:
        assert file["hidden_state1"].shape == (152, 64)
        facts = json.loads(file["made_from"].tobytes())
    assert (facts["token_length"], facts["clip_skip"], facts["weighted"]) == (150, 2, True)
    with safe_open(files[0], "pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_max_token_length"], metadata["ss_clip_skip"]) == ("150", "2")


def test_previews_read_prompts_as_training_reads_captions(train, words, layered, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{CAPTIONS[0]} end --w 32 --h 32 --s 2 --d 7 --n ugly")
    train(words("out", sample_prompts=tmp_path / "prompts.txt", sample_at_first=True, max_train_steps=1))
    (file,) = (tmp_path / "out" / "sample").glob("run_000000_*.png")
    model = load_model(layered)
    model.read_captions(OPTIONS)
    expected = paint(model, PromptLine(f"{CAPTIONS[0]} end", "ugly", 32, 32, 7, sample_steps=2))
    assert np.array_equal(np.asarray(Image.open(file)), np.asarray(expected))


def test_the_dataset_sheet_counts_as_training_reads(train, words, tmp_path):
    train(words("out", debug_dataset=True))
    facts = json.loads((tmp_path / "out" / "run_dataset" / "dataset.json").read_text(encoding="utf-8"))
    cards = [card for subset in facts["subsets"] for bucket in subset["buckets"] for card in bucket["cards"]]
    tokens = [drawing["tokens"]["CLIP-L"] for card in cards for drawing in card["drawings"]]
    assert {token["count"] for token in tokens} == {4 + 100, 3}
    assert {token["cut"] for token in tokens} == {""}


def test_the_dataset_sheet_counts_for_both_encoders_of_sdxl(train, words, model_files, tmp_path):
    train(words("out", debug_dataset=True, pretrained_model_name_or_path=model_files("sdxl")), sdxl=True)
    facts = json.loads((tmp_path / "out" / "run_dataset" / "dataset.json").read_text(encoding="utf-8"))
    cards = [card for subset in facts["subsets"] for bucket in subset["buckets"] for card in bucket["cards"]]
    for card in cards:
        for drawing in card["drawings"]:
            assert drawing["tokens"].keys() == {"CLIP-L", "OpenCLIP-bigG"}
            assert {token["count"] for token in drawing["tokens"].values()} in ({4 + 100}, {3})


@pytest.mark.parametrize(("family", "layers"), [("sd2", 2), ("sdxl", 2)])
def test_every_family_reads_captions_by_the_same_options(train, words, model_files, tmp_path, capsys, family, layers):
    """Cached or not; and no family skips more layers than it has."""
    xl, of_family = family == "sdxl", {"pretrained_model_name_or_path": model_files(family)}
    common = {
        "network_train_unet_only": True,
        "max_train_steps": 2,
        "v2": None if xl else True,
        **PROPORTIONAL,
    } | of_family
    train(words("fresh", **common), sdxl=xl)
    train(words("kept", **common, cache_text_encoder_outputs=True), sdxl=xl)
    train(words("usual", **common | {"max_token_length": None, "clip_skip": None, "weighted_captions": None}), sdxl=xl)
    fresh, kept, usual = (tmp_path / name / "run.safetensors" for name in ("fresh", "kept", "usual"))
    assert_equal_to_rounding(fresh, kept)
    assert tiny.largest_difference(fresh, usual) > 10 * ROUNDING
    with pytest.raises(SystemExit, match="2"):
        train(words("out", **common | {"clip_skip": layers + 1}), sdxl=xl)
    assert f"--clip_skip {layers + 1} is too large" in capsys.readouterr().err


def test_processes_agree_though_skipped_layers_get_no_gradients(words, fork_server, tmp_path):
    ended = fork_server.run(words("out", train_batch_size=1, gradient_checkpointing=True), processes=2)
    assert ended.status == 0, ended.said
    weights = load_file(tmp_path / "out" / "run.safetensors")
    moved = {
        layer: any(v.any() for k, v in weights.items() if f"layers_{layer}" in k and "up" in k) for layer in (1, 2)
    }
    assert moved == {1: True, 2: False}


def test_a_layer_that_is_not_there_is_a_mistake(train, words, capsys):
    with pytest.raises(SystemExit) as end:
        train([*words("out"), "--clip_skip", "4"])
    assert end.value.code == 2
    assert "--clip_skip 4 is too large: this model has a text encoder of 3 layers" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "value"), [("max_token_length", "100"), ("clip_skip", "0")])
def test_values_that_mean_nothing_are_mistakes(train, words, capsys, flag, value):
    with pytest.raises(SystemExit) as end:
        train([*words("out"), f"--{flag}", value])
    assert end.value.code == 2
    assert flag in capsys.readouterr().err
