"""library/training/optimizers.py: optimizers of other packages, their rates, and their state over a restart."""

import copy
import io
import sys

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from library import console
from library.errors import UserError
from library.options.optimizer import OPTIMIZERS, OptimizerOptions
from library.options.scheduler import SchedulerOptions
from library.training import optimizers
from library.training.methods.base import ParameterGroup
from library.training.optimizers import check_optimizer, effective_rates, load_optimizer, make_optimizer
from library.training.schedulers import make_scheduler

RATES = {"Prodigy": 1.0}
STEPS = 4


def options(name: str, *arguments: str, **more: object) -> OptimizerOptions:
    return OptimizerOptions(optimizer_type=name, optimizer_args=arguments, learning_rate=RATES.get(name, 0.01), **more)


def weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """One above the 4096 values from which bitsandbytes takes 8 bits, one below, one of zeros."""
    torch.manual_seed(0)
    shapes = ((64, 80), (7,), (3, 4))
    made = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    nn.init.zeros_(made[2])
    return made


def optimizer_of(parameters: list[nn.Parameter], chosen: OptimizerOptions) -> torch.optim.Optimizer:
    rate = chosen.learning_rate
    groups = [ParameterGroup("first", parameters[:1], rate), ParameterGroup("rest", parameters[1:], rate)]
    return make_optimizer(chosen, groups)


def step(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, numbers: range) -> None:
    """A quadratic whose minimum is elsewhere in each step."""
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for parameter in parameters:
            target = torch.randn(parameter.shape, generator=generator)
            parameter.grad = (parameter.detach().float() - 2 - target).to(parameter.dtype)
        optimizer.step()


def through_a_file(value: object) -> object:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def forget(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Have it imported anew; what was there, or its absence, comes back at the end of the test."""
    monkeypatch.setitem(sys.modules, package, None)
    del sys.modules[package]


def leaves(value: object) -> list[object]:
    """All that a state holds, tensors with their types and bits."""
    if isinstance(value, dict):
        return [leaf for key in sorted(value, key=str) for leaf in (key, *leaves(value[key]))]
    if isinstance(value, (list, tuple)):
        return [leaf for one in value for leaf in leaves(one)]
    return [value.dtype, value.double().tolist()] if isinstance(value, torch.Tensor) else [value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_goes_on_after_a_restart_as_if_there_had_been_none(name, dtype):
    def make():
        parameters, warmup = weights(dtype), SchedulerOptions("constant_with_warmup", lr_warmup_steps=3)
        optimizer = optimizer_of(parameters, options(name))
        return parameters, optimizer, make_scheduler(warmup, optimizer, total_steps=10)

    def go(parameters, optimizer, scheduler, numbers):
        for number in numbers:
            step(parameters, optimizer, range(number, number + 1))
            scheduler.step()

    run = make()
    go(*run, range(STEPS))
    saved = through_a_file([run[0], run[1].state_dict(), run[2].state_dict()])
    go(*run, range(STEPS, 2 * STEPS))

    resumed = make()
    for parameter, value in zip(resumed[0], saved[0], strict=True):
        parameter.data.copy_(value.data)
    load_optimizer(resumed[1], saved[1])
    resumed[2].load_state_dict(saved[2])
    assert leaves(resumed[1].state_dict()) == leaves(saved[1])
    go(*resumed, range(STEPS, 2 * STEPS))
    assert all(map(torch.equal, run[0], resumed[0]))
    assert leaves(run[1].state_dict()) == leaves(resumed[1].state_dict())
    assert not torch.equal(run[0][0], weights(dtype)[0])


def test_state_finer_than_its_parameters_stays_so():
    def make():
        parameters = weights(torch.bfloat16)
        return parameters, Adafactor(parameters, lr=0.01, scale_parameter=False, relative_step=False)

    parameters, optimizer = make()
    step(parameters, optimizer, range(STEPS))
    saved = through_a_file(optimizer.state_dict())
    rounded, loaded = make()[1], make()[1]
    rounded.load_state_dict(copy.deepcopy(saved))
    load_optimizer(loaded, saved)
    assert leaves(loaded.state_dict()) == leaves(saved)
    assert leaves(rounded.state_dict()) != leaves(saved)  # or there would be nothing to do


def test_eight_bits_from_4096_values_on():
    parameters = weights()
    optimizer = optimizer_of(parameters, options("AdamW8bit"))
    step(parameters, optimizer, range(1))
    assert [optimizer.state[one]["state1"].dtype for one in parameters] == [torch.uint8, torch.float32, torch.float32]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_that_does_not_fit_changes_nothing(name):
    parameters, chosen = weights(), options(name)
    optimizer = optimizer_of(parameters, chosen)
    step(parameters, optimizer, range(1))
    before = leaves(optimizer.state_dict())
    others = [nn.Parameter(torch.ones(80, 64)), *weights()[1:]]
    turned = optimizer_of(others, chosen)
    step(others, turned, range(1))
    with pytest.raises(ValueError, match=r"parameter 0 is for the shape \[80, 64\], but it has \[64, 80\]"):
        load_optimizer(optimizer, turned.state_dict())
    with pytest.raises(ValueError, match="other groups of parameters"):
        load_optimizer(optimizer, make_optimizer(chosen, [ParameterGroup("all", parameters, 1.0)]).state_dict())
    assert leaves(optimizer.state_dict()) == before


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(UserError) as mistake:
        check_optimizer(options("AdamWScheduleFree"))
    assert str(mistake.value) == (
        "--optimizer_type AdamWScheduleFree needs the package schedulefree: pip install schedulefree"
    )


def test_what_a_package_itself_needs_is_named(monkeypatch, tmp_path):
    (tmp_path / "schedulefree.py").write_text("import nothing_of_that_name\n")
    forget(monkeypatch, "schedulefree")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"needs the package nothing_of_that_name: pip install nothing_of_that_name$"):
        check_optimizer(options("AdamWScheduleFree"))
    (tmp_path / "schedulefree.py").write_text("")
    forget(monkeypatch, "schedulefree")
    with pytest.raises(UserError, match=r"the installed schedulefree does not work .* --upgrade schedulefree$"):
        check_optimizer(options("AdamWScheduleFree"))


def test_packages_are_imported_only_when_asked_for(monkeypatch):
    for package in ("prodigyopt", "schedulefree"):
        forget(monkeypatch, package)
    check_optimizer(OptimizerOptions())
    assert not {"prodigyopt", "schedulefree"} & sys.modules.keys()
    check_optimizer(OptimizerOptions(optimizer_type="PRODIGY"))
    assert "prodigyopt" in sys.modules
    assert "schedulefree" not in sys.modules


def test_optimizers_do_not_print(monkeypatch, capfd):
    console.setup(None)
    with open(1, "w", closefd=False) as stdout:  # pytest's own does not write to the descriptor
        monkeypatch.setattr(sys, "stdout", stdout)
        check_optimizer(options("Prodigy", "weight_decay=0.1"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "argument", "reason"),
    [
        ("AdamW8bit", "amsgrad=True", "AdamW8bit refuses them: AdamW8bit does not support amsgrad=True"),
        ("Prodigy", "d0=0", "Prodigy refuses them: Invalid d0 value: 0"),
        ("Prodigy", "d_coeff=2", "Prodigy takes no d_coeff, did you mean d_coef?"),
        ("AdamWScheduleFree", "betas=0,.999", "AdamWScheduleFree refuses them: the first of betas has to be between"),
        ("AdamWScheduleFree", "betas=.9", "AdamWScheduleFree refuses them: "),
    ],
)
def test_wrong_arguments_are_refused_before_the_first_step(name, argument, reason):
    with pytest.raises(UserError, match=f"^--optimizer_args: {reason.replace('?', '[?]')}"):
        check_optimizer(options(name, argument))


def test_prodigy_refuses_rates_that_differ():
    parameters = weights()
    groups = [ParameterGroup("text_encoder", parameters[:1], 0.5), ParameterGroup("unet", parameters[1:], 1.0)]
    with pytest.raises(UserError) as mistake:
        make_optimizer(options("Prodigy"), groups)
    assert str(mistake.value) == (
        "--optimizer_type Prodigy finds one learning rate for all parts, but theirs differ (text_encoder 0.5, unet 1): "
        "give --learning_rate alone, usually 1"
    )
    make_optimizer(options("Prodigy"), [ParameterGroup("text_encoder", parameters[:1], 0.0), groups[1]])


@pytest.mark.parametrize(("rate", "result"), [(1e-4, "almost nothing"), (0.1, None), (10, None), (50, "too much")])
def test_prodigy_warns_of_a_rate_that_was_meant_for_others(monkeypatch, rate, result):
    said = []
    monkeypatch.setattr(optimizers, "warn", said.append)
    make_optimizer(options("Prodigy"), [ParameterGroup("unet", weights(), rate)])
    assert [f"it will learn {result}" in one for one in said] == ([True] if result else [])
    make_optimizer(options("AdamW"), [ParameterGroup("unet", weights(), rate)])
    check_optimizer(OptimizerOptions(optimizer_type="prodigy", learning_rate=1e-6))  # the parts may have their own
    assert len(said) == bool(result)


def test_rates_are_those_that_weights_are_moved_with():
    parameters = weights()
    prodigy = optimizer_of(parameters, options("Prodigy"))
    assert effective_rates(prodigy, [1.0, 1.0]) == [1e-6, 1e-6]
    step(parameters, prodigy, range(20))
    (rate, other), d = effective_rates(prodigy, [0.5, 0.0]), prodigy.param_groups[0]["d"]
    assert (rate, other) == (0.5 * d, 0)
    assert d > 1e-6

    free = optimizer_of(parameters, options("AdamWScheduleFree", "warmup_steps=4"))
    shown = []
    for number in range(6):
        shown.append(effective_rates(free, [0.01, 0.01])[0])
        step(parameters, free, range(number, number + 1))
        assert shown[-1] == pytest.approx(free.param_groups[0]["scheduled_lr"])
    assert shown[3:] == [0.01] * 3
    assert effective_rates(optimizer_of(parameters, options("AdamW")), [0.1, 0.2]) == [0.1, 0.2]
