"""Very many records: what they cost in memory, in all processes together."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import million_records
from library.data.dataset import ImageDataset
from tests.pictures import dataset, subset


class Undecoded(ImageDataset):
    """All of a batch but its pixels."""

    def _pixels(self, *_):
        return torch.zeros(3, 1, 1), None, False


def measure(folder: str, start_method: str) -> None:
    """The benchmark with real batches: a scan of the folder without and with its index, and one epoch."""
    datasets = [dataset(subset(Path(folder)), batch_size=8)]
    million_records.Lookup = lambda table: Undecoded(table, datasets)
    print(json.dumps(million_records.measure(Path(folder), 2, start_method)))


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["spawn", "fork"])
def test_a_hundred_thousand_records_index_and_iterate_in_little_memory(tmp_path, start_method):
    peaks = []
    for count in (5_000, 100_000):  # with fewer the workers are gone before they are looked at
        folder = tmp_path / str(count) / "pictures"
        million_records.make_folder(folder, count)
        code = f"from tests import test_scale; test_scale.measure({str(folder)!r}, {start_method!r})"
        root = Path(__file__).parent.parent
        output = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, cwd=root)
        facts = json.loads(output.stdout.splitlines()[-1])
        shutil.rmtree(folder.parent)
        peaks.append({name: value / 1e6 for name, value in facts.items() if name.endswith("bytes")})
    few, many = peaks
    assert set(many) == {"scan bytes", "scan with index bytes", "epoch bytes"}
    for part in many:
        assert many[part] - few[part] < 100, f"megabytes of data at their peak: {part}"
        assert many[part] < 1000, f"megabytes of everything at their peak: {part}"
