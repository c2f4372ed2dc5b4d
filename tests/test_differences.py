"""What the user is told where a run goes on with other settings or data, and what states tell of a run."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from library.training.resuming.differences import say_differences, what_does_not_fit
from tests.tiny import draw_pictures, save_model

Run = Callable[..., str]
SETTINGS = {
    "max_train_steps": 4,
    "save_state_on_train_end": True,
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 3,
    "ema": True,
}


@pytest.fixture
def run(train, flags, tmp_path, capsys) -> Run:
    """`run(name, **changes)` trains into a folder of this name and returns what was said."""

    def start(name: str, **changes: object) -> str:
        capsys.readouterr()
        train(flags(tmp_path / name, **changes))
        return capsys.readouterr().err

    return start


@pytest.fixture
def refused(run, capsys) -> Run:
    """`refused(name, **changes)`: what is said where such a run ends with an error."""

    def start(name: str, **changes: object) -> str:
        with pytest.raises(SystemExit, match="2"):
            run(name, **changes)
        return capsys.readouterr().err

    return start


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shelf")


@pytest.fixture
def begun(train, flags, shelf, tmp_path) -> None:
    """The folder `begun` has the state of the fourth step."""
    if not (shelf / "begun").exists():
        train(flags(shelf / "begun", **SETTINGS))
    shutil.copytree(shelf / "begun", tmp_path / "begun")


def test_each_change_is_said_with_what_it_means(run, begun, pictures, model_files, tmp_path):
    """All at once, of which nothing keeps the run from going on."""
    shutil.copytree(pictures, tmp_path / "pictures")
    folder = tmp_path / "pictures" / "1_sks shape"
    draw_pictures(folder, 1, (32, 28))
    (folder / "32_0.txt").write_text("sks something else")
    other = save_model(
        tmp_path / "other.safetensors", clip_config={"max_position_embeddings": 77, "hidden_act": "gelu"}
    )
    changes = SETTINGS | {
        "train_data_dir": tmp_path / "pictures",
        "pretrained_model_name_or_path": with_other_weights(other),
        "seed": 2,
        "train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "clip_skip": 1,
        "flip_aug": True,
        "mixed_precision": "bf16",
        "optimizer_type": "AdamWScheduleFree",
        "optimizer_args": "weight_decay=0.1",
        "lr_warmup_steps": 2,
        "ema": None,
        "max_grad_norm": 0.5,
        "cache_latents": True,
        "max_train_steps": 5,
    }
    message = run("begun", **changes, resume="latest")
    for sentence in (
        "--seed is 2 and was 1, so all random choices are others from here on",
        "the images of the datasets or their sizes have changed, so the images of each step are others from here on",
        "captions have changed, which counts from here on",
        "the base model is another one, which what was learned beside the old one may not fit",
        "the number of steps in an epoch is 1 and was 3, so the run goes on in epoch 5",
        "--train_batch_size is 4 and was 2, so the images of each step are others from here on",
        "--gradient_accumulation_steps is 2 and was 1, so the images of each step are others from here on",
        "--clip_skip is 1 and was not set, so captions are read in another way than for what was learned before",
        "--flip_aug is set and was not set, which counts from here on",
        "--mixed_precision is bf16 and was no, so it computes with other roundings from here on",
        "the optimizer is AdamWScheduleFree and was AdamW, so it starts anew",
        "--lr_warmup_steps is 2 and was 3, so the learning rate follows the new curve from here on",
        "--ema is not set and was set, so the moving average of the weights begins or ends here",
        "--max_grad_norm is 0.5 and was 1.0, which counts from here on",
        "--cache_latents is set and was not set, so it computes with other roundings from here on",
    ):
        assert sentence in message
    for silent in ("optimizer_args", "optimizer_type", "options of the datasets", "max_train_steps is", "data_dir"):
        assert silent not in message
    assert message.count(" was ") == 14


def with_other_weights(path: Path) -> Path:
    weights = load_file(path)
    save_file({name: tensor + 0.001 for name, tensor in weights.items()}, path)
    return path


def test_what_does_not_matter_is_not_said(run, begun, pictures, tmp_path, model_file):
    shutil.copytree(pictures, tmp_path / "moved")
    shutil.copy(model_file, tmp_path / "moved.safetensors")
    (tmp_path / "prompts.txt").write_text("a red circle --w 32 --h 32 --s 1")
    changes = SETTINGS | {
        "train_data_dir": tmp_path / "moved",
        "pretrained_model_name_or_path": tmp_path / "moved.safetensors",
        "seed": None,
        "max_train_steps": 5,
        "max_data_loader_n_workers": 1,
        "sample_prompts": tmp_path / "prompts.txt",
        "sample_every_n_steps": 5,
        "logging_dir": tmp_path / "logs",
        "console_log_file": tmp_path / "log.txt",
        "save_every_n_steps": 5,
        "save_last_n_steps": 100,
        "save_precision": "fp16",
        "optimizer_type": "adamw",
        "metadata_author": "me",
        "ddp_timeout": 5,
        "validate_every_n_steps": 1,
    }
    message = run("begun", **changes, resume="latest")
    assert "going on after step 4" in message
    assert not re.search(r" was |were|anew|have changed|another|no --seed", message)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"network_dim": 8}, "--network_dim is 8 and was not set"),
        ({"network_alpha": 2}, "--network_alpha is 2.0 and was 1"),
        ({"network_train_unet_only": True}, "--network_train_unet_only is set and was not set"),
    ],
)
def test_a_state_of_another_network_is_refused(refused, begun, changes, why):
    message = refused("begun", **SETTINGS | changes | {"max_train_steps": 5}, resume="latest")
    assert f"run-state is the state of something else than what these flags train ({why})" in message


def test_states_tell_nothing_private(run, tmp_path, pictures, model_file):
    folder = tmp_path / "private"
    (folder / "masks").mkdir(parents=True)
    settings = folder / "data.toml"
    settings.write_text(
        "[[datasets]]\nresolution = 32\nbatch_size = 2\n[[datasets.subsets]]\n"
        f"image_dir = '{pictures / '1_sks shape'}'\n"
        f"conditioning_data_dir = '{folder / 'masks'}'\n"
    )
    run(
        "private",
        train_data_dir=None,
        dataset_config=settings,
        logging_dir=folder / "logs",
        caption_suffix=folder,
        huggingface_token="hf_secret",
        wandb_api_key="key_secret",
        console_log_file=folder / "log.txt",
        save_state=True,
        max_train_steps=1,
    )
    for file in (folder / "run-state").iterdir():
        content = file.read_bytes()
        for private in (str(tmp_path), str(pictures.parent), str(model_file.parent), model_file.name, "secret"):
            assert private.encode() not in content, (file.name, private)


BEFORE = {"settings": {"network_module": "a", "network_dim": 4}, "seed": 1, "steps_per_epoch": 3}


@pytest.mark.parametrize(
    ("name", "old", "new", "sentence"),
    [
        ("world", 1, 2, "the number of processes is 2 and was 1, so the images of each step are others from here on"),
        ("threads", 4, 8, "the number of threads is 8 and was 4, so roundings differ from those of a run without a"),
        ("torch", "2.12", "2.13", "PyTorch is 2.13 and was 2.12, so roundings differ"),
        ("device", "cpu", "cuda", "the device is another one, so roundings differ"),
        ("dataset_options", "a", "b", "options of the datasets have changed, which counts from here on"),
        ("program", "a", "b", ""),
        ("accelerate", "a", "b", ""),
    ],
)
def test_facts_that_differ_are_said(capsys, fresh_console, name, old, new, sentence):
    say_differences(BEFORE | {name: old}, BEFORE | {name: new}, 4)
    shown = capsys.readouterr().err
    assert sentence in shown
    assert bool(sentence) == bool(shown)


def test_what_an_older_state_does_not_tell_is_not_said(capsys, fresh_console):
    say_differences({"settings": {}}, BEFORE | {"world": 2, "optimizer": "AdamW"}, 4)
    assert not capsys.readouterr().err


def test_why_a_state_does_not_fit():
    problem = ValueError("x is missing")
    model = {"settings": {"train_text_encoder": True}}
    assert what_does_not_fit(BEFORE, model, problem) == "it is of a network, not of the model itself"
    assert what_does_not_fit(model, BEFORE, problem) == "it is of the model itself, not of a network"
    parts = {"groups": ["text_encoder"], "settings": {"learning_rate": 0.0, "learning_rate_te": 0.1}}
    others = {"groups": ["unet"], "settings": {"learning_rate": 0.1, "learning_rate_te": 0.2}}
    assert what_does_not_fit(parts, others, problem) == (
        "it trains text_encoder besides and it does not train unet, --learning_rate is 0.1 and was 0.0"
    )
    assert what_does_not_fit(BEFORE, BEFORE, problem) == what_does_not_fit({}, BEFORE, problem) == "x is missing"


@pytest.mark.parametrize(("limit", "said"), [(1.0, True), (0, False)])
def test_fused_steps_differ_only_where_gradients_are_clipped(capsys, fresh_console, limit, said):
    now = {**BEFORE, "settings": {"max_grad_norm": limit, "fused_backward_pass": True}}
    say_differences(now | {"settings": now["settings"] | {"fused_backward_pass": False}}, now, 4)
    assert ("--fused_backward_pass is set and was not set, so gradients are clipped" in capsys.readouterr().err) is said
