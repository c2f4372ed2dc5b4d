"""What is said of files, and of paths that lead to none."""

import pytest

from library.errors import UserError, some, suggest_path
from library.toml_file import read_toml


def test_a_similar_path_is_proposed(tmp_path):
    (tmp_path / "model.txt").touch()
    (tmp_path / "mode").mkdir()
    assert suggest_path(tmp_path / "model") == f", did you mean {tmp_path / 'model.txt'}?"
    assert suggest_path(tmp_path / "model", folder=True) == f", did you mean {tmp_path / 'mode'}?"
    assert suggest_path(tmp_path / "model", (".safetensors",)) == ""
    near = tmp_path / "a longer name.CKPT"
    near.touch()
    assert suggest_path(tmp_path / "a longr name.ckpt", (".ckpt", ".pt")) == f", did you mean {near}?"
    assert suggest_path(tmp_path / "x" / "model") == f", nor is there a folder {tmp_path / 'x'}"


def test_some():
    assert some(["a"]) == "a"
    assert some(["a", "b", "c"]) == "a, b, c"
    assert some(["a", "b", "c", "d"], limit=2) == "a, b and 2 more"


def test_toml_is_read_with_and_without_a_mark_at_its_start(tmp_path):
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "a.toml").write_bytes("a = 'é'\r\n[b]\r\nc = 1\r\n".encode(encoding))
        assert read_toml(tmp_path / "a.toml", "config file") == {"a": "é", "b": {"c": 1}}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"a = 1\nb = 'unfinished\nc = 2", ": this config file is not valid TOML (Expected"),
        (b"a = 1\na.b = '\xff'", ", line 2: this config file is not UTF-8 text, save it as UTF-8"),
        (
            b'a = "D:\\data"',
            ", line 1: this config file is not valid TOML (Unescaped '\\' in a string); write paths",
        ),
        (b"prompt = 3\n[[prompt.subset]]", ", line 2: this config file is not valid TOML"),
        (None, ": there is no such config file, did you mean "),
    ],
)
def test_what_is_wrong_with_a_file_is_one_sentence(tmp_path, content, sentence):
    path = tmp_path / "a file.toml"
    (tmp_path / "the file.toml").touch()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as mistake:
        read_toml(path, "config file")
    assert str(mistake.value).startswith(f"{path}{sentence}")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UserError, match="this config file cannot be read"):
        read_toml(tmp_path, "config file")
