"""finetune/prepare_buckets_latents.py: the files it leaves for fine-tuning, also after kills and second runs."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune import prepare_buckets_latents
from library import cli
from library.models.registry import ModelInfo
from library.models.sd import StableDiffusion1
from library.training import bucket_latents
from tests import tiny
from tests.pictures import picture
from tests.processes import run as run_program
from tests.test_options import alike, flags_of, table
from tools import cache_latents

SCRIPT = "finetune/prepare_buckets_latents.py"
BUCKETS = ("--min_bucket_reso", "16", "--max_bucket_reso", "64", "--bucket_reso_steps", "8")
OURS = {"--force", "--no_half_vae", "--vae"}


def call_in_process(monkeypatch, module, *words: object) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, words)])
    cli.run(module.main)


@pytest.fixture
def tool(monkeypatch, fresh_console):
    """The script in this process, on the CPU."""
    return lambda *words: call_in_process(monkeypatch, prepare_buckets_latents, *words)


@pytest.fixture
def data(tmp_path) -> Path:
    """Pictures of two shapes in a folder that training takes as well, and their metadata in meta.json."""
    folder = tiny.draw_pictures(tmp_path / "data" / "1_sks shape", 5)
    tiny.draw_pictures(folder, 3, (48, 24))
    write_metadata(tmp_path / "meta.json", {path.stem: {"caption": path.stem} for path in folder.glob("*.png")})
    return folder


@pytest.fixture
def words(model_file, data, tmp_path) -> list[object]:
    """The command for `data`, from meta.json to lat.json."""
    names = (data, tmp_path / "meta.json", tmp_path / "lat.json", model_file)
    return [*names, "--max_resolution", "32,32", "--batch_size", 2, *BUCKETS]


@pytest.fixture
def tune(train, flags, tmp_path, monkeypatch):
    """`tune(folder, metadata, ...)`: fine_tune.py on prepared latents; how many pictures it encodes for itself."""

    def run(folder: Path | None, metadata: Path, **changes: object) -> int:
        calls, original = [], StableDiffusion1.encode_images
        with monkeypatch.context() as patch:
            patch.setattr(
                StableDiffusion1,
                "encode_images",
                lambda s, x, seeds: (calls.append(len(x)), original(s, x, seeds))[1],
            )
            data = {"train_data_dir": folder, "in_json": metadata, "caption_extension": None, "network_module": None}
            out = tmp_path / "out"
            train(flags(out, resolution=None, max_train_steps=3, **data, **changes), script="fine_tune")
        return sum(calls)

    return run


def write_metadata(path: Path, entries: dict[str, dict]) -> Path:
    path.write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
    return path


def metadata(path: Path) -> dict[str, dict]:
    return json.loads(path.read_text(encoding="utf-8"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.npz")}


def test_flags_are_those_of_the_table():
    def compared(rows: dict[str, dict[str, str]]) -> dict[str, dict[str, object]]:
        same = {flag: {**alike(row), "type": row["type"].replace("Path", "str")} for flag, row in rows.items()}
        return {flag: {**row, "required": bool(row["required"])} for flag, row in same.items()}

    expected = compared(table("finetune__prepare_buckets_latents"))
    ours = compared(flags_of("finetune.prepare_buckets_latents"))
    assert {flag: row for flag, row in ours.items() if flag in expected} == expected
    assert ours.keys() - expected.keys() == OURS


def cut_off(path: Path) -> None:
    """Leave of a picture what is enough to tell its size."""
    path.write_bytes(path.read_bytes()[:60])


# What is written


@pytest.mark.parametrize("more", [[], ["--flip_aug", "--alpha_mask"]])
def test_fine_tuning_uses_latents_that_are_those_of_the_other_tool(
    tool, words, data, tmp_path, tune, model_file, monkeypatch, more, capfd
):
    for number, path in enumerate(sorted(data.glob("*.png"))):
        image = Image.open(path).convert("RGBA")
        image.putalpha(40 * number)
        image.save(path)
    tool(*words, *[f"{flag}=yes" if flag == "--alpha_mask" else flag for flag in more])
    said = capfd.readouterr().out
    assert "latents: 8 written, 0 skipped, 0 failed, on cpu" in said
    assert "32x32        5" in said
    assert "40x24        3" in said
    assert "mean aspect error: 0.125" in said
    entries = metadata(tmp_path / "lat.json")
    assert entries["32_1"] == {"caption": "32_1", "train_resolution": [32, 32]}
    assert entries["48_1"] == {"caption": "48_1", "train_resolution": [40, 24]}
    assert not tune(data, tmp_path / "lat.json", **{flag.removeprefix("--"): True for flag in more})
    made = {path.stem: dict(np.load(path)) for path in data.glob("*.npz")}
    assert made.keys() == entries.keys()
    for path in data.glob("*.npz"):
        path.unlink()
    options = ["--pretrained_model_name_or_path", model_file, "--train_data_dir", data.parent, "--resolution", "32"]
    options += ["--enable_bucket", *BUCKETS, "--vae_batch_size", 2, "--caption_extension", ".txt", *more]
    call_in_process(monkeypatch, cache_latents, *options)
    for name, arrays in made.items():
        (path,) = data.glob(f"{name}_*_sd.npz")
        other = dict(np.load(path))
        assert arrays.keys() == other.keys()
        assert all(np.array_equal(arrays[key], other[key]) for key in arrays)
        assert ("latents_flipped" in arrays, "alpha_mask" in arrays) == (bool(more), bool(more))


def test_sizes_that_are_never_enlarged_are_used_too(tool, data, words, tmp_path, tune):
    picture(data / "small.png", (30, 26))
    tool(*words, "--bucket_no_upscale")
    assert metadata(tmp_path / "lat.json")["small"] == {"train_resolution": [24, 24]}
    assert not tune(data, tmp_path / "lat.json")


@pytest.mark.parametrize(("family", "flags"), [("sd2", []), ("sd2", ["--v2"]), ("sdxl", [])])
def test_every_family_is_recognised(tool, words, data, model_files, family, flags):
    words[3] = model_files(family)
    tool(*words, *flags)
    assert np.load(data / "32_1.npz")["latents"].shape == (4, 16, 16)


def test_a_file_is_for_one_resolution(tool, words, data, tmp_path):
    tool(*words)
    tool(*words, "--max_resolution", "48")
    assert metadata(tmp_path / "lat.json")["32_1"]["train_resolution"] == [48, 48]
    arrays = np.load(data / "32_1.npz")
    assert arrays["latents"].shape == (4, 24, 24)
    assert set(arrays.files) == {"latents", "original_size", "crop_ltrb", "made_from"}


def test_entries_of_others_stay_as_they_are(tool, words, data, tmp_path, capfd):
    """Those of other folders, what is not known here, and those of pictures that cannot be read."""
    (data / "32_1.png").write_bytes(b"no picture")
    cut_off(data / "32_2.png")
    entries = metadata(tmp_path / "meta.json")
    entries["32_1"]["train_resolution"] = [1, 2]
    entries = {"elsewhere": {"tags": "ü", "train_resolution": [8, 8], "other": {"a": [1.5, None]}}, **entries}
    del entries["48_2"]
    write_metadata(tmp_path / "meta.json", entries)
    words[2] = words[1]
    tool(*words)
    said = capfd.readouterr()
    assert f"6 written, 0 skipped, 2 failed ({data / '32_1.png'}, {data / '32_2.png'})" in said.out
    assert "1 picture has no entry and gets one without caption and tags: 48_2.png" in said.err
    written = metadata(tmp_path / "meta.json")
    assert list(written) == [*entries, "48_2"]
    assert {name: written[name] for name in ("elsewhere", "32_1")} == {
        name: entries[name] for name in ("elsewhere", "32_1")
    }
    assert written["48_2"] == {"train_resolution": [40, 24]}
    assert written["32_2"]["train_resolution"] == [32, 32], "its header is sound, and every entry needs a size"


def test_a_picture_that_cannot_be_read_does_not_keep_the_others_from_being_used(tool, words, data, tmp_path, tune):
    (data / "32_1.png").write_bytes(b"no picture")
    tool(*words)
    assert "train_resolution" not in metadata(tmp_path / "lat.json")["32_1"]
    assert not tune(data, tmp_path / "lat.json")


def test_folders_one_after_the_other(tool, words, data, tmp_path, tune):
    """As users do it: one chain of metadata files with whole paths, also with a folder below."""
    other = tiny.draw_pictures(tmp_path / "zwei ü" / "below", 2, (24, 48)).parent
    picture(other / "32_1.png", (32, 32))
    pictures = [*data.glob("*.png"), *other.rglob("*.png")]
    write_metadata(tmp_path / "meta.json", {str(path): {"caption": path.stem} for path in pictures})
    tool(*words, "--full_path")
    words[0], words[1], words[2] = other, tmp_path / "lat.json", tmp_path / "lat2.json"
    tool(*words, "--full_path", "--recursive")
    entries = metadata(tmp_path / "lat2.json")
    assert [entries[str(path)]["train_resolution"] for path in pictures[-3:]].count([24, 40]) == 2
    assert all("train_resolution" in entry for entry in entries.values())
    assert len(entries) == len(pictures) == len(files(tmp_path))
    assert not tune(None, tmp_path / "lat2.json")


@pytest.mark.parametrize("full_path", [False, True])
def test_pictures_with_one_stem_each_have_latents(tool, words, data, tmp_path, tune, full_path):
    picture(data / "32_1.bmp", (32, 32))
    if full_path:
        write_metadata(tmp_path / "meta.json", {str(path): {} for path in data.iterdir() if path.suffix != ".txt"})
    tool(*words, *(["--full_path"] if full_path else []))
    entries = metadata(tmp_path / "lat.json")
    assert len(entries) == 9
    if not full_path:
        assert entries["32_1.png"] == {"train_resolution": [32, 32]}
        assert entries["32_1"] == {"caption": "32_1", "train_resolution": [32, 32]}
    assert {"32_1.npz", "32_1.png.npz"} < files(data).keys()
    assert not tune(data, tmp_path / "lat.json")


# Again


def test_what_is_there_is_skipped_without_the_model(tool, words, data, tmp_path, capfd, monkeypatch):
    tool(*words)
    made, written = files(data), (tmp_path / "lat.json").read_bytes()
    changed = data / "48_0.png"
    shutil.copy(data / "48_1.png", changed)
    tool(*words)
    assert "latents: 1 written, 7 skipped, 0 failed" in capfd.readouterr().out
    assert {name for name, value in files(data).items() if made[name] != value} == {"48_0.npz"}
    monkeypatch.setattr(ModelInfo, "load_vae", None)
    monkeypatch.setattr(os, "access", lambda path, mode: not (Path(path) == data and mode & os.W_OK))
    (tmp_path / "lat.json").unlink()
    tool(*words)
    assert "latents: 0 written, 8 skipped, 0 failed, on cpu" in capfd.readouterr().out
    assert (tmp_path / "lat.json").read_bytes() == written


def test_files_that_do_not_say_what_they_are_from_count_only_if_they_are_to_be_trusted(tool, words, data, capfd):
    for path in data.glob("*.png"):
        size = (4, 12, 20) if path.stem.startswith("48") else (4, 16, 16)
        np.savez(path.with_suffix(".npz"), latents=np.zeros(size, np.float32))
    tool(*words, "--skip_existing")
    assert "latents: 0 written, 8 skipped" in capfd.readouterr().out
    tool(*words)
    assert "latents: 8 written, 0 skipped" in capfd.readouterr().out


def test_a_killed_run_goes_on(tool, words, data, tmp_path, fork_server, capfd):
    for number in range(12):
        picture(data / f"{number}.png", (32, 32))
    tool(*words)
    whole, entries = files(data), (tmp_path / "lat.json").read_bytes()
    for path in data.glob("*.npz"):
        path.unlink()
    ended = fork_server.run(list(map(str, words)), "finetune.prepare_buckets_latents", at=60)
    assert ended.status == -signal.SIGKILL, ended.said
    before = files(data)
    assert 4 <= len(before) < 20
    assert (tmp_path / "lat.json").read_bytes() == entries
    capfd.readouterr()
    tool(*words)
    assert f"latents: {20 - len(before)} written, {len(before)} skipped" in capfd.readouterr().out
    assert files(data) == whole
    assert not [*tmp_path.rglob("*.tmp")]


def test_force_makes_all_again_and_goes_on_where_it_was_killed(tool, words, data, tmp_path, fork_server, capfd):
    tool(*words)
    whole = files(data)
    ended = fork_server.run([*map(str, words), "--force"], "finetune.prepare_buckets_latents", at=70)
    assert ended.status == -signal.SIGKILL, ended.said
    assert files(data) == whole
    noted = len((tmp_path / "lat.json.unfinished").read_text().splitlines()) - 1
    assert 1 <= noted < 8
    capfd.readouterr()
    tool(*words, "--force")
    assert f"latents: {8 - noted} written, {noted} skipped" in capfd.readouterr().out
    assert files(data) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "lat.json", "meta.json"]
    tool(*words, "--force")
    assert "latents: 8 written, 0 skipped" in capfd.readouterr().out


def test_what_was_done_in_another_precision_does_not_count(tool, words, data, capfd, monkeypatch):
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    tool(*words)
    whole = files(data)
    with monkeypatch.context() as patch:
        patch.setattr(bucket_latents, "write_resolutions", stopped)
        with pytest.raises(SystemExit, match="130"):
            tool(*words, "--force", "--mixed_precision", "bf16")
    assert "so far: 8 written, 0 skipped, 0 failed" in capfd.readouterr().out
    assert files(data) != whole
    tool(*words, "--force")
    assert files(data) == whole
    assert "latents: 8 written, 0 skipped" in capfd.readouterr().out


def test_what_is_lost_or_left_is_said_before(tool, words, data, tmp_path, capfd, monkeypatch):
    """Entries of a file that is made anew, of names that are there twice, and of pictures that are gone."""
    sized = '{"train_resolution": [8, 8]}'
    (tmp_path / "meta.json").write_text(f'{{"32_1": {{}}, "32_2": {{"n": 1}}, "32_2": {{"n": 2}}, "gone": {sized}}}')
    write_metadata(tmp_path / "lat.json", {"foreign": {}, "32_3": {}})
    picture(data / "below" / "x.png", (32, 32))

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bucket_latents, "write_latents", stopped)
        with pytest.raises(SystemExit, match="130"):
            tool(*words)
    said = capfd.readouterr().err
    assert "what lies in the 1 folder below is left out, --recursive takes it along" in said
    assert "1 name is there more than once, and the last entry of each counts: 32_2" in said
    assert "6 pictures have no entry and get one without caption and tags: 32_0.png" in said
    assert "1 entry has a train_resolution, but no picture, and nothing changes there: gone" in said
    assert "and 1 entry is not there and is lost: foreign" in said
    tool(*words)
    entries = metadata(tmp_path / "lat.json")
    assert (entries["32_2"]["n"], entries["gone"]["train_resolution"], len(entries)) == (2, [8, 8], 9)


def test_the_number_of_threads_makes_no_difference(tool, words, data):
    tool(*words, "--max_data_loader_n_workers", 0)
    one = files(data)
    tool(*words, "--max_data_loader_n_workers", 5, "--force")
    assert files(data) == one


# Mistakes


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--recursive"], "--recursive: pictures of several folders can have one name: add --full_path"),
        (["--full_path"], "has pictures by their names, as 32_"),
        (["--max_resolution", "32x32"], "--max_resolution: '32x32' must be one size in pixels or width and height"),
        (["--max_resolution", "30"], "--max_resolution: 30 does not fit this model, which needs multiples of 4"),
        (["--bucket_reso_steps", "6"], "--bucket_reso_steps: 6 does not fit this model"),
        (["--v2"], "is a Stable Diffusion 1.x model, drop it"),
        (["--skip_existing", "--force"], "--skip_existing: with --force all latents are made again"),
        (["--skip_exist"], "did you mean --skip_existing"),
    ],
)
def test_flags_that_do_not_fit(mistake, words, more, sentence):
    assert sentence in mistake(*words, *more)


@pytest.mark.parametrize(
    ("place", "name", "sentence"),
    [
        (0, "dat", "train_data_dir: the folder {} does not exist, did you mean"),
        (0, ".", "there are no pictures in {}, but in those below it: add --recursive"),
        (1, "meat.json", "in_json: {} does not exist, did you mean"),
        (2, "data", "out_json: {} is a folder, give the name of a file in it"),
        (2, "lat.safetensors", "out_json: {} is the name of a model"),
        (3, "model.safetensors", "model_name_or_path: {} does not exist"),
    ],
)
def test_words_that_do_not_fit(mistake, words, tmp_path, place, name, sentence):
    words[place] = tmp_path / name
    assert sentence.format(tmp_path / name) in mistake(*words)


def test_metadata_that_does_not_fit(mistake, words, tmp_path):
    (tmp_path / "meta.json").write_text('{"a": {},')
    assert "meta.json: line 1: no valid JSON" in mistake(*words)
    write_metadata(tmp_path / "meta.json", {"/somewhere/a.png": {}})
    assert "has pictures by their whole paths, as /somewhere/a.png: add --full_path" in mistake(*words)
    assert "as /somewhere/a.png, is of a picture in" in mistake(*words, "--full_path")
    write_metadata(tmp_path / "meta.json", {"32_x": {}})
    assert "none of the entries of" in mistake(*words)
    assert not files(tmp_path), "nothing is encoded"


def test_memory_that_runs_out_is_a_sentence(mistake, words, monkeypatch):
    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(StableDiffusion1, "encode_images", run_out)
    sentence = "there is not enough memory for encoding {} of 32x32 at a time: {}"
    assert sentence.format("2 images", "lower --batch_size") in mistake(*words)
    assert sentence.format("1 image", "choose a smaller resolution") in mistake(*words, "--batch_size", 1)


def test_a_read_only_folder_is_refused_before_the_model_is_read(mistake, words, data, monkeypatch):
    monkeypatch.setattr(ModelInfo, "load_vae", None)
    monkeypatch.setattr(os, "access", lambda path, mode: not (Path(path) == data and mode & os.W_OK))
    assert f"train_data_dir: {data} cannot be written to" in mistake(*words)


def test_nothing_to_show_is_a_mistake(mistake, words, data):
    for path in data.glob("*.png"):
        cut_off(path)
    assert "no latents are written: none of the pictures could be used" in mistake(*words)


@pytest.mark.slow
def test_as_a_program(words, data):
    done = run_program([sys.executable, SCRIPT, *words], 120, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "latents: 8 written, 0 skipped, 0 failed, on cpu"
    assert done.stderr.strip().startswith("caching latents"), "what packages print is not shown"
    assert len(files(data)) == 8
