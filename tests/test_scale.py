"""Very many records: what they cost in memory, in all processes together."""

import json
import shutil
import subprocess
import sys

import pytest

from benchmarks import million_records


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["spawn", "fork"])
def test_a_hundred_thousand_records_index_and_iterate_in_little_memory(tmp_path, start_method):
    peaks = []
    for count in (64, 100_000):
        folder = tmp_path / str(count) / "pictures"
        million_records.make_folder(folder, count)
        command = [sys.executable, million_records.__file__, "--measure", str(folder), "--workers", "2"]
        command += ["--start_method", start_method]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        facts = json.loads(output.splitlines()[-1])
        shutil.rmtree(folder.parent)
        peaks.append({name: value / 1e6 for name, value in facts.items() if name.endswith("bytes")})
    few, many = peaks
    assert set(many) == {"scan bytes", "scan with index bytes", "epoch bytes"}
    for part in many:
        assert many[part] - few[part] < 300, f"megabytes of data at their peak: {part}"
        assert many[part] < 1000, f"megabytes of everything at their peak: {part}"
