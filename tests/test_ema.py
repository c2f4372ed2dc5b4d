"""library/training/ema.py: the moving average, how it is shown, and that it survives a restart."""

import io

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from library.training.ema import Ema


def module(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Parameters, a frozen one, a buffer."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(dtype)
    made[1].weight.requires_grad_(False)
    return made


def move(trained: nn.Module, ema: Ema, steps: int) -> None:
    for _ in range(steps):
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.add_(torch.randn(parameter.shape).to(parameter))
        ema.update()


def snapshot(trained: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trained.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(one[name].equal(other[name]) and one[name].dtype == other[name].dtype for name in one | other)


def test_average_is_that_of_the_formula():
    trained = nn.Linear(1, 1, bias=False)
    nn.init.constant_(trained.weight, 1.0)
    ema, expected = Ema(trained, 0.5), 1.0
    for count in range(1, 20):
        nn.init.constant_(trained.weight, float(count**2))
        ema.update()
        decay = min(0.5, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * count**2
    assert ema.averages[0].item() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shown_is_the_average_and_afterwards_nothing_has_changed(dtype):
    trained = module(dtype)
    ema = Ema(trained, 0.9)
    move(trained, ema, 5)
    before, storage = snapshot(trained), trained[0].weight.data_ptr()
    averages = [average.clone() for average in ema.averages]
    with ema.swapped():
        assert trained[0].weight.equal(ema.averages[0].to(dtype))
        assert not trained[0].weight.equal(before["0.weight"])
        assert trained[1].weight.equal(before["1.weight"])  # frozen
        assert {parameter.dtype for parameter in trained.parameters()} == {dtype}
    with pytest.raises(KeyboardInterrupt), ema.swapped():
        raise KeyboardInterrupt
    assert same(snapshot(trained), before)
    assert trained[0].weight.data_ptr() == storage
    assert all(map(torch.equal, averages, ema.averages))


def test_small_steps_of_bf16_weights_are_not_rounded_away():
    trained = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.constant_(trained.weight, 1.0)
    ema = Ema(trained, 0.9999)
    ema.count = 10**6
    nn.init.constant_(trained.weight, 2.0)
    for _ in range(100):
        ema.update()
    assert ema.averages[0].item() == pytest.approx(2 - 0.9999**100, abs=1e-5)


def test_goes_on_after_a_restart_as_if_there_had_been_none():
    torch.manual_seed(1)
    trained = module()
    ema = Ema(trained, 0.9)
    move(trained, ema, 3)
    file = io.BytesIO()
    torch.save([trained.state_dict(), ema.state_dict(), torch.get_rng_state()], file)
    move(trained, ema, 3)

    file.seek(0)
    weights, state, generator = torch.load(file, weights_only=True)
    restarted = module()
    again = Ema(restarted, 0.9)
    restarted.load_state_dict(weights)
    again.load_state_dict(state)
    torch.set_rng_state(generator)
    move(restarted, again, 3)
    assert again.count == ema.count == 6
    assert all(map(torch.equal, again.averages, ema.averages))


@pytest.mark.parametrize("other", [nn.Linear(3, 5), nn.Linear(3, 4, bias=False)], ids=["shape", "name"])
def test_averages_of_other_parameters_are_refused(other):
    ema = Ema(other, 0.9)
    with pytest.raises(ValueError, match=r"not of these parameters: (bias|weight) differs or is missing"):
        ema.load_state_dict(Ema(nn.Linear(3, 4), 0.9).state_dict())


def test_a_run_saves_the_average_of_its_steps(train, flags, tmp_path):
    """The decay is one that the warm-up reaches in the second step."""
    common = {"ema": True, "ema_decay": 0.2, "save_every_n_steps": 1, "save_precision": "float"}
    train(flags(tmp_path / "still", **common, learning_rate=1e-30, max_train_steps=1))
    train(flags(tmp_path, **common))
    expected = load_file(tmp_path / "still" / "run.safetensors")
    for count in range(1, 5):
        decay, weights = min(0.2, (1 + count) / (10 + count)), load_file(tmp_path / f"run-step{count:08d}.safetensors")
        expected = {key: decay * expected[key] + (1 - decay) * weights[key] for key in weights}
        saved = load_file(tmp_path / f"run-step{count:08d}-ema.safetensors")
        assert all(torch.allclose(saved[key], expected[key], rtol=1e-5, atol=1e-7) for key in weights), count
    last, own = load_file(tmp_path / "run-ema.safetensors"), load_file(tmp_path / "run.safetensors")
    assert all(torch.equal(last[key], saved[key]) for key in last)
    assert not all(torch.allclose(last[key], own[key], atol=1e-4) for key in last)
