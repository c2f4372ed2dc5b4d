"""library/training/optimization/optimizers.py: optimizers by name, their packages, arguments and rates."""

import sys

import pytest
import torch
from torch import nn

from library import console
from library.errors import UserError
from library.options.optimizer import OPTIMIZERS, TORCH_OPTIMIZERS, OptimizerOptions
from library.training.methods.base import ParameterGroup
from library.training.optimization import optimizers
from library.training.optimization.movement import Movement
from library.training.optimization.optimizers import (
    described,
    import_optimizer,
    make_optimizer,
    name_of,
    probe_optimizer,
    try_optimizer,
)
from tests.quadratic import leaves, optimizer_of, options, step, weights

CPU = torch.device("cpu")
ADAPTING = [name for name, row in OPTIMIZERS.items() if row.adapts_rate]


def forget(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Have it imported anew; what was there, or its absence, comes back at the end of the test."""
    monkeypatch.setitem(sys.modules, package, None)
    del sys.modules[package]


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What is told of an optimizer."""
    messages: list[str] = []
    for speaker in ("warn", "notice"):
        monkeypatch.setattr(optimizers, speaker, messages.append)
    return messages


# names


def test_every_class_of_torch_can_be_named():
    classes = {name for name, kind in vars(torch.optim).items() if isinstance(kind, type) and name != "Optimizer"}
    rows = {name.lower() for name in OPTIMIZERS}
    assert {name for name in classes if name.lower() not in rows} == set(TORCH_OPTIMIZERS)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("", "torch.optim.adamw.AdamW"),
        ("dadaptation", "dadaptation.experimental.dadapt_adam_preprint.DAdaptAdamPreprint"),
        ("DADAPTADAM", "dadaptation.dadapt_adam.DAdaptAdam"),
        ("pagedadamw8bit", "bitsandbytes.optim.adamw.PagedAdamW8bit"),
        ("adafactor", "transformers.optimization.Adafactor"),
        ("rmsprop", "torch.optim.rmsprop.RMSprop"),
        ("bitsandbytes.optim.lamb.LAMB", "bitsandbytes.optim.lamb.LAMB"),
    ],
)
def test_names_mean_classes(name, place):
    kind = import_optimizer(OptimizerOptions(optimizer_type=name))
    assert f"{kind.__module__}.{kind.__name__}" == place


def test_old_flags_name_optimizers():
    assert OptimizerOptions(use_8bit_adam=True).optimizer == "AdamW8bit"
    assert OptimizerOptions(use_lion_optimizer=True).optimizer == "Lion"
    for flags, sentence in (
        (
            {"use_8bit_adam": True, "optimizer_type": "AdamW8bit"},
            "--use_8bit_adam and --optimizer_type each name an optimizer: drop --use_8bit_adam",
        ),
        (
            {"use_8bit_adam": True, "use_lion_optimizer": True},
            "--use_8bit_adam and --use_lion_optimizer each name an optimizer: drop --use_8bit_adam",
        ),
    ):
        with pytest.raises(UserError) as mistake:
            OptimizerOptions(**flags)
        assert str(mistake.value) == sentence


def test_optimizers_whose_states_differ_have_names_of_their_own():
    """By which a state is known to be of another optimizer."""
    kinds = ["AdamW", "bitsandbytes.optim.AdamW", "AdaFactor", "torch.optim.Adafactor", "RMSprop"]
    found = [name_of(optimizer_of(weights(), options(name))) for name in kinds]
    assert found == ["AdamW", "bitsandbytes.optim.adamw.AdamW", "Adafactor", "torch.optim.Adafactor", "RMSprop"]
    assert name_of(optimizer_of(weights(), options("prodigyopt.Prodigy", learning_rate=1))) == "Prodigy"


def test_files_tell_the_arguments():
    chosen = options("SGDNesterov", "weight_decay=0.01")
    found = described(chosen, optimizer_of(weights(), chosen))
    assert found == "torch.optim.sgd.SGD(momentum=0.9,nesterov=True,weight_decay=0.01)"
    assert described(options("AdamW"), optimizer_of(weights(), options("AdamW"))) == "torch.optim.adamw.AdamW"


# packages


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "lion_pytorch", None)
    with pytest.raises(UserError) as mistake:
        probe_optimizer(options("Lion"))
    assert str(mistake.value) == "--optimizer_type Lion needs the package lion-pytorch: pip install lion-pytorch"


def test_what_a_package_itself_needs_is_named(monkeypatch, tmp_path):
    (tmp_path / "schedulefree.py").write_text("import nothing_of_that_name\n")
    forget(monkeypatch, "schedulefree")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"needs the package nothing_of_that_name: pip install nothing_of_that_name$"):
        probe_optimizer(options("AdamWScheduleFree"))
    (tmp_path / "schedulefree.py").write_text("")
    forget(monkeypatch, "schedulefree")
    with pytest.raises(UserError, match=r"the installed schedulefree does not work .* --upgrade schedulefree$"):
        probe_optimizer(options("AdamWScheduleFree"))


def test_packages_are_imported_only_when_asked_for(monkeypatch):
    packages = ("prodigyopt", "schedulefree", "dadaptation", "lion_pytorch")
    for package in packages:
        forget(monkeypatch, package)
    probe_optimizer(OptimizerOptions())
    assert not set(packages) & sys.modules.keys()
    probe_optimizer(OptimizerOptions(optimizer_type="PRODIGY"))
    assert set(packages) & sys.modules.keys() == {"prodigyopt"}


def test_optimizers_do_not_print(monkeypatch, capfd):
    console.setup(None)
    with open(1, "w", closefd=False) as stdout:  # pytest's own does not write to the descriptor
        monkeypatch.setattr(sys, "stdout", stdout)
        probe_optimizer(options("Prodigy", "weight_decay=0.1"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("its_own.Missing", "--optimizer_type its_own.Missing: its_own has no Missing, did you mean Mising?"),
        ("its_own.Mising", "--optimizer_type: its_own.Mising is no optimizer of PyTorch"),
        ("its_own.Needy", "--optimizer_args: Needy needs size (it takes size, depth)"),
        ("its_own.Failing", "--optimizer_type its_own.Failing cannot take a step here: no way"),
        ("its_own.Odd", "--optimizer_type its_own.Odd cannot be resumed: its state.state.0.set holds a set, which no"),
        ("its_own.deeper.Own", "--optimizer_type its_own.deeper.Own: there is no module its_own.deeper"),
        ("no_such.Own", "--optimizer_type no_such.Own: there is no module no_such: look at the spelling"),
        ("odd.Own", "--optimizer_type odd.Own: the installed odd does not work (no attribute): pip install --upgrade"),
        ("loud.Own", "--optimizer_type loud.Own: the installed loud does not work (3): pip install --upgrade loud"),
        ("LBFGS", "--optimizer_type: LBFGS computes the loss several times in a step: choose another"),
        ("SparseAdam", "--optimizer_type: SparseAdam is for gradients that are mostly 0"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_sentence(name, reason, monkeypatch, tmp_path, capfd):
    (tmp_path / "its_own.py").write_text(
        "import torch\n"
        "class Mising: ...\n"
        "class Needy(torch.optim.Optimizer):\n"
        "    def __init__(self, params, lr, size, depth=1): super().__init__(params, {'lr': lr})\n"
        "class Failing(torch.optim.Adam):\n"
        "    def step(self, closure=None): raise RuntimeError('no\\nway')\n"
        "class Odd(torch.optim.Adam):\n"
        "    def step(self, closure=None): self.state[self.param_groups[0]['params'][0]]['set'] = {1}\n"
    )
    (tmp_path / "loud.py").write_text("import os\nos.system('echo hello')\nraise SystemExit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "odd.py").write_text("raise AttributeError('no attribute')")
    for module in ("its_own", "loud", "odd"):
        forget(monkeypatch, module)
    with pytest.raises(UserError) as mistake:
        try_optimizer(OptimizerOptions(optimizer_type=name), CPU, spread=False)
    assert str(mistake.value).startswith(reason)
    assert "\n" not in str(mistake.value)
    assert capfd.readouterr() == ("", "")


# arguments


@pytest.mark.parametrize(
    ("name", "argument", "reason"),
    [
        ("AdamW8bit", "amsgrad=True", "AdamW8bit refuses them: AdamW8bit does not support amsgrad=True"),
        ("Prodigy", "d0=0", "Prodigy refuses them: Invalid d0 value: 0"),
        ("Prodigy", "d_coeff=2", "Prodigy takes no d_coeff, did you mean d_coef?"),
        ("Prodigy", "lr=2", "Prodigy takes no lr"),
        ("DAdaptSGD", "moment=0.9", "DAdaptSGD takes no moment, did you mean momentum?"),
        ("SGDNesterov8bit", "momentum=0", "SGD8bit refuses them: SGD without momentum is not supported!"),
        ("SGDNesterov", "dampening=0.1", "SGD refuses them: Nesterov momentum requires a momentum and zero dampening"),
        ("AdamWScheduleFree", "betas=0,.999", "AdamWScheduleFree refuses them: the first of betas has to be between"),
        ("AdamWScheduleFree", "betas=.9", "AdamWScheduleFree refuses them: "),
        ("bitsandbytes.optim.LAMB", "weight_deca=1", "LAMB takes no weight_deca, did you mean weight_decay?"),
    ],
)
def test_wrong_arguments_are_refused_before_the_first_step(name, argument, reason):
    with pytest.raises(UserError) as mistake:
        probe_optimizer(options(name, *argument.split()))
    assert str(mistake.value).startswith(f"--optimizer_args: {reason}")


def test_arguments_are_read_as_literals():
    chosen = options("bitsandbytes.optim.lamb.LAMB", "betas=.8,.99", "weight_decay=1e-2", "bias_correction=false")
    (group, _) = optimizer_of(weights(), chosen).param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.8, 0.99), 0.01)
    relative = options("AdaFactor", "relative_step=false", "beta1=none")
    assert [group["relative_step"] for group in optimizer_of(weights(), relative).param_groups] == [False, False]


def test_arguments_that_are_passed_on_are_those_of_the_class_behind(monkeypatch):
    class Behind(torch.optim.Optimizer):
        def __init__(self, params, lr=0.1, power=2):
            super().__init__(params, {"lr": lr, "power": power})

        def step(self, closure=None): ...

    class Before(Behind):
        def __init__(self, params, size=1, **more):
            super().__init__(params, **more)

    monkeypatch.setattr(torch.optim, "Before", Before, raising=False)
    monkeypatch.setattr(torch.optim, "Behind", Behind, raising=False)
    (group, _) = optimizer_of(weights(), options("torch.optim.Before", "power=3")).param_groups
    assert group["power"] == 3
    with pytest.raises(UserError, match=r"Before takes no powr, did you mean power\? \(it takes size, power\)$"):
        probe_optimizer(options("torch.optim.Before", "powr=3"))


def test_what_is_added_is_said(said):
    parameters = weights()
    (group, _) = optimizer_of(parameters, options("SGDNesterov")).param_groups
    assert (group["momentum"], group["nesterov"]) == (0.9, True)
    assert said == ["SGDNesterov has momentum=0.9 and nesterov=True unless --optimizer_args says otherwise"]
    said.clear()
    (group, _) = optimizer_of(parameters, options("SGDNesterov", "momentum=0.5")).param_groups
    assert group["momentum"] == 0.5
    assert said == ["SGDNesterov has nesterov=True unless --optimizer_args says otherwise"]
    said.clear()
    (group, _) = optimizer_of(parameters, options("AdaFactor", "relative_step=False", "warmup_init=True")).param_groups
    assert group["relative_step"]
    assert (
        said[0] == "--optimizer_args: AdaFactor has relative_step=True all the same, because warmup_init=True needs it"
    )
    said.clear()
    optimizer_of(parameters, options("PagedAdamW"))
    assert said == ["PagedAdamW keeps its state where it is on the CPU: paging is for the memory of GPUs"]


# rates


@pytest.mark.parametrize("name", ADAPTING)
def test_parts_find_rates_of_their_own_where_those_given_differ(name):
    parameters = weights()
    both = optimizer_of(parameters, options(name), (0.5, 1.0))
    step(parameters, both, range(6))
    kind = import_optimizer(options(name))
    for part, rate in ((slice(0, 1), 0.5), (slice(1, 3), 1.0)):
        alone = weights()[part]
        d0 = {} if name == "Prodigy" else {"d0": 0.01}
        single = kind([{"params": alone, "lr": rate}], **d0)
        for number in range(6):
            generator = torch.Generator().manual_seed(number)
            targets = [torch.randn(one.shape, generator=generator) for one in weights()]
            for parameter, target in zip(alone, targets[part], strict=True):
                parameter.grad = parameter.detach() - 2 - target
            single.step()
        assert all(map(torch.equal, alone, parameters[part]))


@pytest.mark.parametrize("name", ADAPTING)
def test_parts_with_the_same_rate_find_one_together(name):
    parameters, others = weights(), weights()
    step(parameters, optimizer_of(parameters, options(name)), range(6))
    d0 = {} if name == "Prodigy" else {"d0": 0.01}
    plain = import_optimizer(options(name))([{"params": others[:1]}, {"params": others[1:]}], lr=1.0, **d0)
    step(others, plain, range(6))
    assert all(map(torch.equal, parameters, others))


@pytest.mark.parametrize("name", ADAPTING)
def test_parts_whose_rates_become_equal_keep_their_own_estimates(name):
    """As with --resume_new_learning_rate."""
    parameters = weights()
    optimizer = optimizer_of(parameters, options(name), (0.1, 3.0))
    step(parameters, optimizer, range(6))
    before = [group["d"] for group in optimizer.param_groups]
    assert before[0] != before[1]
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = 1.0
    step(parameters, optimizer, range(6, 7))
    after = [group["d"] for group in optimizer.param_groups]
    assert after[0] != after[1]
    assert all(new >= old for new, old in zip(after, before, strict=True))


@pytest.mark.parametrize("name", [*ADAPTING, "AdaFactor"])
def test_a_rate_of_0_moves_nothing(name):
    parameters, start = weights(), weights()
    optimizer = optimizer_of(parameters, options(name, *(["weight_decay=0.1"] if name != "AdaFactor" else [])), (0, 1))
    step(parameters, optimizer, range(6))
    assert torch.equal(parameters[0], start[0])
    assert not torch.equal(parameters[1], start[1])
    moved = [one.detach().clone() for one in parameters]
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # as at the end of many a curve
    if name != "AdaFactor":
        step(parameters, optimizer, range(6, 8))
        assert all(map(torch.equal, parameters, moved))


@pytest.mark.parametrize("name", ADAPTING)
def test_gradients_may_be_0_at_first(name):
    parameters, others = weights(), weights()
    late, soon = (optimizer_of(own, options(name)) for own in (parameters, others))
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    late.step()
    assert all(map(torch.equal, parameters, weights()))
    step(parameters, late, range(4))
    step(others, soon, range(4))
    assert all(map(torch.equal, parameters, others))


def test_a_step_counts_once(monkeypatch):
    """Its hooks are called once, whatever the number of parts, also where the package's own class is in use."""
    import_optimizer(options("Prodigy"))([nn.Parameter(torch.ones(2))])
    parameters = weights()
    optimizer = optimizer_of(parameters, options("Prodigy"), (0.5, 1.0))
    movement = Movement([ParameterGroup("a", parameters[:1], 0.5), ParameterGroup("b", parameters[1:], 1.0)], optimizer)
    step(parameters, optimizer, range(3))
    assert (movement.taken, movement.steps) == (3, [3, 3])


def test_those_that_adapt_are_not_spread_over_processes():
    with pytest.raises(UserError, match=r"^--optimizer_type DAdaptAdam needs all gradients in each process"):
        try_optimizer(options("DAdaptAdam"), CPU, spread=True)
    try_optimizer(options("AdamW"), CPU, spread=True)


@pytest.mark.parametrize(("rate", "result"), [(1e-4, "almost nothing"), (0.1, None), (10, None), (50, "too much")])
def test_a_rate_that_was_meant_for_others_is_warned_of(said, rate, result):
    for name in ("Prodigy", "DAdaptLion"):
        said.clear()
        make_optimizer(options(name), [ParameterGroup("unet", weights(), rate)])
        assert [f"it will learn {result}" in one for one in said] == ([True] if result else [])
    make_optimizer(options("AdamW"), [ParameterGroup("unet", weights(), rate)])
    probe_optimizer(OptimizerOptions(optimizer_type="prodigy", learning_rate=1e-6))  # the parts may have their own
    assert len(said) == bool(result)


def test_what_becomes_of_rates_is_said(said):
    optimizer_of(weights(), options("Prodigy"), (0.5, 1.0))
    optimizer_of(weights(), options("AdaFactor", "relative_step=True"))
    optimizer_of(weights(), options("AdaFactor", "relative_step=False"))
    optimizer_of(weights(), options("AdaFactor", "relative_step=False", max_grad_norm=0.0))
    assert said == [
        "Prodigy finds a learning rate for each part, times the one given (first 0.5, rest 1): what comes out need not "
        "be in that ratio",
        "AdaFactor chooses the learning rate itself (relative_step=True), so that those given (first 0.01, rest 0.01) "
        "have no effect unless they are 0; relative_step=False in --optimizer_args lets them",
    ]


def test_state_is_that_of_the_package_itself():
    """So a state of before, or of another program, goes on whether rates differ or not."""
    parameters = weights()
    apart = optimizer_of(parameters, options("DAdaptAdam"), (0.5, 1.0))
    step(parameters, apart, range(2))
    plain = import_optimizer(options("DAdaptAdam"))([{"params": parameters[:1]}, {"params": parameters[1:]}])
    plain.load_state_dict(apart.state_dict())
    assert leaves(plain.state_dict()) == leaves(apart.state_dict())
