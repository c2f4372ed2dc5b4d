"""networks/lora_interrogator.py: the word that a network was made for comes first."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library import cli
from library.models.prompt_weights import BEGIN, END
from library.models.registry import load_model
from networks import lora_interrogator
from networks.lora import create_network

WORD = "cat"


def network_for(word: str, model_path: Path, path: Path) -> Path:
    """A LoRA that is trained to change what is said of a word to something else, and of no other."""
    model = load_model(model_path)
    tokenizer = model.own_tokenizers[0]
    ids = [*tokenizer.words(word), *range(0, BEGIN, 400)]
    captions = torch.tensor([[[BEGIN, id, END]] for id in ids])

    def said() -> torch.Tensor:
        return torch.cat([encoder(captions).hidden[:, 1:].flatten(1) for encoder in model.text_encoders], dim=1)

    with torch.no_grad():
        wanted = said()
    wanted[0] = wanted[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = create_network(1.0, 4, 4.0, None, model.attach_points().text_encoder, None)
    network.apply_to(model.attach_points().text_encoder, None)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(30):
        missed = (said() - wanted).square().mean(dim=1)
        (missed[0] + 2 * missed[1:].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    network.save_weights(path, metadata={})
    return path


@pytest.fixture
def interrogate(monkeypatch, fresh_console, capsys) -> Callable[..., list[str]]:
    """`interrogate(**flags)`: what it prints."""

    def start(**flags: object) -> list[str]:
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value)) if value is not True]
        words += [f"--{name}" for name, value in flags.items() if value is True and f"--{name}" not in words]
        monkeypatch.setattr(sys, "argv", ["lora_interrogator.py", *words])
        cli.run(lora_interrogator.main)
        return capsys.readouterr().out.splitlines()

    return start


@pytest.mark.parametrize("family", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_the_word_it_was_made_for_comes_first(interrogate, model_files, tmp_path, family):
    network = network_for(WORD, model_files(family), tmp_path / "network.safetensors")
    lines = interrogate(sd_model=model_files(family), model=network, batch_size=4096)
    assert lines[1].split() == [lines[1].split()[0], WORD]
    differences = [float(line.split()[0]) for line in (*lines[1:51], *lines[52:])]
    assert len(lines) == 62
    assert differences == sorted(differences, reverse=True)


def test_what_cannot_be_interrogated(interrogate, model_files, tmp_path, capsys):
    def refused(**flags: object) -> str:
        with pytest.raises(SystemExit, match="2"):
            interrogate(**flags)
        return capsys.readouterr().err

    model, network = model_files("sd1"), tmp_path / "network.safetensors"
    assert "--sd_model: no model is given" in refused(model=network)
    assert "--model: no network is given" in refused(sd_model=model)
    assert "does not exist" in refused(sd_model=model, model=network)
    save_file({"lora_unet_conv_in.lora_up.weight": torch.rand(2, 1)}, network)
    assert "changes no text encoder" in refused(sd_model=model, model=network)
    network_for(WORD, model, network)
    assert "it is a Stable Diffusion 1.x model" in refused(sd_model=model, model=network, v2=True)
    assert "--clip_skip 9 is too large" in refused(sd_model=model, model=network, clip_skip=9)
    assert "is for another kind of model than this SDXL model" in refused(sd_model=model_files("sdxl"), model=network)
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    save_file({f"{name}.lora_up.weight": torch.rand(7, 1), f"{name}.lora_down.weight": torch.rand(1, 5)}, network)
    assert "(for a weight of 7 x 5, not 128 x 64)" in refused(sd_model=model, model=network)
