"""Latents made ahead at the sizes that a metadata file names: used without a flag, and the others made for the run."""

import json

import numpy as np
import pytest

from library.models.sd import StableDiffusion1
from tests import tiny


@pytest.fixture
def prepared(tmp_path, flags, train):
    """Four pictures with latents beside them as `<name>.npz`, and their metadata file."""
    folder = tiny.draw_pictures(tmp_path / "data", 4)
    entries = {path.stem: {"caption": "x", "train_resolution": [32, 32]} for path in folder.glob("*.png")}
    (tmp_path / "meta.json").write_text(json.dumps(entries))
    for path in sorted(folder.glob("*.png")):
        facts = {"original_size": np.array([32, 32]), "crop_ltrb": np.array([0, 0, 32, 32])}
        np.savez(path.with_suffix(".npz"), latents=np.zeros((4, 16, 16), np.float32), **facts)
    nothing = {"caption_extension": None, "resolution": None}

    def run(**changes):
        train(flags(tmp_path / "out", train_data_dir=folder, in_json=tmp_path / "meta.json", **nothing | changes))

    return folder, run


def encoded(monkeypatch) -> list[int]:
    """How many images are encoded at a time from now on."""
    calls, original = [], StableDiffusion1.encode_images
    monkeypatch.setattr(
        StableDiffusion1, "encode_images", lambda s, x, seeds: (calls.append(len(x)), original(s, x, seeds))[1]
    )
    return calls


def test_they_are_used_without_a_flag_even_where_the_picture_is_gone(prepared, monkeypatch, capsys):
    folder, run = prepared
    next(folder.glob("*.png")).unlink()
    calls = encoded(monkeypatch)
    run()
    assert not calls
    assert "4 images were made elsewhere" in capsys.readouterr().err


def test_what_is_missing_is_made_for_the_run(prepared, monkeypatch):
    folder, run = prepared
    sorted(folder.glob("*.npz"))[0].unlink()
    sorted(folder.glob("*.png"))[1].unlink()
    calls = encoded(monkeypatch)
    run()
    assert sum(calls) == 1
    assert len(list(folder.glob("*.npz"))) == 3, "nothing is written beside the images unasked"


def test_they_are_not_used_where_images_are_to_vary(prepared, monkeypatch):
    _, run = prepared
    calls = encoded(monkeypatch)
    run(color_aug=True)
    assert sum(calls) == 8
