"""Models written as Diffusers folders: what Diffusers makes of them, and what comes back."""

import dataclasses
import json
import os
import shutil
import warnings

import diffusers
import numpy as np
import pytest
import torch

from library.errors import UserError
from library.generation.paint import paint
from library.generation.prompts import PromptLine
from library.models import diffusers_writer
from library.models.diffusers_writer import check_replaceable, scheduler, write_folder
from library.models.files.safetensors_file import SafetensorsFile
from library.models.noise import Prediction
from library.models.registry import load_model
from tests.pipelines import picture_of, pixels
from tests.tiny import make_model

REQUEST = PromptLine("hi! a red circle", "blue", width=32, height=48, seed=3, scale=5.0, sample_steps=6)
SAMPLERS = {"sd1": "pndm", "sd2": "ddim", "sdxl": "euler"}
CARRIED = {
    "sd1": {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]},
    "sd2": {},  # the unused layer, which `make_model` puts there
    "sdxl": {"conditioner.embedders.1.model.logit_scale": torch.tensor(4.5)},
}


def published(family):
    """A model that carries what its files hold besides."""
    model = make_model(family)
    model.carried |= CARRIED[family]
    return model


def pipeline_at(folder, **arguments):
    """What a user's first line with Diffusers loads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, **arguments)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("family", SAMPLERS)
def test_diffusers_paints_the_picture_we_paint(tmp_path, family):
    model = published(family)
    write_folder(model, tmp_path / "model")
    pipeline = pipeline_at(tmp_path / "model")
    for request in (REQUEST, dataclasses.replace(REQUEST, negative_prompt=None)):
        ours = pixels(paint(model, request, default_sampler=SAMPLERS[family]))
        assert np.ptp(ours) > 20, "there must be a picture to compare"
        assert np.abs(ours - picture_of(pipeline, request)).max() <= 1


@pytest.mark.parametrize("carries", [True, False])
@pytest.mark.parametrize("family", SAMPLERS)
def test_a_model_comes_back_bit_for_bit(tmp_path, fresh_console, capsys, family, carries):
    model = published(family)
    if not carries:
        model.carried = {}
    model.save(tmp_path / "file.safetensors")
    write_folder(model, tmp_path / "model")
    load_model(tmp_path / "model").save(tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == (tmp_path / "file.safetensors").read_bytes()
    assert capsys.readouterr().err == ""


def test_half_precision_pickled_folders_paint_with_default_arguments(tmp_path):
    write_folder(make_model("sdxl"), tmp_path / "model", torch.float16, safetensors=False)
    assert [path.name for path in tmp_path.rglob("*.safetensors")] == ["original_layout.safetensors"]
    pipeline = pipeline_at(tmp_path / "model")
    assert {module.dtype for module in (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)} == {
        torch.float32
    }
    half = pipeline_at(tmp_path / "model", torch_dtype=torch.float16)
    assert half.text_encoder_2.dtype == torch.float16
    assert torch.equal(half.unet.conv_in.weight.float(), pipeline.unet.conv_in.weight)


@pytest.mark.parametrize(
    ("family", "prediction", "kind"),
    [
        ("sd1", Prediction(), "PNDMScheduler"),
        ("sd1", Prediction("v_prediction"), "DDIMScheduler"),
        ("sd2", Prediction("v_prediction", zero_terminal_snr=True), "DDIMScheduler"),
        ("sd2", Prediction(zero_terminal_snr=True), "EulerDiscreteScheduler"),
        ("sdxl", Prediction("v_prediction"), "EulerDiscreteScheduler"),
    ],
)
def test_the_scheduler_fits_what_is_predicted_and_is_read_back(tmp_path, family, prediction, kind):
    model = make_model(family)
    model.prediction = prediction
    assert scheduler(model)["_class_name"] == kind
    write_folder(model, tmp_path / "model")
    assert load_model(tmp_path / "model").prediction == prediction
    pipeline = pipeline_at(tmp_path / "model")
    assert type(pipeline.scheduler).__name__ == kind
    assert pipeline.scheduler.config.prediction_type == prediction.kind
    picture = picture_of(pipeline, REQUEST)
    if kind == "DDIMScheduler":
        assert np.abs(picture - pixels(paint(model, REQUEST))).max() <= 1


def test_components_say_their_own_sizes_and_what_overflows(tmp_path):
    model = make_model("sd2")
    model.prediction = Prediction("v_prediction")
    write_folder(model, tmp_path / "v", metadata={"ss_steps": "3", "modelspec.hash_sha256": "0x" + "0" * 64})
    unet = json.loads((tmp_path / "v/unet/config.json").read_text())
    assert unet["sample_size"] == 768 // model.latents.factor
    assert unet["upcast_attention"] is True
    write_folder(make_model("sdxl"), tmp_path / "sdxl")
    vae = json.loads((tmp_path / "sdxl/vae/config.json").read_text())
    assert (vae["scaling_factor"], vae["force_upcast"], vae["sample_size"]) == (0.13025, True, 1024)
    with SafetensorsFile(tmp_path / "v/text_encoder/model.safetensors") as file:
        file.verify()
        assert {"format": "pt", "ss_steps": "3"}.items() <= file.metadata.items()
        assert all(key.startswith("text_model.") for key in file.keys())  # noqa: SIM118 - a file is no mapping


def test_damage_to_a_part_is_noticed(tmp_path):
    write_folder(make_model(), tmp_path / "model")
    file = tmp_path / "model/unet/diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="unet/diffusion_pytorch_model"):
        load_model(tmp_path / "model")


def test_an_older_model_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    write_folder(make_model(), folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def full_disk(path, *_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(diffusers_writer, "_write_tokenizer", full_disk)
        with pytest.raises(UserError, match="model cannot be written: No space left"):
            write_folder(make_model("sdxl"), folder)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "model.tmp/unet").mkdir(parents=True)  # of a run that was killed
    (tmp_path / "model.tmp/unet/diffusion_pytorch_model.safetensors.123.tmp").write_text("half")
    os.replace(folder, tmp_path / "model.replaced.tmp")  # and of one between its last two steps
    with monkeypatch.context() as patch:
        patch.setattr(diffusers_writer, "_write_tokenizer", full_disk)
        with pytest.raises(UserError):
            write_folder(make_model("sdxl"), folder)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    write_folder(make_model("sdxl"), folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (folder / "text_encoder_2").is_dir()


def test_other_folders_are_not_replaced(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"other things in it \(photo\.png\)"):
        write_folder(make_model(), tmp_path)
    with pytest.raises(UserError, match="is a file"):
        write_folder(make_model(), tmp_path / "photo.png")
    with pytest.raises(UserError, match="/ has no name of its own"):
        write_folder(make_model(), "/")


def test_what_a_user_put_beside_a_model_is_not_removed(tmp_path):
    write_folder(make_model(), tmp_path / "model")
    (tmp_path / "model/my_loras").mkdir()
    (tmp_path / "model/v1-5.safetensors").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"\(my_loras, v1-5\.safetensors\), which would be lost"):
        write_folder(make_model(), tmp_path / "model")
    assert (tmp_path / "model/v1-5.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize(
    "own", ["unet/own/a", "vae/notes.txt", "vae/mine.safetensors", "tokenizer/words.json", "scheduler/old.json"]
)
def test_what_a_user_put_into_a_part_is_not_removed(tmp_path, reference, own):
    shutil.copytree(reference, tmp_path / "model")
    (tmp_path / "model" / own).parent.mkdir(exist_ok=True)
    (tmp_path / "model" / own).write_text("mine")
    named = "/".join(own.split("/")[:2])
    with pytest.raises(UserError, match=rf"\({named}\), which would be lost"):
        write_folder(make_model(), tmp_path / "model")
    assert (tmp_path / "model" / own).read_text() == "mine"


def test_what_other_programs_write_is_a_model_to_replace(tmp_path, reference):
    shutil.copytree(reference, tmp_path / "model")
    weights = tmp_path / "model/unet/diffusion_pytorch_model.safetensors"
    for end in ("fp16.safetensors", "safetensors.index.json", "bin", "fp16-00001-of-00002.safetensors"):
        shutil.copy(weights, weights.with_name(f"diffusion_pytorch_model.{end}"))
    (tmp_path / "model/text_encoder/pytorch_model.bin").write_bytes(b"")
    (tmp_path / "model/tokenizer/tokenizer.json").write_bytes(b"")
    check_replaceable(tmp_path / "model")


@pytest.mark.parametrize("name", ["model.tmp", "model.replaced.tmp"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_users_folder_is_not_taken_for_an_unfinished_one(tmp_path, reference, name, exists):
    if exists:
        shutil.copytree(reference, tmp_path / "model")
    (tmp_path / name / "unet").mkdir(parents=True)
    (tmp_path / name / "unet/photo.png").write_text("mine")
    with pytest.raises(UserError, match=rf"{name} is in the way .*\(unet/photo\.png\)"):
        write_folder(make_model(), tmp_path / "model")
    assert (tmp_path / name / "unet/photo.png").read_text() == "mine"
    shutil.rmtree(tmp_path / name)
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=rf"{name} is in the way"):
        check_replaceable(tmp_path / "model")


def test_a_copied_tokenizer_brings_nothing_else(tmp_path, reference):
    shutil.copytree(reference, tmp_path / "theirs")
    (tmp_path / "theirs/tokenizer/.cache").mkdir()
    (tmp_path / "theirs/tokenizer/notes.txt").write_text("theirs")
    write_folder(make_model(), tmp_path / "model", reference=tmp_path / "theirs")
    names = {file.name for file in (reference / "tokenizer").iterdir()}
    assert {file.name for file in (tmp_path / "model/tokenizer").iterdir()} == names
    check_replaceable(tmp_path / "model")


def test_the_folder_one_stands_in(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    write_folder(make_model(), ".")
    assert load_model(tmp_path / "model").name == "sd1"


@pytest.mark.parametrize(
    ("family", "channels", "kind"),
    [
        ("sd1", 9, "StableDiffusionInpaintPipeline"),
        ("sd1", 8, "StableDiffusionInstructPix2PixPipeline"),
        ("sdxl", 9, "StableDiffusionXLInpaintPipeline"),
        ("sdxl", 8, "StableDiffusionXLInstructPix2PixPipeline"),
    ],
)
def test_models_that_read_a_picture_get_the_pipeline_for_it(tmp_path, caplog, family, channels, kind):
    model = make_model(family, unet_config={"in_channels": channels})
    write_folder(model, tmp_path / "model")
    pipeline = pipeline_at(tmp_path / "model")
    assert type(pipeline).__name__ == kind
    assert torch.equal(pipeline.unet.conv_in.weight, model.unet.conv_in.weight)
    assert torch.equal(load_model(tmp_path / "model").unet.conv_in.weight, model.unet.conv_in.weight)
    assert "not expected" not in caplog.text  # what Diffusers says of entries that its class does not know


@pytest.mark.parametrize("channels", [5, 7])
def test_a_model_that_no_pipeline_is_for_is_not_written_as_a_folder(tmp_path, channels):
    model = make_model("sd2", unet_config={"in_channels": channels})
    with pytest.raises(UserError, match=f"reads {channels} channels, .* write a .safetensors"):
        write_folder(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "model"
    write_folder(make_model(), folder)
    return folder


def with_scheduler(reference, folder, kind, **config):
    """A copy of a reference with another scheduler."""
    shutil.copytree(reference, folder)
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": kind, **config}))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", kind]}))
    return folder


def test_what_the_model_predicts_wins_over_a_reference(tmp_path, reference):
    theirs = with_scheduler(reference, tmp_path / "theirs", "DDIMScheduler", prediction_type="epsilon", eta_of_mine=1)
    model = make_model("sd2")
    model.prediction = Prediction("v_prediction", zero_terminal_snr=True)
    write_folder(model, tmp_path / "model", reference=theirs)
    scheduler = pipeline_at(tmp_path / "model").scheduler
    assert type(scheduler).__name__ == "DDIMScheduler"
    assert scheduler.alphas_cumprod[-1] == 0
    assert (scheduler.config.prediction_type, scheduler.config.timestep_spacing) == ("v_prediction", "trailing")
    assert "eta_of_mine" in (tmp_path / "model/scheduler/scheduler_config.json").read_text()
    assert load_model(tmp_path / "model").prediction == model.prediction


@pytest.mark.parametrize(
    ("kind", "prediction", "said"),
    [
        ("PNDMScheduler", Prediction("v_prediction", zero_terminal_snr=True), "a PNDMScheduler, which cannot step"),
        ("DDIMScheduler", Prediction(zero_terminal_snr=True), "predicts epsilon, with zero terminal SNR"),
        ("NoSuchScheduler", Prediction(), "names no scheduler"),
    ],
)
def test_a_reference_that_contradicts_the_model_is_refused(tmp_path, reference, kind, prediction, said):
    model = make_model()
    model.prediction = prediction
    with pytest.raises(UserError, match=said):
        write_folder(
            model, tmp_path / "model", reference=with_scheduler(reference, tmp_path / "theirs", kind, steps_offset=1)
        )
    assert not (tmp_path / "model").exists()


def test_files_say_what_wrote_them_and_what_they_predict(tmp_path):
    model = make_model("sd2")
    model.prediction = Prediction("v_prediction")
    model.save(tmp_path / "file.safetensors", metadata={"modelspec.implementation": "mine"})
    write_folder(model, tmp_path / "model", metadata={"modelspec.implementation": "mine"})
    for path in (tmp_path / "file.safetensors", tmp_path / "model/unet/diffusion_pytorch_model.safetensors"):
        with SafetensorsFile(path) as file:
            told = {name.removeprefix("modelspec."): text for name, text in file.metadata.items()}
        assert told["implementation_version"].startswith("atelier")
        assert (told["architecture"], told["prediction_type"]) == ("stable-diffusion-v2-768-v", "v")
        assert told["implementation"] == "mine", "what the caller says wins"
