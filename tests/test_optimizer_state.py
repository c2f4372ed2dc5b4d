"""library/training/optimization/optimizers.py: what optimizers keep, over a restart and in bytes."""

import copy
import json

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers.optimization import Adafactor

from library.options.optimizer import OPTIMIZERS
from library.options.scheduler import SchedulerOptions
from library.training.methods.base import ParameterGroup
from library.training.optimization.optimizers import load_optimizer, make_optimizer, name_of, state_bytes, tensors_in
from library.training.optimization.schedulers import make_scheduler
from library.training.resuming import foreign_state
from library.training.resuming.packing import pack, unpack
from tests.quadratic import MODULES, leaves, optimizer_of, options, step, weights

STEPS = 4
ALL = (*OPTIMIZERS, *MODULES)


def through_files(value: object) -> object:
    """As a state is kept."""
    tensors: dict[str, torch.Tensor] = {}
    packed = json.loads(json.dumps(pack(value, tensors, "it")))
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    return unpack(packed, safetensors.torch.load(safetensors.torch.save(tensors)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_goes_on_after_a_restart_as_if_there_had_been_none(name, dtype):
    chosen = options(name)
    # parts that find a rate of their own, where that makes a difference
    rates = (0.5, 1.0) if chosen.source.adapts_rate else None

    def make():
        parameters, warmup = weights(dtype), SchedulerOptions("constant_with_warmup", lr_warmup_steps=3)
        optimizer = optimizer_of(parameters, chosen, rates)
        return parameters, optimizer, make_scheduler(warmup, optimizer, total_steps=10)

    def go(parameters, optimizer, scheduler, numbers):
        for number in numbers:
            step(parameters, optimizer, range(number, number + 1))
            scheduler.step()

    run = make()
    go(*run, range(STEPS))
    saved = through_files([[one.detach() for one in run[0]], run[1].state_dict(), run[2].state_dict()])
    go(*run, range(STEPS, 2 * STEPS))

    resumed = make()
    for parameter, value in zip(resumed[0], saved[0], strict=True):
        parameter.data.copy_(value)
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
    saved = through_files(optimizer.state_dict())
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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_accelerate_kept_of_it_goes_on(name, tmp_path):
    parameters = weights()
    optimizer = optimizer_of(parameters, options(name))
    step(parameters, optimizer, range(1))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.bin")
    assert foreign_state.objects(tmp_path, name_of(optimizer), 1)
    if name != "AdamW":
        torch.save({"state": {0: {"step": 1, "exp_avg_sq": 1}}}, tmp_path / "optimizer.bin")  # Adam's without momentum
        assert not foreign_state.objects(tmp_path, name_of(optimizer), 1)


@pytest.mark.parametrize("name", ["PagedAdamW8bit", "PagedLion8bit"])
def test_paged_ones_move_as_those_that_are_not(name):
    runs = []
    for kind in (name, name.removeprefix("Paged")):
        parameters = [nn.Parameter(torch.linspace(-1, 1, 120_000))]  # above the size from which it would be paged
        step(parameters, make_optimizer(options(kind), [ParameterGroup("all", parameters, 0.01)]), range(2))
        runs.append(parameters)
    assert torch.equal(runs[0][0], runs[1][0])


@pytest.mark.parametrize("name", ALL)
def test_memory_is_foreseen(name):
    """Of shapes like those of a U-Net and its LoRA: wide ones, narrow ones, kernels, and what has few values."""
    shapes = [(1, 320), (640, 640), (8, 2560), (64, 48, 3, 3), (320,), (4, 320)]
    parameters = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = make_optimizer(options(name), [ParameterGroup("all", parameters, 1.0)])
    step(parameters, optimizer, range(1))
    kept = sum(tensor.nbytes for tensor in tensors_in(optimizer.state))
    outlines = [torch.empty(shape, device="meta") for shape in shapes]
    assert state_bytes(options(name), outlines, torch.device("cpu")) == pytest.approx(kept, rel=0.02)
