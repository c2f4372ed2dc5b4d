"""The names and shapes of the published files, and the architectures read off them."""

from copy import copy
from functools import cache

import pytest
import torch

from library.models import architecture, sgm_keys
from library.models.family import Family
from library.models.registry import FAMILIES
from library.models.sd import StableDiffusion1
from tests import tiny
from tests.full_size import CONFIGS, SD15

# Names and shapes of the published Stable Diffusion 1.5 file.
PUBLISHED = {
    "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
    "model.diffusion_model.time_embed.0.weight": (1280, 320),
    "model.diffusion_model.time_embed.2.weight": (1280, 1280),
    "model.diffusion_model.input_blocks.1.0.in_layers.0.weight": (320,),
    "model.diffusion_model.input_blocks.1.0.emb_layers.1.weight": (320, 1280),
    "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": (320, 320),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.ff.net.0.proj.weight": (2560, 320),
    "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
    "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
    "model.diffusion_model.input_blocks.11.0.out_layers.3.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.middle_block.1.proj_in.weight": (1280, 1280, 1, 1),
    "model.diffusion_model.middle_block.2.in_layers.2.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.3.1.transformer_blocks.0.norm3.bias": (1280,),
    "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.8.2.conv.weight": (640, 640, 3, 3),
    "model.diffusion_model.output_blocks.11.1.proj_out.weight": (320, 320, 1, 1),
    "model.diffusion_model.out.0.weight": (320,),
    "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
    "first_stage_model.encoder.down.0.block.0.conv1.weight": (128, 128, 3, 3),
    "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
    "first_stage_model.encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
    "first_stage_model.encoder.mid.attn_1.norm.weight": (512,),
    "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
    "first_stage_model.decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
    "first_stage_model.decoder.up.0.block.0.conv1.weight": (128, 256, 3, 3),
    "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
    "first_stage_model.encoder.norm_out.weight": (512,),
    "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
    "first_stage_model.post_quant_conv.weight": (4, 4, 1, 1),
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
    "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": (77, 768),
    "cond_stage_model.transformer.text_model.encoder.layers.11.self_attn.out_proj.weight": (768, 768),
    "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768),
    "cond_stage_model.transformer.text_model.final_layer_norm.bias": (768,),
}


# And of Stable Diffusion 2.1 and SDXL, where they are built in another way.
PUBLISHED_V2 = {
    "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
    "model.diffusion_model.output_blocks.11.1.proj_out.weight": (320, 320),
    "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
    "cond_stage_model.model.token_embedding.weight": (49408, 1024),
    "cond_stage_model.model.positional_embedding": (77, 1024),
    "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight": (3072, 1024),
    "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias": (3072,),
    "cond_stage_model.model.transformer.resblocks.0.attn.out_proj.weight": (1024, 1024),
    "cond_stage_model.model.transformer.resblocks.0.ln_1.weight": (1024,),
    "cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.weight": (4096, 1024),
    "cond_stage_model.model.transformer.resblocks.0.mlp.c_proj.weight": (1024, 4096),
    "cond_stage_model.model.ln_final.bias": (1024,),
}
PUBLISHED_XL = {
    "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
    "model.diffusion_model.label_emb.0.2.weight": (1280, 1280),
    "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
    "model.diffusion_model.input_blocks.4.1.proj_in.weight": (640, 640),
    "model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
    "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.norm1.weight": (1280,),
    "model.diffusion_model.middle_block.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
    "model.diffusion_model.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.5.2.conv.weight": (640, 640, 3, 3),
    "model.diffusion_model.output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
    "conditioner.embedders.0.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
    "conditioner.embedders.1.model.token_embedding.weight": (49408, 1280),
    "conditioner.embedders.1.model.positional_embedding": (77, 1280),
    "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
    "conditioner.embedders.1.model.text_projection": (1280, 1280),
    "conditioner.embedders.1.model.ln_final.weight": (1280,),
}


@cache
def full_size(name: str) -> Family:
    kind = next(kind for kind in FAMILIES if kind.name == name)
    with torch.device("meta"):
        return kind.from_configs(**CONFIGS[name])


@pytest.fixture(scope="module")
def sd15() -> Family:
    return full_size("sd1")


def shapes_of(model: Family) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.tensors().outlines().items()}


@pytest.fixture(scope="module")
def shapes(sd15) -> dict[str, tuple[int, ...]]:
    return shapes_of(sd15)


@pytest.mark.parametrize(("name", "published"), [("sd1", PUBLISHED), ("sd2", PUBLISHED_V2), ("sdxl", PUBLISHED_XL)])
def test_real_size_has_the_published_names_and_shapes(name, published):
    shapes = shapes_of(full_size(name))
    assert {name: shapes.get(name) for name in published} == published


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("sd1", {sgm_keys.UNET_PREFIX: 686, sgm_keys.VAE_PREFIX: 248, sgm_keys.CLIP_PREFIX: 196}),
        # but for its last layer of 12 tensors, the projection and the scale, which are carried
        ("sd2", {sgm_keys.UNET_PREFIX: 686, sgm_keys.VAE_PREFIX: 248, sgm_keys.OPEN_CLIP_PREFIX: 294 - 14}),
        (
            "sdxl",
            {
                sgm_keys.UNET_PREFIX: 1680,
                sgm_keys.VAE_PREFIX: 248,
                # but for the position ids and the scale
                sgm_keys.SDXL_CLIP_PREFIX: 197 - 1,
                sgm_keys.SDXL_OPEN_CLIP_PREFIX: 390 - 1,
            },
        ),
    ],
)
def test_real_size_has_the_published_number_of_tensors(name, counts):
    names = full_size(name).tensors()
    assert {prefix: sum(name.startswith(prefix) for name in names) for prefix in counts} == counts
    assert len(names) == sum(counts.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_has_one_place(name):
    for module, names in full_size(name).components().values():
        ours = module.state_dict()
        held = [name for place in names.places(ours) for name in place.names]
        assert sorted(held) == sorted(ours)


@pytest.mark.parametrize("name", CONFIGS)
def test_outlines_are_those_of_the_tensors(name):
    tensors = full_size(name).tensors()
    assert all(outline.shape == tensors[key].shape for key, outline in tensors.outlines().items())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_is_built_from_the_shapes_alone(name):
    """Every configuration that can be read off, is; heads are as wide as everywhere in the family."""
    model = full_size(name)
    if name == "sd2":
        model = unused_layer(model)
    with torch.device("meta"):
        built = type(model).build(shapes_of(model), {})
    configs = {part: module.config for part, (module, _) in built.components().items()}
    for wanted, part in zip(CONFIGS[name].values(), built.components(), strict=True):
        got = configs[part] if isinstance(configs[part], dict) else configs[part].to_dict()
        assert {key: got[key] for key in wanted} == wanted


def unused_layer(model: Family) -> Family:
    """The same with the text layer that is in the file and not in the model."""
    model = copy(model)
    model.carried = tiny.unused_text_layer(model)
    return model


def test_configurations_win_over_the_shapes(shapes):
    with torch.device("meta"):
        built = type(full_size("sd1")).build(shapes, {"unet": {"attention_head_dim": (5, 10, 20, 20)}})
    assert built.unet.config.attention_head_dim == (5, 10, 20, 20)


def test_depth_and_linear_projections_are_read_off_the_shapes():
    wanted = SD15["unet_config"] | {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 48,
        "transformer_layers_per_block": (1, 3),  # 1 where there is no attention and it makes no difference
        "use_linear_projection": True,
    }
    with torch.device("meta"):
        model = StableDiffusion1.from_configs(wanted, SD15["vae_config"], SD15["clip_config"])
    assert architecture.unet_config(shapes_of(model)) == wanted


def test_missing_tensor_is_named(shapes):
    name = "model.diffusion_model.out.2.weight"
    with pytest.raises(KeyError, match=name):
        architecture.unet_config({key: shape for key, shape in shapes.items() if key != name})


def test_unknown_names_are_refused(sd15):
    names = sgm_keys.vae_key_map(sd15.vae.config)
    with pytest.raises(KeyError):
        names.original("encoder.down_blocks.9.resnets.0.conv1.weight")


@pytest.mark.parametrize(
    ("spelling", "usual"),
    [
        ("first_stage_model.decoder.mid.attn_1.to_out.0.bias", "first_stage_model.decoder.mid.attn_1.proj_out.bias"),
        ("first_stage_model.encoder.mid.attn_1.query.weight", "first_stage_model.encoder.mid.attn_1.q.weight"),
        ("first_stage_model.encoder.mid.attn_1.norm.weight", "first_stage_model.encoder.mid.attn_1.norm.weight"),
        (
            "cond_stage_model.transformer.embeddings.position_embedding.weight",
            "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
        ),
        (
            "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.bias",
            "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.bias",
        ),
    ],
)
def test_other_spellings(spelling, usual):
    assert sgm_keys.usual_spelling(spelling) == usual
