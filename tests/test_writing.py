"""Whole models in the formats of --save_model_as."""

import pytest
import torch

from library.models.registry import load_model
from library.models.writing import format_of, write_model
from tests import tiny

KINDS = ["ckpt", "pt", "safetensors", "diffusers", "diffusers_safetensors"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    tiny.save_model(path)
    return load_model(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_written_in_the_format_it_was_read_in(model, tmp_path, kind):
    written = write_model(model, tmp_path / "v1.5 tuned", kind)
    assert written.name in {"v1.5 tuned", f"v1.5 tuned.{kind}"}
    assert format_of(written) == kind
    back = load_model(written, None)
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_of_a_folder_with_both_kinds_of_weights_the_safetensors_count(model, tmp_path):
    folder = write_model(model, tmp_path / "model", "diffusers_safetensors")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"old")
    assert format_of(folder) == "diffusers_safetensors"
