"""Several new words at once: learned beside each other, saved as a folder with a file for each, and gone on with."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from library.generation.paint import paint
from library.generation.prompts import parse_line
from library.models.files.checkpoint import open_weights
from library.models.registry import load_model
from library.models.text import VOCABULARY_SIZE, Tokenizer
from library.options import OptimizerOptions, TextualInversionOptions
from library.training.methods.textual_inversion import TextualInversion
from tests import tiny
from tests.pipelines import pixels
from tests.tiny import draw_pictures
from tests.words import SEVERAL, learner

LINE = "a big mychar4 in the style of <my/style> --w 32 --h 32 --s 4 --l 5 --d 3"


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> Path:
    """A --train_data_dir of six pictures with the first word, the second or both in their captions."""
    folder = tmp_path_factory.mktemp("shown")
    captions = sorted(draw_pictures(folder / "1_shape", 6).glob("*.txt"))
    for number, file in enumerate(captions):
        words = ("mychar4", "<my/style>", "mychar4 in the style of <my/style>")[number % 3]
        file.write_text(f"{words}, {file.read_text().removeprefix('sks ')}")
    return folder


@pytest.fixture
def learn(train, flags, model_files, shown):
    own = learner(train, flags, model_files)
    return lambda folder, **changes: own(folder, **{**SEVERAL, "train_data_dir": shown, **changes})


def method_of(words: str, vectors: int = 2, **changes: object) -> TextualInversion:
    options = TextualInversionOptions(token_string=words, num_vectors_per_token=vectors, **changes)
    return TextualInversion(options, OptimizerOptions(learning_rate=1.0))


def rows(folder: Path, suffix: str = ".safetensors", name: str = "emb_params") -> list[torch.Tensor]:
    return [load_file(folder / f"{stem}{suffix}")[name] for stem in ("mychar4", "_my_style_")]


def test_each_word_gets_a_file_of_its_own_and_previews_read_all(learn, tmp_path, model_files):
    (tmp_path / "prompts.txt").write_text(LINE)
    previews = {"sample_prompts": tmp_path / "prompts.txt", "sample_every_n_steps": 6, "max_train_steps": 6}
    numbered = {"save_every_n_steps": 2, "save_last_n_steps": 2, "ema": True, "save_model_as": "safetensors"}
    folder = learn(tmp_path / "out", family="sdxl", **previews, **numbered, init_word="red circle,square")
    names = {entry.name for entry in folder.parent.iterdir()} - {"sample"}
    kept = ("run-step00000004", "run-step00000006", "run")
    assert names == {f"{name}{end}" for name in kept for end in ("", "-ema")}
    files = ["_my_style_.safetensors", "mychar4.safetensors", "words.json"]
    for name in names:
        assert sorted(file.name for file in (folder.parent / name).iterdir()) == files
    words = json.loads((folder / "words.json").read_text())
    assert words == {"mychar4": "mychar4.safetensors", "<my/style>": "_my_style_.safetensors"}
    for (word, file), begun in zip(words.items(), ("red circle", "square"), strict=True):
        with open_weights(folder / file) as opened:
            opened.verify()
            told = opened.metadata
        assert (told["ss_token_string"], told["ss_init_word"]) == (word, begun)

    method = method_of("mychar4,<my/style>", weights=str(folder))
    model = load_model(model_files("sdxl")).eval()
    plain = pixels(paint(model, parse_line(LINE)))
    method.read_weights(model)
    model.words = method.build(model)
    (preview,) = (folder.parent / "sample").glob("run_000006_00_*.png")
    ours = pixels(paint(model.eval(), parse_line(LINE)))
    assert np.abs(pixels(Image.open(preview)) - ours).max() <= 1
    assert np.abs(ours - plain).mean() > 2, "the words must be seen for their picture to be compared"


def test_each_word_starts_from_its_own_or_all_from_one(tmp_path):
    model = tiny.make_model()
    known, tokenizer = model.text_encoders[0].clip.embeddings.token_embedding.weight, Tokenizer()
    for init, wanted in (
        ("red circle, square", ("red circle", "square square")),
        ("red circle", ("red circle", "red circle")),
    ):
        method = method_of("mychar4,<my/style>", init_word=init, save_model_as="safetensors")
        assert method.build(model)["emb_params"].rows.shape == (4, 64)
        found = rows(method.save(tmp_path / "run", torch.float32, {}))
        for first, text in zip(found, wanted, strict=True):
            assert torch.equal(first, known[tokenizer.words(text)])


@pytest.mark.parametrize("caption", ["a MyChar4", "red <my/style>", "mychar4 in <my/style>"])
def test_only_the_words_of_a_caption_learn_from_it(caption):
    model = tiny.make_model()
    method = method_of("mychar4,<my/style>")
    model.words = method.build(model).requires_grad_(True)
    (hidden,) = model.encode_text([caption]).values()
    hidden.square().sum().backward()
    has_gradient = model.words["emb_params"].rows.grad.any(dim=1).tolist()
    assert has_gradient == [word in caption.lower() for word in ("mychar4", "<my/style>") for _ in range(2)]


def test_a_run_goes_on_as_if_nothing_had_happened_and_only_with_the_same_words(learn, tmp_path, capsys):
    changes = {"save_model_as": "safetensors", "save_state": True, "resume": "latest", "ema": True}
    whole = learn(tmp_path / "whole", **changes, max_train_steps=4)
    for steps in (2, 4):
        broken = learn(tmp_path / "broken", **changes, max_train_steps=steps)
    for end in ("", "-ema"):
        pairs = zip(rows(whole.with_name(f"run{end}")), rows(broken.with_name(f"run{end}")), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
    for words, more in (
        ("<my/style>,mychar4", {}),
        ("mychar4,<my/style>x", {"dry_run": True, "caption_suffix": "<my/style>x"}),
    ):
        with pytest.raises(SystemExit, match="2"):
            learn(tmp_path / "broken", **changes | more, token_string=words, max_train_steps=6)
        assert "the state of something else than what these flags train (--token_string is " in capsys.readouterr().err


def test_folders_and_files_to_start_from(learn, tmp_path, capsys):
    vectors = {"mychar4": 0.25, "_my_style_": 0.5}
    (tmp_path / "start").mkdir()
    for stem, value in vectors.items():
        save_file({"emb_params": torch.full((2, 64), value)}, tmp_path / "start" / f"{stem}.safetensors")
    torch.save({"<other>": torch.full((2, 64), 0.75)}, tmp_path / "other.bin")
    still = {"learning_rate": 1e-9, "max_train_steps": 1, "save_model_as": "safetensors", "init_word": None}
    for start, expected in (
        (tmp_path / "start", (0.25, 0.5)),
        (f"{tmp_path / 'other.bin'}, {tmp_path / 'start/mychar4.safetensors'}", (0.75, 0.25)),
    ):
        for found, value in zip(rows(learn(tmp_path / "out", weights=start, **still)), expected, strict=True):
            assert torch.allclose(found, torch.full((2, 64), value), atol=1e-6)

    def refused(start: object, sentence: str) -> None:
        with pytest.raises(SystemExit, match="2"):
            learn(tmp_path / "out", weights=start, **still)
        assert sentence in capsys.readouterr().err

    refused(tmp_path / "other.bin", "is no folder, and 1 file for 2 words")
    (tmp_path / "start/mychar4.pt").touch()
    refused(tmp_path / "start", "start holds mychar4.pt, mychar4.safetensors for the word mychar4")
    (tmp_path / "start/_my_style_.safetensors").unlink()
    (tmp_path / "start/mychar4.pt").unlink()
    refused(tmp_path / "start", "start has no file _my_style_ for the word <my/style>")


def test_a_folder_with_other_things_in_it_is_not_replaced(learn, tmp_path, capsys):
    folder = learn(tmp_path, max_train_steps=1)
    learn(tmp_path, max_train_steps=1, token_string="mychar4,sks", caption_suffix="sks")
    assert {file.name for file in folder.iterdir()} == {"mychar4.pt", "sks.pt", "words.json"}
    (folder / "mychar4.png").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        learn(tmp_path, max_train_steps=1)
    assert "run is a folder with other things in it (mychar4.png)" in capsys.readouterr().err
    (folder / "mychar4.png").unlink()
    (folder / "words.json").unlink()
    with pytest.raises(SystemExit, match="2"):
        learn(tmp_path, max_train_steps=1)
    assert "run is a folder with other things in it (mychar4.pt, sks.pt)" in capsys.readouterr().err


def test_words_that_are_the_beginning_of_others(learn, tmp_path, capsys):
    tokenizer = Tokenizer()
    method = method_of("mychar,mychar2,mychar-x", vectors=3)
    method.add_words(tokenizer)
    first = VOCABULARY_SIZE
    assert tokenizer.words("mychar") == [first, first + 1, first + 2]
    assert tokenizer.words("mychar1") == [first + 1]
    assert tokenizer.words("MYCHAR2 mychar-x") == [*range(first + 3, first + 9)]  # no single vector of mychar
    assert tokenizer.words("mychar22") == [first + 5]
    assert tokenizer.words("mychar-x1") == [first + 7]
    both = method_of("mychar,mychar1", vectors=12)
    both.add_words(tokenizer := Tokenizer())
    assert tokenizer.words("mychar11") == Tokenizer().words("mychar11")  # it would be a vector of both
    learn(tmp_path, token_string="mychar4,mychar42", caption_suffix="mychar42", dry_run=True)
    assert "mychar4 is a part of mychar42: Diffusers confuses them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"token_string": "mychar4,"}, "there is nothing beside one of the commas"),
        ({"token_string": "mychar4,my style"}, "'my style' has ' ' in it"),
        ({"token_string": "mychar4,circle"}, "circle is in the model's vocabulary already"),
        ({"token_string": "mychar4,MyChar4"}, "mychar4 and MyChar4 would be saved in one file, MyChar4"),
        ({"token_string": "a<b,a>b"}, "a<b and a>b would be saved in one file, a_b"),
        ({"token_string": "mychar4,\uff4dychar4"}, "are one word to the model"),
        (
            {"token_string": "mychar4,nowhere9"},
            "nowhere9 is in no caption as a word of its own, so nothing would be learned of it: put it into the",
        ),
        (
            {"token_string": "mychar4,nowhere8,nowhere9"},
            "nowhere8, nowhere9 are in no caption as words of their own, so nothing would be learned of them: put "
            "them into the captions",
        ),
        ({"init_word": "red,circle,square"}, "--init_word: there are 3 for 2 words"),
        ({"init_word": "red, "}, "--init_word: there is no word in ''"),
        ({"use_style_template": True}, "--use_style_template: its sentences cannot tell which image shows which"),
    ],
)
def test_what_cannot_be_learned_is_refused_in_a_sentence(learn, tmp_path, capsys, changes, sentence):
    with pytest.raises(SystemExit, match="2"):
        learn(tmp_path, **changes)
    assert sentence in capsys.readouterr().err


def test_captions_are_counted_by_words(learn, tmp_path, capsys):
    captions = sorted(draw_pictures(tmp_path / "data" / "1_shape", 4).glob("*.txt"))
    for file, caption in zip(captions, ("mychar4", "mychar4 <my/style>", "a circle", "<my/style>s"), strict=True):
        file.write_text(caption)
    learn(tmp_path / "out", train_data_dir=tmp_path / "data", max_train_steps=1)
    said = capsys.readouterr().err
    assert "mychar4 is in 2, <my/style> is in 2 of 4 captions" in said
    assert "1 of 4 captions are without any of mychar4, <my/style>, so their images teach nothing: those of" in said


def test_a_dry_run_names_the_folders_and_writes_none(learn, tmp_path, capsys):
    learn(tmp_path / "out", dry_run=True, save_every_n_steps=2, ema=True)
    assert {"run", "run-ema", "run-step00000002-ema"} <= {line.strip() for line in capsys.readouterr().out.splitlines()}
    assert not (tmp_path / "out").exists()
