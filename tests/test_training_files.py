"""What a run leaves behind: weights, metadata, previews and logs, as users and their programs find them."""

import hashlib
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from library.generation.paint import paint
from library.generation.prompts import parse_line
from library.models.registry import load_model
from networks.lora import LoRANetwork, create_network_from_weights
from tests.processes import ACCELERATE, train_script
from tests.tiny import draw_pictures, read_log, scalars, stored

DATA = Path(__file__).parent / "data"
PROMPTS = ("a red circle --w 32 --h 32 --s 2 --d 7", "sks --n blue --w 48 --h 32 --s 2 --l 4 --d 8 --ss euler_a")
# the parts of Stable Diffusion 1.x that the tiny model has
PARTS = (
    "lora_te_text_model_encoder_layers_0_",
    "lora_unet_down_blocks_0_attentions_0_",
    "lora_unet_mid_block_attentions_0_",
    "lora_unet_up_blocks_1_attentions_0_",
    "lora_unet_up_blocks_1_attentions_1_",
)


@pytest.fixture(scope="module")
def work(tmp_path_factory, flags):
    """The folder of a run that was started with `accelerate launch`, and the finished process."""
    folder = tmp_path_factory.mktemp("work")
    images = draw_pictures(folder / "data" / "3_sks circle", 3)
    draw_pictures(images, 1, size=(64, 24))
    (folder / "prompts.txt").write_text("# previews\n" + "\n".join(PROMPTS))
    words = flags(
        folder / "out",
        train_data_dir=folder / "data",
        enable_bucket=True,
        min_bucket_reso=16,
        max_bucket_reso=64,
        bucket_reso_steps=16,
        cache_latents=True,
        max_train_steps=8,
        max_data_loader_n_workers=1,
        save_every_n_steps=4,
        save_every_n_epochs=1,
        save_precision="fp16",
        sample_prompts=folder / "prompts.txt",
        sample_every_n_steps=4,
        sample_at_first=True,
        logging_dir=folder / "logs",
        log_prefix="try_",
        metadata_author="me",
        training_comment="a try",
        network_args=("dropout=0.1",),
    )
    return folder, train_script(words, ACCELERATE)


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_a_run_ends_well_and_says_what_it_did(work):
    _, result = work
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert re.search(r"3_sks circle +train +4 +3 +12", result.stdout)
    assert "8 optimizer steps in 1.14 epochs" in result.stdout
    assert re.search(r"unet: weights changed by \d+\.\d+% of their size", result.stdout)


def test_files_have_their_published_names(work):
    out = work[0] / "out"
    weights = ["run-000001", "run-step00000004", "run-step00000008", "run"]
    assert {path.name for path in out.iterdir()} == {"sample", *(f"{name}.safetensors" for name in weights)}
    stamped = [re.fullmatch(r"run_(\d{6}_\d\d)_\d{14}_([78])\.png", path.name) for path in (out / "sample").iterdir()]
    expected = [(f"{step:06d}_{n:02d}", seed) for step in (0, 4, 8) for n, seed in ((0, "7"), (1, "8"))]
    assert sorted(match.groups() for match in stamped) == expected
    (log,) = (work[0] / "logs").iterdir()
    assert re.fullmatch(r"try_\d{14}", log.name)


def test_the_weights_have_the_published_names(work):
    published = [line.split("\t")[0] for line in (DATA / "lora_keys/sd1.tsv").read_text().splitlines()[1:]]
    names = [name for name in published if name.startswith(PARTS)]
    weights = load_file(work[0] / "out" / "run.safetensors")
    assert len(names) == 6 + 4 * 12
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert weights.keys() == {f"{name}.{part}" for name in names for part in parts}
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert all(tensor.any() for tensor in weights.values())


def test_the_metadata_is_complete_and_true(work, model_file):
    folder = work[0]
    metadata = header(folder / "out" / "run.safetensors")
    published = set((DATA / "golden/metadata_keys.txt").read_text().split())
    assert published <= metadata.keys()
    told = {
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.author": "me",
        "modelspec.prediction_type": "epsilon",
        "modelspec.resolution": "32x32",
        "modelspec.title": "run",
        "ss_base_model_version": "sd_v1",
        "ss_batch_size_per_device": "2",
        "ss_epoch": "2",
        "ss_learning_rate": "0.01",
        "ss_max_train_steps": "8",
        "ss_network_dim": "4",
        "ss_network_module": "networks.lora",
        "ss_num_batches_per_epoch": "7",
        "ss_num_epochs": "2",
        "ss_num_train_images": "12",
        "ss_optimizer": "torch.optim.adamw.AdamW",
        "ss_output_name": "run",
        "ss_sd_model_name": "tiny.safetensors",
        "ss_seed": "1",
        "ss_steps": "8",
        "ss_total_batch_size": "2",
        "ss_training_comment": "a try",
    }
    assert {key: metadata[key] for key in told} == told
    assert json.loads(metadata["ss_network_args"]) == {"dropout": "0.1"}
    assert json.loads(metadata["ss_dataset_dirs"]) == {"3_sks circle": {"n_repeats": 3, "img_count": 4}}
    assert not [value for value in metadata.values() if str(folder) in value or str(model_file.parent) in value]
    earlier = header(folder / "out" / "run-step00000004.safetensors")
    assert (earlier["ss_steps"], earlier["ss_epoch"]) == ("4", "1")


def test_hashes_are_those_that_other_programs_compute(work, model_file):
    file = work[0] / "out" / "run.safetensors"
    metadata = header(file)
    model = model_file.read_bytes()
    assert metadata["ss_new_sd_model_hash"] == hashlib.sha256(model).hexdigest()
    assert metadata["ss_sd_model_hash"] == hashlib.sha256(model[0x100000:0x110000]).hexdigest()[:8]
    assert metadata["sshs_model_hash"] == hashlib.sha256(stored(file)).hexdigest()
    own = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    plain = to_bytes(load_file(file), own)
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(plain[0x100000:0x110000]).hexdigest()[:8]


def test_the_log_has_every_step_and_the_previews(work):
    log = read_log(work[0] / "logs")
    steps = list(range(1, 9))
    rates = ("lr/unet", "lr/text_encoder")
    for tag in ("loss/current", "loss/average", *rates, "gradient_norm", "images_per_second", "waiting_for_data"):
        values = scalars(log, tag)
        assert list(values) == steps
        assert all(np.isfinite(value) and value > 0 for value in values.values())
    current = list(scalars(log, "loss/current").values())
    assert scalars(log, "loss/average")[8] == pytest.approx(np.mean(current))
    for number in (0, 1):
        logged = log.Images(f"preview/{number}")
        assert [image.step for image in logged] == [0, 4, 8]
        for image in logged:
            (file,) = (work[0] / "out" / "sample").glob(f"run_{image.step:06d}_{number:02d}_*.png")
            shown = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
            assert np.array_equal(shown, np.asarray(Image.open(file)))


def test_previews_are_those_of_the_saved_file_and_change_nothing(train, flags, tmp_path, model_file):
    random = {"network_dropout": 0.2, "save_precision": "float"}
    train(flags(tmp_path / "plain", **random))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    looking = {"sample_prompts": tmp_path / "prompts.txt", "sample_every_n_steps": 2, "sample_at_first": True}
    train(flags(tmp_path / "watched", save_every_n_steps=2, **looking, **random))
    assert stored(tmp_path / "plain" / "run.safetensors") == stored(tmp_path / "watched" / "run.safetensors")

    model = load_model(model_file)
    points = model.attach_points()
    pictures = {}
    for step in (0, 2, 4):
        if step:
            file = tmp_path / "watched" / f"run-step{step:08d}.safetensors"
            network, weights = create_network_from_weights(1.0, file, None, points.text_encoders[0], points.unet)
            network.apply_to(points.text_encoders[0], points.unet)
            network.load_state_dict(weights)
            network.eval()
        for number, line in enumerate(PROMPTS):
            (preview,) = (tmp_path / "watched" / "sample").glob(f"run_{step:06d}_{number:02d}_*.png")
            pictures[step, number] = np.asarray(paint(model, parse_line(line)))
            assert np.array_equal(np.asarray(Image.open(preview)), pictures[step, number])
        if step:
            network.set_multiplier(0)
    assert not np.array_equal(pictures[0, 0], pictures[2, 0])
    assert not np.array_equal(pictures[2, 0], pictures[4, 0])


def test_previews_by_epoch_are_named_after_it(train, flags, tmp_path):
    (tmp_path / "prompts.txt").write_text(PROMPTS[0])
    looking = {"sample_prompts": tmp_path / "prompts.txt", "sample_every_n_epochs": 1, "sample_every_n_steps": 1}
    train(flags(tmp_path / "out", max_train_epochs=2, **looking))
    names = sorted(path.name for path in (tmp_path / "out" / "sample").iterdir())
    assert [name[: len("run_e000001_00")] for name in names] == ["run_e000001_00", "run_e000002_00"]


def test_what_is_unfinished_is_named_after_the_file_and_the_process(train, flags, tmp_path, monkeypatch):
    save, seen = LoRANetwork.save_weights, []

    def watched(self, *arguments):
        save(self, *arguments)
        seen.extend(path.name for path in tmp_path.iterdir())

    monkeypatch.setattr(LoRANetwork, "save_weights", watched)
    train(flags(tmp_path, max_train_steps=1))
    assert seen == [f"run.safetensors.{os.getpid()}.tmp"]
    assert [path.name for path in tmp_path.iterdir()] == ["run.safetensors"]


def test_weights_that_are_not_finite_are_not_saved(train, flags, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        train(flags(tmp_path / "out", learning_rate=1e30, max_train_steps=3))
    assert "not finite since step" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_a_seed_is_drawn_shown_and_recorded(train, flags, tmp_path, capsys):
    train(flags(tmp_path / "drawn", seed=None, max_train_steps=2))
    (seed,) = re.findall(r"no --seed was given, this run's is (\d+)", capsys.readouterr().err)
    file = tmp_path / "drawn" / "run.safetensors"
    assert header(file)["ss_seed"] == seed
    train(flags(tmp_path / "again", seed=seed, max_train_steps=2))
    assert stored(file) == stored(tmp_path / "again" / "run.safetensors")


def test_the_file_alone_works_with_no_metadata(train, flags, tmp_path):
    train(flags(tmp_path / "out", no_metadata=True, max_train_steps=1))
    metadata = header(tmp_path / "out" / "run.safetensors")
    assert metadata["ss_network_dim"] == "4"
    assert "ss_seed" not in metadata
