"""Which models a script takes with which flags, and what it says of the others."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from library.errors import UserError
from library.models.files.checkpoint import write_tensors
from library.models.noise import Prediction
from library.options.base import Settings
from library.options.model import ModelOptions
from library.training.base_model import Script, inspect_base_model, prediction_for
from tests import tiny

SCRIPTS = {
    "train_network.py": Script(sdxl=False, counterpart="sdxl_train_network.py"),
    "sdxl_train_network.py": Script(sdxl=True, counterpart="train_network.py"),
}
# (family, script, --v2) -> what is wrong, as the end of a sentence; nothing for what fits.
COMBINATIONS = {
    ("sd1", "train_network.py", False): None,
    ("sd1", "train_network.py", True): "is a Stable Diffusion 1.x model: drop --v2",
    ("sd1", "sdxl_train_network.py", False): "is a Stable Diffusion 1.x model: train it with train_network.py",
    ("sd1", "sdxl_train_network.py", True): "is a Stable Diffusion 1.x model: train it with train_network.py",
    ("sd2", "train_network.py", False): "is a Stable Diffusion 2.x model: add --v2, and --v_parameterization if it "
    "predicts v, as the 768-pixel models do",
    ("sd2", "train_network.py", True): None,
    ("sd2", "sdxl_train_network.py", False): "is a Stable Diffusion 2.x model: train it with train_network.py with "
    "--v2",
    ("sd2", "sdxl_train_network.py", True): "is a Stable Diffusion 2.x model: train it with train_network.py with --v2",
    ("sdxl", "train_network.py", False): "is an SDXL model: train it with sdxl_train_network.py",
    ("sdxl", "train_network.py", True): "is an SDXL model: train it with sdxl_train_network.py",
    ("sdxl", "sdxl_train_network.py", False): None,
    ("sdxl", "sdxl_train_network.py", True): "is an SDXL model: drop --v2",
}


def settings(path: Path, **options: object) -> Settings:
    own = ModelOptions(pretrained_model_name_or_path=str(path), **options)
    return Settings({ModelOptions: own}, frozenset())


@pytest.mark.parametrize(("family", "script", "v2"), COMBINATIONS)
def test_a_script_takes_its_models_and_names_the_way_for_others(model_files, family, script, v2):
    path, mistake = model_files(family), COMBINATIONS[family, script, v2]
    if mistake is None:
        assert inspect_base_model(settings(path, v2=v2), SCRIPTS[script]).family.name == family
        return
    with pytest.raises(UserError) as error:
        inspect_base_model(settings(path, v2=v2), SCRIPTS[script])
    assert str(error.value) == f"{path} {mistake}"


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_a_tool_takes_every_family(model_files, family):
    assert inspect_base_model(settings(model_files(family), v2=family == "sd2")).family.name == family


@pytest.mark.parametrize(
    ("family", "channels", "kind"),
    [("sd1", 9, "an inpainting model"), ("sd2", 5, "a depth-to-image model"), ("sdxl", 9, "an inpainting model")],
)
def test_models_that_read_more_than_latents_cannot_be_trained(tmp_path, family, channels, kind):
    path = tiny.save_model(tmp_path / "model.safetensors", family, unet_config={"in_channels": channels})
    script = SCRIPTS["sdxl_train_network.py" if family == "sdxl" else "train_network.py"]
    with pytest.raises(UserError) as error:
        inspect_base_model(settings(path, v2=family == "sd2"), script)
    assert str(error.value) == (
        f"{path} is {kind}, whose U-Net reads {channels} channels: it cannot be trained here, give the model it was "
        "made from"
    )
    assert inspect_base_model(settings(path, v2=family == "sd2")).kind == kind, "its caches can be made"


@pytest.mark.parametrize("zero", [False, True])
def test_a_file_that_says_nothing_is_trained_as_the_flags_say(tmp_path, zero):
    write_tensors(tmp_path / "silent.safetensors", tiny.make_model("sd2").tensors())
    info = inspect_base_model(settings(tmp_path / "silent.safetensors", v2=True))
    assert info.prediction is None
    for flag, kind in ((False, "epsilon"), (True, "v_prediction")):
        options = ModelOptions(v_parameterization=flag, zero_terminal_snr=zero)
        assert prediction_for(options, info) == Prediction(kind, zero)


def test_a_file_of_v_prediction_asks_for_its_flag(model_files):
    info = replace(inspect_base_model(settings(model_files("sd1"))), prediction=Prediction("v_prediction"))
    with pytest.raises(UserError, match=r"predicts v, not the noise: add --v_parameterization$"):
        prediction_for(ModelOptions(), info)
    assert prediction_for(ModelOptions(v_parameterization=True), info) == Prediction("v_prediction")


def test_a_silent_file_whose_weights_look_like_v_is_told_of(model_files, fresh_console, capsys):
    info = replace(inspect_base_model(settings(model_files("sd2"), v2=True)), prediction=None, looks_like_v=True)
    assert prediction_for(ModelOptions(v_parameterization=True), info) == Prediction("v_prediction")
    assert not capsys.readouterr().err
    assert prediction_for(ModelOptions(), info) == Prediction()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("that is very probably v, as with the 768-pixel models: add --v_parameterization if it is")


def test_what_a_file_would_unlearn_is_told(model_files, fresh_console, capsys):
    info = inspect_base_model(settings(model_files("sd1")))
    noise = replace(info, prediction=Prediction())
    assert prediction_for(ModelOptions(), noise) == Prediction()
    assert not capsys.readouterr().err
    assert prediction_for(ModelOptions(v_parameterization=True), noise).kind == "v_prediction"
    assert "it first has to unlearn that" in capsys.readouterr().err
    zero = replace(info, prediction=Prediction("v_prediction", zero_terminal_snr=True))
    assert prediction_for(ModelOptions(v_parameterization=True), zero) == Prediction("v_prediction")
    assert "without --zero_terminal_snr" in capsys.readouterr().err
    assert prediction_for(ModelOptions(v_parameterization=True, zero_terminal_snr=True), zero).zero_terminal_snr
    assert not capsys.readouterr().err


def test_a_model_for_the_other_script_in_a_process_of_its_own(flags, model_files, fork_server, train, tmp_path):
    """One sentence and exit status 2; what it says to do works."""
    words = flags(tmp_path / "out", pretrained_model_name_or_path=model_files("sdxl"), max_train_steps=1)
    wrong = fork_server.run(words)
    assert wrong.status == 2
    (line,) = wrong.said.splitlines()
    assert re.fullmatch(r"error: .+ is an SDXL model: train it with sdxl_train_network\.py", line)
    assert not list((tmp_path / "out").iterdir())
    train(words, sdxl=True)
    assert (tmp_path / "out" / "run.safetensors").exists()
