"""Our LoRA files and networks/lora.py in Diffusers' own pipeline, outside this project."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from networks.lora import LoRANetwork, create_network, create_network_from_weights

REPOSITORY = Path(__file__).resolve().parents[1]

# A user's script: several LoRA files on one pipeline, found, applied and loaded with nothing but lora.py.
USER_SCRIPT = """
import torch
from diffusers import StableDiffusionPipeline
from networks.lora import LoRAModule, create_network_from_weights
from safetensors.torch import load_file

device = "cpu"
pipe = StableDiffusionPipeline.from_pretrained("model", revision="fp16", torch_dtype=torch.float32)
pipe = pipe.to(device)
vae = pipe.vae
text_encoder = pipe.text_encoder
unet = pipe.unet

sd = load_file("lora1.safetensors")
network1, sd = create_network_from_weights(0.5, None, vae, text_encoder, unet, sd)
network1.apply_to(text_encoder, unet)
network1.load_state_dict(sd)
network1.to(device, dtype=torch.float32)

sd = load_file("lora2.safetensors")
network2, sd = create_network_from_weights(0.7, None, vae, text_encoder, unet, sd)
network2.apply_to(text_encoder, unet)
network2.load_state_dict(sd)
network2.to(device, dtype=torch.float32)

sd = load_file("lora3.safetensors")
network3, sd = create_network_from_weights(0.5, None, vae, text_encoder, unet, sd)
network3.merge_to(text_encoder, unet, sd)

with torch.autocast(device):
    image = pipe("a red circle", guidance_scale=7.5, negative_prompt="blue", num_inference_steps=2).images[0]
network1.set_multiplier(0.8)
with torch.autocast(device):
    pipe("a red circle", guidance_scale=7.5, negative_prompt="blue", num_inference_steps=2)
image.save("by_diffusers..png")
"""


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level tokenizer without merges: every byte, in and at the end of a word, is a token."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def make_text_encoder(kind: type[nn.Module], tokenizer: CLIPTokenizer, width: int = 32) -> nn.Module:
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_unet(**settings: object) -> UNet2DConditionModel:
    defaults = {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**defaults, **settings})


def make_pipeline(family: str = "sd1") -> DiffusionPipeline:
    """SD 1.x, SD 2.x or SDXL in structure, random in weights, about half a million parameters, 32x32 pixels."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    vae = AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        force_upcast=False,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction" if family == "sd2" else "epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    text_encoder = make_text_encoder(CLIPTextModel, tokenizer)
    parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "scheduler": scheduler}
    if family == "sdxl":
        unet = make_unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=32 + 64,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 64,
        )
        second = make_text_encoder(CLIPTextModelWithProjection, tokenizer, 64)
        pipeline = StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=tokenizer, unet=unet)
    else:
        unet = make_unet(attention_head_dim=(4, 8), use_linear_projection=True) if family == "sd2" else make_unet()
        pipeline = StableDiffusionPipeline(
            **parts, unet=unet, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def text_encoders(pipeline: DiffusionPipeline) -> nn.Module | list[nn.Module]:
    """What networks are given: a module, or for SDXL a list of two."""
    if isinstance(pipeline, StableDiffusionXLPipeline):
        return [pipeline.text_encoder, pipeline.text_encoder_2]
    return pipeline.text_encoder


def random_network(
    pipeline: DiffusionPipeline, seed: int, rank: int = 4, alpha: float = 2.0, **arguments: object
) -> LoRANetwork:
    network = create_network(1.0, rank, alpha, pipeline.vae, text_encoders(pipeline), pipeline.unet, **arguments)
    torch.manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1 if arguments else 0.2)
    return network


def paint(pipeline: DiffusionPipeline) -> np.ndarray:
    """One picture as levels 0..255, (H, W, 3)."""
    generator = torch.Generator().manual_seed(1)
    images = pipeline("a red circle", num_inference_steps=4, generator=generator, output_type="np").images
    return images[0] * 255


@pytest.fixture(scope="module")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {family: tmp_path_factory.mktemp(family) for family in ("sd1", "sd2", "sdxl")}
    for family, folder in folders.items():
        make_pipeline(family).save_pretrained(folder)
    return folders


def load_pipeline(folder: Path) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_users_script_runs_with_lora_py_alone(model_folders, tmp_path):
    pipeline = load_pipeline(model_folders["sd1"])
    for number in (1, 2, 3):
        random_network(pipeline, number, rank=number).save_weights(tmp_path / f"lora{number}.safetensors")
    (tmp_path / "networks").mkdir()
    shutil.copy(REPOSITORY / "networks" / "lora.py", tmp_path / "networks")
    shutil.copytree(model_folders["sd1"], tmp_path / "model")
    (tmp_path / "script.py").write_text(USER_SCRIPT, encoding="utf-8")
    result = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "by_diffusers..png").stat().st_size > 0


WITH_CONVOLUTIONS = {"conv_dim": "3", "conv_alpha": "2"}


@pytest.mark.parametrize(
    ("family", "dtype", "arguments"),
    [
        ("sd1", torch.float32, {}),
        ("sd1", torch.float16, {}),
        ("sd2", torch.float32, {}),
        ("sdxl", torch.float32, {}),
        ("sd1", torch.float32, WITH_CONVOLUTIONS),
        ("sdxl", torch.float32, WITH_CONVOLUTIONS),
    ],
)
def test_diffusers_paints_the_same_picture_with_our_file(model_folders, tmp_path, family, dtype, arguments):
    folder, file = model_folders[family], tmp_path / "lora.safetensors"
    ours = load_pipeline(folder)
    plain = paint(ours)
    random_network(ours, seed=3, **arguments).save_weights(file, dtype)
    network, weights = create_network_from_weights(1.0, file, ours.vae, text_encoders(ours), ours.unet)
    network.apply_to(text_encoders(ours), ours.unet)
    network.load_state_dict(weights)
    applied = paint(ours)

    theirs = load_pipeline(folder)
    theirs.load_lora_weights(file)
    loaded = paint(theirs)

    assert np.abs(applied - plain).mean() > 4, "the LoRA must be seen for its picture to be compared"
    assert np.abs(applied - loaded).max() < 0.1

    network.set_multiplier(0)
    assert np.array_equal(paint(ours), plain)
    network.set_multiplier(1)
    merged = load_pipeline(folder)
    network.merge_to(text_encoders(merged), merged.unet, weights)
    assert np.abs(applied - paint(merged)).max() < 0.1
