"""--dry_run against the runs that it foretells."""

import json
import re
from pathlib import Path

import pytest

from library.models.files.safetensors_file import SafetensorsFile
from library.training import dry_run, launch

SAVING = {
    "max_train_steps": 7,
    "save_every_n_steps": 2,
    "save_every_n_epochs": 1,
    "save_last_n_steps": 2,
    "save_last_n_epochs": 1,
    "save_state": True,
    "save_last_n_steps_state": 1,
    "save_best": True,
    "validation_split": 0.34,
    "sample_every_n_epochs": 1,
    "sample_at_first": True,
    "ema": True,
}
# Whatever an optimizer keeps, per value of a tensor that is not small.
KEPT = {"AdamW": 8, "AdEMAMix8bit": 3, "Prodigy": 16, "AdamWScheduleFree": 8}


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle --w 32 --h 32 --s 2\na blue square --w 32 --h 32 --s 2 --d 5")
    return path


@pytest.fixture
def no_weights(monkeypatch):
    """A tensor that is read is an error; headers may be."""

    def read(self, *arguments):
        raise AssertionError("weights are read")

    monkeypatch.setattr(SafetensorsFile, "get", read)


@pytest.fixture
def foretold(monkeypatch):
    """What is planned by the dry runs of a test, in order."""
    plans, planned = [], dry_run.planned
    monkeypatch.setattr(dry_run, "planned", lambda *arguments: (plans.append(planned(*arguments)), plans[-1])[1])
    return plans


def relative(folder: Path) -> set[str]:
    """Everything in a folder but what is in states, with no times in the names."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.parent.name.endswith("-state")}
    return {re.sub(r"_\d{14}_", "_<time>_", name) for name in names}


@pytest.mark.parametrize("changes", [{}, {"max_train_epochs": 2, "max_train_steps": None, "output_name": None}])
def test_it_names_what_a_run_leaves(changes, flags, train, tmp_path, prompts, foretold):
    out = tmp_path / "out"
    words = flags(out, sample_prompts=prompts, **SAVING | changes)
    train([*words, "--dry_run"])
    assert not out.exists()
    train(words)
    (plan,) = foretold
    staying = {
        str(path.relative_to(out))
        for one in plan
        for step, paths in zip(one.steps, one.paths, strict=True)
        if step in one.staying
        for path in paths
    }
    best = {"run-best.safetensors", "run-best-ema.safetensors", "best.safetensors", "best-ema.safetensors"}
    assert staying == relative(out) - best - {"sample"}
    assert len(staying) > 10


def test_it_says_what_the_run_says(flags, train, tmp_path, prompts, capsys):
    words = flags(tmp_path / "out", sample_prompts=prompts, network_dim=8, **SAVING)
    train([*words, "--dry_run"])
    told = capsys.readouterr().out
    train(words)
    run = capsys.readouterr().out
    table = run[: run.index("text_encoder: weights changed")].strip()
    assert "trained: unet, " in table
    assert "in all: 7 optimizer steps in 3.5 epochs on " in table
    assert table in told


def test_it_reads_no_weights_and_writes_nothing(flags, train, tmp_path, pictures, no_weights, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = sorted(pictures.rglob("*"))
    train(flags(tmp_path / "a" / "b", logging_dir="logs", cache_info=True, dry_run=True, cache_latents_to_disk=True))
    assert "nothing was written" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert sorted(pictures.rglob("*")) == before


def test_leftovers_stay(flags, train, tmp_path):
    """A run would remove what a killed one has left."""
    left = tmp_path / "run.safetensors.1.tmp"
    left.touch()
    train(flags(tmp_path, dry_run=True))
    assert left.exists()


def test_a_name_in_use_is_said(flags, train, tmp_path, capsys):
    words = flags(tmp_path, max_train_steps=1, save_state_on_train_end=True)
    train([*words, "--dry_run"])
    assert not re.search("replaced when|in place of|another run", "".join(capsys.readouterr()))
    train(words)
    train([*words, "--dry_run"])
    told = capsys.readouterr()
    assert f"{tmp_path / 'run.safetensors'} is there already and is replaced when the run is over" in told.err
    assert f"{tmp_path} holds states of another run named run (run-state), and this is a new run" in told.err
    size = r"([\d.]+ KB)"
    (result,) = re.findall(rf"  result: after step 1, {size}, in place of what is there now\n", told.out)
    train([*flags(tmp_path, max_train_steps=1, output_name="other"), "--dry_run"])
    ((stays, _),) = re.findall(
        rf"this takes about {size} of the disk, and up to {size} on the way", capsys.readouterr().out
    )
    assert stays == result
    train([*flags(tmp_path, max_train_steps=2, resume="latest"), "--dry_run"])
    assert not re.search("replaced when|another run", capsys.readouterr().err)
    train([*flags(tmp_path, max_train_steps=1, output_name="other"), "--dry_run"])
    assert not re.search("replaced when|another run", capsys.readouterr().err)


def test_prompts_without_an_interval_are_said(flags, train, tmp_path, prompts, capsys):
    for changes, said in (({}, True), ({"sample_at_first": True}, False)):
        train(flags(tmp_path / "out", sample_prompts=prompts, dry_run=True, **changes))
        assert ("--sample_prompts: previews are painted on request only" in capsys.readouterr().err) == said


@pytest.mark.parametrize("place", ["--output_dir", "--logging_dir"])
def test_a_place_that_cannot_be_written_shows(place, flags, train, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        train([*flags(tmp_path / "out", dry_run=True), place, str(tmp_path / "file" / "folder")])
    assert f"{place}: {tmp_path / 'file'} cannot be written to" in capsys.readouterr().err


def test_mistakes_that_need_the_optimizer_show(flags, train, tmp_path, capsys, no_weights):
    words = flags(tmp_path, optimizer_type="Muon", dry_run=True)
    with pytest.raises(SystemExit, match="2"):
        train(words)
    assert "--optimizer_type Muon cannot be used: Muon only supports 2D parameters" in capsys.readouterr().err


@pytest.fixture
def sizes(train, monkeypatch):
    """`sizes(words)`: the sizes that a dry run finds."""

    def run(words: list[str], script: str = "train_network") -> dry_run.Sizes:
        found, estimate = [], dry_run.estimate
        monkeypatch.setattr(dry_run, "estimate", lambda *args: (found.append(estimate(*args)), found[-1])[1])
        train([*words, "--dry_run"], script=script)
        monkeypatch.setattr(dry_run, "estimate", estimate)
        return found[0]

    return run


@pytest.mark.parametrize("optimizer", KEPT)
def test_sizes_are_those_of_a_run(optimizer, flags, train, tmp_path, sizes):
    words = flags(
        tmp_path,
        optimizer_type=optimizer,
        learning_rate=1,
        network_dim=256,
        max_train_steps=1,
        save_state_on_train_end=True,
        save_precision="fp16",
        ema=True,
    )
    found = sizes(words)
    train(words)
    assert found.saved == pytest.approx((tmp_path / "run.safetensors").stat().st_size, rel=0.03)
    files = json.loads((tmp_path / "run-state" / "state.json").read_text())["files"]
    # Prodigy keeps no copy of weights that start at 0, as half of a LoRA's do
    assert found.state == pytest.approx(sum(files.values()), rel=0.15 if optimizer == "Prodigy" else 0.06)
    around = 0.07 if "8bit" in optimizer else 0.01  # which need scales and tables besides
    assert found.optimizer == pytest.approx(KEPT[optimizer] * found.gradients / 4, rel=around)


def test_weights_count_in_their_precision(flags, tmp_path, sizes, model_file):
    whole, half = (sizes(flags(tmp_path, mixed_precision=precision)) for precision in ("no", "bf16"))
    assert sum(whole.parts.values()) == pytest.approx(model_file.stat().st_size, rel=0.02)
    assert sum(half.parts.values()) == pytest.approx(sum(whole.parts.values()) / 2, rel=0.001)


def test_nothing_else_of_a_run_happens(flags, train, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "build", None)
    train(flags(tmp_path, dry_run=True, resume="latest"))


def test_it_says_what_going_on_with_a_state_would_mean(flags, train, tmp_path, capsys):
    train(flags(tmp_path, max_train_steps=2, save_state=True))
    going_on = {"dry_run": True, "resume": "latest", "max_train_steps": 4}
    capsys.readouterr()
    train(flags(tmp_path, **going_on, train_batch_size=3))
    said = capsys.readouterr().err
    assert "--train_batch_size is 3 and was 2" in said
    assert f"it would go on after step 2 with {tmp_path / 'run-state'}" in said
    with pytest.raises(SystemExit, match="2"):
        train(flags(tmp_path, **going_on, network_dim=8))
    assert "run-state is the state of something else than what these flags train" in capsys.readouterr().err
