import pytest
import torch

from library.models import sgm_keys
from library.models.sd import StableDiffusion1
from tests.sd15 import SD15

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


@pytest.fixture(scope="module")
def sd15() -> StableDiffusion1:
    with torch.device("meta"):
        return StableDiffusion1.from_configs(**SD15)


@pytest.fixture(scope="module")
def shapes(sd15) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in sd15.tensors().items()}


def test_real_size_has_the_published_names_and_shapes(shapes):
    assert {name: shapes.get(name) for name in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize(
    ("prefix", "count"),
    [(sgm_keys.UNET_PREFIX, 686), (sgm_keys.VAE_PREFIX, 248), (sgm_keys.CLIP_PREFIX, 196)],
)
def test_real_size_has_the_published_number_of_tensors(shapes, prefix, count):
    assert sum(name.startswith(prefix) for name in shapes) == count


def test_every_name_has_an_original_of_its_own(sd15):
    for module, names in sd15.parts():
        ours = list(module.state_dict())
        assert len({names.original(name) for name in ours}) == len(ours)


@pytest.mark.parametrize("part", ["unet_config", "vae_config", "clip_config"])
def test_configuration_is_read_off_the_shapes(shapes, part):
    assert getattr(sgm_keys, part)(shapes) == SD15[part]


def test_depth_and_linear_projections_are_read_off_the_shapes():
    wanted = SD15["unet_config"] | {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 48,
        "transformer_layers_per_block": 3,
        "use_linear_projection": True,
    }
    with torch.device("meta"):
        model = StableDiffusion1.from_configs(wanted, SD15["vae_config"], SD15["clip_config"])
    assert sgm_keys.unet_config({name: tuple(tensor.shape) for name, tensor in model.tensors().items()}) == wanted


def test_missing_tensor_is_named(shapes):
    name = "model.diffusion_model.out.2.weight"
    with pytest.raises(KeyError, match=name):
        sgm_keys.unet_config({key: shape for key, shape in shapes.items() if key != name})


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
