"""Checkpoints in main memory, and what leaves the device when: no result changes."""

import pytest
import torch
from torch import nn

from library.errors import UserError
from library.options import CacheOptions, MemoryOptions
from library.training import preparation
from library.training.device import engines, offload, placement
from library.training.device.offload import offload_checkpoints, offloaded
from library.training.device.placement import Placement, place
from tests import tiny


def test_checkpoints_are_kept_as_copies_and_gradients_stay_the_same(monkeypatch):
    packed: list[tuple[torch.Tensor, torch.Tensor]] = []
    pack = offload._pack
    monkeypatch.setattr(offload, "_pack", lambda tensor: (packed.append((tensor, pack(tensor)[1])), pack(tensor))[1])
    model, gradients = tiny.make_model().requires_grad_(False).train(), []
    for offloads in (False, True):
        model.enable_gradient_checkpointing(text_encoders=True)
        if offloads:
            offload_checkpoints(model)
        table = model.text_encoders[0].clip.embeddings.token_embedding.weight.requires_grad_()
        latents = torch.ones(2, 4, 8, 8, requires_grad=True)
        condition = model.condition(model.encode_text(["a cat", "a red dog"]), torch.zeros(2, 6))
        answer = model.denoise(latents, torch.tensor([1, 900]), condition).square().mean()
        gradients.append(torch.autograd.grad(answer, (latents, table)))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*gradients, strict=True))
    layers = sum(part.__class__.__name__ in ("ResnetBlock2D", "BasicTransformerBlock") for part in model.unet.modules())
    assert len(packed) > layers
    assert all(one.data_ptr() != kept.data_ptr() for one, kept in packed if one.numel())


def test_what_changes_in_place_afterwards_does_not_count():
    layer, gradients = nn.Linear(4, 4), []
    for changed in (False, True):
        x = torch.ones(2, 4, requires_grad=True)
        inner = x * 2
        answer = offloaded(lambda value: layer(value).square(), inner)
        if changed:
            inner.zero_()
        gradients.append(torch.autograd.grad(answer.sum(), x)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("stays", [{"lowram": True}, {"highvram": True}, {"lowram": True, "highvram": True}])
def test_what_leaves_the_device(stays):
    both = CacheOptions(cache_latents=True, cache_text_encoder_outputs=True)
    assert place(MemoryOptions(), both, latents=True) == Placement(vae_rests=True, text_encoders_rest=True)
    assert place(MemoryOptions(), CacheOptions(), latents=False) == Placement(False, False)
    assert place(MemoryOptions(), CacheOptions(), latents=True) == Placement(True, False)
    assert place(MemoryOptions(**stays), both, latents=True) == Placement(False, False)


def test_text_encoders_that_checkpoint_in_an_unknown_way_are_refused():
    model = tiny.make_model()
    model.enable_gradient_checkpointing(text_encoders=True)
    for module in model.text_encoders.modules():
        vars(module).pop("_gradient_checkpointing_func", None)
    with pytest.raises(UserError, match="--cpu_offload_checkpointing does not know"):
        offload_checkpoints(model)


def test_runs_with_these_options_are_the_plain_run(train, flags, tmp_path, monkeypatch, capsys):
    """And an engine that brings everything to the device is not the last to have a say."""
    order: list[str] = []
    prepare, leave = engines.prepare, placement.leave
    monkeypatch.setattr(engines, "prepare", lambda *arguments: (order.append("engine"), prepare(*arguments))[1])
    for module in (placement, preparation):
        monkeypatch.setattr(module, "leave", lambda part: (order.append(type(part).__name__), leave(part))[1])
    common = {"cache_latents": True, "max_train_steps": 2}
    train(flags(tmp_path / "plain", **common))
    assert order == ["AutoencoderKL", "engine", "AutoencoderKL"]
    saving = {"gradient_checkpointing": True, "cpu_offload_checkpointing": True, "highvram": True}
    train(flags(tmp_path / "other", **common, **saving, mem_eff_attn=True, xformers=True))
    assert order[3:] == ["engine"]
    one, other = (tiny.stored(tmp_path / name / "run.safetensors") for name in ("plain", "other"))
    assert one == other
    assert "--mem_eff_attn, --xformers: the first of these" in capsys.readouterr().err
