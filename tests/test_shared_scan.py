"""Several processes and one dataset."""

import pytest

from library.data.records import scan
from library.errors import UserError
from library.training import shared_scan, together
from tests.pictures import dataset, picture, subset


class Process:
    """One of two; `others` is what the other one says."""

    num_processes = 2

    def __init__(self, is_local_main_process: bool):
        self.is_local_main_process = is_local_main_process


@pytest.fixture
def datasets(tmp_path):
    for name in "ab":
        picture(tmp_path / f"{name}.png", caption=name)
    return (dataset(subset(tmp_path)),)


def test_the_second_process_of_a_machine_reads_the_table_of_the_first(datasets, monkeypatch):
    said = []
    monkeypatch.setattr(together, "gather", lambda seen: (said.append(seen), list(said))[1])
    first = shared_scan.scan_together(datasets, Process(True))
    monkeypatch.setattr(shared_scan, "scan", None)  # would fail
    second = shared_scan.scan_together(datasets, Process(False))
    assert second.folder == first.folder
    assert [record.path for record in second] == [record.path for record in first]


def test_machines_that_see_different_images_are_refused(datasets, tmp_path, monkeypatch):
    table = scan(datasets)
    elsewhere = [("other machine", "folder", shared_scan.digest(table))]
    monkeypatch.setattr(together, "gather", lambda seen: [seen, elsewhere])
    shared_scan.scan_together(datasets, Process(True))
    (tmp_path / "a.png").rename(tmp_path / "c.png")
    with pytest.raises(UserError, match="do not see the same images"):
        shared_scan.scan_together(datasets, Process(True))
