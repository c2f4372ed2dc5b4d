"""Short runs of every method against those that were recorded; see CHANGELOG.md for what to do when one differs."""

import json

import pytest

from tests.trajectories import FILE, METHODS, record

GOLDEN = json.loads(FILE.read_text(encoding="utf-8"))
TOLERANCE = 2e-5  # relative, ten times what other instruction sets and another number of threads were found to make


@pytest.mark.parametrize("method", METHODS)
def test_the_trajectory_is_the_recorded_one(method, train, tmp_path):
    golden = GOLDEN[method]
    now = record(method, tmp_path, lambda words, script: train(words, script=script))
    assert now["losses"] == pytest.approx(golden["losses"], rel=TOLERANCE)
    if now["machine"] == golden["machine"]:
        assert now["result"] == golden["result"]
