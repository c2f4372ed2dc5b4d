"""Short runs with each option of the objective: what it changes, what it leaves alone, and that runs go on exactly."""

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from library.data.batch import Batch
from library.models.family import Family
from library.models.noise import DDPM, Prediction, sample_noise
from library.options.objective import ObjectiveOptions
from library.training import timesteps as drawing
from library.training.events import CheckMovement
from library.training.step import TrainingStep
from library.training.timesteps import LossAware
from tests.processes import train_script
from tests.tiny import draw_pictures, largest_difference, make_model, read_log, scalars, stored

Run = Callable[..., Path]
V = {"v_parameterization": True}
OPTIONS = {
    "noise_offset": {"noise_offset": 0.3},
    "noise_offset_random_strength": {"noise_offset": 0.3, "noise_offset_random_strength": True},
    "adaptive_noise_scale": {"noise_offset": 0.3, "adaptive_noise_scale": 0.5},
    "multires_noise": {"multires_noise_iterations": 6},
    "multires_noise_discount": {"multires_noise_iterations": 6, "multires_noise_discount": 0.8},
    "ip_noise_gamma": {"ip_noise_gamma": 0.3},
    "ip_noise_gamma_random_strength": {"ip_noise_gamma": 0.3, "ip_noise_gamma_random_strength": True},
    "min_timestep": {"min_timestep": 900},
    "max_timestep": {"max_timestep": 100},
    "logit_normal": {"timestep_distribution": "logit_normal"},
    "logit_mean": {"timestep_distribution": "logit_normal", "logit_mean": 1},
    "logit_std": {"timestep_distribution": "logit_normal", "logit_std": 0.3},
    "l1": {"loss_type": "l1"},
    "huber": {"loss_type": "huber"},
    "smooth_l1": {"loss_type": "smooth_l1"},
    "huber_constant": {"loss_type": "huber", "huber_schedule": "constant"},
    "huber_exponential": {"loss_type": "huber", "huber_schedule": "exponential"},
    "huber_c": {"loss_type": "huber", "huber_c": 0.3},
    "huber_scale": {"loss_type": "huber", "huber_schedule": "constant", "huber_scale": 2},
    "min_snr_gamma": {"min_snr_gamma": 1},
    "debiased_estimation_loss": {"debiased_estimation_loss": True},
    "v_pred_like_loss": {"v_pred_like_loss": 0.5},
    "v": V,
    "min_snr_gamma_v": {**V, "min_snr_gamma": 1},
    "debiased_v": {**V, "debiased_estimation_loss": True},
    "scale_v_pred_loss_like_noise_pred": {**V, "scale_v_pred_loss_like_noise_pred": True},
    "scale_v_zero_terminal": {**V, "scale_v_pred_loss_like_noise_pred": True, "zero_terminal_snr": True},
}
SHORT = {"max_train_steps": 2, "network_train_unet_only": True, "cache_latents": True}
ALL = {
    **OPTIONS["noise_offset_random_strength"],
    **OPTIONS["adaptive_noise_scale"],
    **OPTIONS["multires_noise_discount"],
    **OPTIONS["ip_noise_gamma_random_strength"],
    **OPTIONS["huber_exponential"],
    "min_snr_gamma": 1,
    "debiased_estimation_loss": True,
    "timestep_distribution": "logit_normal",
}


@pytest.fixture
def run(train, flags, tmp_path) -> Run:
    """`run(name, **changes)` trains into a folder of this name and returns the file."""

    def start(name: str, **changes: object) -> Path:
        train(flags(tmp_path / name, **changes))
        return tmp_path / name / "run.safetensors"

    return start


@pytest.fixture(scope="module")
def model() -> Family:
    return make_model()


def losses_of(model: Family, seeds: Sequence[int], **options: object) -> torch.Tensor:
    """(B,) losses of a training step on latents that belong to the seeds."""
    shaping = {name: options.pop(name) for name in ("v_parameterization", "zero_terminal_snr") if name in options}
    kind = "v_prediction" if "v_parameterization" in shaping else "epsilon"
    process = DDPM(Prediction(kind, "zero_terminal_snr" in shaping))
    step = TrainingStep(model, torch.nn.Module(), process, ObjectiveOptions(**options))
    latents = sample_noise((4, 16, 16), [seed + 1000 for seed in seeds]) * 3 + 1
    batch = Batch(
        plan=None,
        seeds=list(seeds),
        records=list(seeds),
        captions=[""] * len(seeds),
        images=None,
        latents=latents,
        text=None,
        sizes=torch.zeros(len(seeds), 6),
        loss_mask=None,
        weights=torch.ones(len(seeds)),
    )
    with torch.no_grad():
        return step(batch)


def test_each_option_changes_the_loss(model):
    """Of some sample at least, and in a way of its own."""
    losses = {name: losses_of(model, range(8), **options) for name, options in OPTIONS.items()}
    losses["none"] = losses_of(model, range(8))
    assert all(torch.isfinite(values).all() for values in losses.values())
    pairs = combinations(losses, 2)
    assert [pair for pair in pairs if torch.allclose(losses[pair[0]], losses[pair[1]], rtol=1e-4)] == []


@pytest.mark.parametrize("options", [{}, ALL, OPTIONS["scale_v_zero_terminal"]], ids=["none", "all", "v"])
def test_the_loss_of_a_sample_does_not_depend_on_its_batch(model, options):
    together = losses_of(model, range(4), **options)
    alone = torch.cat([losses_of(model, [seed], **options) for seed in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-7)
    assert len(set(together.tolist())) == 4


def test_a_run_with_all_of_it_repeats_itself_and_its_file_tells_of_it(run):
    once, again = run("once", **SHORT, **ALL), run("again", **SHORT, **ALL)
    assert stored(once) == stored(again) != stored(run("none", **SHORT))
    with safe_open(once, "pt") as file:
        told = file.metadata()
    for name, value in ALL.items():
        if name not in ("timestep_distribution", "debiased_estimation_loss"):
            assert told[f"ss_{name}"] in (str(value), str(float(value) if type(value) is int else value))
    assert told["ss_debiased_estimation"] == "True"


@pytest.fixture
def seen(monkeypatch) -> list[torch.Tensor]:
    """The timesteps of all batches that are trained on."""
    batches, losses = [], TrainingStep.losses

    def noted(self, batch, latents, noise, timesteps, *added):
        if torch.is_grad_enabled():
            batches.append(timesteps)
        return losses(self, batch, latents, noise, timesteps, *added)

    monkeypatch.setattr(TrainingStep, "losses", noted)
    return batches


def test_timesteps_are_within_their_bounds_and_where_the_log_says(run, seen, tmp_path):
    run("a", **SHORT | {"max_train_steps": 6}, min_timestep=250, max_timestep=253, logging_dir=tmp_path / "logs")
    assert set(torch.cat(seen).tolist()) == {250, 251, 252}
    logged = [tag for tag in read_log(tmp_path / "logs").Tags()["scalars"] if tag.startswith("loss/average/")]
    assert logged == ["loss/average/250-499"]


def test_validation_has_the_loss_of_the_run_and_plain_noise(run, tmp_path):
    def first(name: str, **changes: object) -> float:
        common = {**SHORT, "validation_split": 0.5, "max_train_steps": 1, "logging_dir": tmp_path / f"{name}-logs"}
        run(name, **common, **changes)
        return scalars(read_log(tmp_path / f"{name}-logs"), "loss/validation")[0]

    plain = first("plain")
    noisy = {**OPTIONS["noise_offset"], **OPTIONS["ip_noise_gamma"], "max_timestep": 9, "multires_noise_iterations": 3}
    assert first("noisy", **noisy, timestep_distribution="loss_aware") == plain
    assert first("other", loss_type="l1", min_snr_gamma=1) != pytest.approx(plain, rel=1e-2)


def test_a_resumed_run_says_what_another_loss_means(run, capsys):
    common = {**SHORT, "validation_split": 0.5, "save_state": True, "save_every_n_steps": 1, "resume": "latest"}
    run("a", **common)
    capsys.readouterr()
    run("a", **common | {"max_train_steps": 3}, loss_type="l1", noise_offset=0.1)
    said = capsys.readouterr().err
    assert "--loss_type is l1 and was l2, so losses do not compare with those of before" in said
    assert "--noise_offset is 0.1 and was not set, so noise is drawn in another way from here on" in said
    assert "the held-out images or the loss are not those of the state" in said


# --- masks ---


@pytest.fixture
def masked(tmp_path) -> dict[str, object]:
    """Four pictures with mask files. The first two are hidden by these, and transparent all over."""
    folder = draw_pictures(tmp_path / "masked" / "1_sks shape", 4)
    masks = tmp_path / "masks"
    masks.mkdir()
    for number, path in enumerate(sorted(folder.glob("*.png"))):
        picture, visible = Image.open(path).convert("RGB"), 255 * (number > 1)
        Image.new("L", picture.size, visible).save(masks / path.name)
        picture.putalpha(visible)
        picture.save(path)
    return {"train_data_dir": folder.parent, "conditioning_data_dir": masks}


@pytest.mark.parametrize(("kind", "normalize"), [("masked_loss", None), ("masked_loss", True), ("alpha_mask", True)])
def test_nothing_is_learned_where_masks_leave_nothing(run, masked, kind, normalize, tmp_path):
    if kind == "alpha_mask":
        masked.pop("conditioning_data_dir")
    options = {**masked, kind: True, "masked_loss_normalize": normalize, "debiased_estimation_loss": True}
    options |= {"train_batch_size": 1, "max_train_steps": 4, "logging_dir": tmp_path / "logs"}
    weights = load_file(run("a", **SHORT | options))
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    log = read_log(tmp_path / "logs")
    losses, norms = (scalars(log, tag).values() for tag in ("loss/current", "gradient_norm"))
    assert sorted(loss > 0 for loss in losses) == [False, False, True, True]
    assert [loss > 0 for loss in losses] == [norm > 0 for norm in norms]


def test_normalized_losses_are_of_what_masks_leave(run, masked, tmp_path):
    """With a quarter of each picture, they are four times those that are not."""
    for path in masked["conditioning_data_dir"].iterdir():
        mask = Image.new("L", (32, 32), 0)
        mask.paste(255, (0, 0, 16, 16))
        mask.save(path)
    losses = []
    for normalize in (None, True):
        logs = tmp_path / f"logs-{normalize}"
        options = {**masked, "masked_loss": True, "masked_loss_normalize": normalize, "logging_dir": logs}
        run(f"a-{normalize}", **SHORT | {"max_train_steps": 1}, **options)
        losses.append(scalars(read_log(logs), "loss/current")[1])
    assert losses[1] == pytest.approx(4 * losses[0], rel=1e-5)


def test_flags_that_do_not_fit_are_refused_before_training(run, capsys):
    for flags, sentence in (
        ({"masked_loss_normalize": True}, "--masked_loss_normalize: no mask is used"),
        ({**V, "v_pred_like_loss": 1}, "--v_pred_like_loss is for models that predict the noise"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run("a", **flags)
        assert sentence in capsys.readouterr().err


# --- loss_aware ---

LOSS_AWARE = {
    "timestep_distribution": "loss_aware",
    "max_train_steps": 8,
    "min_timestep": 100,
    "max_timestep": 104,
    "network_train_unet_only": True,
    "cache_latents": True,
}


@pytest.fixture
def soon(monkeypatch) -> None:
    """It learns after a loss of each of its bins, of which there are four timesteps' here."""
    monkeypatch.setattr(drawing, "_WARM_UP", 1)


def test_a_broken_or_rehearsed_run_has_learned_the_same(soon, run, monkeypatch):
    whole = stored(run("whole", **LOSS_AWARE))
    assert stored(run("rehearsed", **LOSS_AWARE, no_rehearsal=None)) == whole
    run("broken", **LOSS_AWARE | {"max_train_steps": 6, "save_state_on_train_end": True})
    known, probabilities = [], LossAware.probabilities
    monkeypatch.setattr(LossAware, "probabilities", lambda self: known.append(probabilities(self)) or known[-1])
    assert stored(run("broken", **LOSS_AWARE, resume="latest")) == whole
    assert known[0] is not None
    assert stored(run("uniform", **LOSS_AWARE | {"timestep_distribution": "uniform"})) != whole


def test_losses_of_ranges_are_not_shifted_by_what_is_drawn_more_often(soon, run, tmp_path, monkeypatch):
    """A loss of 3 at one of four timesteps, and 1 at the others, of which two are of the second range."""

    def losses(self, batch, latents, noise, timesteps, *added):
        return 1.0 + 2 * (timesteps == 248) + 0 * sum(weights.sum() for weights in self.trained.parameters())

    monkeypatch.setattr(TrainingStep, "losses", losses)
    monkeypatch.setattr(CheckMovement, "due", lambda *_: False)
    changes = {"max_train_steps": 100, "train_batch_size": 6, "min_timestep": 248, "max_timestep": 252}
    run("a", **LOSS_AWARE | changes, logging_dir=tmp_path / "logs")
    log = read_log(tmp_path / "logs")
    for name, mean in (("", 1.5), ("/000-249", 2), ("/250-499", 1)):
        assert list(scalars(log, f"loss/average{name}").values())[-1] == pytest.approx(mean, rel=0.05)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(flags, tmp_path):
    common = {**LOSS_AWARE, "min_timestep": 0, "max_timestep": 2, "max_train_steps": 24, "train_batch_size": 1}
    # steps nearly proportional to gradients
    common |= {"learning_rate": 1, "optimizer_args": ("eps=1", "weight_decay=0", "betas=0.5,0.5")}
    one = train_script(flags(tmp_path / "one", **common, gradient_accumulation_steps=2))
    two = train_script(flags(tmp_path / "two", **common), ("torchrun", "--standalone", "--nproc_per_node", "2"))
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    uniform = train_script(
        flags(tmp_path / "uniform", **common | {"timestep_distribution": "uniform"}, gradient_accumulation_steps=2)
    )
    assert uniform.returncode == 0
    files = [tmp_path / name / "run.safetensors" for name in ("one", "two", "uniform")]
    assert largest_difference(files[0], files[1]) < 1e-5 < largest_difference(files[0], files[2])
