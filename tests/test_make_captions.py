"""Captions by models that transformers has, small and with random weights, from the scripts' own command lines."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from finetune import make_captions, make_captions_by_git
from library import cli
from tests.hub_stand_in import Repository, hub_stand_in
from tests.pictures import picture
from tests.processes import ROOT, run
from tests.test_upload import ask

SCRIPT = "finetune/make_captions.py"
BY_GIT = "finetune/make_captions_by_git.py"
KINDS = ("blip", "git", "pair", "chat")
WAYS = {"drawn": (), "likeliest": ("--beam_search",), "searched": ("--beam_search", "--num_beams", "3")}


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A folder of each kind."""
    from tests import captioners

    folder = tmp_path_factory.mktemp("captioners")
    for kind in KINDS:
        getattr(captioners, f"save_{kind}")(folder / kind)
    return folder


@pytest.fixture
def tool(monkeypatch, fresh_console) -> Callable[..., None]:
    """make_captions.py in this process, or `by_git` the other."""

    def call(*words: object, by_git: bool = False) -> None:
        script = make_captions_by_git if by_git else make_captions
        monkeypatch.setattr(sys, "argv", [BY_GIT if by_git else SCRIPT, *map(str, words)])
        cli.run(script.main)

    return call


@pytest.fixture
def data(tmp_path) -> Path:
    """Pictures whose names are not plain, of several shapes."""
    for number in range(7):
        picture(tmp_path / "my data" / f"bild {number} ü.png", (40 + 3 * number, 60))
    return tmp_path / "my data"


@pytest.fixture
def caption(tool, data, tmp_path) -> Callable[..., dict[str, str]]:
    """`caption(model, *words)`: what is written of the pictures, by name; what was there is forgotten."""

    def call(model: Path, *words: object, by_git: bool = False) -> dict[str, str]:
        for path in data.glob("*.caption"):
            path.unlink()
        tool(data, "--model_id", model, "--max_length", 12, *words, by_git=by_git)
        return captions(data)

    return call


def captions(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.caption"))}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_the_batch_a_picture_is_in_changes_nothing(caption, models, kind, way):
    alone = caption(models / kind, *WAYS[way])
    assert len(set(alone.values())) > 2
    assert all(text == " ".join(text.split()) + "\n" for text in alone.values())
    for size in (3, 7):
        assert caption(models / kind, *WAYS[way], "--batch_size", size) == alone


@pytest.mark.parametrize(
    ("kind", "given", "prompt", "cut", "begin"),
    [
        ("blip", (), "a picture of", 0, 4),
        ("blip", ("--prompt", "the red"), "the red", 0, 3),
        ("blip", ("--prompt", ""), None, 0, 1),
        ("git", (), None, 0, 1),
        ("git", ("--prompt", "a dog"), "a dog", 1, 3),
        ("pair", (), None, 0, 1),
        ("chat", ("--prompt", "the hat"), "<image>" * 16 + "the hat a", 1, 20),
    ],
)
def test_captions_are_those_of_the_model(caption, models, data, kind, given, prompt, cut, begin):
    from tests.captioners import generated

    made = caption(models / kind, "--beam_search", "--num_beams", 2, "--min_length", 0, *given)
    length = {"max_length": 12, "num_beams": 2} if kind in ("blip", "git") else {"max_new_tokens": 12, "num_beams": 2}
    for path in sorted(data.glob("*.png"))[:3]:
        assert made[path.stem] == generated(models / kind, path, prompt, cut=cut, begin=begin, **length) + "\n"


def test_draws_are_by_seed_and_name(caption, models, data, tool):
    first = caption(models / "blip")
    assert caption(models / "blip", "--seed", 43) != first
    caption(models / "blip")
    (data / "bild 2 ü.caption").unlink()
    tool(data, "--model_id", models / "blip", "--max_length", 12)
    assert captions(data) == first
    same = [data / f"bild {number} ü.png" for number in (0, 1)]
    shutil.copyfile(*same)
    made = caption(models / "blip")
    assert made[same[0].stem] != made[same[1].stem]


def test_as_many_words_are_drawn_from_as_top_p_says(caption, models, tmp_path):
    own = shutil.copytree(models / "git", tmp_path / "own")
    settings = json.loads((own / "generation_config.json").read_text())
    (own / "generation_config.json").write_text(json.dumps(settings | {"repetition_penalty": 1.0}))
    likeliest = caption(own, "--beam_search")
    assert caption(own, "--top_p", 1e-6) == caption(own, "--top_p", 1e-6, "--seed", 1) == likeliest
    assert caption(own, "--top_p", 1) != likeliest


def test_lengths(caption, models):
    short = caption(models / "chat", "--max_length", 3, "--min_length", 3)
    assert {len(text.split()) for text in short.values()} == {3}
    longer = caption(models / "git", "--max_length", 9, "--min_length", 9, "--beam_search")
    assert {len(text.split()) for text in longer.values()} == {8}  # the beginning of the text counts


def test_settings_that_come_with_a_model_override_no_flag(caption, models, tmp_path):
    own = shutil.copytree(models / "git", tmp_path / "own")
    settings = json.loads((own / "generation_config.json").read_text())
    settings |= {
        "num_beams": 4,
        "do_sample": True,
        "max_length": 3,
        "min_length": 9,
        "num_return_sequences": 2,
        "top_p": 0.1,
    }
    (own / "generation_config.json").write_text(json.dumps(settings))
    for words in ((), ("--beam_search",)):
        assert caption(own, *words) == caption(models / "git", *words)


def test_pictures_are_seen_as_they_are_shown(caption, models, data):
    for path in data.glob("*.png"):
        path.unlink()
    upright = picture(data / "upright.png", (60, 40))
    image = Image.open(upright)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(data / "turned.png", exif=exif)
    layer = Image.new("RGBA", image.size, (9, 9, 9, 0))
    layer.save(data / "clear.png")
    Image.new("RGB", image.size, "white").save(data / "white.png")
    made = caption(models / "blip", "--beam_search")
    assert made["turned"] == made["upright"] != made["white"] == made["clear"]


def test_the_script(models, data):
    """As users start it: what it prints, what it skips, what it does about broken pictures."""
    (data / "bild 3 ü.png").write_bytes((data / "bild 3 ü.png").read_bytes()[:2000])
    (data / "bild 4 ü.caption").write_text("my own")
    picture(data / "below" / "deep.jpg")
    words = [
        data,
        "--caption_weights",
        models / "blip",
        "--batch_size",
        2,
        "--max_length",
        12,
        "--recursive",
        "--debug",
    ]
    command = [sys.executable, SCRIPT, *map(str, words)]
    first = run(command, 120, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    assert first.returncode == 0, first.stderr
    *shown, end = first.stdout.splitlines()
    assert end == f"captions: 6 written, 1 skipped, 1 failed ({data / 'bild 3 ü.png'}), on cpu"
    made = captions(data)
    done = [path for path in data.rglob("*.[pj]*g") if path.stem not in ("bild 3 ü", "bild 4 ü")]
    assert sorted(shown) == sorted(f"{path}: {made[path.stem].strip()}" for path in done)
    told = [line for line in first.stderr.replace("\r", "\n").splitlines() if line.strip() and "img" not in line]
    assert len(told) == 1
    assert "bild 3 ü.png" in told[0]
    assert made["bild 4 ü"] == "my own"
    assert len(made) == 7
    (data / "bild 3 ü.png").unlink()
    again = run(command, 30)
    assert (again.returncode, again.stdout) == (0, "captions: 0 written, 7 skipped, 0 failed\n")


def test_by_git(caption, models, data, tool, capsys):
    made = caption(models / "git", by_git=True)
    assert made == caption(models / "git", "--beam_search", "--min_length", 0)
    tool(data, "--model_id", models / "git", "--caption_extention", "txt", by_git=True)
    assert len(list(data.glob("*.txt"))) == 7


def say(monkeypatch, text: str | Callable[[str], str]) -> None:
    """Have models say this, or what a function makes of a picture's name."""
    from library.preprocessing.captioning.captioner import Captioner

    answer = text if callable(text) else lambda name: text
    monkeypatch.setattr(Captioner, "caption", lambda self, choice, names, inputs: [answer(name) for name in names])


def test_remarks_are_removed_only_if_wanted(caption, models, monkeypatch):
    say(monkeypatch, 'a mug with the words " hello " on it')
    assert set(caption(models / "git", by_git=True).values()) == {'a mug with the words " hello " on it\n'}
    assert set(caption(models / "git", "--remove_words", by_git=True).values()) == {"a mug\n"}


def test_who_has_nothing_to_say_has_failed(caption, models, monkeypatch, data, capsys):
    say(monkeypatch, lambda name: "" if "3" in name else "a dog")
    assert len(caption(models / "blip")) == 6
    assert "6 written, 0 skipped, 1 failed" in capsys.readouterr().out
    say(monkeypatch, "")
    with pytest.raises(SystemExit, match="2"):
        caption(models / "blip")
    assert "no captions are written" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["cp1252", None])
def test_captions_that_the_console_cannot_show(tool, models, data, monkeypatch, encoding):
    console = io.TextIOWrapper(io.BytesIO(), encoding) if encoding else None
    (data / "bild 1 ü.png").rename(data / "絵.png")
    say(monkeypatch, "a dog")
    monkeypatch.setattr(sys, "stdout", console)
    tool(data, "--model_id", models / "git", "--debug")
    assert len(captions(data)) == 7
    if console is not None:
        console.flush()
        assert "\\u7d75.png: a dog" in console.buffer.getvalue().decode(encoding)


@pytest.mark.slow
def test_a_killed_run_goes_on(models, data, tmp_path):
    for number in range(7, 40):
        picture(data / f"bild {number} ü.png")
    (data / "bild 1 ü.caption.123.tmp").write_text("ha")
    whole = tmp_path / "whole"
    shutil.copytree(data, whole)
    words = ("--caption_weights", str(models / "blip"), "--max_length", "30")
    assert run([sys.executable, SCRIPT, whole, *words], 300, OMP_NUM_THREADS="1").returncode == 0
    command = [sys.executable, SCRIPT, str(data), *words, "--batch_size", "2"]
    for _ in range(3):
        before = len(captions(data))
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(captions(data)) < before + 3:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    stamps = {path: path.stat().st_mtime_ns for path in data.glob("*.caption")}
    end = run(command, 300, OMP_NUM_THREADS="1").stdout
    assert f"{40 - len(stamps)} written, {len(stamps)} skipped" in end
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert captions(data) == captions(whole)
    assert {path.suffix for path in data.iterdir()} == {".png", ".caption"}


# --- models ---


def broken(models: Path, tmp_path: Path, kind: str, name: str, change: Callable[[bytes], bytes] | None) -> Path:
    """A copy of a model of which one file is changed, or missing."""
    folder = shutil.copytree(models / kind, tmp_path / "broken")
    data = (folder / name).read_bytes()
    (folder / name).unlink()
    if change is not None:
        (folder / name).write_bytes(change(data))
    return folder


def without_a_tensor(data: bytes) -> bytes:
    from safetensors.torch import load, save

    tensors = load(data)
    del tensors[next(name for name in tensors if name.endswith("query.weight"))]
    return save(tensors, {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", lambda data: b"{", "does not say what kind of model"),
        ("config.json", lambda data: data.replace(b'"git"', b'"gitt"'), "cannot be used.*gitt"),
        ("model.safetensors", None, "has no weights, neither"),
        ("model.safetensors", lambda data: data[:-100], "weights cannot be read"),
        ("model.safetensors", without_a_tensor, "lack .*query.weight"),
        ("preprocessor_config.json", None, "has neither processor_config.json nor"),
    ],
)
def test_broken_models(mistake, models, data, tmp_path, name, change, said):
    folder = broken(models, tmp_path, "git", name, change)
    line = mistake(data, "--model_id", folder)
    assert line.startswith("error: --model_id: ")
    assert re.search(said, line), line


def test_a_model_of_text_is_refused(mistake, models, data, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = broken(models, tmp_path, "git", "model.safetensors", None)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    assert "(llama) does not make text of pictures" in mistake(data, "--model_id", folder)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model_id", "a/b", "--caption_weights", "c/d"), "each name a model"),
        (("--caption_weights", "model_large_caption.pth"), "Salesforce/blip-image-captioning-large of the hub"),
        (("--caption_weights", "nowhere"), "--caption_weights: nowhere does not exist"),
        (("--model_id", "blib"), r"--model_id: blib does not exist"),
        (("--top_p", 1.5), "--top_p: 1.5 is no share"),
        (("--min_length", 80), "--min_length: 80 is more than --max_length"),
        (("--batch_size", 0), "--batch_size: 0 is too small"),
        (("--caption_extension", ".png"), "is an ending of pictures"),
        (("--caption_extension", "a/b"), "is no ending of a file"),
        (("--precision", "fp8"), "--precision: 'fp8' is none of"),
        (("--beam_serch",), r"unknown option, did you mean --beam_search\?"),
    ],
)
def test_mistakes(mistake, data, words, said):
    assert said.replace("\\", "") in mistake(data, *words)


def test_mistakes_about_folders(mistake, data, tmp_path):
    assert "did you mean" in mistake(tmp_path / "my dta")
    (tmp_path / "empty").mkdir()
    assert "there are no pictures" in mistake(tmp_path / "empty")
    assert "train_data_dir" in mistake()


def test_devices_and_prompts_that_do_not_fit(mistake, models, data):
    assert "--device: cuda:77 cannot be used" in mistake(data, "--model_id", models / "git", "--device", "cuda:77")
    assert "--prompt: " in mistake(data, "--model_id", models / "pair", "--prompt", "a dog")


def test_flags_without_effect_are_told(caption, models, monkeypatch, capsys):
    say(monkeypatch, "a dog")
    caption(models / "git", "--num_beams", 3, "--precision", "fp16")
    told = capsys.readouterr().err
    assert "--num_beams has no effect without --beam_search" in told
    assert "computes in float32" in told
    caption(models / "git", "--beam_search", "--seed", 3)
    assert "--seed has no effect with --beam_search" in capsys.readouterr().err


def test_half_precision(caption, models):
    assert len(caption(models / "blip", "--precision", "bf16")) == 7


def test_memory_that_does_not_suffice(mistake, models, data, monkeypatch):
    import torch
    from transformers import GitForCausalLM

    def generate(self, **inputs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(GitForCausalLM, "generate", generate)
    assert "--batch_size: use a smaller one than 4" in mistake(data, "--model_id", models / "git", "--batch_size", 4)
    assert "--precision: use fp16" in mistake(data, "--model_id", models / "git")


def test_a_model_comes_from_the_hub(models, data, tool, mistake, monkeypatch, tmp_path, tmp_path_factory):
    with hub_stand_in() as hub:
        ask(monkeypatch, hub.url, tmp_path_factory.mktemp("hub"))
        repository = hub.repositories["models", "me/blip"] = Repository(private=False)
        files = {path.name: path.read_bytes() for path in (models / "blip").iterdir()}
        other = {"pytorch_model.bin": b"x", "tf_model.h5": b"x", "onnx/model.onnx": b"x", "README.md": b"x"}
        repository.commits.append(("1" * 40, files | other))
        tool(data, "--caption_weights", "me/blip", "--max_length", 12)
        assert len(captions(data)) == 7
        assert not any(name in request for name in other for request in hub.requests)
        assert "the hub has no such repository" in mistake(data, "--model_id", "me/blob", "--force")
        hub.repositories["models", "me/notes"] = Repository(private=False, commits=[("2" * 40, {"README.md": b"x"})])
        assert "no config.json" in mistake(data, "--model_id", "me/notes", "--force")
        hub.answer = 503
        tool(data, "--caption_weights", "me/blip", "--max_length", 12, "--force")
        assert "its cache has no copy" in mistake(data, "--model_id", "me/blap", "--force")
