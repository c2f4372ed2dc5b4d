"""Whole runs of the tiny model: what must not change their result, and what must."""

import json
import os
from itertools import count
from pathlib import Path

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from safetensors.torch import load_file

from library.data.config import SubsetConfig
from library.data.plan import RunPlan
from library.data.records import scan
from library.errors import UserError
from library.models.files.checkpoint import open_weights
from library.models.registry import ModelInfo
from library.training.optimization.movement import Movement
from networks import lora
from tests.pictures import dataset, subset
from tests.processes import train_script
from tests.tiny import draw_pictures, largest_difference, read_log, scalars, stored

RATES = json.loads((Path(__file__).parent / "data/golden/lr_schedules.json").read_text())

# AdamW divides gradients by their size, so that rounding decides the step where they are next to nothing. With a large
# epsilon, steps are nearly proportional to gradients, and runs that should agree can be compared number by number.
PROPORTIONAL = {"learning_rate": 1, "optimizer_args": ("eps=1", "weight_decay=0", "betas=0.,0."), "max_grad_norm": 0}
ROUNDING = 1e-6


@pytest.fixture
def run(train, flags, tmp_path):
    """`run(name, **changes)` trains into a folder of this name and returns the file."""

    def start(name: str, **changes: object) -> Path:
        train(flags(tmp_path / name, **changes))
        return tmp_path / name / "run.safetensors"

    return start


def up_weights(file: Path) -> torch.Tensor:
    """All weights of a LoRA that were zero before training."""
    return torch.cat([tensor.flatten() for key, tensor in load_file(file).items() if "lora_up" in key])


def assert_equal_to_rounding(one: Path, other: Path) -> None:
    assert up_weights(one).abs().max() > 1000 * ROUNDING  # or there would be nothing to compare
    assert largest_difference(one, other) < ROUNDING


def images_of_steps(folders: list[SubsetConfig], seed: int, batch: int, accumulation: int) -> list[set[int]]:
    """The records that each step of the first epoch takes."""
    datasets = (dataset(*folders, resolution=(32, 32), batch_size=batch),)
    plan = RunPlan(scan(datasets), datasets, seed=seed, accumulation=accumulation)
    images: list[set[int]] = [set() for _ in range(plan.steps_per_epoch)]
    for micro in plan.iterate(0, plan.steps_per_epoch):
        images[micro.step] |= {item.record for item in micro.items}
    return images


# What does not change the result


@pytest.mark.parametrize("cached", [None, True])
def test_workers_change_nothing(run, monkeypatch, cached):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)  # one CPU is always left to the training
    random = {"network_dropout": 0.2, "flip_aug": True, "shuffle_caption": True, "cache_latents": cached}
    alone = run("alone", max_data_loader_n_workers=0, **random)
    together = run("together", max_data_loader_n_workers=2, **random)
    assert up_weights(alone).abs().max() > 0.01
    assert stored(alone) == stored(together)


def test_another_seed_is_another_run(run):
    assert largest_difference(run("a"), run("b", seed=2)) > 0.01


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 2), (1, 6)])
def test_images_weigh_the_same_however_they_fall_into_micro_batches(run, batch, accumulation):
    """Every step takes all six images: in one batch, in batches of 4 and 2, or one by one."""
    whole = run("whole", train_batch_size=6, **PROPORTIONAL)
    parts = run("parts", train_batch_size=batch, gradient_accumulation_steps=accumulation, **PROPORTIONAL)
    assert_equal_to_rounding(whole, parts)


def test_a_short_last_step_is_averaged_over_its_own_images(run, pictures):
    """Six images in steps of 4 and 2: as two batches, and as six of one image under accumulation."""
    folder = subset(pictures / "1_sks shape", caption_extension=".txt")

    def the_same(seed: int) -> bool:
        return images_of_steps([folder], seed, 4, 1)[:2] == images_of_steps([folder], seed, 1, 4)[:2]

    common = {"max_train_steps": 2, "seed": next(filter(the_same, count())), **PROPORTIONAL}
    batches = run("batches", train_batch_size=4, **common)
    images = run("images", train_batch_size=1, gradient_accumulation_steps=4, **common)
    assert_equal_to_rounding(batches, images)


def test_gradient_checkpointing_computes_twice_and_changes_nothing(run, monkeypatch):
    calls = []
    forward = BasicTransformerBlock.forward

    def counted(self, *args, **keywords):
        calls.append(self)
        return forward(self, *args, **keywords)

    monkeypatch.setattr(BasicTransformerBlock, "forward", counted)
    kept = run("kept", network_dropout=0.2, **PROPORTIONAL)
    once = len(calls)
    recomputed = run("recomputed", network_dropout=0.2, gradient_checkpointing=True, **PROPORTIONAL)
    assert len(calls) == 3 * once
    assert_equal_to_rounding(kept, recomputed)


def test_two_processes_equal_one_with_twice_the_accumulation(run, flags, tmp_path):
    """Three batches per epoch, so every second step has none for the second process."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --w 32 --h 32 --s 2 --d 1")
    common = {"network_dropout": 0.2, "save_every_n_steps": 2, "sample_prompts": prompts, "sample_every_n_steps": 4}
    changes = {**common, **PROPORTIONAL, "logging_dir": tmp_path / "logs"}
    launcher = ("torchrun", "--standalone", "--nproc_per_node", "2")
    result = train_script(flags(tmp_path / "two", **changes), launcher)
    assert result.returncode == 0, result.stderr
    assert ", 2 processes" in result.stdout
    for once in ("run-step00000002", "run-step00000004", "run.safetensors", "unet: weights changed"):
        assert (result.stdout + result.stderr).count(once) == 1
    assert len(list((tmp_path / "two" / "sample").iterdir())) == 1
    logged = scalars(read_log(tmp_path / "logs"), "loss/current")

    one = run("one", gradient_accumulation_steps=2, **changes | {"logging_dir": tmp_path / "other"})
    assert_equal_to_rounding(tmp_path / "two" / "run.safetensors", one)
    assert logged == pytest.approx(scalars(read_log(tmp_path / "other"), "loss/current"), rel=1e-5)


# How far and how fast


def test_gradients_are_clipped_at_their_overall_norm(run):
    one_step = PROPORTIONAL | {"max_train_steps": 1}
    free = up_weights(run("free", **one_step)).norm()
    clipped = up_weights(run("clipped", **one_step | {"max_grad_norm": 1e-3})).norm()
    assert free > 0.01
    assert clipped == pytest.approx(1e-3, rel=0.01)


def test_the_learning_rate_warms_up_as_published(run, tmp_path):
    case = next(case for case in RATES if case["flags"])
    words = {flag.removeprefix("--"): value for flag, value in zip(*[iter(case["flags"])] * 2, strict=True)}
    rates = {"unet_lr": 0.004, "text_encoder_lr": 0.002}
    run(
        "a",
        max_train_steps=case["max_train_steps"],
        logging_dir=tmp_path / "logs",
        train_batch_size=1,
        **words,
        **rates,
    )
    log = read_log(tmp_path / "logs")
    for group, rate in (("unet", 0.004), ("text_encoder", 0.002)):
        expected = {step: rate * factor for step, factor in enumerate(case["rates"], 1)}
        assert scalars(log, f"lr/{group}") == pytest.approx(expected)


def test_epochs_beat_steps_and_the_last_one_writes_no_numbered_file(train, flags, tmp_path):
    saving = {"save_every_n_epochs": 1, "save_every_n_steps": 3, "output_name": None, "save_model_as": "ckpt"}
    train(flags(tmp_path, max_train_epochs=2, max_train_steps=1, **saving))
    names = ["at-step00000003.ckpt", "at-step00000006.ckpt", "epoch-000001.ckpt", "last.ckpt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    last, at_six = (torch.load(tmp_path / name, weights_only=True) for name in ("last.ckpt", "at-step00000006.ckpt"))
    assert all(torch.equal(last[key], at_six[key]) for key in last)


# What is trained, and what is not


def test_only_the_network_changes(run, monkeypatch, model_file, capsys):
    loaded = []
    load = ModelInfo.load
    monkeypatch.setattr(ModelInfo, "load", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[0])
    assert up_weights(run("a")).abs().max() > 0.01
    before = load_file(model_file)
    after = loaded[0].tensors()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    printed = capsys.readouterr().out
    assert "text_encoder: weights changed by" in printed
    assert "unet: weights changed by" in printed


@pytest.mark.parametrize(("part", "prefix"), [("unet", "lora_unet_"), ("text_encoder", "lora_te_")])
def test_the_part_that_is_not_trained_is_not_in_the_file(run, part, prefix):
    file = run("a", **{f"network_train_{part}_only": True})
    assert all(key.startswith(prefix) for key in load_file(file))


def test_a_part_with_rate_zero_stays_as_it_began(run):
    weights = load_file(run("a", text_encoder_lr=0))
    assert not any(tensor.any() for key, tensor in weights.items() if "lora_te" in key and "lora_up" in key)
    assert all(tensor.any() for key, tensor in weights.items() if "lora_unet" in key and "lora_up" in key)


def test_a_group_without_gradients_stops_the_run(train, flags, tmp_path, monkeypatch, capsys):
    apply = lora.LoRAModule.apply_to
    monkeypatch.setattr(
        lora.LoRAModule, "apply_to", lambda self, layer: None if "lora_te_" in self.lora_name else apply(self, layer)
    )
    with pytest.raises(SystemExit, match="2"):
        train(flags(tmp_path, save_every_n_steps=3))
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "text_encoder get no gradient" in message
    assert "unet" not in message
    assert not list(tmp_path.iterdir())


def test_a_run_without_any_step_taken_is_refused_unless_it_was_resumed():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(UserError, match="all gradients overflowed"):
        Movement([], optimizer).check()
    Movement([], optimizer, resumed=True).check()


def test_regularisation_images_count_by_their_weight(run, tmp_path):
    """One step over six images and as many uses of two regularisation images."""
    reg = draw_pictures(tmp_path / "reg" / "1_shape", 2).parent
    one_step = PROPORTIONAL | {"max_train_steps": 1, "train_batch_size": 12, "reg_data_dir": reg}
    none, half, full = (up_weights(run(f"{weight}", prior_loss_weight=weight, **one_step)) for weight in (0, 0.5, 1))
    assert (full - none).norm() > 0.1 * none.norm()
    assert torch.allclose(half, (none + full) / 2, atol=0.02 * none.abs().max())
    without = up_weights(run("without", **one_step | {"reg_data_dir": None}))
    assert torch.allclose(none, without / 2, atol=0.02 * none.abs().max())


def test_steps_without_anything_to_learn_are_no_reason_to_stop(run, tmp_path, pictures):
    reg = draw_pictures(tmp_path / "reg" / "1_shape", 2)
    folders = [
        subset(pictures / "1_sks shape", caption_extension=".txt"),
        subset(reg, caption_extension=".txt", is_reg=True),
    ]

    def starts_with_regularisation(seed: int) -> bool:
        return all(images <= {6, 7} for images in images_of_steps(folders, seed, 1, 1)[:3])

    seed = next(filter(starts_with_regularisation, count()))
    file = run("a", train_batch_size=1, reg_data_dir=reg.parent, prior_loss_weight=0, seed=seed, max_train_steps=12)
    assert up_weights(file).any()


# Precision


def test_bf16_computes_roughly_and_trains_exactly(run):
    exact = up_weights(run("exact", **PROPORTIONAL))
    rough = up_weights(run("rough", mixed_precision="bf16", save_precision="float", **PROPORTIONAL))
    assert 0 < (exact - rough).norm() < 0.1 * exact.norm()
    assert (rough != rough.bfloat16().float()).any()


def test_fp16_falls_back_to_bf16_with_one_notice(run, capsys):
    file = run("a", mixed_precision="fp16")
    assert capsys.readouterr().err.count("training in bf16 on this CPU") == 1
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    with open_weights(file) as opened:
        assert opened.metadata["ss_mixed_precision"] == "bf16"
    assert stored(file) == stored(run("b", mixed_precision="bf16"))
