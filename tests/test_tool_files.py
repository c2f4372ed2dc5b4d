"""What a tool says of the files that it is to read and write, before anything is done."""

from pathlib import Path

import pytest

from library.errors import UserError
from library.tool_files import check_apart, check_inputs, check_output


def refused(path: Path, *inputs: Path) -> str:
    with pytest.raises(UserError) as mistake:
        check_output("--save_to", path, inputs)
    return str(mistake.value)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model's folder that is read."""
    unet = tmp_path / "model" / "unet"
    unet.mkdir(parents=True)
    (unet / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    return tmp_path / "model"


def test_nothing_is_written_into_what_is_read(folder, tmp_path):
    within = f"lies in {folder}, which is read"
    assert within in refused(folder / "unet" / "diffusion_pytorch_model.safetensors", folder)
    assert within in refused(folder / "new.safetensors", folder)
    (tmp_path / "link").symlink_to(folder / "unet", target_is_directory=True)
    assert within in refused(tmp_path / "link" / "new.safetensors", folder)
    with pytest.raises(UserError, match=within):
        check_apart("--save_to", folder / "merged", [folder])
    lora = tmp_path / "lora.safetensors"
    lora.write_bytes(b"")
    assert "is one of the files to read" in refused(lora, folder, lora)
    check_output("--save_to", tmp_path / "model.safetensors", [folder, lora])


def test_outputs_that_cannot_be(folder, tmp_path):
    assert f"did you mean {tmp_path / 'new.safetensors'}?" in refused(tmp_path / "new.safetensor")
    message = refused(tmp_path / "new.tensors.zip")
    assert "ends in none of .safetensors, .ckpt" in message
    assert "did you mean" not in message
    (tmp_path / "folder.ckpt").mkdir()
    assert "is a folder, give the name of a file in it" in refused(tmp_path / "folder.ckpt")
    (tmp_path / "file").write_bytes(b"")
    assert f"{tmp_path / 'file'} is a file and can hold no new.ckpt" in refused(tmp_path / "file" / "sub" / "new.ckpt")


def test_what_killed_processes_left_of_an_output_is_removed(tmp_path):
    dead, other = (tmp_path / f"{name}.safetensors.{2**22 + 1}.tmp" for name in ("new", "newer"))
    for path in (dead, other):
        path.write_bytes(b"half")
    check_output("--save_to", tmp_path / "new.safetensors", [])
    assert list(tmp_path.iterdir()) == [other]


def test_names_are_alike_without_their_endings(tmp_path):
    (tmp_path / "merged.safetensors").write_bytes(b"")
    for name, alike in (("nothere.safetensors", False), ("mergd.ckpt", True), ("merged.safetensor", True)):
        with pytest.raises(UserError) as mistake:
            check_inputs("--models", [tmp_path / name])
        assert ("merged.safetensors?" in str(mistake.value)) == alike
