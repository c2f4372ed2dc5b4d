"""Whole runs of sdxl_train.py on the tiny model: its parts and blocks at rates of their own, and what is written."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from library.models.blocks import unet_blocks
from library.models.files.checkpoint import open_weights
from library.models.registry import load_model
from library.models.sgm_keys import SDXL_CLIP_PREFIX, SDXL_OPEN_CLIP_PREFIX, UNET_PREFIX, VAE_PREFIX, unet_key_map
from library.models.writing import format_of
from library.options import SdxlFineTuneOptions
from tests import tiny
from tests.tiny import draw_pictures, largest_difference, read_logs, scalars, stored
from tests.whole_models import EVERY_PARAMETER, PROPORTIONAL, ROUNDING, names, unchanged

SCRIPT = "sdxl_train"
BLOCKS = 13
"""Of the tiny model: embeddings, 4 input blocks, 3 in the middle, 4 output blocks, last layers."""
MOVED = [0, 2, 5, 12]
"""Blocks with a rate above 0 in RATES."""
RATES = ",".join("1e-3" if block in MOVED else "0" for block in range(BLOCKS))
SDXL_UNET = tiny.CONFIGS["sdxl"]["unet_config"] | {
    "block_out_channels": (32, 32, 32),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 3),
    "attention_head_dim": 1,
}
"""The U-Net of SDXL in all but its width."""
ENCODERS = (SDXL_CLIP_PREFIX, SDXL_OPEN_CLIP_PREFIX)


@pytest.fixture(scope="module")
def xl_file(model_files) -> Path:
    return model_files("sdxl")


@pytest.fixture
def words(flags, xl_file):
    def make(folder: Path, **changes: object) -> list[str]:
        own = {"network_module": None, "pretrained_model_name_or_path": xl_file}
        return flags(folder, **own | PROPORTIONAL | changes)

    return make


def blocks_of(base: Path, result: Path) -> list[int]:
    """The blocks of the U-Net that have changed."""
    moved = names(base, UNET_PREFIX) - unchanged(base, result)
    return sorted({block for key, block in unet_blocks(moved | names(base, UNET_PREFIX)).items() if key in moved})


# Blocks


def test_blocks_are_counted_as_other_programs_do():
    """0 embeddings, 1-9 input, 10-12 middle, 13-21 output blocks, 22 the last layers."""
    names = unet_key_map(SDXL_UNET).original
    with torch.device("meta"):
        keys = [names(name) for name, _ in UNet2DConditionModel(**SDXL_UNET).named_parameters()]
    blocks = unet_blocks([*keys, f"{VAE_PREFIX}decoder.conv_in.weight"])
    assert blocks.keys() == set(keys)
    assert set(blocks.values()) == set(range(23))
    for name, block in {
        "time_embed.2.bias": 0,
        "label_emb.0.0.weight": 0,
        "input_blocks.0.0.weight": 1,
        "input_blocks.8.1.proj_in.weight": 9,
        "middle_block.0.in_layers.0.weight": 10,
        "middle_block.2.in_layers.0.weight": 12,
        "output_blocks.0.0.in_layers.0.weight": 13,
        "output_blocks.8.0.in_layers.0.weight": 21,
        "out.0.weight": 22,
    }.items():
        assert blocks[f"{UNET_PREFIX}{name}"] == block


def test_each_block_has_its_own_rate_and_those_with_none_stay(run, xl_file, tmp_path, capsys):
    result = run("a", **EVERY_PARAMETER | {"learning_rate": 5}, block_lr=RATES, logging_dir=tmp_path / "logs")
    assert blocks_of(xl_file, result) == MOVED
    assert unchanged(xl_file, result) >= names(xl_file, VAE_PREFIX, *ENCODERS)
    printed, told = capsys.readouterr()
    assert "--learning_rate has no effect: --block_lr" in told
    assert [f"unet_block_{block:02d}: weights changed by" in printed for block in range(BLOCKS)] == [
        block in MOVED for block in range(BLOCKS)
    ]
    log = read_logs(tmp_path / "logs")
    assert {tag for tag in log.Tags()["scalars"] if tag.startswith("lr/")} == {
        f"lr/unet_block_{block:02d}" for block in MOVED
    }
    assert scalars(log, "lr/unet_block_05") == pytest.approx(dict.fromkeys(range(1, 5), 1e-3))


def test_rates_that_are_all_the_same_are_one_rate(run):
    blocks = run("blocks", block_lr=", ".join(["0.1"] * BLOCKS), max_train_steps=2)
    assert stored(blocks) == stored(run("plain", max_train_steps=2))


@pytest.mark.parametrize(
    "changes",
    [
        {"fused_backward_pass": True},
        pytest.param({"fused_optimizer_groups": 4}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_weights_that_move_in_the_backward_pass_keep_the_rates_of_their_blocks(run, xl_file, changes):
    rates = ",".join(f"{block / 100}" for block in range(BLOCKS))
    own = {"block_lr": rates, "train_text_encoder": True, "learning_rate_te1": 0.3, "learning_rate_te2": 0}
    plain, fused = run("plain", **own), run("fused", **own, **changes)
    assert blocks_of(xl_file, fused) == list(range(1, BLOCKS))
    assert largest_difference(plain, fused) < ROUNDING
    assert largest_difference(plain, xl_file) > 1000 * ROUNDING


def test_a_rate_that_is_found_is_found_for_all_blocks_with_one_factor(run, tmp_path):
    rates = ",".join(["1"] * 6 + ["0.5"] * 6 + ["0"])
    run("a", optimizer_type="Prodigy", optimizer_args=None, block_lr=rates, logging_dir=tmp_path / "logs")
    log = read_logs(tmp_path / "logs")
    found = [list(scalars(log, f"lr/unet_block_{block:02d}").values()) for block in range(12)]
    assert found[0] == found[5]
    assert found[6] == found[11]
    assert found[0] != found[6]


@pytest.mark.parametrize(
    ("rates", "reason"),
    [
        ("1,2", "--block_lr: 2 learning rates for the 13 blocks of "),
        ("1,x,3", "--block_lr: 'x', the value of block 1, is not a number of 0 or more"),
        ("1,,3", "--block_lr: '', the value of block 1, is not"),
        ("1,-1", "--block_lr: '-1', the value of block 1, is not"),
        ("1,nan", "--block_lr: 'nan', the value of block 1, is not"),
        (",".join(["0"] * BLOCKS), "nothing is left to train"),
    ],
)
def test_rates_of_blocks_that_cannot_be_are_refused(refused, rates, reason):
    assert reason in refused(block_lr=rates)


def test_an_empty_value_of_a_front_end_is_none():
    assert SdxlFineTuneOptions(block_lr="").block_rates is None


def test_a_state_goes_on_with_the_blocks_that_it_was_made_with(run, refused, tmp_path, capsys):
    """Also where the shapes of all tensors are the same, as in the first and the last block of the middle."""

    def middle(block: int) -> str:
        return ",".join("0.1" if number in (0, block) else "0" for number in range(BLOCKS))

    changes = {"save_state": True, "save_every_n_steps": 2}
    whole = run("whole", block_lr=middle(5), **changes)
    state = tmp_path / "whole" / "run-step00000002-state"
    assert stored(run("resumed", block_lr=middle(5), **changes, resume=state)) == stored(whole)
    why = "(it trains unet_block_05 besides and it does not train unet_block_07, --block_lr is "
    for changes in ({}, {"dry_run": True}):
        message = refused(block_lr=middle(7), resume=state, **changes)
        assert f"{why}{middle(7)} and was {middle(5)})" in message
    capsys.readouterr()
    run("others", block_lr=middle(5).replace("0.1", "0.2"), resume=state)
    told = capsys.readouterr().err
    assert "unet_block_05 learns at 0.1 as before, not at 0.2: --resume_new_learning_rate lets new rates win" in told
    assert "--block_lr is" not in told


# Text encoders


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        ({}, ()),
        ({"train_text_encoder": True}, ENCODERS),
        ({"train_text_encoder": True, "learning_rate_te1": 0}, ENCODERS[1:]),
        ({"train_text_encoder": True, "learning_rate_te2": 0, "mixed_precision": "bf16"}, ENCODERS[:1]),
    ],
    ids=str,
)
def test_text_encoders_are_trained_at_their_rates(run, xl_file, changes, trained):
    result = run("a", **EVERY_PARAMETER, **changes, save_precision="float", max_train_steps=2)
    moved = names(xl_file, *ENCODERS) - unchanged(xl_file, result)
    for prefix in ENCODERS:
        own = {name for name in moved if name.startswith(prefix)}
        # the last layer of the first one has no part in its answer
        assert (len(own) > 5) == (prefix in trained)


def test_the_unet_may_be_the_one_that_stays(run, xl_file):
    changes = {"train_text_encoder": True, "learning_rate_te2": 1e-3, "learning_rate_te1": 0}
    result = run("a", **EVERY_PARAMETER | {"learning_rate": 0}, **changes)
    assert names(xl_file, UNET_PREFIX, VAE_PREFIX, SDXL_CLIP_PREFIX) <= unchanged(xl_file, result)
    assert not names(xl_file, SDXL_OPEN_CLIP_PREFIX) <= unchanged(xl_file, result)


def test_texts_may_be_cached_where_no_encoder_is_trained(run, refused, pictures, tmp_path):
    plain = run("plain")
    still = {"train_text_encoder": True, "learning_rate_te1": 0, "learning_rate_te2": 0}
    assert largest_difference(run("memory", cache_text_encoder_outputs=True, **still), plain) < ROUNDING
    assert "changes while it is trained" in refused(cache_text_encoder_outputs=True, train_text_encoder=True)
    own = tmp_path / "pictures"
    draw_pictures(own / "1_sks shape", 6)
    disk = run("disk", cache_text_encoder_outputs_to_disk=True, train_data_dir=own)
    assert len(list(own.rglob("*_te_outputs.npz"))) == 6
    assert largest_difference(disk, plain) < ROUNDING


# Datasets


def test_it_takes_folders_metadata_files_and_regularisation_images(run, pictures, metadata_file, tmp_path):
    folders = run("folders", max_train_steps=1)
    described = {"train_data_dir": pictures / "1_sks shape", "in_json": metadata_file, "caption_extension": None}
    assert run("metadata", **described, max_train_steps=1).is_file()
    draw_pictures(tmp_path / "reg" / "1_shape", 2)
    regularised = run("regularised", reg_data_dir=tmp_path / "reg", max_train_steps=1)
    assert largest_difference(regularised, folders) > 0


def test_models_of_other_scripts_name_them(refused, model_files):
    first = refused(pretrained_model_name_or_path=model_files("sd1"))
    assert "is a Stable Diffusion 1.x model: train it with fine_tune.py or train_db.py" in first
    assert first.endswith("train_db.py")
    second = refused(pretrained_model_name_or_path=model_files("sd2"))
    assert second.endswith("train it with fine_tune.py or train_db.py with --v2")


# What is written


@pytest.mark.parametrize(
    "kind", ["ckpt", *(pytest.param(f"diffusers{own}", marks=pytest.mark.slow) for own in ("", "_safetensors"))]
)
def test_it_writes_every_format(run, tmp_path, kind):
    changes = {"block_lr": RATES, "max_train_steps": 1, "mixed_precision": "bf16", "full_bf16": True}
    changes |= {"ema": True, "cache_latents": True, "train_text_encoder": True, "learning_rate_te1": 0}
    run("a", **changes, save_model_as=kind)
    ending = "" if kind.startswith("diffusers") else f".{kind}"
    for name in ("run", "run-ema"):
        written = tmp_path / "a" / f"{name}{ending}"
        assert format_of(written) == kind
        model = load_model(written)
        assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
        if kind.startswith("diffusers"):
            pipeline = StableDiffusionXLPipeline.from_pretrained(written, local_files_only=True)
            assert torch.equal(pipeline.unet.conv_out.weight.float(), model.unet.conv_out.weight)


def test_the_file_tells_how_it_was_made(run):
    with open_weights(run("a", max_train_steps=2, block_lr=RATES, metadata_title="Mine")) as file:
        told = file.metadata
        file.verify()
    assert told["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert (told["modelspec.title"], told["ss_steps"]) == ("Mine", "2")
    assert told["ss_base_model_version"] == "sdxl_base_v1-0"
    assert json.loads(told["ss_dataset_dirs"])


def test_what_is_frozen_is_saved_as_exactly_as_it_was_read(run, xl_file):
    """Blocks and parts with a rate of 0, beside others in half precision."""
    changes = {"mixed_precision": "bf16", "train_text_encoder": True, "learning_rate_te1": 0, "learning_rate_te2": 0}
    result = run("a", **EVERY_PARAMETER, block_lr=RATES, **changes, save_precision="float", max_train_steps=1)
    assert blocks_of(xl_file, result) == MOVED
    assert names(xl_file, *ENCODERS) <= unchanged(xl_file, result)
    assert load_file(result).keys() == load_file(xl_file).keys()
