"""Whole runs of train_db.py on the tiny model: how long the text encoder is trained, how captions are padded, and
regularisation images.
"""

import re
from pathlib import Path

import pytest
import torch
from prodigyopt import Prodigy
from safetensors.torch import load_file

from library.models.sgm_keys import CLIP_PREFIX, VAE_PREFIX
from library.models.text import TextEncoder
from library.training.methods.base import ParameterGroup
from library.training.optimization import planned_rates
from library.training.optimization.apart import by_rate
from library.training.optimization.movement import Movement
from tests.tiny import draw_pictures, largest_difference, read_logs, scalars, stored
from tests.whole_models import EVERY_PARAMETER, PROPORTIONAL, ROUNDING, names, unchanged

SCRIPT = "train_db"
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "BasicTransformerBlock,ResnetBlock2D,CLIPEncoderLayer",
}


@pytest.fixture
def words(flags):
    def make(folder: Path, **changes: object) -> list[str]:
        return flags(folder, network_module=None, **PROPORTIONAL | changes)

    return make


def text_encoder(file: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in load_file(file).items() if name.startswith(CLIP_PREFIX)}


def same_text_encoder(one: Path, other: Path) -> bool:
    ours, theirs = text_encoder(one), text_encoder(other)
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


# How long the text encoder is trained


def test_the_text_encoder_is_trained_unless_a_flag_says_otherwise(run, model_file, capsys):
    both = run("both", **EVERY_PARAMETER)
    assert unchanged(model_file, both) == names(model_file, VAE_PREFIX)
    for never in (0, -1):
        alone = run(f"alone{never}", **EVERY_PARAMETER, stop_text_encoder_training=never)
        assert unchanged(model_file, alone) == names(model_file, VAE_PREFIX, CLIP_PREFIX)
    still = run("still", **EVERY_PARAMETER, learning_rate_te=0)
    assert stored(still) == stored(alone)
    assert "text_encoder is not trained: its learning rate is 0" in capsys.readouterr().err


STOPPED: dict[str, dict[str, object]] = {
    "AdamW8bit": {"optimizer_type": "AdamW8bit"},
    "Prodigy": {"optimizer_type": "Prodigy", "learning_rate": 1},
    "AdamWScheduleFree in groups": {"optimizer_type": "AdamWScheduleFree", "fused_optimizer_groups": 3},
    "bf16 throughout": {"mixed_precision": "bf16", "full_bf16": True},
    "AdamW": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    "Lion": {"optimizer_type": "Lion"},
    "AdaFactor": {"optimizer_type": "AdaFactor", "learning_rate": None},
    "AdaFactor at given rates": {"optimizer_type": "AdaFactor", "optimizer_args": "relative_step=False"},
    "DAdaptSGD": {"optimizer_type": "DAdaptSGD", "learning_rate": 1},
    "DAdaptAdaGrad": {"optimizer_type": "DAdaptAdaGrad", "learning_rate": 1},
    "DAdaptAdam": {"optimizer_type": "DAdaptAdam", "learning_rate": 1},
    "DAdaptLion": {"optimizer_type": "DAdaptLion", "learning_rate": 1},
    "DAdaptAdan": {"optimizer_type": "DAdaptAdan", "learning_rate": 1, "learning_rate_te": 0.5},
    "AdamW within the backward pass": {"fused_backward_pass": True},
}
QUICK = 4


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (n >= QUICK)) for n, name in enumerate(STOPPED)]
)
def test_after_so_many_steps_the_unet_is_trained_alone(run, name, tmp_path, capsys):
    """With weight decay and momentum, which nothing may be moved by."""
    changes = {"learning_rate": 1e-3, "optimizer_args": "weight_decay=0.1", "stop_text_encoder_training": 2}
    changes |= STOPPED[name]
    saved = {"save_every_n_steps": 1, "logging_dir": tmp_path / "logs", "no_rehearsal": None}
    last = run("a", **changes, **saved, max_train_steps=4)
    first, second, third = (last.with_name(f"run-step0000000{number}.safetensors") for number in (1, 2, 3))
    assert not same_text_encoder(first, second)
    assert same_text_encoder(second, third)
    assert same_text_encoder(second, last)
    assert unchanged(third, last) == names(last, VAE_PREFIX, CLIP_PREFIX)
    rates = scalars(read_logs(tmp_path / "logs"), "lr/text_encoder")
    assert [rate > 0 for rate in rates.values()] == [True, True, False, False]
    assert "text_encoder, " in (printed := capsys.readouterr().out)
    assert "in the first 2 steps only" in printed


def test_it_is_not_asked_for_gradients_any_more(run, monkeypatch, tmp_path):
    asked, forward = [], TextEncoder.forward

    def watched(self, *arguments):
        asked.append(torch.is_grad_enabled())
        return forward(self, *arguments)

    monkeypatch.setattr(TextEncoder, "forward", watched)
    run("a", stop_text_encoder_training=3, save_state=True)
    assert asked == [True, True, True, False]
    asked.clear()
    state = {"resume": tmp_path / "a" / "run-state", "max_train_steps": 5}
    rehearsed = run("rehearsed", stop_text_encoder_training=3, **state, no_rehearsal=None)
    assert asked == [False, False]
    assert stored(rehearsed) == stored(run("plain", stop_text_encoder_training=3, **state))


def test_the_end_of_the_text_encoders_training_is_nowhere_but_there(run, capsys):
    """Until then nothing is otherwise; one that is beyond the last step has no effect, and that is said."""
    whole = run("whole")
    assert stored(run("beyond", stop_text_encoder_training=4)) == stored(whole)
    said = capsys.readouterr()
    assert "--stop_text_encoder_training 4 has no effect: the run ends at step 4" in said.err
    assert "steps only" not in said.out
    stopped = run("stopped", stop_text_encoder_training=2, save_every_n_steps=2)
    early = run("early", max_train_steps=2)
    assert stored(stopped.with_name("run-step00000002.safetensors")) == stored(early)
    still = {"learning_rate": 0, "learning_rate_te": 0.1}
    assert stored(run("unet still", **still, stop_text_encoder_training=4)) == stored(run("text alone", **still))


def test_where_it_has_no_effect_one_rate_is_found_for_all(run):
    found = {"optimizer_type": "Prodigy", "learning_rate": 1, "optimizer_args": None, "max_train_steps": 3}
    assert stored(run("beyond", **found, stop_text_encoder_training=3)) == stored(run("whole", **found))


def test_a_resumed_run_finds_a_rate_of_its_own_for_what_stops_now(run, tmp_path):
    """Whatever the state says of it."""
    found = {"optimizer_type": "Prodigy", "learning_rate": 1, "optimizer_args": None, "save_state": True}
    state = run("begun", **found, max_train_steps=1).with_name("run-state")
    logs = {"max_train_steps": 7, "logging_dir": tmp_path / "logs"}
    run("stopping", **found, **logs, stop_text_encoder_training=6, resume=state)
    unet, text = (
        list(scalars(read_logs(tmp_path / "logs"), f"lr/{part}").values()) for part in ("unet", "text_encoder")
    )
    assert unet[:5] != text[:5]


def test_a_run_goes_on_on_either_side_of_it(run, tmp_path, capsys):
    changes = {"stop_text_encoder_training": 2, "save_state": True, "save_every_n_steps": 1}
    whole = run("whole", **changes)
    for step in (1, 3):
        resumed = run(f"from {step}", **changes, resume=tmp_path / "whole" / f"run-step0000000{step}-state")
        assert stored(resumed) == stored(whole)
    capsys.readouterr()
    later = run("later", stop_text_encoder_training=4, resume=tmp_path / "whole" / "run-step00000003-state")
    assert not same_text_encoder(later, whole)
    assert "--stop_text_encoder_training is 4 and was 2, so the text encoder is trained in other steps" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("left", [0, 1, 2])
def test_many_steps_after_it_nothing_is_missed(left):
    """What is resumed there, or shortly before it, sees few gradients of the text encoder or none."""
    unet, text = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([{"params": [unet]}, {"params": [text]}], lr=0.1)
    groups = [ParameterGroup("unet", [unet], 0.1), ParameterGroup("text_encoder", [text], 0.1, steps=5)]
    number = iter(range(5 - left, 9))
    movement = Movement(groups, optimizer, resumed=True, step=lambda: next(number))
    for step in range(4):
        unet.grad, text.grad = torch.ones(1), torch.ones(1) if step < left else None
        optimizer.step()
    assert movement.observed
    movement.check()


def test_what_stops_has_no_part_in_the_rate_that_is_found_for_the_rest():
    """Prodigy's estimate is a ratio of sums: one of them would go on without the part that has stopped."""

    def estimates(**alone: bool) -> list[float]:
        one, other = (torch.nn.Parameter(torch.full((4,), 3.0)) for _ in range(2))
        groups = [{"params": [one], "lr": 1.0}, {"params": [other], "lr": 1.0, **alone}]
        optimizer = by_rate(Prodigy)(groups, lr=1.0)
        for step in range(8):
            one.grad, other.grad = one.detach().clone(), 100 * other.detach() if step < 5 else None
            optimizer.step()
        return [group["d"] for group in optimizer.param_groups]

    def by_itself() -> float:
        one = torch.nn.Parameter(torch.full((4,), 3.0))
        optimizer = by_rate(Prodigy)([one], lr=1.0)
        for _ in range(8):
            one.grad = one.detach().clone()
            optimizer.step()
        return optimizer.param_groups[0]["d"]

    assert estimates(alone=True)[0] == by_itself()
    assert estimates()[0] != by_itself()


def test_the_picture_of_planned_rates_ends_it_there(run, monkeypatch, tmp_path):
    drawn = []
    chart = planned_rates.rate_chart
    monkeypatch.setattr(planned_rates, "rate_chart", lambda *a: drawn.append(a[:2]) or chart(*a))
    run("a", stop_text_encoder_training=1, max_train_steps=2, logging_dir=tmp_path / "logs")
    ((parts, rates),) = drawn
    assert parts == ["unet", "text_encoder"]
    assert rates == {1: [0.1, 0.1], 2: [0.1, 0.0]}


def test_nothing_may_be_left_to_train(refused):
    message = refused(learning_rate=0, learning_rate_te=1e-3, stop_text_encoder_training=2)
    assert "nothing is left to train after step 2" in message


@pytest.mark.slow
def test_two_processes_agree_on_it(fork_server, run, words, model_file, tmp_path):
    """And equal one with twice the accumulation. Three batches per epoch, so every second step has none for one."""
    stop = {"stop_text_encoder_training": 2, "save_every_n_steps": 2}
    two = words(tmp_path / "two", **stop, ddp_static_graph=True, ddp_gradient_as_bucket_view=True)
    ended = fork_server.run(two, "train_db", processes=2, how=("telling",))
    assert ended.status == 0, ended.said
    assert "--ddp_static_graph is left out: --stop_text_encoder_training" in ended.said
    weights = re.findall(r"WEIGHTS <(\w+)>", ended.said)
    assert len(weights) == 8
    assert all(weights.count(one) == 2 for one in weights)
    one = run("one", gradient_accumulation_steps=2, **stop)
    for name in ("run-step00000002.safetensors", "run.safetensors"):
        assert largest_difference(one.with_name(name), tmp_path / "two" / name) < ROUNDING
    assert largest_difference(one, model_file) > 1000 * ROUNDING
    assert same_text_encoder(one, one.with_name("run-step00000002.safetensors"))


@pytest.mark.slow
def test_fsdp_stops_as_plain_processes_do(fork_server, run, words, tmp_path):
    stop = {"stop_text_encoder_training": 2, "train_batch_size": 1, "save_every_n_steps": 2}
    fsdp = words(tmp_path / "two", **stop)
    ended = fork_server.run(fsdp, "train_db", processes=2, how=("on_cpu",), environment=FSDP)
    assert ended.status == 0, ended.said
    one = run("one", gradient_accumulation_steps=2, **stop)
    for name in ("run-step00000002.safetensors", "run.safetensors"):
        assert largest_difference(one.with_name(name), tmp_path / "two" / name) < ROUNDING


# How captions are padded


def test_without_padding_captions_are_as_long_as_the_longest_of_their_batch(run, monkeypatch, tmp_path, capsys):
    seen, forward = [], TextEncoder.forward

    def watched(self, ids, *others):
        seen.append((self.training, *ids.shape))
        return forward(self, ids, *others)

    monkeypatch.setattr(TextEncoder, "forward", watched)
    (tmp_path / "prompts.txt").write_text("a red circle --w 32 --h 32 --s 2 --d 1")
    painted = {"sample_prompts": tmp_path / "prompts.txt", "sample_every_n_steps": 2}
    held_out = {"validation_split": 0.4, "validate_every_n_steps": 2}
    short = run("short", no_token_padding=True, save_state=True, max_train_steps=2, **painted, **held_out)
    trained = {length for training, _, _, length in seen if training}
    assert trained
    assert max(trained) < 20
    lengths = {length for training, _, _, length in seen if not training}
    assert 77 in lengths, "previews are painted as they are everywhere else"
    assert lengths & set(range(20)), "validation reads captions as training does"
    padded = run("padded", max_train_steps=2, **held_out)
    assert largest_difference(short, padded) > ROUNDING
    capsys.readouterr()
    run("on", resume=short.with_name("run-state"), max_train_steps=4, **held_out)
    assert "--no_token_padding is not set and was set, so captions are read in another way" in capsys.readouterr().err


def test_padding_that_is_needed_cannot_be_left_out(refused):
    long = refused(no_token_padding=True, max_token_length=150)
    assert "drop it, or --max_token_length 150" in long
    cached = refused(no_token_padding=True, cache_text_encoder_outputs=True, stop_text_encoder_training=-1)
    assert "drop it, or --cache_text_encoder_outputs" in cached


# Regularisation images


def test_regularisation_images_keep_what_they_show(run, refused, tmp_path):
    draw_pictures(tmp_path / "reg" / "1_shape", 3)
    changes = {"reg_data_dir": tmp_path / "reg", "train_batch_size": 4}
    full, half = run("full", **changes), run("half", **changes, prior_loss_weight=0.5)
    none, without = run("none", **changes, prior_loss_weight=0), run("without", train_batch_size=4)
    assert min(largest_difference(full, other) for other in (half, none, without)) > ROUNDING
    assert largest_difference(half, none) > ROUNDING


# What belongs to other scripts


def test_models_and_datasets_of_other_scripts_name_them(refused, model_files, tmp_path):
    assert "is an SDXL model: train it with sdxl_train.py" in refused(pretrained_model_name_or_path=model_files("sdxl"))
    (tmp_path / "captions.json").write_text("{}")
    assert "use fine_tune.py for them" in refused(in_json=tmp_path / "captions.json")


def test_a_state_goes_on_in_fine_tuning_if_the_same_is_trained(
    run,
    train,
    flags,
    pictures,
    metadata_file,
    refused,
    tmp_path,
    capsys,
):
    """The parts decide, not the script."""
    run("db", max_train_steps=2, save_state=True)
    alone = run("alone", max_train_steps=2, save_state=True, stop_text_encoder_training=0)
    message = refused(resume=alone.with_name("run-state"))
    assert "is the state of something else than what these flags train (it does not train text_encoder, " in message
    assert "text_encoder, --stop_text_encoder_training is not set and was 0)" in message
    besides = refused(resume=tmp_path / "db" / "run-state", stop_text_encoder_training=-1)
    assert "(it trains text_encoder besides, --stop_text_encoder_training is -1 and was not set)" in besides
    described = {"in_json": metadata_file, "train_data_dir": pictures / "1_sks shape", "caption_extension": None}
    state = {"resume": tmp_path / "db" / "run-state", "train_text_encoder": True, "max_train_steps": 3}
    train(flags(tmp_path / "on", network_module=None, **PROPORTIONAL, **described, **state), script="fine_tune")
    assert "going on after step 2" in capsys.readouterr().err
