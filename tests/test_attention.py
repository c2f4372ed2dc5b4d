"""Which way attention is computed in, and that it makes no difference to the result."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0, XFormersAttnProcessor

from library.models import attention
from library.models.attention import FrugalAttention
from library.models.family import Family
from library.options import AttentionOptions, PrecisionOptions, SaveOptions
from library.training.device import hardware, precision
from tests import tiny

CPU = torch.device("cpu")
FLOAT32 = precision.choose(PrecisionOptions(), SaveOptions(), "no")


@pytest.fixture
def chosen(monkeypatch):
    """`chosen(*flags, works=WAYS)`: the model, and what was said, where these flags are given and these ways work."""

    def choose(*flags: str, works: tuple[str, ...] = ()) -> tuple[Family, list[str]]:
        said: list[str] = []
        model = tiny.make_model()
        monkeypatch.setattr(hardware.console, "notice", said.append)
        monkeypatch.setattr(attention, "works", lambda way, *_: way in works)
        hardware.choose_attention(AttentionOptions(**dict.fromkeys(flags, True)), model, FLOAT32, CPU)
        return model, said

    return choose


def kinds(module: torch.nn.Module) -> set[type]:
    return {type(part.processor) for part in module.modules() if hasattr(part, "set_processor")}


@pytest.mark.parametrize(
    ("flags", "works", "in_unet", "in_vae", "notices"),
    [
        ((), (), AttnProcessor2_0, AttnProcessor2_0, 0),
        (("sdpa",), (), AttnProcessor2_0, AttnProcessor2_0, 0),
        (("xformers",), ("xformers",), XFormersAttnProcessor, XFormersAttnProcessor, 0),
        (("diffusers_xformers",), ("xformers",), XFormersAttnProcessor, XFormersAttnProcessor, 0),
        (("xformers",), (), AttnProcessor2_0, AttnProcessor2_0, 1),
        (("mem_eff_attn",), ("mem_eff_attn",), FrugalAttention, AttnProcessor2_0, 0),
        (("sdpa", "xformers"), ("xformers",), XFormersAttnProcessor, XFormersAttnProcessor, 1),
        (("xformers", "mem_eff_attn"), ("xformers", "mem_eff_attn"), FrugalAttention, AttnProcessor2_0, 1),
        (("xformers", "mem_eff_attn"), ("xformers",), XFormersAttnProcessor, XFormersAttnProcessor, 2),
    ],
)
def test_the_first_way_that_works_is_used(chosen, flags, works, in_unet, in_vae, notices):
    model, said = chosen(*flags, works=works)
    assert (kinds(model.unet), kinds(model.vae)) == ({in_unet}, {in_vae})
    assert len(said) == notices


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["xformers"], "xformers"),
        (["diffusers_xformers"], "diffusers_xformers"),
        (["xformers", "diffusers_xformers"], "xformers"),
    ],
)
def test_a_fallback_says_what_is_missing(chosen, given, named):
    _, said = chosen(*given)
    assert said == [
        f"--{named} cannot be used here: xformers needs an NVIDIA GPU, and to be built for the installed torch; torch "
        "chooses how attention is computed"
    ]


def test_ways_are_tried_on_this_machine():
    model = tiny.make_model()
    for dtype in (torch.float32, torch.bfloat16):
        assert attention.works("mem_eff_attn", model.unet, CPU, dtype)
        assert not attention.works("xformers", model.unet, CPU, dtype)


def test_frugal_attention_never_holds_all_weights_and_answers_the_same(monkeypatch):
    model, plain, kernels = tiny.make_model("sdxl").unet, F.scaled_dot_product_attention, []

    def noted(*arguments, **keywords):
        kernels.append(torch.backends.cuda.math_sdp_enabled())
        return plain(*arguments, **keywords)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    answers = []
    for way in (None, "mem_eff_attn"):
        if way:
            attention.use(way, model)
        latents = torch.ones(2, 4, 16, 8, requires_grad=True)
        added = {"text_embeds": torch.ones(2, 48), "time_ids": torch.ones(2, 6)}
        answer = model(latents, torch.tensor([1, 900]), torch.ones(2, 77, 96), added_cond_kwargs=added).sample
        answers.append((answer.detach(), *torch.autograd.grad(answer.square().sum(), latents)))
    half = len(kernels) // 2
    assert kernels == [True] * half + [False] * half
    assert half > 0
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*answers, strict=True))
