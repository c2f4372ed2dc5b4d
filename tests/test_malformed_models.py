"""Models with one tensor too few, of another shape, or changed: one sentence, whichever it is."""

from collections.abc import Callable

import pytest
from torch import Tensor

from library.errors import UserError
from library.models.files.checkpoint import write_tensors
from library.models.registry import FAMILIES, inspect_model
from tests import tiny

# What may go wrong with a tensor.
DAMAGES: dict[str, Callable[[Tensor], Tensor | None]] = {
    "deleted": lambda tensor: None,
    "flat": lambda tensor: tensor.reshape(-1).clone(),
    "halved": lambda tensor: tensor[: len(tensor) // 2].clone(),
    "extra dimension": lambda tensor: tensor[None].clone(),
}
# Any that no architecture is read off, of each component: all of these are compared with the modules' in one way.
OTHERS = ("attn2.to_v.weight", "emb_layers.1.bias", "quant_conv.weight", "ln_final.weight", "final_layer_norm.weight")


class Noting(dict):
    """Shapes that remember which of them were looked at."""

    def __init__(self, *args: object):
        super().__init__(*args)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> tuple[int, ...]:
        self.read.add(key)
        return super().__getitem__(key)


@pytest.fixture(scope="module", params=tiny.CONFIGS)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def tensors(family) -> dict[str, Tensor]:
    # narrow text encoders: their tables of 49,408 tokens are the most of a file
    texts = ("clip_config", "open_clip_config") if family == "sdxl" else ("clip_config",)
    narrow = {name: {"hidden_size": 16, "intermediate_size": 16, "projection_dim": 16} for name in texts}
    sizes = {"cross_attention_dim": 16 * len(texts)}
    if family == "sdxl":
        sizes["projection_class_embeddings_input_dim"] = 6 * 8 + 16
    return dict(tiny.make_model(family, unet_config=sizes, **narrow).tensors())


@pytest.fixture(scope="module")
def looked_at(family, tensors) -> list[str]:
    """The tensors an architecture is read off, and a few others."""
    shapes = Noting({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    next(kind for kind in FAMILIES if kind.name == family).build(shapes, {})
    others = (next((name for name in tensors if name.endswith(end)), None) for end in OTHERS)
    return sorted(shapes.read | {*others} - {None})


def test_text_encoders_for_other_captions_are_refused_at_once(tmp_path, family, tensors):
    """They would be loaded, and fail at the first caption."""
    path = tmp_path / "model.safetensors"
    for end, rows, told in (
        ("token_embedding.weight", 24704, "is for 24704 tokens, and .+ models have 49408"),
        ("position_embedding.weight" if family == "sd1" else "positional_embedding", 39, "is for 39 tokens at once"),
    ):
        key = next(name for name in tensors if name.endswith(end))
        write_tensors(path, tensors | {key: tensors[key][:rows].clone()})
        with pytest.raises(UserError, match=f"^{path} cannot be used: its {key} {told}"):
            inspect_model(path)


@pytest.mark.parametrize(("writer", "refused"), [("atelier/0.1.0", True), ("another/1.0", False), (None, False)])
def test_contents_that_do_not_have_their_hash(tmp_path, fresh_console, capsys, tensors, writer, refused):
    """Ours are damaged; other programs change weights and keep what the metadata say."""
    metadata = {"modelspec.hash_sha256": "0x" + "1" * 64} | (
        {"modelspec.implementation_version": writer} if writer else {}
    )
    write_tensors(tmp_path / "model.safetensors", tensors, metadata=metadata)
    info = inspect_model(tmp_path / "model.safetensors")
    if refused:
        with pytest.raises(UserError, match=r"model\.safetensors is damaged: its contents do not have the hash"):
            info.load()
        return
    info.load()
    (line,) = capsys.readouterr().err.splitlines()
    assert "model.safetensors: its contents do not have the hash that its header tells" in line


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tensor_is_a_sentence(tmp_path, tensors, looked_at, damage):
    assert len(looked_at) > 15
    path = tmp_path / "model.safetensors"
    for name in looked_at:
        changed = DAMAGES[damage](tensors[name])
        if changed is not None and changed.shape == tensors[name].shape:
            continue
        others = {key: tensor for key, tensor in tensors.items() if key != name}
        write_tensors(path, others if changed is None else others | {name: changed})
        with pytest.raises(UserError, match=f"^{path} "):
            inspect_model(path).load()
