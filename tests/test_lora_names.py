"""networks/lora.py: names and shapes for the published models, and the two layouts of SDXL's names."""

import csv
import gzip
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from networks.lora import create_network, create_network_from_weights, find_layers
from tests.lora_models import original_name, original_tree, randomise

TABLES = Path(__file__).parent / "data" / "lora_keys"
# The table's ResNet layers and samplers belong to the kind with convolutions; the plain kind adapts the transformers.
CONVOLUTIONAL = re.compile(
    r".*_(resnets_\d+_(conv1|conv2|time_emb_proj|conv_shortcut)|(down|up)samplers_0_conv"
    r"|in_layers_2|emb_layers_1|out_layers_3|skip_connection|\d+_op|\d+_conv)"
)
FAMILIES = ("sd1", "sd2", "sdxl", "sdxl as the trainer hands it in")


def published_blocks(family: str) -> dict[str, int]:
    """The block of every module, by which values of blocks are counted; -1 in text encoders."""
    with gzip.open(TABLES / f"{family}_conv.tsv.gz", "rt", encoding="utf-8", newline="") as stream:
        return {row["lora_name"]: int(row["block"] or -1) for row in csv.DictReader(stream, delimiter="\t")}


def published_shapes(family: str, convolutional: bool) -> dict[str, str]:
    """Tensors of a rank 4 file and their shapes, such as 4x320; alpha is a scalar, whose shape is empty."""
    with gzip.open(TABLES / f"{family}_conv.tsv.gz", "rt", encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream, delimiter="\t"))[1:]
    shapes = {}
    for name, down, up, _block in rows:
        if convolutional or not CONVOLUTIONAL.fullmatch(name):
            shapes |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": ""}
    return shapes


def published_weights(family: str) -> dict[str, torch.Tensor]:
    """A file with every layer of the table; its tensors are views of a single number."""
    return {
        key: torch.tensor(1.0).expand([int(size) for size in shape.split("x") if size])
        for key, shape in published_shapes(family, convolutional=True).items()
    }


def shapes_of(network: nn.Module) -> dict[str, str]:
    return {key: "x".join(map(str, tensor.shape)) for key, tensor in network.state_dict().items()}


def clip(width: int, layers: int, kind: type[nn.Module] = CLIPTextModel) -> nn.Module:
    heads = width // 64
    return kind(
        CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            projection_dim=width,
        )
    )


@cache
def full_size(family: str) -> tuple[nn.Module | list[nn.Module], nn.Module]:
    """Text encoders and U-Net of a published model, without weights."""
    with torch.device("meta"):
        if family == "sd1":
            return clip(768, 12), UNet2DConditionModel(cross_attention_dim=768)
        if family == "sd2":
            unet = UNet2DConditionModel(
                cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
            )
            return clip(1024, 23), unet
        encoders = [clip(768, 12), clip(1280, 32, CLIPTextModelWithProjection)]
        unet = sdxl_unet(
            (320, 640, 1280), (0, 2, 10), cross_attention_dim=2048, projection_class_embeddings_input_dim=2816
        )
    return encoders, unet if family == "sdxl" else original_tree(unet)


def sdxl_unet(channels: tuple[int, ...], transformers: tuple[int, ...], **settings: object) -> UNet2DConditionModel:
    """A U-Net built like SDXL's, with so many transformer blocks per level."""
    depths = [max(1, depth) for depth in transformers]
    return UNet2DConditionModel(
        block_out_channels=channels,
        down_block_types=["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in transformers],
        up_block_types=["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(transformers)],
        transformer_layers_per_block=depths,
        attention_head_dim=[max(1, width // 64) for width in channels],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        **settings,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_new_network_has_the_published_names_and_shapes(family):
    network = create_network(1.0, 4, 1.0, None, *full_size(family))
    assert shapes_of(network) == published_shapes(family.split()[0], convolutional=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_new_network_with_convolutions_has_the_published_names_and_shapes(family):
    network = create_network(1.0, 4, 1.0, None, *full_size(family), conv_dim="4")
    assert shapes_of(network) == published_shapes(family.split()[0], convolutional=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_of_blocks_are_counted_as_published(family):
    published = published_blocks(family.split()[0])
    count = {"sd1": 25, "sd2": 25, "sdxl": 23}[family.split()[0]]
    dims, conv_dims = [block + 1 for block in range(count)], [block + 2 for block in range(count)]
    arguments = {"block_dims": dims, "conv_block_dims": conv_dims, "block_alphas": dims, "conv_block_alphas": dims}
    texts = {name: ",".join(map(str, values)) for name, values in arguments.items()}
    network = create_network(1.0, 30, 1.0, None, *full_size(family), **texts)
    assert {lora.lora_name for lora in network.children()} == published.keys()
    for lora in network.children():
        block, kernel = published[lora.lora_name], lora.lora_down.weight.shape[2:]
        is_large = len(kernel) > 0 and max(kernel) > 1
        own = (conv_dims[block] if is_large else dims[block], dims[block]) if block >= 0 else (30, 1)
        assert (lora.lora_dim, lora.alpha.item()) == own


def test_text_encoder_may_have_a_level_above_it():
    text_encoder, _ = full_size("sd1")
    network = create_network(1.0, 4, 1.0, None, nn.ModuleDict({"text_model": text_encoder}), None)
    published = published_shapes("sd1", convolutional=False)
    assert shapes_of(network) == {key: shape for key, shape in published.items() if key.startswith("lora_te_")}


@pytest.mark.parametrize("family", FAMILIES)
def test_files_with_the_convolutions_fit_the_models(family):
    model = full_size(family)
    network, weights = create_network_from_weights(1.0, None, None, *model, published_weights(family.split()[0]))
    assert shapes_of(network) == published_shapes(family.split()[0], convolutional=True)
    assert weights.keys() == network.state_dict().keys()
    layers = find_layers(*model)
    network.apply_to(*model)
    try:
        assert all(layers[lora.lora_name].forward == lora.forward for lora in network.children())
    finally:
        for lora in network.children():  # the models are shared by the tests
            del layers[lora.lora_name].forward


@pytest.mark.parametrize("family", FAMILIES)
def test_files_of_other_families_are_refused(family):
    own = family.split()[0]
    for other in {"sd1", "sd2", "sdxl"} - {own}:
        with pytest.raises(ValueError, match=r"made for another kind of model|nothing in this LoRA fits the model"):
            create_network_from_weights(1.0, None, None, *full_size(family), published_weights(other))


# SDXL's two layouts

SHAPES_OF_UNETS = [
    {"channels": (8, 8, 16), "transformers": (0, 1, 2), "layers_per_block": 2},
    {"channels": (8, 16), "transformers": (0, 1), "layers_per_block": 1},
    {"channels": (8, 8, 8, 8), "transformers": (0, 1, 1, 0), "layers_per_block": 3},
]


def small_sdxl(
    channels: tuple[int, ...] = (8, 16), transformers: tuple[int, ...] = (0, 1), layers_per_block: int = 1
) -> UNet2DConditionModel:
    return sdxl_unet(
        channels,
        transformers,
        layers_per_block=layers_per_block,
        cross_attention_dim=8,
        norm_num_groups=4,
        projection_class_embeddings_input_dim=6 * 256 + 8,
    )


def random_diffusers_file(unet: nn.Module) -> dict[str, torch.Tensor]:
    """A rank 1 LoRA of every linear layer and convolution, under the names that Diffusers' paths give."""
    weights = {}
    for path, layer in unet.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            name = "lora_unet_" + path.replace(".", "_")
            outer, inner, *kernel = layer.weight.shape
            weights[f"{name}.lora_down.weight"] = torch.randn(1, inner, *kernel)
            weights[f"{name}.lora_up.weight"] = torch.randn(outer, 1, *(1 for _ in kernel))
            weights[f"{name}.alpha"] = torch.tensor(0.5)
    return weights


def disordered_tree(unet: nn.Module) -> nn.Module:
    """The original layout's tree with its children registered the other way round."""
    tree = original_tree(unet)
    for node in list(tree.modules()):
        if type(node) is nn.Module:
            node._modules = dict(reversed(node._modules.items()))
    return tree


@pytest.mark.parametrize("sizes", SHAPES_OF_UNETS)
@pytest.mark.parametrize("make_tree", [lambda unet: unet, original_tree, disordered_tree])
def test_diffusers_names_are_read_as_the_original_ones(sizes, make_tree):
    unet = small_sdxl(**sizes)
    tree = make_tree(unet)
    expected = {
        "lora_unet_" + original_name(unet, path).replace(".", "_"): layer
        for path, layer in unet.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    assert find_layers(None, tree) == expected
    given = random_diffusers_file(unet)
    network, weights = create_network_from_weights(1.0, None, None, None, tree, given)
    assert weights.keys() == network.state_dict().keys()
    assert {lora.lora_name for lora in network.children()} == expected.keys()
    for path, layer in unet.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            own, theirs = original_name(unet, path).replace(".", "_"), path.replace(".", "_")
            assert torch.equal(weights[f"lora_unet_{own}.lora_up.weight"], given[f"lora_unet_{theirs}.lora_up.weight"])


@pytest.mark.parametrize("make_tree", [lambda unet: unet, original_tree], ids=["bare", "original"])
def test_every_way_of_reading_takes_both_layouts_and_writes_the_original(tmp_path, make_tree):
    unet = small_sdxl()
    tree = make_tree(unet)
    network = randomise(create_network(1.0, 2, 1.0, None, None, tree))
    network.save_weights(tmp_path / "original.pt")
    originals = torch.load(tmp_path / "original.pt")
    respelled = {
        "lora_unet_" + original_name(unet, path).replace(".", "_"): "lora_unet_" + path.replace(".", "_")
        for path, _ in unet.named_modules()
        if path.endswith(("attentions.0", "attentions.1"))
    }
    diffusers = {}
    for key, tensor in originals.items():
        head = next(head for head in respelled if key.startswith(f"{head}_"))
        diffusers[respelled[head] + key.removeprefix(head)] = tensor
    torch.save(diffusers, tmp_path / "diffusers.pt")
    assert not diffusers.keys() & originals.keys()

    loaded = create_network(1.0, 2, 1.0, None, None, tree)
    loaded.load_weights(tmp_path / "diffusers.pt")
    made, weights = create_network_from_weights(1.0, tmp_path / "diffusers.pt", None, None, tree)
    made.load_weights(tmp_path / "diffusers.pt")
    for each in (loaded.state_dict(), made.state_dict(), weights):
        assert each.keys() == originals.keys()
        assert all(torch.equal(each[key], originals[key]) for key in originals)

    layer = unet.mid_block.attentions[0].proj_in
    before = layer.weight.detach().clone()
    network.merge_to(None, tree, diffusers)
    after = layer.weight.detach().clone()
    assert not torch.equal(before, after)
    network.set_multiplier(-1.0)
    network.merge_to(None, tree, originals)
    torch.testing.assert_close(layer.weight.detach(), before)


def test_layer_under_both_names_is_refused():
    unet = small_sdxl()
    weights = create_network(1.0, 2, 1.0, None, None, unet).state_dict()
    weights["lora_unet_mid_block_attentions_0_proj_in.alpha"] = torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"two tensors for lora_unet_middle_block_1_proj_in.alpha"):
        create_network_from_weights(1.0, None, None, None, unet, weights)
