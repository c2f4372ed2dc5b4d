"""Networks' files of other programs: names, alphas and what is wrong with them."""

import csv
import gzip
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.errors import UserError
from library.lora.metadata import base_of
from library.lora.names import named_modules
from library.lora.reading import UnknownKind, open_network
from library.models.family import Family
from tests.pipelines import pipeline_of
from tests.test_lora_names import TABLES, full_size
from tests.tiny import UNET_V2, make_model

# As many levels as the published model has.
SDXL_UNET = UNET_V2 | {
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 2),
    "attention_head_dim": (1, 1, 1),
}
UNET_LAYERS = ["to_q", "to_k", "to_out.0", "ff.net.0.proj", "conv1", "conv_shortcut", "proj_in"]
TEXT_LAYERS = ["q_proj", "out_proj", "fc1"]
DOWN, UP = "lora_down.weight", "lora_up.weight"


def model_of(family: str) -> Family:
    return make_model(family, unet_config=SDXL_UNET) if family == "sdxl" else make_model(family)


def encoders(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    return {name: getattr(pipe, name) for name in ("text_encoder", "text_encoder_2") if hasattr(pipe, name)}


def add_adapters(
    pipe: DiffusionPipeline, layers: Sequence[str] = UNET_LAYERS, **settings: object
) -> dict[str, nn.Module]:
    """peft's adapters with random weights, by the part of the pipeline."""
    torch.manual_seed(0)
    common = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **settings}
    pipe.unet.add_adapter(LoraConfig(target_modules=list(layers), **common))
    for encoder in encoders(pipe).values():
        encoder.add_adapter(LoraConfig(target_modules=TEXT_LAYERS, **common))
    with torch.no_grad():
        for part in (pipe.unet, *encoders(pipe).values()):
            for name, parameter in part.named_parameters():
                if "magnitude" in name:
                    parameter.mul_(1 + torch.rand(parameter.shape))
    return {"unet": pipe.unet, **encoders(pipe)}


def save_as_diffusers(
    pipe: DiffusionPipeline, folder: Path, parts: dict[str, nn.Module], *, configs: bool = True, older: bool = False
) -> Path:
    """As Diffusers' own training scripts do it; in the names of its `older` ones, which only know attention layers."""
    layers = {f"{name}_lora_layers": get_peft_model_state_dict(part) for name, part in parts.items()}
    if older:
        layers = {name: convert_state_dict_to_diffusers(tensors) for name, tensors in layers.items()}
    said = {f"{name}_lora_adapter_metadata": part.peft_config["default"].to_dict() for name, part in parts.items()}
    pipe.save_lora_weights(folder, **layers, **(said if configs else {}))
    return folder / "pytorch_lora_weights.safetensors"


def weights_of(model: Family) -> dict[str, Tensor]:
    """By the names of layers in networks' files."""
    modules = named_modules(model.attach_points()).items()
    return {name: module.weight.detach().clone() for name, module in modules if hasattr(module, "weight")}


def merged(path: Path, model: Family) -> dict[str, Tensor]:
    """What we make of the weights of a model; every layer of the file must have one."""
    weights = weights_of(model)
    with open_network(path) as network:
        assert network.layers
        for name in network.layers:
            change = network.change(name)
            assert change.fits(weights[name].shape), name
            weights[name] = change.applied(weights[name], 1.0)
    return weights


def assert_as_in_pipeline(path: Path, family: str, pipe: DiffusionPipeline, model: Family) -> None:
    """A file gives the weights that the model gets whose pipeline has the adapters, where Diffusers fuses them."""
    plain = weights_of(model_of(family))
    ours = merged(path, model_of(family))
    pipe.fuse_lora(components=["unet", *encoders(pipe)])
    pipe.unload_lora_weights()
    theirs = weights_of(model)
    assert ours.keys() == theirs.keys()
    assert sum(not torch.equal(theirs[name], plain[name]) for name in plain) > 15
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, {"use_rslora": True, "alpha_pattern": {"to_k": 9}, "rank_pattern": {"to_k": 2}}],
    ids=["plain", "dora", "patterns"],
)
def test_a_file_of_diffusers_is_what_was_trained(tmp_path, family, settings):
    pipe = pipeline_of(model := model_of(family), DDIMScheduler())
    path = save_as_diffusers(pipe, tmp_path, add_adapters(pipe, **settings))
    assert_as_in_pipeline(path, family, pipe, model)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_without_what_peft_says_it_is_what_diffusers_reads(tmp_path, family, monkeypatch):
    said = []
    monkeypatch.setattr("library.lora.reading.console.notice", said.append)
    pipe = pipeline_of(model_of(family), DDIMScheduler())
    adapters = add_adapters(pipe, ("to_q", "to_v", "to_out.0"))
    path = save_as_diffusers(pipe, tmp_path, adapters, configs=False, older=True)
    assert any(key.endswith(".to_q.lora.down.weight") for key in load_file(path))
    pipe = pipeline_of(model := model_of(family), DDIMScheduler())
    pipe.load_lora_weights(tmp_path)
    assert_as_in_pipeline(path, family, pipe, model)
    assert said == [f"{path.name} has no alphas, so its ranks are taken for them: it acts in full"]


def test_the_oldest_names_of_diffusers(tmp_path):
    """Of attention processors, and of text encoders whose layers are called as those of U-Nets."""
    torch.manual_seed(0)
    shapes = {"down": (4, 64), "up": (64, 4)}
    starts = [
        *(f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_{x}_lora" for x in ("q", "out")),
        *(f"text_encoder.text_model.encoder.layers.0.self_attn.to_{x}_lora" for x in ("q", "out")),
    ]
    tensors = {f"{start}.{half}.weight": torch.randn(shape) for start in starts for half, shape in shapes.items()}
    save_file(tensors | {f"{start}.alpha": torch.tensor(2.0) for start in starts}, tmp_path / "x.safetensors")
    unet, text = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1", "lora_te_text_model_encoder_layers_0"
    names = [f"{unet}_to_q", f"{unet}_to_out_0", f"{text}_self_attn_q_proj", f"{text}_self_attn_out_proj"]
    with open_network(tmp_path / "x.safetensors") as network:
        assert list(network.layers) == sorted(names)
        for start, name in zip(starts, names, strict=True):
            expected = tensors[f"{start}.up.weight"] @ tensors[f"{start}.down.weight"] / 2
            torch.testing.assert_close(network.change(name).delta(), expected)


def test_a_folder_of_peft(tmp_path):
    model, plain = make_model(), weights_of(make_model())
    adapter = get_peft_model(
        model.unet, LoraConfig(r=4, lora_alpha=12, target_modules=["to_q", "conv1"], init_lora_weights=False)
    )
    adapter.save_pretrained(tmp_path)
    ours = merged(tmp_path / "adapter_model.safetensors", make_model())
    adapter.merge_and_unload()
    theirs = weights_of(model)
    assert sum(not torch.equal(theirs[name], plain[name]) for name in plain) > 10
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_model.safetensors: what peft says of its alphas cannot be read: "):
        open_network(tmp_path / "adapter_model.safetensors")


# our own names


def published(family: str) -> list[str]:
    with gzip.open(TABLES / f"{family}_conv.tsv.gz", "rt", encoding="utf-8", newline="") as stream:
        return [row[0] for row in list(csv.reader(stream, delimiter="\t"))[1:]]


def write_lora(path: Path, names: Sequence[str], **more: Tensor) -> Path:
    tensors = {f"{name}.{part}": torch.ones(2, 2) for name in names for part in (DOWN, UP)}
    save_file(tensors | {f"{name}.alpha": torch.tensor(1.0) for name in names} | more, path)
    return path


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_published_names_stay_what_they_are(tmp_path, family):
    names = published(family)
    with open_network(write_lora(tmp_path / "x.safetensors", names)) as network:
        assert set(network.layers) == set(names)
        assert not network.foreign


def test_sdxl_in_the_names_of_diffusers(tmp_path):
    """Every layer of the published model, as Diffusers calls it."""
    _, unet = full_size("sdxl")
    theirs = [
        f"lora_unet_{path.replace('.', '_')}"
        for path, layer in unet.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm)
    ]
    with open_network(write_lora(tmp_path / "x.safetensors", theirs)) as network:
        assert network.foreign
        assert len(network.layers) == len(theirs)
        assert {name for name in published("sdxl") if name.startswith("lora_unet_")} <= network.layers.keys()
        assert (
            network.layers["lora_unet_output_blocks_2_1_norm"]["alpha"]
            == "lora_unet_up_blocks_0_attentions_2_norm.alpha"
        )
        assert "lora_unet_out_0" in network.layers


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("sdxl", ["lora_unet_mid_block_attentions_0_transformer_blocks_3_attn1_to_q"]),
        ("sdxl", ["lora_unet_mid_block_attentions_0_proj_in", "lora_te2_text_model_encoder_layers_0_mlp_fc1"]),
        ("sd1", ["lora_unet_mid_block_attentions_0_proj_in", "lora_unet_up_blocks_3_attentions_0_proj_in"]),
        ("sd1", ["lora_unet_mid_block_attentions_0_proj_in"]),
    ],
)
def test_networks_of_a_part_are_known_by_what_they_have(tmp_path, family, names):
    with open_network(write_lora(tmp_path / "x.safetensors", names)) as network:
        original = any("middle_block_1" in name for name in network.layers)
        assert original is (family == "sdxl")


def test_the_width_of_the_text_tells_sdxl(tmp_path):
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    for width, own in ((2048, "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"), (768, name)):
        weights = {f"{name}.{DOWN}": torch.ones(2, width), f"{name}.{UP}": torch.ones(640, 2)}
        save_file(weights | {f"{name}.alpha": torch.ones(())}, tmp_path / "x.safetensors")
        with open_network(tmp_path / "x.safetensors") as network:
            assert list(network.layers) == [own]
            assert network.width(own) == width


def test_a_text_encoder_of_diffusers_is_the_first_one_in_sdxl(tmp_path):
    path = tmp_path / "x.safetensors"
    for metadata, name in (({}, "lora_te"), ({"ss_base_model_version": "sdxl_base_v1-0"}, "lora_te1")):
        layer = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
        save_file(
            {f"{layer}.lora_A.weight": torch.ones(2, 8), f"{layer}.lora_B.weight": torch.ones(8, 2)}, path, metadata
        )
        with open_network(path) as network:
            assert list(network.layers) == [f"{name}_text_model_encoder_layers_0_mlp_fc1"]


TEXT = "lora_te_text_model_encoder_layers_{}_{}"


@pytest.mark.parametrize(
    ("names", "width", "family"),
    [
        ([TEXT.format(0, "self_attn_q_proj"), TEXT.format(0, "mlp_fc2")], 768, "sd1"),
        ([TEXT.format(0, "mlp_fc1")], 1024, "sd2"),
        ([TEXT.format(22, "mlp_fc2")], 4096, "sd2"),
        ([TEXT.format(11, "mlp_fc2")], 3072, None),
        (["lora_te1_text_model_encoder_layers_0_mlp_fc1"], 768, "sdxl"),
        (["lora_te2_text_model_encoder_layers_0_mlp_fc1"], 1280, "sdxl"),
        (["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v"], 1024, "sd2"),
    ],
)
def test_sizes_tell_the_family(tmp_path, names, width, family):
    factors = {f"{name}.{part}": torch.ones(2, width) for name in names for part in (DOWN, UP)}
    save_file(factors | {f"{name}.alpha": torch.tensor(1.0) for name in names}, tmp_path / "x.safetensors")
    with open_network(tmp_path / "x.safetensors") as network:
        assert (base.name if (base := base_of(network)) else None) == family


# what is wrong with files


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            lambda tensors: {k: x for k, x in tensors.items() if k != "lora_unet_mid_block_attentions_0_proj_in.alpha"},
            r"has no alpha for 1 of its 3 layers, lora_unet_mid_block_attentions_0_proj_in: it is damaged or half-made",
        ),
        (
            lambda tensors: tensors | {"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.ones(2, 2)},
            r"has two tensors for the same of lora_unet_mid_block_attentions_0_proj_in, lora_.* and unet",
        ),
        (lambda tensors: {"model.weight": torch.ones(1)}, "is no network's file: no tensor's name begins with lora_te"),
        (
            lambda tensors: {"transformer.single_blocks.0.lora_A.weight": torch.ones(1, 1)},
            "is no network's file: .* for Stable Diffusion",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path, spoil, sentence):
    names = [f"lora_unet_mid_block_attentions_0_proj_{end}" for end in ("in", "out")]
    path = write_lora(tmp_path / "x.safetensors", [*names, "lora_te_text_model_encoder_layers_0_mlp_fc1"])
    save_file(spoil(load_file(path)), path)
    with pytest.raises(UserError, match=rf"^[^\n]*x.safetensors {sentence}"):
        open_network(path)


def test_what_is_no_change_of_a_layer_is_told_as_such(tmp_path):
    layer = "lora_unet_mid_block_attentions_0_proj_in"
    path = write_lora(tmp_path / "x.safetensors", [layer], **{"bundle_emb.cat.string_to_param.*": torch.ones(2, 4)})
    with open_network(path) as network:
        assert network.change(layer).rank == 2
        with pytest.raises(UnknownKind, match=r"holds bundle_emb.cat.string_to_param.\*, which changes no layer"):
            network.change("bundle_emb.cat.string_to_param.*")
    with pytest.raises(UserError, match=r"is a folder: give the \.safetensors or \.ckpt file of the network itself"):
        open_network(tmp_path)


def test_a_download_cut_short(tmp_path):
    path = write_lora(tmp_path / "x.safetensors", ["lora_unet_mid_block_attentions_0_proj_in"])
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], whole[:5], b"", b"<!DOCTYPE html><html></html>"):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"^[^\n]*x.safetensors[^\n]*$"):
            open_network(path)
