"""Files of arrays: whole or not there at all."""

import errno
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from library.data.caching import npz
from library.data.caching.npz import read_arrays, update_arrays, write_arrays


def test_nothing_but_whole_files_of_arrays_is_read(tmp_path):
    path = tmp_path / "x.npz"
    assert read_arrays(path) is None
    write_arrays(path, {"a": np.arange(5), "b": np.zeros(0)})
    assert read_arrays(path)["a"].tolist() == [0, 1, 2, 3, 4]
    assert set(read_arrays(path, ["b", "c"])) == {"b"}
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert read_arrays(path) is None
    np.savez(path, a=np.array([{}], dtype=object))
    assert read_arrays(path) is None
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    assert read_arrays(path) is None


def test_the_same_arrays_are_the_same_bytes_and_the_old_file_stays_until_then(tmp_path):
    path = tmp_path / "x.npz"
    write_arrays(path, {"a": np.arange(5)})
    first = path.read_bytes()

    def fail():
        raise OSError(errno.EIO, "broken")

    with pytest.raises(OSError, match="broken"):
        update_arrays(path, fail)
    assert path.read_bytes() == first
    write_arrays(path, {"a": np.arange(5)})
    assert path.read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(npz.fcntl is None, reason="this system locks no folders")
def test_no_addition_is_lost_where_several_add_to_one_file(tmp_path):
    path = tmp_path / "x.npz"

    def add(name: str) -> None:
        update_arrays(path, lambda: (read_arrays(path) or {}) | {name: np.zeros(1)})

    names = [f"a{number}" for number in range(60)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, names))
    assert read_arrays(path).keys() == set(names)
