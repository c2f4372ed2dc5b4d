"""Models of every family: from the original file to memory and back, what is not theirs, what networks see of them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from library.errors import UserError
from library.models.family import Family
from library.models.files.checkpoint import open_weights, write_tensors
from library.models.registry import FAMILIES, inspect_model, load_model
from library.models.sgm_keys import CLIP_PREFIX, OPEN_CLIP_PREFIX, SDXL_CLIP_PREFIX, SDXL_OPEN_CLIP_PREFIX
from library.models.text import TextEncoder
from networks.lora import create_network
from tests import tiny
from tests.full_size import CONFIGS
from tests.test_lora_names import published_shapes, shapes_of

NAMES = list(tiny.CONFIGS)
UNET_WEIGHT = "model.diffusion_model.out.2.weight"
POSITION_IDS = {
    "sd1": f"{CLIP_PREFIX}embeddings.position_ids",
    "sdxl": f"{SDXL_CLIP_PREFIX}embeddings.position_ids",
}
# What published files hold besides, and no module uses.
EXTRAS = {
    "sd1": {POSITION_IDS["sd1"]: torch.arange(77)[None], "betas": torch.rand(1000)},
    "sd2": {
        f"{OPEN_CLIP_PREFIX}text_projection": torch.rand(64, 64),
        "sqrt_one_minus_alphas_cumprod": torch.rand(1000),
    },
    "sdxl": {
        POSITION_IDS["sdxl"]: torch.arange(77)[None],
        f"{SDXL_OPEN_CLIP_PREFIX}logit_scale": torch.tensor(4.6),
        "denoiser.sigmas": torch.rand(1000),
    },
}


@pytest.fixture(scope="module", params=NAMES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def tensors(family) -> dict[str, Tensor]:
    """All that is in a file of this family."""
    return dict(tiny.make_model(family).tensors()) | EXTRAS[family]


def read(path: Path) -> dict[str, Tensor]:
    with open_weights(path) as file:
        return file.tensors()


def write(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> Path:
    write_tensors(path, tensors, dtype)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_file_comes_back_as_it_was(tmp_path, family, tensors, suffix, dtype):
    path = write(tmp_path / f"model{suffix}", tensors, dtype)
    model = load_model(path, dtype)
    assert model.name == family
    model.save(tmp_path / f"again{suffix}")
    before, after = read(path), read(tmp_path / f"again{suffix}")
    assert after.keys() == before.keys()
    assert all(after[key].dtype == before[key].dtype and torch.equal(after[key], before[key]) for key in before)
    if suffix == ".safetensors":
        assert tiny.stored(tmp_path / f"again{suffix}") == tiny.stored(path)


def test_weights_take_the_precision_asked_for_and_tables_keep_their_own(tmp_path, family, tensors):
    mixed = {key: tensor.half() if key.startswith("model.") else tensor for key, tensor in tensors.items()}
    model = load_model(write(tmp_path / "model.safetensors", mixed), torch.bfloat16, vae_dtype=torch.float32)
    for name, (module, _) in model.components().items():
        wanted = torch.float32 if name == "vae" else torch.bfloat16
        assert {tensor.dtype for tensor in module.state_dict().values()} == {wanted}
    weights = type(model).text_outputs.prefixes
    for key in EXTRAS[family]:
        is_weight = key.startswith(weights) and not key.endswith("position_ids")
        assert model.carried[key].dtype == (torch.bfloat16 if is_weight else tensors[key].dtype), key
    model.save(tmp_path / "half.safetensors", torch.float16)
    dtypes = {key: tensor.dtype for key, tensor in read(tmp_path / "half.safetensors").items()}
    assert {dtype for key, dtype in dtypes.items() if not key.endswith("position_ids")} == {torch.float16}


def test_what_training_left_in_a_file_is_dropped_with_one_notice(tmp_path, family, tensors, fresh_console, capsys):
    averaged = {f"model_ema.{key.replace('.', '')}": tensors[key] for key in list(tensors)[:3]}
    loaded = load_model(write(tmp_path / "model.safetensors", tensors | averaged))
    assert loaded.tensors().keys() == tensors.keys()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert f"{tmp_path / 'model.safetensors'}: 3 tensors of its training" in line


def test_unknown_and_missing_tensors_are_named(tmp_path, family, tensors):
    with pytest.raises(UserError, match=r"holds tensors that no .+ model has: something\.else$"):
        load_model(write(tmp_path / "more.safetensors", tensors | {"something.else": torch.zeros(1)}))
    for key in (UNET_WEIGHT, next(key for key in tensors if "resblocks.0.attn" in key or "layers.0.self_attn" in key)):
        less = {name: tensor for name, tensor in tensors.items() if name != key}
        with pytest.raises(UserError, match=f"less.safetensors lacks {key}"):
            load_model(write(tmp_path / "less.safetensors", less))


def test_one_tensor_under_two_names_is_not_dropped_silently(tmp_path, model_files):
    key = f"{CLIP_PREFIX}final_layer_norm.weight"
    other = key.replace("text_model.", "")
    tensors = read(model_files("sd1"))
    path = write(tmp_path / "both.safetensors", tensors | {other: tensors[key] + 1})
    with pytest.raises(UserError) as error:
        inspect_model(path)
    assert str(error.value).startswith(f"{path} holds one tensor under two names, ")
    assert key in str(error.value)
    assert other in str(error.value)


@pytest.mark.parametrize("name", POSITION_IDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.int64])
def test_right_position_ids_stay_as_they_are(tmp_path, model_files, fresh_console, capsys, name, dtype):
    ids = torch.arange(77, dtype=dtype)[None]
    loaded = load_model(write(tmp_path / "m.safetensors", read(model_files(name)) | {POSITION_IDS[name]: ids}))
    assert torch.equal(loaded.tensors()[POSITION_IDS[name]], ids)
    assert loaded.tensors()[POSITION_IDS[name]].dtype == dtype
    assert "position ids" not in capsys.readouterr().err


@pytest.mark.parametrize("name", POSITION_IDS)
@pytest.mark.parametrize("shift", [-0.01, 0.01])
def test_damaged_position_ids_are_mended_with_a_warning(tmp_path, model_files, fresh_console, capsys, name, shift):
    ids = torch.arange(77)[None] + torch.tensor(shift)
    path = write(tmp_path / "m.safetensors", read(model_files(name)) | {POSITION_IDS[name]: ids})
    load_model(path).save(tmp_path / "again.safetensors")
    assert "its position ids are damaged" in capsys.readouterr().err
    assert torch.equal(read(tmp_path / "again.safetensors")[POSITION_IDS[name]], torch.arange(77)[None])
    with torch.no_grad():
        text = [load_model(file).encode_text(["a red circle"])["hidden_state1"] for file in (path, model_files(name))]
    assert torch.equal(*text)


def test_the_unused_text_layer_goes_back_and_a_second_one_does_not_exist(tmp_path, model_files):
    """Of Stable Diffusion 2.x's layers the last has no part in the answer, whatever is in it."""
    tensors = read(model_files("sd2"))
    last = {key for key in tensors if ".resblocks.2." in key}
    assert len(last) == 12
    changed = tensors | {key: tensors[key] + 1 for key in last}
    one, other = load_model(model_files("sd2")), load_model(write(tmp_path / "other.safetensors", changed))
    assert one.text_encoders[0].layers == 2
    assert all(torch.equal(other.tensors()[key], changed[key]) for key in last)
    with torch.no_grad():
        assert torch.equal(*(model.encode_text(["a circle"])["hidden_state1"] for model in (one, other)))
    one_less = {key: tensor for key, tensor in tensors.items() if key != min(last)}
    with pytest.raises(UserError, match=f"less.safetensors lacks {min(last)}"):
        load_model(write(tmp_path / "less.safetensors", one_less))
    flat = tensors | {min(last): tensors[min(last)].reshape(1, -1)}
    with pytest.raises(UserError, match=f"does not fit together: {min(last)} has shape"):
        load_model(write(tmp_path / "flat.safetensors", flat))
    foreign = tensors | {f"{OPEN_CLIP_PREFIX}transformer.resblocks.2.lora": torch.ones(2)}
    with pytest.raises(UserError, match=r"model has: .+resblocks\.2\.lora$"):
        load_model(write(tmp_path / "foreign.safetensors", foreign))
    further = {key.replace(".resblocks.2.", ".resblocks.4."): tensors[key] for key in last}
    with pytest.raises(UserError, match=r"no Stable Diffusion 2\.x model has: .+resblocks\.4"):
        load_model(write(tmp_path / "further.safetensors", tensors | further))


def test_files_are_recognised_from_their_header(model_files, family):
    info = inspect_model(model_files(family))
    assert (info.family.name, info.kind, info.input_channels) == (family, None, 4)
    model = info.load(torch.float16)
    assert info.latents == model.latents
    assert (model.latents.scale, model.latents.default_size) == (
        (0.13025, 1024) if family == "sdxl" else (0.18215, 512)
    )


@pytest.mark.parametrize(
    ("channels", "kind"),
    [
        (9, "an inpainting model"),
        (5, "a depth-to-image model"),
        (8, "a model that edits images by instructions"),
        (7, "a model whose U-Net reads 7 channels"),
    ],
)
def test_models_that_read_more_than_latents_are_loaded_and_named(tmp_path, family, channels, kind):
    path = tiny.save_model(tmp_path / "model.safetensors", family, unet_config={"in_channels": channels})
    info = inspect_model(path)
    assert info.kind == kind
    assert info.latents.channels == 4
    info.load().save(tmp_path / "again.safetensors")
    assert tiny.stored(tmp_path / "again.safetensors") == tiny.stored(path)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (
            ("model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.model.ln_final.bias"),
            "is an SDXL refiner, which cannot be trained here",
        ),
        (("double_blocks.0.img_attn.norm.key_norm.scale",), "is a FLUX model"),
        (("model.diffusion_model.double_blocks.0.img_mod.lin.weight",), "is a FLUX model"),
        (("model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.bias",), "is an SD3 model"),
        (("control_model.input_blocks.0.0.weight",), "is a ControlNet, not a model"),
        (("controlnet_down_blocks.0.weight", "down_blocks.0.resnets.0.conv1.weight"), "is a ControlNet, not a model"),
        (("model.diffusion_model.input_blocks.0.0.weight",), "has a U-Net but no text encoder"),
        (("encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"), "is an autoencoder without its model"),
        (("text_model.encoder.layers.0.mlp.fc1.bias",), "is a text encoder without its model"),
        (("clip_l", "clip_g"), "is a Textual Inversion embedding"),
    ],
)
def test_what_is_no_model_is_named(tmp_path, keys, sentence):
    path = write(tmp_path / "x.safetensors", {key: torch.zeros(2, 2) for key in keys})
    with pytest.raises(UserError) as error:
        inspect_model(path)
    assert str(error.value).startswith(f"{path} {sentence}")


def test_a_text_encoder_of_another_model_does_not_fit(tmp_path, family, model_files):
    other = read(tiny.save_model(tmp_path / "other.safetensors", family, unet_config={"cross_attention_dim": 40}))
    unet = {key: tensor for key, tensor in other.items() if key.startswith("model.diffusion_model.")}
    path = write(tmp_path / "mixed.safetensors", read(model_files(family)) | unet)
    with pytest.raises(UserError, match=r"does not fit together: its text encoder.* U-Net reads 40"):
        load_model(path)


def full_size(family: str) -> Family:
    kind = next(kind for kind in FAMILIES if kind.name == family)
    with torch.device("meta"):
        return kind.from_configs(**CONFIGS[family])


def test_networks_get_the_published_names_and_the_models_own_layers(family):
    model = full_size(family)
    points = model.attach_points()
    text = points.text_encoders if family == "sdxl" else points.text_encoders[0]
    network = create_network(1.0, 4, 1.0, None, text, points.unet)
    assert shapes_of(network) == published_shapes(family, convolutional=False)
    own = {id(module) for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    seen = [module for root in (*points.text_encoders, points.unet) for module in root.modules()]
    leaves = [module for module in seen if isinstance(module, nn.Linear | nn.Conv2d)]
    assert {id(module) for module in leaves} <= own
    assert len(leaves) == len({id(module) for module in leaves})


def test_sizes_reach_the_denoiser_of_sdxl_in_their_order():
    """Any of the six numbers changes the answer, and no two of them mean the same."""
    model = tiny.make_model("sdxl")
    sizes = torch.tensor([[32.0, 48, 0, 0, 32, 48]])
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def answer(sizes: Tensor) -> Tensor:
        condition = model.condition(model.encode_text(["a circle"]), sizes)
        return model.denoise(noisy, torch.tensor([500]), condition)

    answers = [answer(sizes)]
    for position in range(6):
        changed = sizes.clone()
        changed[0, position] += 100
        answers.append(answer(changed))
    for number, one in enumerate(answers):
        assert all((one - other).abs().max() > 1e-6 for other in answers[number + 1 :])


@torch.no_grad()
def test_sizes_stay_exact_in_half_precision():
    """1023 and 1025 pixels are the same number in bfloat16."""
    model = tiny.make_model("sdxl").to(torch.bfloat16)
    seen = []
    model.unet.add_time_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    sizes = torch.tensor([[1023, 1025, 0, 0, 1023, 1025]])
    model.denoise(torch.zeros(1, 4, 8, 8), torch.tensor([1]), model.condition(model.encode_text(["a"]), sizes))
    assert seen[0].tolist() == sizes[0].tolist()


def test_gradient_checkpointing_changes_no_gradient(family):
    gradients = []
    for checkpointing in (False, True):
        model = tiny.make_model(family).train()
        if checkpointing:
            model.enable_gradient_checkpointing(unet=True, text_encoders=True)
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        condition = model.condition(model.encode_text(["a red circle"]), torch.tensor([[16, 16, 0, 0, 16, 16]]))
        model.denoise(latents, torch.tensor([10]), condition).square().mean().backward()
        layers = [encoder.clip.encoder.layers[0].mlp.fc1 for encoder in model.text_encoders]
        gradients.append([layer.weight.grad for layer in (model.unet.conv_in, *layers)])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(recomputed, plain)


def test_every_encoder_is_one_of_text(family):
    model = tiny.make_model(family)
    assert all(isinstance(encoder, TextEncoder) for encoder in model.text_encoders)
    assert len(model.text_encoders) == len(model.tokenizers()) == len(model.text_outputs.prefixes)
    text = model.encode_text(["a", "b c"])
    assert text.keys() == model.text_outputs.arrays.keys()
    assert {len(tensor) for tensor in text.values()} == {2}
