import base64
import dataclasses
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors import safe_open

from library.errors import UserError
from library.models.files.checkpoint import Hashes, hash_file, hash_tensors
from library.models.metadata import (
    BaseModel,
    RunFacts,
    modelspec,
    network_hashes,
    network_metadata,
)
from library.models.noise import Prediction
from library.options import MetadataOptions

SETTINGS = {
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-4,
    "lr_scheduler": "constant",
    "max_grad_norm": 1.0,
    "mixed_precision": "no",
    "network_alpha": 1,
    "network_dim": 4,
    "network_module": "networks.lora",
    "output_dir": "/home/somebody/private",
    "output_name": "k",
    "seed": 42,
    "train_data_dir": "/home/somebody/private/images",
}
DATA = {
    "ss_batch_size_per_device": 2,
    "ss_bucket_info": {"buckets": {"0": {"resolution": [64, 64], "count": 80}}, "mean_img_ar_error": 0.25},
    "ss_bucket_no_upscale": False,
    "ss_dataset_dirs": {"10_sks dog": {"n_repeats": 10, "img_count": 8}},
    "ss_enable_bucket": True,
    "ss_flip_aug": False,
    "ss_keep_tokens": 0,
    "ss_max_bucket_reso": 128,
    "ss_min_bucket_reso": 64,
    "ss_num_batches_per_epoch": 40,
    "ss_num_reg_images": 0,
    "ss_num_train_images": 80,
    "ss_num_validation_images": 0,
    "ss_reg_dataset_dirs": {},
    "ss_resolution": "(64, 64)",
    "ss_shuffle_caption": False,
    "ss_tag_frequency": {"10_sks dog": {"sks dog": 8, "blue sky": 8}},
}
RUN = RunFacts(
    base=BaseModel("sd15.safetensors", "sd_v1", "stable-diffusion-v1", Prediction(), Hashes("ab" * 32, "c6406a4c")),
    datasets=DATA,
    resolution=(64, 64),
    optimizer="torch.optim.adamw.AdamW",
    session_id=2581693713,
    started_at=1795217077.6192226,
    finished_at=1795217113.4265301,
    steps=8,
    max_train_steps=8,
    epoch=1,
    num_epochs=1,
    total_batch_size=2,
)
# The keys that other programs find in a network's file, but for the two hashes of its tensors.
KEYS = set((Path(__file__).parent / "data/golden/metadata_keys.txt").read_text().split())


def test_a_network_has_the_keys_that_others_read():
    metadata = network_metadata(SETTINGS, RUN)
    assert set(metadata) == KEYS
    assert all(isinstance(value, str) for value in metadata.values())


def test_values_are_written_as_others_write_them():
    metadata = network_metadata(SETTINGS, RUN)
    expected = {
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.date": "2026-11-20T23:25:13",
        "modelspec.resolution": "64x64",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": "k",
        "ss_base_model_version": "sd_v1",
        "ss_bucket_info": '{"buckets": {"0": {"resolution": [64, 64], "count": 80}}, "mean_img_ar_error": 0.25}',
        "ss_dataset_dirs": '{"10_sks dog": {"n_repeats": 10, "img_count": 8}}',
        "ss_enable_bucket": "True",
        "ss_learning_rate": "0.0001",
        "ss_network_dropout": "None",
        "ss_new_sd_model_hash": "ab" * 32,
        "ss_reg_dataset_dirs": "{}",
        "ss_resolution": "(64, 64)",
        "ss_sd_model_hash": "c6406a4c",
        "ss_tag_frequency": '{"10_sks dog": {"sks dog": 8, "blue sky": 8}}',
        "ss_training_finished_at": "1795217113.4265301",
    }
    assert {name: metadata[name] for name in expected} == expected


def test_no_path_is_written(tmp_path):
    (tmp_path / "somebody").mkdir()
    preset = tmp_path / "somebody" / "preset.toml"
    preset.touch()
    metadata = network_metadata(SETTINGS | {"network_args": {"preset": str(preset), "algo": "lokr"}}, RUN)
    assert not [name for name, value in metadata.items() if "somebody" in value]
    assert metadata["ss_network_args"] == '{"preset": "preset.toml", "algo": "lokr"}'


def test_several_datasets_are_listed():
    run = dataclasses.replace(RUN, datasets={"ss_num_train_images": 80, "ss_datasets": [{"resolution": (64, 64)}]})
    metadata = network_metadata(SETTINGS, run)
    assert metadata["ss_datasets"] == '[{"resolution": [64, 64]}]'
    assert metadata["ss_num_train_images"] == "80"
    assert "ss_color_aug" not in metadata


def test_without_bucketing_the_bucket_info_is_json_too():
    run = dataclasses.replace(RUN, datasets=DATA | {"ss_bucket_info": None})
    assert network_metadata(SETTINGS, run)["ss_bucket_info"] == "null"


def test_network_arguments_are_written_if_there_are_any():
    metadata = network_metadata(SETTINGS | {"network_args": {"conv_dim": "4"}}, RUN)
    assert metadata["ss_network_args"] == '{"conv_dim": "4"}'


@pytest.mark.parametrize(
    ("rates", "text"), [(None, "None"), ((), "None"), ((0.0,), "0.0"), ((1e-5, 2e-5), "[1e-05, 2e-05]")]
)
def test_one_learning_rate_of_text_encoders_is_a_number_and_several_are_json(rates, text):
    assert network_metadata(SETTINGS | {"text_encoder_lr": rates}, RUN)["ss_text_encoder_lr"] == text


def test_without_metadata_what_a_reader_needs_is_left():
    metadata = network_metadata(SETTINGS | {"no_metadata": True}, RUN)
    left = {name for name in metadata if name.startswith("ss_")}
    assert left == {"ss_base_model_version", "ss_network_alpha", "ss_network_dim", "ss_network_module", "ss_v2"}


def test_descriptions_come_from_their_flags():
    described = {
        "metadata_title": "Sks",
        "metadata_author": "me",
        "metadata_tags": "dog, sks",
        "metadata_license": None,
    }
    fields = modelspec(SETTINGS | described, RUN)
    assert (fields["modelspec.title"], fields["modelspec.author"], fields["modelspec.tags"]) == (
        "Sks",
        "me",
        "dog, sks",
    )
    assert fields["modelspec.architecture"] == "stable-diffusion-v1"
    assert "modelspec.license" not in fields


@pytest.mark.parametrize(
    ("kind", "start"), [("jpeg", b"\xff\xd8\xff"), ("png", b"\x89PNG\r\n\x1a\n"), ("webp", b"RIFF")]
)
def test_a_thumbnail_is_a_data_url(tmp_path, kind, start):
    path = tmp_path / "cover.JPG"
    Image.new("RGB", (8, 8), "red").save(path, kind)
    described = MetadataOptions(metadata_thumbnail=str(path)).described()
    url = modelspec(SETTINGS | described, RUN)["modelspec.thumbnail"]
    media, _, content = url.partition(",")
    assert media == f"data:image/{kind};base64"
    assert base64.b64decode(content, validate=True) == path.read_bytes()
    assert path.read_bytes().startswith(start)
    assert MetadataOptions(metadata_thumbnail=url).described() == described


def test_a_picture_that_cannot_be_a_thumbnail_is_refused(tmp_path):
    (tmp_path / "cover.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(2 << 20))
    (tmp_path / "cover.txt").write_text("red")
    (tmp_path / "sound.webp").write_bytes(b"RIFF\x24\0\0\0WAVEfmt ")
    for name, sentence in (
        ("cover.pgn", r"there is no picture .*cover.pgn, did you mean .*cover.png\?"),
        ("cover.png", r"has 2.0 MB, .* 256x256 pixels will do"),
        ("cover.txt", "is no JPEG, PNG, GIF or WebP picture"),
        ("sound.webp", "is no JPEG, PNG, GIF or WebP picture"),
        (".", "there is no picture"),
    ):
        with pytest.raises(UserError, match=f"^--metadata_thumbnail: .*{sentence}"):
            MetadataOptions(metadata_thumbnail=str(tmp_path / name)).described()


@pytest.mark.parametrize(("text", "told"), [("True", "true"), ("yes", "true"), ("0", "false")])
def test_negative_embeddings_are_told_by_true_and_false(text, told):
    described = MetadataOptions(metadata_is_negative_embedding=text).described()
    assert modelspec(SETTINGS | described, RUN)["modelspec.is_negative_embedding"] == told
    with pytest.raises(UserError, match="'negative' is neither true nor false"):
        MetadataOptions(metadata_is_negative_embedding="negative")


def test_a_run_writes_its_descriptions_and_looks_at_the_picture_first(train, flags, tmp_path, capsys):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "cover.png")
    told = {
        "usage_hint": "as it is",
        "merged_from": "a, b",
        "trigger_phrase": "sks",
        "preprocessor": "canny",
        "is_negative_embedding": "True",
    }
    given = {f"metadata_{name}": text for name, text in told.items()}
    common = {**given, "training_comment": "second try", "max_train_steps": 1}
    with pytest.raises(SystemExit, match="2"):
        train(flags(tmp_path / "out", **common, metadata_thumbnail=tmp_path / "clover.png"))
    assert not (tmp_path / "out").exists()
    for name, changes in (("out", {}), ("bare", {"no_metadata": True})):
        train(flags(tmp_path / name, **common, **changes, metadata_thumbnail=tmp_path / "cover.png"))
        with safe_open(tmp_path / name / "run.safetensors", "pt") as file:
            metadata = file.metadata()
        expected = told | {"is_negative_embedding": "true"}
        assert {key: metadata[f"modelspec.{key}"] for key in told} == expected
        assert metadata["modelspec.thumbnail"].startswith("data:image/png;base64,")
        assert metadata.get("ss_training_comment") == (None if name == "bare" else "second try")
        assert str(tmp_path) not in str(metadata)


def test_what_was_merged_into_the_model_is_named():
    metadata = network_metadata(SETTINGS | {"base_weights": [["style.safetensors", 0.5]]}, RUN)
    assert metadata["ss_base_weights"] == '[["style.safetensors", 0.5]]'


def test_a_base_model_without_hashes():
    run = dataclasses.replace(RUN, base=dataclasses.replace(RUN.base, hashes=None))
    assert not {"ss_sd_model_hash", "ss_new_sd_model_hash"} & network_metadata(SETTINGS, run).keys()


def test_v_prediction_is_written_as_modelspec_names_it():
    assert modelspec(SETTINGS, RUN)["modelspec.prediction_type"] == "epsilon"
    run = dataclasses.replace(RUN, base=dataclasses.replace(RUN.base, prediction=Prediction("v_prediction")))
    assert modelspec(SETTINGS, run)["modelspec.prediction_type"] == "v"


def test_another_autoencoder_is_written_by_name_and_hashes():
    base = dataclasses.replace(RUN.base, vae="better.safetensors", vae_hashes=Hashes("cd" * 32, "12345678"))
    metadata = network_metadata(SETTINGS, dataclasses.replace(RUN, base=base))
    told = {name: value for name, value in metadata.items() if "vae" in name}
    assert told == {
        "ss_vae_name": "better.safetensors",
        "ss_vae_hash": "12345678",
        "ss_new_vae_hash": "cd" * 32,
    }
    folder = dataclasses.replace(RUN, base=dataclasses.replace(base, vae_hashes=None))
    assert "ss_vae_hash" not in network_metadata(SETTINGS, folder)


def test_network_hashes_are_those_of_the_file_with_its_training_metadata_alone(tmp_path):
    tensors = {"a.lora_down.weight": torch.randn(600, 700), "a.alpha": torch.tensor(4.0)}
    [key] = own = {"ss_training_comment": "x" * 1000}
    hashes = network_hashes(tensors, torch.float32, {"modelspec.title": "t", key: own[key], "sshs_model_hash": "old"})
    plain = safetensors.torch.save(tensors, own)
    expected = hash_tensors(tensors, torch.float32, own)
    assert hashes == {"sshs_model_hash": expected.sha256, "sshs_legacy_hash": expected.legacy}
    # another program, which writes the file anew to check it, finds the same
    (tmp_path / "plain.safetensors").write_bytes(plain)
    assert hash_file(tmp_path / "plain.safetensors").legacy == hashes["sshs_legacy_hash"]
