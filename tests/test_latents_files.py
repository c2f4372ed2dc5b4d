"""Latents in files beside the images: what others can read and write, what is made anew, and what is left alone."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.data.caching import latents_file
from library.data.records import geometry_of, scan
from tests.latents import LAYOUT, Disk, contents
from tests.pictures import dataset, picture, subset

RNG = np.random.default_rng(0)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five pictures in three buckets."""
    for number, size in enumerate([(64, 64), (90, 60), (64, 64), (60, 90), (64, 64)]):
        picture(tmp_path / "a" / f"{number}.png", size, str(number))
    return tmp_path / "a"


def latents(bucket: tuple[int, int] = (64, 64)) -> np.ndarray:
    return RNG.standard_normal((4, bucket[1] // 8, bucket[0] // 8)).astype(np.float32)


def touch(path: Path, seconds: float) -> None:
    """Moves a file's time."""
    facts = path.stat()
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + int(seconds * 1e9)))


# --- what others read and write ---


def test_other_programs_read_our_files(folder):
    disk = Disk(dataset(subset(folder, flip_aug=True, alpha_mask=True)))
    cache = disk.cache()
    assert set(contents(folder)) == {f"{n}_0064x0064_sd.npz" for n in (0, 2, 4)} | {
        "1_0090x0060_sd.npz",
        "3_0060x0090_sd.npz",
    }
    for record in disk.table:
        crop = geometry_of(record, disk.datasets[0].buckets()).crop_ltrb
        with np.load(latents_file.file_path(record, LAYOUT), allow_pickle=False) as file:
            assert {file[name].dtype.name for name in ("latents", "latents_flipped", "alpha_mask")} == {"float32"}
            assert file["original_size"].tolist() == [record.width, record.height]
            assert file["crop_ltrb"].tolist() == pytest.approx(crop)
            assert file["alpha_mask"].shape == record.bucket[::-1]
            assert np.array_equal(file["latents"], cache.latents(record, False))
            assert np.array_equal(file["latents_flipped"], cache.latents(record, True))
            assert file["latents"].shape == (4, record.bucket[1] // 8, record.bucket[0] // 8)


def test_files_of_other_programs_are_used_and_reported_once(folder, said):
    disk = Disk(dataset(subset(folder, flip_aug=True)))
    sizes = {record.path: record.bucket for record in scan(disk.datasets)}
    made = {}
    for path, bucket in sizes.items():
        with Image.open(path) as image:
            size = image.size
        made[path] = latents(bucket), latents(bucket)
        name = f"{path[:-4]}_{size[0]:04d}x{size[1]:04d}_sd.npz"
        crop = np.zeros(4)
        np.savez(
            name, latents=made[path][0], latents_flipped=made[path][1], original_size=np.array(size), crop_ltrb=crop
        )
    before = contents(folder)
    cache = disk.cache(layout=replace(LAYOUT, fingerprint="any"))
    assert disk.plan.missing == disk.encoded == 0
    for record in disk.table:
        assert np.array_equal(cache.latents(record, False), made[record.path][0])
        assert np.array_equal(cache.latents(record, True), made[record.path][1])
    assert contents(folder) == before
    assert len(said) == 1
    assert "of 5 images" in said[0]
    assert "--recache_unknown" in said[0]
    disk.cache(recache_unknown=True)
    assert disk.encoded == 10
    assert len(said) == 1
    disk.cache()
    assert disk.encoded == 0


@pytest.mark.parametrize("flaw", ["older", "another size", "another shape", "no mirrored", "not finite"])
def test_a_file_of_another_program_that_does_not_fit_is_made_anew(tmp_path, flaw, said):
    image = picture(tmp_path / "a" / "0.png", (64, 64), "x")
    arrays = {"latents": latents(), "latents_flipped": latents(), "original_size": np.array([64, 64])}
    if flaw == "another size":
        arrays["original_size"] = np.array([64, 65])
    elif flaw == "another shape":
        arrays["latents"] = latents((64, 80))
    elif flaw == "no mirrored":
        del arrays["latents_flipped"]
    elif flaw == "not finite":
        arrays["latents"][0, 0, 0] = np.nan
    np.savez(tmp_path / "a" / "0_0064x0064_sd.npz", **arrays)
    if flaw == "older":
        touch(image, 10)
    disk = Disk(dataset(subset(tmp_path / "a", flip_aug=True)))
    disk.cache()
    assert disk.encoded == 2
    assert [message for message in said if "made anew" in message] == said


def test_an_old_file_is_read(tmp_path):
    picture(tmp_path / "a" / "0.png", (64, 64), "x")
    straight, mirrored = latents(), latents()
    np.savez(tmp_path / "a" / "0.npz", straight)
    np.savez(tmp_path / "a" / "0_flip.npz", mirrored)
    disk = Disk(dataset(subset(tmp_path / "a", flip_aug=True)))
    cache = disk.cache()
    assert disk.encoded == 0
    assert np.array_equal(cache.latents(disk.table[0], False), straight)
    assert np.array_equal(cache.latents(disk.table[0], True), mirrored)
    (tmp_path / "a" / "0_flip.npz").unlink()
    disk.cache()
    assert disk.encoded == 2


def test_prepared_latents_need_neither_flag_nor_image(tmp_path, said):
    """`<stem>.npz` with the train_resolution in the metadata."""
    image = picture(tmp_path / "a" / "0.png", (90, 60), "x")
    values = latents((80, 48))
    np.savez(tmp_path / "a" / "0.npz", latents=values, original_size=np.array([90, 60]), crop_ltrb=np.zeros(4))
    metadata = tmp_path / "meta.json"
    metadata.write_text(json.dumps({"0": {"caption": "x", "train_resolution": [80, 48]}}))
    disk = Disk(dataset(subset(tmp_path / "a", metadata_file=metadata), resolution=None))
    for there in (True, False):
        if not there:
            image.unlink()
        cache = disk.cache(to_disk=False)
        assert disk.encoded == 0
        assert np.array_equal(cache.latents(disk.table[0], False), values)
        disk.cache(to_disk=False, recache_unknown=True)
        assert disk.encoded == there


def test_without_the_flag_files_are_not_looked_at(folder):
    disk = Disk(dataset(subset(folder)))
    disk.cache()
    disk.cache(to_disk=False)
    assert disk.encoded == 5


# --- several resolutions of one image ---


def test_a_second_resolution_goes_into_the_same_file(folder):
    small, large = (dataset(subset(folder), resolution=(side, side)) for side in (64, 96))
    one = Disk(small)
    first = one.cache()
    values = {record.path: first.latents(record, False) for record in one.table}
    both = Disk(small, large)
    cache = both.cache()
    assert both.encoded == 5
    for record in both.table:
        with np.load(latents_file.file_path(record, LAYOUT)) as file:
            assert torch.equal(torch.from_numpy(file["latents"]), values[record.path])
            ending = f"_{record.bucket[1] // 8}x{record.bucket[0] // 8}"
            used = file["latents" + (ending if record.dataset else "")]
            assert {"original_size" + ending, "crop_ltrb" + ending} <= set(file.files) or not record.dataset
        assert np.array_equal(cache.latents(record, False), used)
    both.cache()
    assert both.encoded == 0
    only_large = Disk(large)
    only_large.cache()
    assert only_large.encoded == 0


def test_other_resolutions_go_when_the_image_has_changed(folder):
    small, large = (dataset(subset(folder), resolution=(side, side)) for side in (64, 96))
    Disk(small, large).cache()
    Image.new("RGB", (64, 64)).save(folder / "0.png")
    disk = Disk(large)
    disk.cache(batch_size=1)
    assert disk.encoded == 1
    with np.load(folder / "0_0064x0064_sd.npz") as file:
        assert file["latents"].shape == (4, 12, 12)
        assert not any(name.endswith("_12x12") for name in file.files)


def test_a_plain_array_counts_only_in_its_own_size_and_one_with_the_size_in_its_name_wins(tmp_path):
    picture(tmp_path / "a" / "0.png", (64, 64), "x")
    arrays = {"latents": latents(), "latents_8x8": latents(), "original_size_8x8": np.array([64, 64])}
    np.savez(tmp_path / "a" / "0_0064x0064_sd.npz", **arrays)
    disk = Disk(dataset(subset(tmp_path / "a")))
    assert np.array_equal(disk.cache().latents(disk.table[0], False), arrays["latents_8x8"])
    disk = Disk(dataset(subset(tmp_path / "a"), resolution=(96, 96)))
    disk.cache()
    assert disk.encoded == 1


def test_an_image_in_two_datasets_is_encoded_once(folder):
    disk = Disk(dataset(subset(folder)), dataset(subset(folder), batch_size=1))
    cache = disk.cache()
    assert disk.encoded == 5
    assert torch.equal(cache.latents(disk.table[0], False), cache.latents(disk.table[5], False))


def test_images_with_one_stem_have_files_of_their_own(tmp_path):
    for name in ("0.png", "0.webp"):
        picture(tmp_path / "a" / name, (64, 64), "x")
    disk = Disk(dataset(subset(tmp_path / "a")))
    cache = disk.cache()
    assert len(contents(tmp_path / "a")) == 2
    assert not torch.equal(cache.latents(disk.table[0], False), cache.latents(disk.table[1], False))


@pytest.mark.parametrize("skip_check", [False, True])
def test_a_file_that_may_be_of_either_of_two_images_is_made_anew(tmp_path, skip_check):
    for name in ("0.png", "0.webp"):
        picture(tmp_path / "a" / name, (64, 64), "x")
    values = {"latents": latents(), "latents_12x12": latents((96, 96)), "original_size": np.array([64, 64])}
    np.savez(tmp_path / "a" / "0_0064x0064_sd.npz", **values)
    disk = Disk(dataset(subset(tmp_path / "a")))
    disk.cache(skip_check=skip_check)
    assert disk.encoded == 2
    with np.load(tmp_path / "a" / "0_0064x0064_sd.npz") as file:
        assert "latents_12x12" not in file.files
    disk.cache(skip_check=skip_check)
    assert disk.encoded == 0


# --- what is made anew ---


def spoil_source(folder: Path) -> None:
    Image.new("RGB", (64, 64)).save(folder / "0.png")


def truncate(folder: Path) -> None:
    path = folder / "0_0064x0064_sd.npz"
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(folder: Path) -> None:
    path = folder / "0_0064x0064_sd.npz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [spoil_source, truncate, flip_a_bit])
def test_what_is_stale_or_damaged_is_made_anew_and_nothing_else(folder, harm, said):
    disk = Disk(dataset(subset(folder)))
    disk.cache()
    disk.cache()
    assert disk.encoded == 0
    assert not said
    before = contents(folder)
    harm(folder)
    disk.cache(batch_size=1)
    assert disk.encoded == 1
    after = contents(folder)
    assert [name for name in before if before[name] != after[name]] == ["0_0064x0064_sd.npz"] * (harm is spoil_source)
    disk.cache()
    assert disk.encoded == 0
    assert len(said) == 1
    assert ("1 are of an image that has changed since" if harm is spoil_source else "1 are damaged") in said[0]


@pytest.mark.parametrize(
    ("dataset_options", "image_options", "fingerprint"),
    [
        ({}, {}, "another VAE"),
        ({}, {"alpha_mask": True}, "this VAE"),
        ({}, {"flip_aug": True}, "this VAE"),
        ({}, {"resize_interpolation": "nearest"}, "this VAE"),
        ({}, {"legacy_image_decode": True}, "this VAE"),
        ({"resolution": (32, 32), "enable_bucket": False}, {}, "this VAE"),
    ],
)
def test_latents_of_other_settings_are_made_anew(folder, dataset_options, image_options, fingerprint):
    Disk(dataset(subset(folder))).cache()
    disk = Disk(dataset(subset(folder, **image_options), **dataset_options))
    layout = replace(LAYOUT, fingerprint=fingerprint)
    disk.cache(layout=layout)
    assert disk.encoded == 5 * (1 + ("flip_aug" in image_options))
    disk.cache(layout=layout)
    assert disk.encoded == 0


def test_latents_with_an_alpha_mask_are_made_anew_without_one(folder):
    """What is transparent has another colour then."""
    Disk(dataset(subset(folder, alpha_mask=True))).cache()
    disk = Disk(dataset(subset(folder)))
    disk.cache()
    assert disk.encoded == 5


@pytest.mark.parametrize("older", [False, True])
def test_another_resolution_of_another_program_stays_if_it_is_newer_than_the_image(tmp_path, older):
    image = picture(tmp_path / "a" / "0.png", (64, 64), "x")
    np.savez(tmp_path / "a" / "0_0064x0064_sd.npz", latents=latents(), original_size=np.array([64, 64]))
    touch(image, 10 if older else -10)
    Disk(dataset(subset(tmp_path / "a"), resolution=(96, 96))).cache()
    with np.load(tmp_path / "a" / "0_0064x0064_sd.npz") as file:
        assert file["latents"].shape[1:] == ((12, 12) if older else (8, 8))
        assert ("latents_12x12" in file.files) != older


def test_another_crop_of_the_same_size_is_made_anew(tmp_path):
    picture(tmp_path / "a" / "0.png", (53, 89), "x")
    Disk(dataset(subset(tmp_path / "a"))).cache()
    disk = Disk(dataset(subset(tmp_path / "a"), bucket_no_upscale=True))
    cache = disk.cache()
    assert cache.shape(disk.table[0].bucket) == (4, 10, 6)
    assert disk.encoded == 1


def test_a_copied_dataset_keeps_its_latents(folder):
    disk = Disk(dataset(subset(folder)))
    disk.cache()
    for path in folder.glob("*.png"):
        touch(path, 1000)
    disk.cache()
    assert disk.encoded == 0


def counting(monkeypatch) -> list[str]:
    """The images whose content is read for a digest."""
    read, digest = [], latents_file._digest
    monkeypatch.setattr(latents_file, "_digest", lambda path: read.append(path) or digest(path))
    return read


def test_a_copied_dataset_is_read_once(folder, monkeypatch):
    small, large = (dataset(subset(folder), resolution=(side, side)) for side in (64, 96))
    disk = Disk(small, large)
    before = disk.cache()
    for path in folder.glob("*.png"):
        touch(path, 1000)
    read = counting(monkeypatch)
    disk.cache()
    assert read
    read.clear()
    cache = disk.cache()
    assert disk.encoded == 0
    assert not read
    assert all(torch.equal(cache.latents(record, False), before.latents(record, False)) for record in disk.table)
    Image.new("RGB", (64, 64)).save(folder / "0.png")
    disk.cache(batch_size=1)
    assert disk.encoded == 2


def test_a_copied_dataset_that_cannot_be_written_to_is_used(folder, monkeypatch):
    disk = Disk(dataset(subset(folder)))
    disk.cache()
    for path in folder.glob("*.png"):
        touch(path, 1000)
    before = contents(folder)

    def refuse(*_, **__):
        raise PermissionError(13, "read-only")

    monkeypatch.setattr("library.data.caching.npz.np.savez", refuse)
    disk.cache()
    assert disk.encoded == 0
    assert contents(folder) == before
