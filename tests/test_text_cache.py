"""Cached text encoder outputs: those of the caption that is trained, whatever is on the disk already."""

import errno
import json
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from library.data.caching import text_cache
from library.data.caching.text_cache import TextLayout, cache_text, write_text_files
from library.data.images import BrokenImage
from library.data.records import scan
from library.errors import UserError
from library.randomness import address
from tests.pictures import dataset, picture, subset

SDXL = TextLayout(
    "_te_outputs.npz",
    {"hidden_state1": "hidden_state1", "hidden_state2": "hidden_state2", "pooled": "pool2"},
    fingerprint="abc",
)
SHAPES = {"hidden_state1": (77, 768), "hidden_state2": (77, 1280), "pooled": (1280,)}


def said_of(caption: str) -> dict[str, torch.Tensor]:
    """What the stand-in for SDXL's text encoders says of a caption."""
    random = torch.Generator().manual_seed(address(caption))
    return {kind: torch.randn(shape, generator=random) for kind, shape in SHAPES.items()}


class Encoder:
    """Remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        self.asked.append(list(captions))
        outputs = [said_of(caption) for caption in captions]
        return {kind: torch.stack([output[kind] for output in outputs]) for kind in SHAPES}


@pytest.fixture
def encode() -> Encoder:
    return Encoder()


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """Messages to the user."""
    messages: list[str] = []
    for name in ("notice", "warn"):
        monkeypatch.setattr(text_cache.console, name, messages.append)
    return messages


@pytest.fixture
def datasets(tmp_path):
    """Five pictures with three captions, which lose them now and then."""
    for number, caption in enumerate(["red", "blue", "red", "green", "red"]):
        picture(tmp_path / "a" / f"{number}.png", caption=caption)
    return (dataset(subset(tmp_path / "a", caption_prefix="a photo,", caption_dropout_rate=0.5)),)


def check(cache: text_cache.TextCache, table, captions: Sequence[str], layout: TextLayout = SDXL) -> None:
    for record, caption in zip(table, captions, strict=True):
        for dropped in (False, True):
            outputs, expected = cache.outputs(record, dropped), said_of("" if dropped else caption)
            assert outputs.keys() == layout.arrays.keys()
            assert all(torch.equal(outputs[kind], expected[kind]) for kind in outputs)


PHOTOS = [f"a photo, {colour}" for colour in ("red", "blue", "red", "green", "red")]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.npz"))}


@pytest.mark.parametrize("to_disk", [False, True])
@pytest.mark.parametrize("batch_size", [None, 2, 10])
def test_every_record_has_the_outputs_of_its_final_caption_and_of_the_empty_one(datasets, encode, to_disk, batch_size):
    table = scan(datasets)
    cache = cache_text(table, datasets, encode, SDXL, to_disk=to_disk, batch_size=batch_size)
    check(cache, table, PHOTOS)
    assert sorted(caption for batch in encode.asked for caption in batch) == [
        "",
        "a photo, blue",
        "a photo, green",
        "a photo, red",
    ]
    assert max(map(len, encode.asked)) <= (batch_size or 1)


def test_in_memory_nothing_is_written_beside_the_images(datasets, encode, tmp_path):
    cache_text(scan(datasets), datasets, encode, SDXL)
    assert not files(tmp_path / "a")


def test_regularisation_and_held_out_images_have_outputs_too(tmp_path, encode):
    for number in range(4):
        picture(tmp_path / "a" / f"{number}.png", caption=str(number))
    picture(tmp_path / "b" / "0.png", caption="class")
    datasets = (dataset(subset(tmp_path / "a", validation_split=0.5), subset(tmp_path / "b", is_reg=True)),)
    table = scan(datasets)
    assert sum(record.validation for record in table) == 2
    check(cache_text(table, datasets, encode, SDXL), table, ["0", "1", "2", "3", "class"])


def test_a_file_is_read_by_name_without_pickle(datasets, encode, tmp_path):
    layout = replace(SDXL, token_length=150, clip_skip=2, weighted=True)
    cache_text(scan(datasets), datasets, encode, layout, to_disk=True)
    assert list(files(tmp_path / "a")) == [f"{number}_te_outputs.npz" for number in range(5)]
    with np.load(tmp_path / "a" / "1_te_outputs.npz", allow_pickle=False) as file:
        expected = said_of("a photo, blue")
        assert np.array_equal(file["hidden_state1"], expected["hidden_state1"])
        assert np.array_equal(file["hidden_state2"], expected["hidden_state2"])
        assert np.array_equal(file["pool2"], expected["pooled"])
        assert {file[name].dtype for name in ("hidden_state1", "hidden_state2", "pool2")} == {np.dtype(np.float32)}
        assert json.loads(file["made_from"].tobytes()) == {
            "caption": "a photo, blue",
            "token_length": 150,
            "clip_skip": 2,
            "weighted": True,
            "encoders": "abc",
        }


def test_outputs_in_half_precision_are_kept_in_float32(datasets, tmp_path):
    def halves(captions):
        return {kind: values.bfloat16() for kind, values in Encoder()(captions).items()}

    table = scan(datasets)
    for to_disk in (False, True):
        outputs = cache_text(table, datasets, halves, SDXL, to_disk=to_disk).outputs(table[0], False)
        expected = said_of("a photo, red")
        assert all(torch.equal(values, expected[kind].bfloat16().float()) for kind, values in outputs.items())


def test_a_valid_file_is_never_made_again(datasets, encode, tmp_path):
    table = scan(datasets)
    first = write_text_files(table, datasets, encode, SDXL)
    assert (first.written, first.valid, len(encode.asked)) == (5, 0, 3)
    times = [path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()]
    second = write_text_files(table, datasets, encode, SDXL)
    assert (second.written, second.valid, len(encode.asked)) == (0, 5, 3)
    assert times == [path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()]


@pytest.mark.parametrize(
    "changed",
    [{"fingerprint": "other"}, {"token_length": 225}, {"clip_skip": 2}, {"weighted": True}],
    ids=lambda changed: next(iter(changed)),
)
def test_files_are_made_again_for_other_encoders_or_another_encoding(datasets, encode, said, changed):
    table = scan(datasets)
    write_text_files(table, datasets, encode, SDXL)
    again = write_text_files(table, datasets, encode, replace(SDXL, **changed))
    assert (again.written, again.valid) == (5, 0)
    again.report()
    assert said == ["files of text encoder outputs were replaced: 5 made from another caption or other text encoders"]


def test_a_file_is_made_again_when_its_caption_changes(datasets, encode, tmp_path):
    write_text_files(scan(datasets), datasets, encode, SDXL)
    (tmp_path / "a" / "1.caption").write_text("violet")
    table = scan(datasets)
    check(cache_text(table, datasets, encode, SDXL, to_disk=True), table, [*PHOTOS[:1], "a photo, violet", *PHOTOS[2:]])
    assert encode.asked[3:] == [["a photo, violet"], [""]]


def test_a_damaged_or_foreign_file_is_replaced_and_counted(datasets, encode, tmp_path, said):
    table = scan(datasets)
    write_text_files(table, datasets, encode, SDXL)
    whole = files(tmp_path / "a")
    names = list(whole)
    (tmp_path / "a" / names[0]).write_bytes(whole[names[0]][:-100])
    (tmp_path / "a" / names[1]).write_bytes(b"")
    np.savez(tmp_path / "a" / names[3], hidden_state1=np.zeros(1), hidden_state2=np.zeros(1), pool2=np.zeros(1))
    check(cache_text(table, datasets, encode, SDXL, to_disk=True), table, PHOTOS)
    assert files(tmp_path / "a") == whole
    assert said == ["files of text encoder outputs were replaced: 2 damaged, 1 of unknown origin"]


def test_without_a_check_whatever_exists_is_used(datasets, encode, tmp_path):
    table = scan(datasets)
    foreign = {"hidden_state1": (77, 768), "hidden_state2": (77, 1280), "pool2": (1280,)}
    path = tmp_path / "a" / "1_te_outputs.npz"
    np.savez(path, **{name: np.full(shape, 0.5, dtype=np.float16) for name, shape in foreign.items()})
    cache = cache_text(table, datasets, encode, SDXL, to_disk=True, skip_check=True)
    assert all((values == 0.5).all() for values in cache.outputs(table[1], False).values())
    assert ["a photo, blue"] not in encode.asked


def test_a_whole_batch_is_encoded_where_a_member_is_missing(datasets, encode, tmp_path):
    table = scan(datasets)
    write_text_files(table, datasets, encode, SDXL, batch_size=2)
    (tmp_path / "a" / "1_te_outputs.npz").unlink()
    again = write_text_files(table, datasets, encode, SDXL, batch_size=2)
    assert (again.written, again.valid) == (1, 4)
    assert encode.asked == [PHOTOS[:2], ["a photo, green"], PHOTOS[:2]]


def test_processes_share_the_work(datasets, tmp_path):
    table = scan(datasets)
    encoders = [Encoder(), Encoder()]
    shares = [write_text_files(table, datasets, encode, SDXL, rank=r, world=2) for r, encode in enumerate(encoders)]
    assert [encode.asked for encode in encoders] == [[["a photo, red"], ["a photo, green"]], [["a photo, blue"]]]
    assert [share.written for share in shares] == [4, 1]
    again = [write_text_files(table, datasets, encode, SDXL, rank=r, world=2) for r, encode in enumerate(encoders)]
    assert [share.valid for share in again] == [4, 1]


def test_a_process_waits_for_the_files_of_the_others(datasets, encode, tmp_path):
    table = scan(datasets)

    def wait():
        assert list(files(tmp_path / "a")) == ["1_te_outputs.npz"]
        write_text_files(table, datasets, encode, SDXL, rank=0, world=2)

    check(cache_text(table, datasets, encode, SDXL, to_disk=True, rank=1, world=2, wait=wait), table, PHOTOS)


def test_images_used_with_several_captions_do_not_fight_for_a_file(tmp_path, encode, said):
    picture(tmp_path / "a" / "0.png", caption="red")
    datasets = tuple(dataset(subset(tmp_path / "a", caption_prefix=prefix)) for prefix in ("one", "two", "one"))
    table = scan(datasets)
    captions = ["one red", "two red", "one red"]
    check(cache_text(table, datasets, encode, SDXL, to_disk=True), table, captions)
    assert said == [
        "files keep one caption of an image, 1 uses of images with another one have none",
        "the text encoder outputs of 1 images are kept in a temporary file for this run",
    ]
    before = files(tmp_path / "a")
    again = write_text_files(table, datasets, encode, SDXL)
    assert (again.written, again.valid, again.left) == (0, 1, {1})
    assert files(tmp_path / "a") == before


def test_a_folder_that_cannot_be_written_to_is_said_and_done_without(datasets, encode, tmp_path, said, monkeypatch):
    table = scan(datasets)
    write_text_files(table, datasets, encode, SDXL)
    (tmp_path / "a" / "1_te_outputs.npz").unlink()

    def read_only(dir):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(text_cache.tempfile, "TemporaryFile", read_only)
    for rank in (0, 1):
        said.clear()
        cache = cache_text(table, datasets, encode, SDXL, to_disk=True, rank=rank, world=2)
        check(cache, table, PHOTOS)
        assert len(files(tmp_path / "a")) == 4
        assert said == [
            f"1 files of text encoder outputs cannot be written to {tmp_path / 'a'}",
            "the text encoder outputs of 1 images are kept in a temporary file for this run",
        ]


def test_a_full_disk_is_one_sentence_and_leaves_what_is_finished(datasets, encode, tmp_path, monkeypatch):
    def full(path, arrays):
        if "1_te" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        written(path, arrays)

    written = text_cache.write_arrays
    monkeypatch.setattr(text_cache, "write_arrays", full)
    with pytest.raises(UserError, match=r"1_te_outputs\.npz cannot be written \(No space left on device\): free some"):
        write_text_files(scan(datasets), datasets, encode, SDXL)
    assert len(files(tmp_path / "a")) == 3


def test_a_full_temporary_folder_is_reported_with_a_remedy(datasets, encode, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    table = scan(datasets)
    monkeypatch.setattr(text_cache.np, "save", full)
    with pytest.raises(UserError, match="TMPDIR"):
        cache_text(table, datasets, encode, SDXL)


@pytest.mark.parametrize("to_disk", [False, True])
def test_outputs_that_are_not_finite_are_refused(datasets, tmp_path, to_disk):
    def overflow(captions):
        outputs = Encoder()(captions)
        if "a photo, blue" in captions:
            outputs["pooled"][0, 3] = float("inf")
        return outputs

    with pytest.raises(UserError, match=r"the caption of .*1\.png are not finite: use --mixed_precision"):
        cache_text(scan(datasets), datasets, overflow, SDXL, to_disk=to_disk)
    assert "1_te_outputs.npz" not in files(tmp_path / "a")


def test_a_file_that_is_spoilt_during_training_is_named(datasets, encode, tmp_path):
    table = scan(datasets)
    cache = cache_text(table, datasets, encode, SDXL, to_disk=True)
    path = tmp_path / "a" / "1_te_outputs.npz"
    np.savez(path, hidden_state1=np.zeros((77, 768)), hidden_state2=np.zeros((77, 1280)), pool2=np.full(1280, np.nan))
    with pytest.raises(BrokenImage, match=r"1_te_outputs\.npz holds no pool2"):
        cache.outputs(table[1], False)
    path.unlink()
    with pytest.raises(BrokenImage, match=r"1_te_outputs\.npz"):
        cache.outputs(table[1], False)


@pytest.mark.parametrize("to_disk", [False, True])
def test_a_pickled_cache_is_its_path_and_goes_with_its_maker(datasets, encode, to_disk):
    table = scan(datasets)
    cache = cache_text(table, datasets, encode, SDXL, to_disk=to_disk)
    data = pickle.dumps(cache)
    assert len(data) < 500
    check(pickle.loads(data), table, PHOTOS)
    folder = cache.folder
    assert folder.exists()
    del cache
    assert not folder.exists()


def test_outputs_are_copies(datasets, encode):
    table = scan(datasets)
    cache = cache_text(table, datasets, encode, SDXL)
    for values in (*cache.outputs(table[0], False).values(), *cache.outputs(table[0], True).values()):
        values.zero_()
    check(cache, table, PHOTOS)
