"""Each method changes what it is to train and nothing else of a model, whatever else is switched on."""

import json
import sys
from pathlib import Path

import pytest

from tests.changes import CASES, METHODS, assert_intended, watching
from tests.processes import run
from tests.trajectories import data_for


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    data_for("fine_tune", folder)
    return folder


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=[pytest.mark.slow] * (not case.is_quick)) for case in CASES]
)
def test_exactly_what_is_trained_changes(case, train, flags, model_files, data, tmp_path):
    with watching() as seen:
        train(case.words(flags, tmp_path, model_files, data), script=METHODS[case.method][0])
    assert_intended(case.method, *seen)


@pytest.mark.slow
def test_exactly_what_is_trained_changes_in_two_processes_which_stay_alike(flags, model_files, data, tmp_path):
    words = [case.words(flags, tmp_path / str(number), model_files, data) for number, case in enumerate(CASES)]
    runs, seen = tmp_path / "runs.json", tmp_path / "seen"
    runs.write_text(json.dumps([(METHODS[case.method][0], own) for case, own in zip(CASES, words, strict=True)]))
    torchrun = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc_per_node", "2"]
    ended = run(
        [*torchrun, "-m", "tests.changes", runs, seen],
        900,
        ACCELERATE_USE_CPU="true",
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    first, second = (json.loads(seen.with_name(f"seen.{rank}").read_text()) for rank in (0, 1))
    assert first == second
    for case, both in zip(CASES, first, strict=True):
        assert_intended(case.method, *both)
