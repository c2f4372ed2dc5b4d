"""The rehearsal before the first step: what does not work shows there, and nothing is different afterwards."""

import errno
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from library.generation import paint as painting
from library.training import rehearsal
from library.training.device import memory
from library.training.methods.network import NetworkMethod
from library.training.optimization.stepper import Stepper
from library.training.step import TrainingStep
from networks.lora import LoRANetwork
from tests.tiny import draw_pictures, stored

# PyTorch's own words
ON_A_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
ON_A_CPU = RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")


@pytest.fixture
def batches(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of all latents that are trained on, as far as the run comes."""
    shapes, losses = [], TrainingStep.losses

    def noted(self, batch, latents, *others):
        if torch.is_grad_enabled():
            shapes.append(tuple(latents.shape))
        return losses(self, batch, latents, *others)

    monkeypatch.setattr(TrainingStep, "losses", noted)
    return shapes


@pytest.fixture
def of_fine_tuning(pictures, tmp_path) -> dict[str, object]:
    """The flags that make a run of the text encoder and the U-Net themselves."""
    images = pictures / "1_sks shape"
    captions = {path.stem: {"caption": path.read_text(encoding="utf-8")} for path in images.glob("*.txt")}
    (tmp_path / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    return {
        "network_module": None,
        "network_dropout": None,
        "caption_extension": None,
        "train_data_dir": images,
        "in_json": tmp_path / "captions.json",
        "train_text_encoder": True,
        "learning_rate": 1e-4,
    }


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"optimizer_type": "AdamW8bit", "network_dim": 64},
        {"optimizer_type": "PagedAdamW8bit", "network_dim": 64},
        pytest.param({"optimizer_type": "Prodigy", "learning_rate": 1}, marks=pytest.mark.slow),
        {"optimizer_type": "AdamWScheduleFree"},
        pytest.param({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 3}, marks=pytest.mark.slow),
        {"gradient_accumulation_steps": 2},
        "fine_tune",
    ],
    ids=str,
)
def test_nothing_is_different_afterwards(kind, of_fine_tuning, flags, train, tmp_path, batches):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --w 32 --h 32 --s 3")
    changes = {
        "network_dropout": 0.2,
        "validation_split": 0.34,
        "ema": True,
        "sample_prompts": prompts,
        "sample_every_n_steps": 2,
        "save_state_on_train_end": True,
        **(of_fine_tuning if kind == "fine_tune" else kind),
    }
    script = "fine_tune" if kind == "fine_tune" else "train_network"
    train(flags(tmp_path / "without", **changes), script=script)
    taken = len(batches)
    resumed = {**changes, "no_rehearsal": None, "resume": "latest"}
    train(flags(tmp_path / "with", **{**resumed, "max_train_steps": 2}), script=script)
    train(flags(tmp_path / "with", **resumed), script=script)
    assert len(batches) == 2 * taken + 2
    for name in ("run.safetensors", "run-ema.safetensors", "run-state/objects.safetensors"):
        assert stored(tmp_path / "with" / name) == stored(tmp_path / "without" / name), name


@pytest.mark.parametrize(("squares", "wide"), [(4, 1), (1, 3)], ids=["larger ones", "more, but smaller ones"])
def test_it_takes_the_largest_batch(squares, wide, flags, train, tmp_path, batches):
    """Squares become 48x48, others 64x32."""
    images = draw_pictures(tmp_path / "data" / "1_sks", squares, size=(32, 32))
    draw_pictures(images, wide, size=(64, 32))
    words = flags(
        tmp_path / "out",
        train_data_dir=tmp_path / "data",
        enable_bucket=True,
        min_bucket_reso=16,
        max_bucket_reso=64,
        bucket_reso_steps=16,
        resolution="48,48",
        train_batch_size=3,
        max_train_epochs=1,
        no_rehearsal=None,
    )
    train(words)
    sizes = [batch * height * width for batch, _, height, width in batches]
    assert sizes[0] == max(sizes) > min(sizes)


def test_nothing_is_left_behind(flags, train, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rehearsal, "_WORTH_A_WORD", 0.0)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --w 32 --h 32 --s 2\na blue one --w 64 --h 32 --s 4")
    painted, denoise = [], painting._denoise
    monkeypatch.setattr(painting, "_denoise", lambda *args: (painted.append(args[2].shape), denoise(*args))[1])
    words = flags(
        tmp_path / "out", sample_prompts=prompts, sample_every_n_steps=9, max_train_steps=1, no_rehearsal=None
    )
    begun, begin = [], LoRANetwork.on_epoch_start
    monkeypatch.setattr(LoRANetwork, "on_epoch_start", lambda *args: (begun.append(args), begin(*args)))
    train(words)
    assert len(begun) == 2, "the first epoch begins anew"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.safetensors"]
    assert [tuple(shape[2:]) for shape in painted] == [(16, 32)]
    said = capsys.readouterr()
    assert re.search(r"rehearsed a step with 2 images of 32x32 at a time, a preview, a save in \d+ s:", said.err)


def test_what_a_killed_one_leaves_is_cleaned_up(flags, train, tmp_path, monkeypatch):
    folders, save = [], NetworkMethod.save
    monkeypatch.setattr(
        NetworkMethod, "save", lambda self, stem, *args: (folders.append(stem), save(self, stem, *args))[1]
    )
    train(flags(tmp_path, max_train_steps=1, no_rehearsal=None))
    (name,) = {stem.parent.name for stem in folders} - {tmp_path.name}
    nobody = 2**22 + 1  # systems do not count that far: a free number below may be taken by the next process
    assert not psutil.pid_exists(nobody)
    left = tmp_path / name.replace(str(psutil.Process().pid), str(nobody))
    (left / "folder").mkdir(parents=True)
    (left / "folder" / "run.safetensors").touch()
    train(flags(tmp_path, max_train_steps=1))
    assert [path.name for path in tmp_path.iterdir()] == ["run.safetensors"]


@pytest.mark.parametrize("error", [ON_A_GPU, ON_A_CPU, MemoryError()], ids=["GPU", "CPU", "Python"])
def test_too_large_a_step_shows_before_the_first_one(error, flags, train, tmp_path, capsys, monkeypatch):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(TrainingStep, "losses", fail)
    with pytest.raises(SystemExit) as ended:
        train(flags(tmp_path / "out", no_rehearsal=None))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "not enough memory for a step with 2 images of 32x32 at a time: lower --train_batch_size or" in said
    assert not list((tmp_path / "out").iterdir())


def test_memory_that_runs_out_later_is_one_sentence_too(flags, train, tmp_path, capsys, monkeypatch):
    calls, move = itertools.count(1), Stepper._step

    def fail(self):
        if next(calls) == 3:
            raise ON_A_GPU
        return move(self)

    monkeypatch.setattr(Stepper, "_step", fail)
    with pytest.raises(SystemExit) as ended:
        train(flags(tmp_path / "out"))
    assert ended.value.code == 2
    assert "not enough memory for what the optimizer keeps: lower" in capsys.readouterr().err


def test_other_errors_are_left_as_they_are():
    with pytest.raises(RuntimeError, match="shapes differ"), memory.enough_for("it", "less"):
        raise RuntimeError("shapes differ")


def test_a_preview_that_is_too_large_shows_before_the_first_step(flags, train, tmp_path, capsys, monkeypatch, batches):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --w 32 --h 32 --s 2")

    def fail(*arguments):
        raise ON_A_GPU

    monkeypatch.setattr(painting, "_denoise", fail)
    with pytest.raises(SystemExit):
        train(flags(tmp_path / "out", sample_prompts=prompts, sample_every_n_steps=2, no_rehearsal=None))
    assert "not enough memory for a preview: lower --w and --h" in capsys.readouterr().err
    assert len(batches) == 1


def test_a_preview_that_is_too_large_later_is_left_out(flags, train, tmp_path, capsys, monkeypatch, batches):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --w 32 --h 32 --s 2")

    def fail(*arguments):
        raise ON_A_GPU

    monkeypatch.setattr(painting, "_denoise", fail)
    train(flags(tmp_path / "out", sample_prompts=prompts, sample_every_n_steps=1))
    assert capsys.readouterr().err.count("not enough memory for a preview: lower --w and --h") == 1
    assert len(batches) == 4


def test_deepspeed_keeps_its_optimizer(flags, train, tmp_path, monkeypatch):
    own = {**vars(rehearsal.engines), "engine": lambda accelerator: "deepspeed"}
    monkeypatch.setattr(rehearsal, "engines", SimpleNamespace(**own))
    monkeypatch.setattr(rehearsal, "_optimizer_as_new", None)  # so that nobody can call it
    train(flags(tmp_path / "out", no_rehearsal=None, max_train_steps=1))


def test_a_full_disk_shows_before_the_first_step(flags, train, tmp_path, capsys, monkeypatch, batches):
    def fail(self, file, *others):
        Path(file).with_name("half").write_text("a half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LoRANetwork, "save_weights", fail)
    with pytest.raises(SystemExit) as ended:
        train(flags(tmp_path / "out", no_rehearsal=None))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"could not be saved in {tmp_path / 'out'}, as was tried before the first step" in said
    assert "No space left on device" in said
    assert len(batches) == 1
    assert not list((tmp_path / "out").iterdir())


def test_a_disk_too_small_for_states_is_a_warning(flags, train, tmp_path, capsys, monkeypatch):
    class Full:
        free = 1000

    monkeypatch.setattr(rehearsal.shutil, "disk_usage", lambda path: Full)
    train(flags(tmp_path / "out", max_train_steps=1, save_state_on_train_end=True, no_rehearsal=None))
    assert "a state of this run takes" in capsys.readouterr().err
