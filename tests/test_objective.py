"""The formulas of the objective against numbers worked out by hand and those of the golden table, and its flags."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings, strategies

from library.errors import UserError
from library.models import coloured_noise
from library.models.noise import DDPM, Prediction, sample_noise
from library.options.model import ModelOptions
from library.options.objective import TIMESTEPS as STEPS
from library.options.objective import ObjectiveOptions
from library.training import objective
from library.training.objective import Objective

GOLDEN = json.loads((Path(__file__).parent / "data/golden/objective.json").read_text())
TIMESTEPS = torch.tensor(GOLDEN["timesteps"])
SNR = torch.tensor(GOLDEN["snr"])
WHOLE_SNR = DDPM().snr(torch.arange(DDPM.steps))
EPSILON = Prediction()
V = Prediction("v_prediction")
V_ZERO = Prediction("v_prediction", zero_terminal_snr=True)


def assert_golden(values: torch.Tensor, name: str) -> None:
    torch.testing.assert_close(values, torch.tensor(GOLDEN[name]), rtol=2e-6, atol=0)


def objective_of(prediction: Prediction = EPSILON, **options: object) -> Objective:
    return Objective(ObjectiveOptions(**options), DDPM(prediction))


def loss_of(one: Objective, timestep: int, mask: torch.Tensor | None = None, weight: float = 1.0) -> float:
    """For errors of 2 and 4."""
    prediction, target = torch.tensor([[[[3.0, 5.0]]]]), torch.ones(1, 1, 1, 2)
    return one.losses(prediction, target, torch.tensor([timestep]), mask, torch.tensor([weight])).item()


# --- errors ---


@pytest.mark.parametrize("kind", ["l2", "l1", "huber", "smooth_l1"])
def test_golden_losses(kind):
    errors = torch.tensor([0, 0.5, 1, 2, 4]).view(1, 1, 1, 5)
    for sign in (1, -1):
        losses = objective.element_losses(sign * errors + 3, torch.full_like(errors, 3), kind, torch.tensor([0.1]))
        torch.testing.assert_close(losses.flatten(), torch.tensor(GOLDEN[f"loss_{kind}_of_0_0.5_1_2_4"]))


def test_each_sample_has_its_own_border():
    errors, c = torch.full((2, 1, 1, 1), 3.0), torch.tensor([4.0, 1.25])
    expected = [2 * 4 * (5 - 4), 2 * 1.25 * (3.25 - 1.25)]
    assert objective.element_losses(errors, torch.zeros_like(errors), "huber", c).flatten().tolist() == expected
    smooth = objective.element_losses(errors, torch.zeros_like(errors), "smooth_l1", c).flatten().tolist()
    assert smooth == [2 * (5 - 4), 2 * (3.25 - 1.25)]


def test_half_precision_is_compared_in_float32():
    errors = torch.full((1, 1, 1, 1), 300.0, dtype=torch.float16)
    assert objective.element_losses(errors, torch.zeros_like(errors)).item() == 90000


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_golden_borders(schedule):
    assert_golden(objective.huber_c(schedule, 0.1, 1.0, WHOLE_SNR)[TIMESTEPS], f"huber_c_0.1_{schedule}")


def test_the_border_is_scaled_where_it_does_not_follow_the_noise():
    once, thrice = (
        [objective.huber_c(schedule, 0.1, scale, WHOLE_SNR) for schedule in ("constant", "exponential", "snr")]
        for scale in (1.0, 3.0)
    )
    assert torch.equal(thrice[0], torch.full((1000,), 0.3))
    torch.testing.assert_close(thrice[1], 3 * once[1])
    assert torch.equal(thrice[2], once[2])


def test_without_signal_the_border_is_huber_c():
    one = objective_of(V_ZERO, loss_type="huber")
    assert one.huber_c.at(torch.tensor([999])).item() == pytest.approx(0.1)


def test_masks_leave_a_mean_over_all_or_over_what_they_leave():
    errors = torch.tensor([[[[1.0, 3.0]], [[5.0, 7.0]]]])
    for mask, plain, normalized in (
        ([1.0, 0.0], 1.5, 3),
        ([0.5, 0.5], 2, 4),
        ([0.5, 0.0], 0.75, 3),
        ([0.0, 0.0], 0, 0),
    ):
        mask = torch.tensor([[[mask]]])
        assert objective.mean_of_samples(errors, mask).item() == plain
        assert objective.mean_of_samples(errors, mask, normalize=True).item() == pytest.approx(normalized)
    assert objective.mean_of_samples(errors, normalize=True).item() == 4


@pytest.mark.parametrize("kind", ["l2", "l1", "huber", "smooth_l1"])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_mask_without_area_gives_no_gradient_and_no_nan(kind, normalize):
    prediction = torch.ones(2, 4, 2, 2, requires_grad=True)
    mask = torch.cat([torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)])
    one = objective_of(loss_type=kind, masked_loss_normalize=normalize)
    losses = one.losses(prediction, torch.zeros_like(prediction), torch.tensor([5, 5]), mask, torch.ones(2))
    losses.sum().backward()
    assert losses[0] == 0
    assert losses[1] > 0
    assert (prediction.grad[0] == 0).all()
    assert (prediction.grad[1] != 0).all()
    assert torch.isfinite(prediction.grad).all()


# --- weights of timesteps ---


def test_golden_weights():
    assert_golden(objective.min_snr_weight(SNR, 5, v=False), "min_snr_gamma_5")
    assert_golden(objective.min_snr_weight(SNR, 5, v=True), "min_snr_gamma_5_v")
    assert_golden(objective.v_scale(SNR), "scale_v_pred_loss_like_noise_pred")
    assert_golden(objective.v_like_weight(SNR, 0.5), "v_pred_like_loss_0_5")
    assert_golden(objective.debiased_weight(SNR, v=False), "debiased")
    assert_golden(objective.debiased_weight(SNR, v=True), "debiased_v")


@pytest.mark.parametrize(
    ("options", "prediction", "name"),
    [
        ({"min_snr_gamma": 5}, Prediction(), "min_snr_gamma_5"),
        ({"min_snr_gamma": 5}, V, "min_snr_gamma_5_v"),
        ({"scale_v_pred_loss_like_noise_pred": True}, V, "scale_v_pred_loss_like_noise_pred"),
        ({"v_pred_like_loss": 0.5}, Prediction(), "v_pred_like_loss_0_5"),
        ({"debiased_estimation_loss": True}, Prediction(), "debiased"),
        ({"debiased_estimation_loss": True}, V, "debiased_v"),
    ],
)
def test_each_flag_is_its_weight_after_mask_and_weight_of_the_sample(options, prediction, name):
    one, mask = objective_of(prediction, **options), torch.tensor([[[[1.0, 0.5]]]])
    for timestep, weight in zip(GOLDEN["timesteps"], GOLDEN[name], strict=True):
        assert loss_of(one, timestep) == pytest.approx(10 * weight, rel=1e-5)
        assert loss_of(one, timestep, mask, 0.25) == pytest.approx((4 + 8) / 2 * 0.25 * weight, rel=1e-5)


def test_weights_multiply():
    both = objective_of(min_snr_gamma=5, debiased_estimation_loss=True)
    weights = zip(GOLDEN["timesteps"], GOLDEN["min_snr_gamma_5"], GOLDEN["debiased"], strict=True)
    for timestep, one, other in weights:
        assert loss_of(both, timestep) == pytest.approx(10 * one * other, rel=1e-5)


def test_weights_are_those_of_the_rescaled_schedule_and_finite_without_signal():
    last, middle = 999, 500
    alpha_bar = GOLDEN["zero_terminal_alphas_cumprod"][GOLDEN["timesteps"].index(middle)]
    scaled = objective_of(V_ZERO, scale_v_pred_loss_like_noise_pred=True)
    assert loss_of(scaled, middle) == pytest.approx(10 * alpha_bar, rel=1e-5)
    assert loss_of(scaled, last) == 0
    assert loss_of(objective_of(V_ZERO, min_snr_gamma=5), last) == 0
    assert loss_of(objective_of(V_ZERO, debiased_estimation_loss=True), last) == 10
    assert loss_of(objective_of(Prediction(zero_terminal_snr=True), min_snr_gamma=5), last) == 10


@settings(max_examples=60, deadline=None)
@given(
    prediction=strategies.sampled_from([Prediction(), V, V_ZERO, Prediction(zero_terminal_snr=True)]),
    gamma=strategies.floats(0, 1e4),
    v_like=strategies.floats(0, 1e4),
    flags=strategies.tuples(strategies.booleans(), strategies.booleans()),
)
@example(Prediction(zero_terminal_snr=True), 1e-50, 0.0, (False, False))
def test_whatever_is_not_refused_has_finite_weights(prediction, gamma, v_like, flags):
    options = ObjectiveOptions(
        min_snr_gamma=gamma,
        v_pred_like_loss=v_like,
        scale_v_pred_loss_like_noise_pred=flags[0],
        debiased_estimation_loss=flags[1],
    )
    is_v = prediction.kind == "v_prediction"
    model = ModelOptions(v_parameterization=is_v, zero_terminal_snr=prediction.zero_terminal_snr)
    try:
        options.check(model, masked=False)
    except UserError:
        return
    weights = objective.timestep_weights(options, DDPM(prediction).snr(torch.arange(DDPM.steps)), v=is_v)
    assert weights is None or (torch.isfinite(weights).all() and (weights >= 0).all())


@pytest.mark.parametrize("prediction", [Prediction(), V_ZERO])
def test_signal_to_noise_falls_from_first_to_last_timestep(prediction):
    process = DDPM(prediction)
    snr = process.snr(torch.tensor([0, 1, 998, 999]))
    assert torch.isfinite(snr).all()
    assert (snr.diff() < 0).all()
    assert (snr[-1] == 0) == prediction.zero_terminal_snr
    assert process.steps == STEPS


# --- noise ---


def test_the_offset_is_one_number_per_channel():
    latents = torch.tensor([1.0, -3.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    draws, strength = torch.tensor([2.0, -1.0]).view(1, 2, 1, 1), torch.tensor([0.1])
    for adaptive, expected in ((0.0, [0.2, -0.1]), (0.5, [1.2, -1.6]), (-0.05, [0.1, 0.0])):
        found = coloured_noise.offset(draws, strength, latents, adaptive)
        assert found.flatten().tolist() == pytest.approx(expected, abs=1e-7)


def test_random_strengths_are_uniform_below_the_limit():
    assert coloured_noise.strengths(0.1, [1, 2], "a", random=False).tolist() == pytest.approx([0.1, 0.1])
    drawn = coloured_noise.strengths(0.1, range(500), "a", random=True)
    assert 0 <= drawn.min() < 0.01
    assert 0.09 < drawn.max() <= 0.1
    assert drawn.mean().item() == pytest.approx(0.05, abs=0.005)


def test_coarser_noise_is_smooth_and_ends_where_nothing_is_coarser():
    shape = (4, 32, 16)
    first = coloured_noise.coarser(shape, 1, 0.3, 7)
    assert first.shape == shape
    assert first.std().item() == pytest.approx(1, abs=0.1)
    assert torch.equal(coloured_noise.coarser(shape, 6, 0.0, 7), first)
    second = (coloured_noise.coarser(shape, 2, 0.5, 7) - first) / 0.5
    steps = second.diff(dim=1).abs().mean() / second.std()
    assert 0.1 < steps < 0.7  # white noise has 1.13
    whole = coloured_noise.coarser(shape, 6, 0.5, 7)
    assert torch.equal(whole, coloured_noise.coarser(shape, 60, 0.5, 7))
    assert not torch.equal(whole, coloured_noise.coarser(shape, 2, 0.5, 7))


def test_noise_of_several_resolutions_has_unit_deviation_in_each_sample():
    latents = torch.zeros(2, 4, 16, 16)
    white = sample_noise((4, 16, 16), [1, 2])
    noise, added = objective_of(multires_noise_iterations=6, multires_noise_discount=0.8).colour(white, latents, [1, 2])
    assert noise.std(dim=(1, 2, 3)).tolist() == pytest.approx([1, 1])
    assert added is None
    coarse = noise.unfold(2, 4, 4).unfold(3, 4, 4).mean(dim=(4, 5)).std()
    assert coarse > 2 * white.unfold(2, 4, 4).unfold(3, 4, 4).mean(dim=(4, 5)).std()


def test_input_perturbation_is_not_to_be_predicted():
    latents, seeds = torch.zeros(40, 4, 8, 8), range(40)
    white = sample_noise((4, 8, 8), seeds)
    noise, added = objective_of(ip_noise_gamma=0.5).colour(white, latents, seeds)
    assert noise is white
    disturbances = (added - white).std(dim=(1, 2, 3))
    assert disturbances.mean().item() == pytest.approx(0.5, abs=0.02)
    random = objective_of(ip_noise_gamma=0.5, ip_noise_gamma_random_strength=True).colour(white, latents, seeds)[1]
    spread = (random - white).std(dim=(1, 2, 3))
    assert spread.max() < 0.55
    assert spread.min() < 0.1


COLOURS = {
    "noise_offset": 0.1,
    "noise_offset_random_strength": True,
    "adaptive_noise_scale": 0.1,
    "multires_noise_iterations": 3,
    "ip_noise_gamma": 0.1,
    "ip_noise_gamma_random_strength": True,
}


def test_colours_belong_to_their_sample():
    """Neither the batch that a sample comes in nor the global generator matters; the deviation is the last word."""
    latents, white = torch.randn(3, 4, 8, 8), sample_noise((4, 8, 8), [1, 2, 3])
    one = objective_of(**COLOURS)
    together = one.colour(white, latents, [1, 2, 3])
    torch.manual_seed(5)
    alone = one.colour(white[2:], latents[2:], [3])
    for ours, theirs in zip(alone, together, strict=True):
        torch.testing.assert_close(ours[0], theirs[2])
        assert not torch.equal(theirs[0], theirs[1])
    assert together[0].std(dim=(1, 2, 3)).tolist() == pytest.approx([1, 1, 1])


def test_without_flags_nothing_is_done():
    white = sample_noise((4, 8, 8), [1])
    noise, added = objective_of().colour(white, torch.zeros(1, 4, 8, 8), [1])
    assert noise is white
    assert added is None
    assert objective_of().fingerprint == ()


def test_huber_keeps_small_errors_and_has_a_gradient_at_none():
    small = objective.element_losses(
        torch.tensor([[[[1e-3]]]]), torch.zeros(1, 1, 1, 1), "huber", torch.tensor([1000.0])
    )
    assert small.item() == pytest.approx(1e-6, rel=1e-4)
    prediction = torch.zeros(1, 1, 1, 1, requires_grad=True)
    objective.element_losses(prediction, torch.zeros(1, 1, 1, 1), "huber", torch.tensor([1e-30])).sum().backward()
    assert prediction.grad.item() == 0


# --- flags ---

OF_NOISE = ModelOptions()
OF_V = ModelOptions(v_parameterization=True)
ZERO = ModelOptions(zero_terminal_snr=True)
OF_V_ZERO = ModelOptions(v_parameterization=True, zero_terminal_snr=True)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"min_timestep": 500, "max_timestep": 500}, "from --min_timestep 500 to below --max_timestep 500"),
        ({"min_timestep": 1000}, "--min_timestep 1000 leaves no timestep below 1000"),
        ({"max_timestep": 1001}, "--max_timestep: 1001 is too large"),
        ({"adaptive_noise_scale": 0.1}, "add --noise_offset"),
        ({"adaptive_noise_scale": 0.1, "noise_offset": 0.0}, "add --noise_offset"),
        ({"loss_type": "huber", "huber_c": 0.0}, "--huber_c: 0.0 is not above 0"),
        ({"loss_type": "smooth_l1", "huber_scale": -1.0}, "--huber_scale: -1.0 is not above 0"),
        ({"timestep_distribution": "logit_normal", "logit_std": 0.0}, "--logit_std"),
    ],
)
def test_what_contradicts_itself_is_refused(values, sentence):
    with pytest.raises(UserError, match=sentence):
        ObjectiveOptions(**values)


@pytest.mark.parametrize(
    ("values", "model", "sentence"),
    [
        ({"scale_v_pred_loss_like_noise_pred": True}, OF_NOISE, "add --v_parameterization"),
        ({"v_pred_like_loss": 0.5}, OF_V, "this one predicts v: drop it"),
        ({"v_pred_like_loss": 0.5}, ZERO, "--v_pred_like_loss divides"),
        ({"debiased_estimation_loss": True}, ZERO, "--debiased_estimation_loss divides"),
        ({"masked_loss_normalize": True}, OF_NOISE, "add --masked_loss or --alpha_mask"),
    ],
)
def test_what_does_not_fit_the_model_or_the_data_is_refused(values, model, sentence):
    with pytest.raises(UserError, match=sentence):
        ObjectiveOptions(**values).check(model, masked=False)


def said(capsys, model: ModelOptions = OF_NOISE, **values: object) -> str:
    ObjectiveOptions(**values).check(model, masked=True)
    return capsys.readouterr().err


def test_what_removes_the_last_timesteps_is_warned_of(fresh_console, capsys):
    assert "--scale_v_pred_loss_like_noise_pred all but removes" in said(
        capsys, OF_V_ZERO, scale_v_pred_loss_like_noise_pred=True
    )
    assert "--min_snr_gamma all but removes" in said(capsys, OF_V_ZERO, min_snr_gamma=5.0)
    assert said(capsys, OF_V_ZERO, debiased_estimation_loss=True) == ""
    assert said(capsys, OF_V, scale_v_pred_loss_like_noise_pred=True, min_snr_gamma=5.0) == ""
    assert said(capsys, ZERO, min_snr_gamma=5.0, masked_loss_normalize=True) == ""


def test_what_has_no_effect_is_noticed(fresh_console, capsys):
    unused = {"noise_offset_random_strength": True, "huber_c": 0.2, "logit_mean": 1.0, "multires_noise_discount": 0.1}
    message = said(capsys, **unused)
    assert message.count("\n") == 4
    assert "--huber_c has no effect without --loss_type huber or smooth_l1" in message
    assert "--noise_offset_random_strength has no effect without --noise_offset" in message
    assert "--huber_scale has no effect without" in said(capsys, loss_type="huber", huber_scale=2.0)
    used = {"noise_offset": 0.1, "loss_type": "huber", "timestep_distribution": "logit_normal"}
    assert said(capsys, **unused | used, multires_noise_iterations=2) == ""


def test_the_fingerprint_is_that_of_the_loss():
    different = [
        {},
        {"loss_type": "l1"},
        {"loss_type": "huber"},
        {"loss_type": "huber", "huber_c": 0.2},
        {"min_snr_gamma": 5.0},
        {"debiased_estimation_loss": True},
        {"masked_loss_normalize": True},
    ]
    assert len({objective_of(**options).fingerprint for options in different}) == len(different)
    fingerprints = [objective_of(prediction).fingerprint for prediction in (Prediction("v_prediction"), V_ZERO)]
    assert len({(), *fingerprints}) == 3
    same = ({"noise_offset": 0.1}, {"max_timestep": 500}, {"huber_c": 0.2}, {"min_snr_gamma": 0.0})
    assert {objective_of(**options).fingerprint for options in same} == {()}
