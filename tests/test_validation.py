"""The loss on held-out images: what must not move it, what must, and what a run makes of it."""

import random
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from library.data.dataset import ImageDataset
from library.data.held_out import held_out_batches
from library.data.records import scan
from library.errors import UserError
from library.options.validation import ValidationOptions
from library.training import validation
from library.training.health import NotFinite
from library.training.step import TrainingStep
from library.training.trainer import seed_generators
from library.training.validation import ValidationLoss, Validator
from tests.pictures import dataset, picture, subset
from tests.tiny import draw_pictures, make_model, read_log, scalars, stored

RANGES = ("000-249", "250-499", "500-749", "750-999")
# each makes another use of an image something else
VARYING = {"flip_aug": True, "color_aug": True, "random_crop": True, "shuffle_caption": True}
DROPPING = {"caption_dropout_rate": 0.7, "network_dropout": 0.5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A --train_data_dir with pictures of two sizes, of which half are to be held out."""
    root = tmp_path_factory.mktemp("validated")
    draw_pictures(root / "1_sks shape", 6)
    draw_pictures(root / "1_sks shape", 4, (48, 16))
    return root


@pytest.fixture
def validated(train, flags, folders, tmp_path):
    """`validated(name, **changes)` trains with half of the pictures held out; returns the logged losses by name, and
    the file.
    """

    def start(name: str, **changes: object) -> tuple[dict[str, dict[int, float]], Path]:
        words = flags(tmp_path / name, **settings(folders, tmp_path / f"{name}-logs") | changes)
        train(words)
        return losses(tmp_path / f"{name}-logs"), tmp_path / name / "run.safetensors"

    return start


def settings(folders: Path, logs: Path) -> dict[str, object]:
    return {
        "train_data_dir": folders,
        "validation_split": 0.5,
        "enable_bucket": True,
        "min_bucket_reso": 16,
        "max_bucket_reso": 64,
        "bucket_reso_steps": 16,
        "max_train_steps": 4,
        "validate_every_n_steps": 2,
        "logging_dir": logs,
    }


def losses(logs: Path) -> dict[str, dict[int, float]]:
    log = read_log(logs)
    return {tag: scalars(log, tag) for tag in log.Tags()["scalars"] if tag.startswith("loss/validation")}


def assert_close(ours: dict[str, dict[int, float]], theirs: dict[str, dict[int, float]]) -> None:
    assert ours.keys() == theirs.keys()
    for tag, values in ours.items():
        assert values == pytest.approx(theirs[tag], rel=1e-5), tag


# What does not move it


def test_it_is_logged_before_at_every_interval_and_at_the_end_by_ranges_too(validated, capsys):
    logged, _ = validated("a", max_train_steps=5)
    assert set(logged) == {"loss/validation", *(f"loss/validation/{name}" for name in RANGES)}
    for values in logged.values():
        assert list(values) == [0, 2, 4, 5]
    for step, mean in logged["loss/validation"].items():
        assert mean == pytest.approx(np.mean([logged[f"loss/validation/{name}"][step] for name in RANGES]), rel=1e-6)
    assert len(set(logged["loss/validation"].values())) == 4
    assert f"validation loss: {logged['loss/validation'][0]:.4f} before training" in capsys.readouterr().out


def test_looking_does_not_touch(validated, monkeypatch):
    """A run that is validated and one that is not have the same weights bit for bit, dropout and all."""
    changes = {**VARYING, **DROPPING, "gradient_checkpointing": True, "validate_every_n_steps": 1}
    logged, looked_at = validated("looked_at", **changes)
    monkeypatch.setattr(validation, "held_out_batches", lambda *_: [])
    nothing, left_alone = validated("left_alone", **changes)
    assert len(logged["loss/validation"]) == 5
    assert not nothing
    assert stored(looked_at) == stored(left_alone)


def test_nothing_but_the_weights_decides_it(validated):
    """Steps too small to see leave the weights where they began."""
    still = {"learning_rate": 1e-12, "max_train_steps": 2}
    varied = {"seed": 7, **VARYING, **DROPPING, "caption_tag_dropout_rate": 0.5, "token_warmup_step": 100}
    cached = {"cache_latents": True, "flip_aug": True}
    cached_too = {"cache_latents": True, "cache_text_encoder_outputs": True, "network_train_unet_only": True}
    expected, _ = validated("plain", **still)
    assert_close(expected, validated("varied", **still, **varied, train_batch_size=5)[0])
    assert_close(expected, validated("cached", **still, **cached, train_batch_size=1)[0])
    assert_close(expected, validated("cached_too", **still, **cached_too, gradient_accumulation_steps=3)[0])


def test_two_processes_see_the_same(validated, flags, folders, fork_server, tmp_path):
    common = {"max_train_steps": 2, "learning_rate": 1e-12, "save_best": True}
    words = flags(tmp_path / "two", **settings(folders, tmp_path / "two-logs") | common)
    ended = fork_server.run(words, processes=2)
    assert ended.status == 0, ended.said
    assert ended.said.count("run-best.safetensors") == 1
    assert_close(losses(tmp_path / "two-logs"), validated("one", **common)[0])


# What moves it


def test_another_validation_seed_is_another_measure(validated):
    still = {"learning_rate": 1e-12, "max_train_steps": 1}
    one, other = (validated(str(seed), **still, validation_seed=seed)[0]["loss/validation"][0] for seed in (1, 2))
    assert one != pytest.approx(other, rel=1e-3)


def test_masks_count(validated, folders, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in (folders / "1_sks shape").glob("*.png"):
        Image.new("L", Image.open(path).size, 0).save(masks / path.name)
    masked = {"masked_loss": True, "conditioning_data_dir": masks, "max_train_steps": 1}
    logged, _ = validated("masked", **masked)
    assert set(logged["loss/validation"].values()) == {0}


# Trouble


def make_validator(tmp_path: Path, pictures: int = 4) -> tuple[Validator, TrainingStep]:
    """For half of these pictures, with the loss of a step that can be replaced."""
    for number in range(pictures):
        picture(tmp_path / f"{number}.png", (32, 32), caption="a")
    datasets = (dataset(subset(tmp_path, validation_split=0.5), resolution=(32, 32), batch_size=4),)
    table = scan(datasets)
    model = make_model()
    step = TrainingStep(model, torch.nn.Dropout(), model.noise_process())
    loader = ImageDataset(table, datasets, latent_factor=2)
    validator = Validator(step, loader, held_out_batches(table, datasets), nullcontext, Accelerator(cpu=True))
    return validator, step


@pytest.fixture
def accelerators():
    """One may be made, and is forgotten."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.usefixtures("accelerators")
class TestValidator:
    def test_a_picture_that_has_gone_does_not_count(self, tmp_path, monkeypatch, fresh_console):
        validator, step = make_validator(tmp_path)
        table = validator.dataset.table
        whole = [table[index] for index in table.held_out]
        monkeypatch.setattr(step, "losses", lambda batch, *_: torch.tensor(batch.records) * batch.weights)
        assert validator.measure().mean == pytest.approx(np.mean(table.held_out))
        Path(whole[0].path).unlink()
        assert validator.measure().mean == whole[1].index
        Path(whole[1].path).unlink()
        with pytest.raises(UserError, match="none of the held-out images can be read"):
            validator.measure()

    def test_a_loss_that_is_not_finite_names_its_picture_and_does_not_count(
        self, tmp_path, monkeypatch, capsys, fresh_console
    ):
        validator, step = make_validator(tmp_path)
        table = validator.dataset.table
        bad = table[table.held_out[1]]

        def spoilt(batch, *_):
            return torch.tensor([float("nan") if record == bad.index else 1.0 for record in batch.records])

        monkeypatch.setattr(step, "losses", spoilt)
        assert validator.measure().mean == 1
        assert f"warning: {bad.path}: the validation loss of this image is not finite" in capsys.readouterr().err
        monkeypatch.setattr(step, "losses", lambda batch, *_: batch.weights * float("nan"))
        with pytest.raises(UserError, match="of no held-out image is finite"):
            validator.measure()
        step.trained = torch.nn.PReLU(init=float("nan"))
        with pytest.raises(NotFinite, match="the weights are no longer finite"):
            validator.measure()

    def test_modes_and_generators_come_back_and_dropout_is_off_meanwhile(self, tmp_path, monkeypatch):
        def draw():
            return random.random(), np.random.random(), torch.rand(1).item()

        validator, step = make_validator(tmp_path)
        step.train()
        step.model.vae.eval()
        published = []
        validator.published = lambda: nullcontext(published.append(True))
        modes = [module.training for module in step.modules()]
        seen = []

        def losses(batch, *_):
            seen.append(any(module.training for module in step.modules()))
            assert not torch.is_grad_enabled()
            draw()
            return batch.weights

        monkeypatch.setattr(step, "losses", losses)
        seed_generators(1)
        expected = draw()
        seed_generators(1)
        validator.measure()
        assert draw() == expected
        assert seen == [False] * len(RANGES)
        assert published == [True]
        assert [module.training for module in step.modules()] == modes

    def test_every_picture_is_seen_at_one_timestep_of_each_range(self, tmp_path, monkeypatch):
        validator, step = make_validator(tmp_path, 16)
        seen, noises = [], []

        def losses(batch, latents, noise, timesteps):
            seen.append(timesteps)
            noises.append(noise)
            return batch.weights

        monkeypatch.setattr(step, "losses", losses)
        validator.measure()
        for number, timesteps in enumerate(seen):
            assert torch.equal(timesteps // 250, torch.full_like(timesteps, number % len(RANGES)))
        assert len(torch.cat(seen).unique()) > 20
        assert len(torch.cat(noises).flatten(1).unique(dim=0)) == validator.images * len(RANGES)


# What follows from it


def test_the_best_file_is_the_one_of_its_step(validated, tmp_path, capsys):
    """With a rate this high every validation is worse than the first one."""
    common = {"save_best": True, "learning_rate": 3, "max_train_steps": 8, "validate_every_n_steps": 1}
    logged, file = validated("a", **common, save_every_n_steps=1, stop_after_no_improvement=2)
    values = dict(list(logged["loss/validation"].items())[1:])
    best = min(values, key=values.__getitem__)
    assert max(values) == best + 2 < 8
    weights = load_file(file.with_name("run-best.safetensors"))
    expected = load_file(file.with_name(f"run-step{best:08d}.safetensors"))
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert file.exists()
    assert "the last 2 validations were no improvement" in capsys.readouterr().err


def test_a_run_that_was_ended_early_stays_so_until_more_is_asked_of_it(
    train, flags, folders, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(Validator, "measure", lambda _: ValidationLoss(1.0, {}))
    common = settings(folders, tmp_path / "logs") | {"validate_every_n_steps": 1, "save_state_on_train_end": True}

    def steps(patience: int | None, total: int) -> int:
        reached = [0]
        monkeypatch.setattr(validation, "measures", lambda _, progress: reached.append(progress.step) or True)
        changes = {"stop_after_no_improvement": patience, "max_train_steps": total, "resume": "latest"}
        train(flags(tmp_path / "a", **common | changes))
        return reached[-1]

    assert steps(2, 20) == 3
    assert steps(2, 20) == steps(2, 10) == 0
    assert "after which --stop_after_no_improvement 2 ended the run" in capsys.readouterr().err
    assert steps(4, 20) == 5
    assert steps(4, 21) == 6
    assert steps(None, 8) == 8


# What is asked of images that are not there


def test_flags_for_no_held_out_images_are_noted_or_refused(train, flags, tmp_path, capsys):
    train(flags(tmp_path, max_train_steps=1, validate_every_n_steps=1, max_validation_steps=2))
    said = capsys.readouterr().err
    assert said.count("--validate_every_n_steps and --max_validation_steps have no effect") == 1
    with pytest.raises(SystemExit):
        train(flags(tmp_path, max_train_steps=1, stop_after_no_improvement=2))
    assert "--stop_after_no_improvement: there are no held-out images" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"^--save_best: there are no held-out images"):
        ValidationOptions(save_best=True).check(False)
    ValidationOptions(save_best=True, validate_every_n_steps=1).check(True)
