import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

from library.errors import UserError
from library.models.files.checkpoint import write_tensors
from library.models.registry import ModelInfo, inspect_model, load_model
from library.models.sd import StableDiffusion1
from library.models.sgm_keys import CLIP_PREFIX

UNET = {
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 64,
    "attention_head_dim": 8,
}
VAE = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
CLIP = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "hidden_act": "quick_gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}
SIZES = torch.tensor([[16, 24, 0, 0, 16, 24]] * 2)
POSITION_IDS = f"{CLIP_PREFIX}embeddings.position_ids"


@pytest.fixture(scope="module")
def model() -> StableDiffusion1:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return StableDiffusion1.from_configs(UNET, VAE, CLIP).eval()


@pytest.fixture
def weights(model) -> dict[str, torch.Tensor]:
    return dict(model.tensors())


def save(folder, tensors, name="model.safetensors"):
    write_tensors(folder / name, tensors)
    return folder / name


def answers(model: StableDiffusion1) -> list[torch.Tensor]:
    """What a model says about fixed inputs: text, latents, noise, images."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        text = model.encode_text(["a red circle on a white background", ""])
        latents = model.encode_images(torch.rand(2, 3, 16, 24, generator=generator) * 2 - 1, [1, 2])
        noise = model.denoise(latents, torch.tensor([3, 700]), model.condition(text, SIZES))
        return [text["hidden_state1"], latents, noise, model.decode_latents(latents)]


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_round_trip_is_exact(tmp_path, model, name):
    model.save(tmp_path / name)
    loaded = load_model(tmp_path / name)
    assert not loaded.training
    assert loaded.latents == model.latents
    assert all(map(torch.equal, answers(loaded), answers(model)))
    weights, again = model.tensors(), loaded.tensors()
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[key], again[key]) for key in weights)


def test_shapes_of_the_answers(model):
    text, latents, noise, images = answers(model)
    assert text.shape == (2, 77, 64)
    assert latents.shape == noise.shape == (2, 4, 8, 12)
    assert images.shape == (2, 3, 16, 24)


def test_diffusers_reads_the_same_weights(model, weights):
    """The names agree with those of Diffusers' own converter."""
    unet = convert_ldm_unet_checkpoint(dict(weights), dict(model.unet.config))
    vae = convert_ldm_vae_checkpoint(dict(weights), dict(model.vae.config))
    for module, converted in ((model.unet, unet), (model.vae, vae)):
        ours = module.state_dict()
        assert converted.keys() == ours.keys()
        assert all(torch.equal(converted[name], ours[name]) for name in ours)


def test_precision_is_chosen_while_loading(tmp_path, model):
    model.save(tmp_path / "half.safetensors", torch.float16)
    loaded = load_model(tmp_path / "half.safetensors", torch.bfloat16, vae_dtype=torch.float32)
    dtypes = [loaded.unet.dtype, loaded.text_encoders[0].model.dtype, loaded.vae.dtype]
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32]
    half = [tensor.half() for tensor in model.vae.state_dict().values()]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(loaded.vae.state_dict().values(), half, strict=True))


def test_a_file_is_recognised_from_its_header(tmp_path, model):
    model.save(tmp_path / "model.safetensors")
    info = inspect_model(tmp_path / "model.safetensors")
    assert isinstance(info, ModelInfo)
    assert info.family is StableDiffusion1
    assert info.latents == model.latents
    assert (info.latents.channels, info.latents.factor, info.latents.step) == (4, 2, 8)
    assert info.load(torch.float16).unet.dtype == torch.float16
    assert len(info.hashes.sha256) == 64


def test_tensors_that_no_module_uses_are_written_back(tmp_path, model, weights):
    carried = {
        POSITION_IDS: torch.arange(77)[None],
        "betas": torch.rand(1000, dtype=torch.float64),
        "sqrt_recipm1_alphas_cumprod": torch.rand(1000),
        "posterior_mean_coef1": torch.rand(1000),
    }
    dropped = {"model_ema.decay": torch.tensor(0.999), "first_stage_model.loss.logvar": torch.tensor(0.0)}
    loaded = load_model(save(tmp_path, weights | carried | dropped))
    loaded.save(tmp_path / "again.safetensors")
    again = load_model(tmp_path / "again.safetensors")
    assert again.tensors().keys() == weights.keys() | carried.keys()
    assert all(torch.equal(again.tensors()[name], carried[name]) for name in carried)
    assert all(again.tensors()[name].dtype == carried[name].dtype for name in carried)


def test_other_spellings_are_read(tmp_path, model, weights):
    def respell(key: str) -> str:
        key = key.replace("attn_1.q.", "attn_1.to_q.").replace("attn_1.proj_out.", "attn_1.to_out.0.")
        return key.replace(CLIP_PREFIX, "cond_stage_model.transformer.")

    respelled = {}
    for key, tensor in weights.items():
        respelled[respell(key)] = tensor.reshape(tensor.shape[:2]) if "attn_1" in key and tensor.ndim == 4 else tensor
    assert respelled.keys() != weights.keys()
    loaded = load_model(save(tmp_path, respelled))
    assert all(map(torch.equal, answers(loaded), answers(model)))
    assert loaded.tensors().keys() == weights.keys()


def test_missing_tensors_are_named(tmp_path, weights):
    del weights["model.diffusion_model.middle_block.0.in_layers.0.bias"]
    with pytest.raises(UserError, match=r"model\.safetensors lacks model\.diffusion_model\.middle_block\.0"):
        load_model(save(tmp_path, weights))


def test_missing_tensors_that_the_architecture_is_read_off_are_named(tmp_path, weights):
    del weights["model.diffusion_model.out.2.weight"]
    with pytest.raises(UserError, match=r"model\.safetensors lacks model\.diffusion_model\.out\.2\.weight: "):
        inspect_model(save(tmp_path, weights))


def test_shapes_that_do_not_fit_are_named(tmp_path, weights):
    weights["model.diffusion_model.out.2.bias"] = torch.zeros(7)
    with pytest.raises(UserError, match=r"model\.diffusion_model\.out\.2\.bias has shape \(7,\), not \(4,\)"):
        load_model(save(tmp_path, weights))


def test_unknown_tensors_are_named(tmp_path, weights):
    unknown = {f"something.{number}": torch.zeros(1) for number in range(5)}
    with pytest.raises(UserError, match=r"something\.0, something\.1, something\.2 and 2 more"):
        load_model(save(tmp_path, weights | unknown))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", "is a LoRA, not a model"),
        ("unet.mid_block.attentions.0.proj_in.lora_A.weight", "is a LoRA, not a model"),
        ("lora_unet_x.hada_w1_a", "is a LyCORIS network, not a model"),
        ("emb_params", "is a Textual Inversion embedding"),
        ("mid_block.attentions.0.down_blocks.x", "Diffusers' layout"),
        ("first_stage_model.decoder.conv_in.weight", "is an autoencoder without its model"),
        (
            "anything",
            r"is not a Stable Diffusion 1\.x, Stable Diffusion 2\.x or SDXL checkpoint: its tensors are named anything",
        ),
    ],
)
def test_files_of_another_kind(tmp_path, key, message):
    with pytest.raises(UserError, match=message):
        inspect_model(save(tmp_path, {key: torch.zeros(2, 2)}))


def test_latents_are_drawn_for_each_image(model):
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        together = model.encode_images(images, [5, 6, 7])
        torch.manual_seed(3)
        alone = model.encode_images(images[1:2], [6])
        other = model.encode_images(images[1:2], [8])
    torch.testing.assert_close(alone[0], together[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(other, alone, atol=1e-3)


def test_attach_points_have_canonical_names_and_the_models_own_leaves(model):
    points = model.attach_points()
    text, unet = (dict(root.named_modules()) for root in (points.text_encoders[0], points.unet))
    query = "text_model.encoder.layers.1.self_attn.q_proj"
    assert text[query] is model.text_encoders[0].model.encoder.layers[1].self_attn.q_proj
    assert unet["mid_block.attentions.0.proj_in"] is model.unet.mid_block.attentions[0].proj_in
    assert unet["time_embedding.linear_1"] is model.unet.time_embedding.linear_1
    assert set(unet) == {name for name, _ in model.unet.named_modules()}
    classes = {type(module).__name__ for module in (*text.values(), *unet.values())}
    assert {"Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"} <= classes
    assert {"CLIPAttention", "CLIPMLP"} <= classes
    assert not {"TimestepEmbedding", "UNet2DConditionModel", "CLIPTextModel"} & classes


def test_gradient_checkpointing_changes_no_gradient(model, tmp_path):
    model.save(tmp_path / "model.safetensors")
    gradients = []
    for checkpointing in (False, True):
        copy = load_model(tmp_path / "model.safetensors").train()
        if checkpointing:
            copy.enable_gradient_checkpointing(unet=True, text_encoders=True)
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        condition = copy.condition(copy.encode_text(["a red circle"]), SIZES[:1])
        copy.denoise(latents, torch.tensor([10]), condition).square().mean().backward()
        parts = (copy.unet.conv_in, copy.text_encoders[0].model.encoder.layers[0].mlp.fc1)
        gradients.append([part.weight.grad for part in parts])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(recomputed, plain)
