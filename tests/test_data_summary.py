"""The table before training and the metadata that describes the data."""

import json

import numpy as np
import pytest
from PIL import Image

from library.data.plan import RunPlan
from library.data.records import scan
from library.data.report.chart import COLOURS, chart
from library.data.report.metadata_facts import dataset_metadata
from library.data.report.summary import BucketRow, FolderRow, Summary, summarise
from library.options.training import TrainingOptions
from tests.pictures import dataset, picture, subset


@pytest.fixture
def folders(tmp_path):
    for number in range(3):
        picture(tmp_path / "10_sks dog" / f"{number}.png", (96, 64) if number else (64, 64), f"sks dog, Tag{number}")
        picture(tmp_path / "1_dog" / f"{number}.png", (64, 64))
    (tmp_path / "10_sks dog" / "broken.png").touch()
    return (
        subset(tmp_path / "10_sks dog", num_repeats=10, class_tokens="sks dog"),
        subset(tmp_path / "1_dog", class_tokens="dog", is_reg=True),
    )


def described(*datasets, **options):
    table = scan(datasets)
    plan = RunPlan(table, datasets, seed=0, accumulation=2)
    return summarise(table, datasets, plan, **options), dataset_metadata(table, datasets, plan)


def mask(path, values):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.array(values, dtype=np.uint8)).resize((64, 64), Image.Resampling.NEAREST).save(path)


def test_the_table_before_training(folders):
    summary, _ = described(dataset(*folders))
    training, regularisation = summary.folders
    assert (training.images, training.repeats, training.per_epoch, training.broken) == (3, 10, 30, 1)
    assert training.aspect_error == pytest.approx(2 * abs(80 / 48 - 96 / 64) / 3)
    assert (regularisation.images, regularisation.per_epoch, regularisation.no_caption) == (3, 30, 3)
    assert [(row.bucket, row.images, row.per_epoch, row.batches) for row in summary.buckets] == [
        ("64x64", 4, 40, 20),
        ("80x48", 2, 20, 10),
    ]
    lines = str(summary).splitlines()
    assert lines[-1] == "per epoch: 60 images in 30 batches, 15 optimizer steps"
    assert lines[0].split() == ["per", "no", "aspect"]
    assert lines[1].split() == ["folder", "kind", "images", "repeats", "epoch", "caption", "broken", "error"]
    assert lines[2].split() == ["10_sks", "dog", "train", "3", "10", "30", "0", "1", "0.111"]
    assert len({len(line) for line in lines[1:4]}) == 1


def test_kinds_of_folders(tmp_path, folders):
    picture(tmp_path / "kept" / "a.png", (64, 64))
    marked = subset(tmp_path / "kept", custom_attributes={"diff_output_preservation": True})
    summary, _ = described(dataset(*folders, marked))
    assert [row.kind for row in summary.folders] == ["train", "reg", "preserved"]


def test_columns_of_zeros_and_tables_without_rows_are_left_out(tmp_path):
    picture(tmp_path / "a" / "0.png", (64, 64), "x")
    summary, _ = described(dataset(subset(tmp_path / "a")))
    text = str(summary)
    assert not {"dataset", "broken", "caption", "enlarged", "reg", "masks", "processes"} & set(text.split())
    picture(tmp_path / "a" / "1.png", (20, 20), "x")
    summary, _ = described(dataset(subset(tmp_path / "a")))
    assert summary.folders[0].upscaled == 1
    assert "upscaled" in str(summary)


def test_real_batch_sizes_and_buckets_below_half_a_batch(tmp_path):
    for number in range(7):
        picture(tmp_path / "a" / f"{number}.png", (64, 64), "x")
    picture(tmp_path / "a" / "wide.png", (96, 64), "x")
    summary, _ = described(dataset(subset(tmp_path / "a"), batch_size=4))
    assert [row.batch_sizes for row in summary.buckets] == ["1x4 1x3", "1x1"]
    assert [(row.bucket, row.files) for row in summary.small_buckets] == [("80x48", ("wide.png",))]
    assert "80x48 is less than half a batch of 4: wide.png" in str(summary)
    summary, _ = described(dataset(subset(tmp_path / "a"), batch_size=2))
    assert [row.batch_sizes for row in summary.buckets] == ["3x2 1x1", "1x1"]
    assert not summary.small_buckets


def test_regularisation_images_that_are_not_needed(tmp_path):
    for number in range(5):
        picture(tmp_path / "reg" / f"{number}.png")
    picture(tmp_path / "a" / "0.png", caption="x")
    regular = subset(tmp_path / "reg", is_reg=True)
    summary, _ = described(dataset(subset(tmp_path / "a", num_repeats=3), regular))
    (row,) = summary.regularisation
    assert (row.images, row.used, row.uses_per_epoch, row.unused) == (5, 3, 3, 2)
    summary, _ = described(dataset(subset(tmp_path / "a", num_repeats=8), regular))
    (row,) = summary.regularisation
    assert (row.images, row.used, row.uses_per_epoch, row.unused) == (5, 5, 8, 0)


def test_masks(tmp_path):
    for number in range(4):
        picture(tmp_path / "a" / f"{number}.png", caption="x")
    mask(tmp_path / "masks" / "0.png", [[255, 0]])
    mask(tmp_path / "masks" / "1.png", [[0]])
    mask(tmp_path / "masks" / "2.png", [[255]])
    (tmp_path / "masks" / "2.png").write_bytes(b"no image")
    mask(tmp_path / "masks" / "stray.png", [[255]])
    summary, _ = described(dataset(subset(tmp_path / "a", conditioning_data_dir=tmp_path / "masks")))
    (row,) = summary.masks
    assert (row.found, row.no_mask, row.no_image, row.wrong_size) == (3, 1, 1, 0)
    assert (row.looked_at, row.mean_area, row.all_zero, row.unreadable) == (3, "25%", 1, 1)


def test_masks_of_other_proportions(tmp_path):
    picture(tmp_path / "a" / "0.png", caption="x")
    picture(tmp_path / "masks" / "0.png", (16, 48))
    summary, _ = described(dataset(subset(tmp_path / "a", conditioning_data_dir=tmp_path / "masks")))
    assert summary.masks[0].wrong_size == 1
    assert "| wrong size |" in summary.markdown()


def test_transparency_as_mask(tmp_path):
    (tmp_path / "a").mkdir()
    pixels = np.zeros((64, 64, 4), dtype=np.uint8)
    pixels[:16, :, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a" / "0.png")
    picture(tmp_path / "a" / "1.png")
    summary, _ = described(dataset(subset(tmp_path / "a", class_tokens="x", alpha_mask=True)))
    (row,) = summary.masks
    assert (row.looked_at, row.mean_area) == (1, "25%")


def test_numbers_of_processes(folders):
    data = dataset(*folders)
    by_steps, _ = described(data, total_steps=TrainingOptions(max_train_steps=45).total_steps)
    rows = [
        (row.global_batch, row.steps_per_epoch, row.steps, row.epochs, row.images_seen) for row in by_steps.processes
    ]
    assert rows == [("4", 15, 45, 3, 180), ("8", 8, 45, 5.62, 338), ("16", 4, 45, 11.25, 675)]
    assert by_steps.processes[0].processes == "1 (this run)"
    by_epochs, _ = described(data, dataset(folders[0]), total_steps=TrainingOptions(max_train_epochs=2).total_steps)
    assert [row.steps for row in by_epochs.processes] == [46, 24, 12]
    table = scan([data])
    plan = RunPlan(table, [data], seed=0, world=3)
    rows = summarise(table, [data], plan, lambda steps: steps).processes
    assert [row.processes for row in rows] == ["1", "2", "3 (this run)", "4"]
    assert [row.epochs for row in rows] == [1] * 4


def test_held_out_images_are_counted(tmp_path):
    for number in range(10):
        picture(tmp_path / "a" / f"{number}.png", caption="x")
    summary, metadata = described(dataset(subset(tmp_path / "a", validation_split=0.2)))
    assert summary.folders[0].held_out == 2
    assert "held out for validation: 2 images" in str(summary)
    assert (metadata["ss_num_validation_images"], metadata["ss_num_train_images"]) == (2, 8)


def many_buckets(count):
    folder = FolderRow(
        3, "a folder with a name that goes on and on " * 3, "reg", *([10**6] * 2), 10**6, *[1000] * 6, 0.123
    )
    buckets = tuple(BucketRow(0, f"{64 * i}x64", i, 2 * i, i, "1000x16 1x3") for i in range(1, count + 1))
    return Summary((folder,), (), (), buckets, (), (), 0, 1, 1, 1)


def test_it_fits_a_console(tmp_path):
    text = str(many_buckets(200))
    assert max(map(len, text.splitlines())) <= 100
    assert len(text.splitlines()) < 40
    shown = [line.split() for line in text.splitlines() if "x64 " in line]
    assert [line[0] for line in shown] == [f"{64 * i}x64" for i in range(182, 201)]  # the largest, in their order
    others = next(line for line in text.splitlines() if "others" in line).split()
    assert others == ["181", "others", str(sum(range(182))), str(2 * sum(range(182))), str(sum(range(182)))]


def test_markdown(folders):
    summary, _ = described(dataset(*folders))
    rows = [line for line in summary.markdown().splitlines() if line.startswith("|")]
    assert rows[:3] == [
        "| folder | kind | images | repeats | per epoch | no caption | broken | aspect error |",
        "| :-- | :-- | --: | --: | --: | --: | --: | --: |",
        "| 10_sks dog | train | 3 | 10 | 30 | 0 | 1 | 0.111 |",
    ]
    assert "- per epoch: 60 images in 30 batches, 15 optimizer steps" in summary.markdown()


def test_chart():
    def bars(count):
        picture = np.asarray(chart(many_buckets(count)))
        coloured = (picture == COLOURS[0]).all(axis=2)
        lengths = coloured.sum(axis=1)
        starts = np.flatnonzero((lengths[1:] > 0) & (lengths[:-1] == 0)) + 1
        return lengths[starts].tolist()

    lengths = bars(4)
    assert [round(4 * length / lengths[-1]) for length in lengths] == [1, 2, 3, 4]
    assert len(bars(200)) == 40


def test_metadata_of_one_dataset(folders):
    _, metadata = described(dataset(*folders))
    info = metadata.pop("ss_bucket_info")
    assert info["buckets"] == {
        "0": {"resolution": [64, 64], "count": 40},
        "1": {"resolution": [80, 48], "count": 20},
    }
    assert info["mean_img_ar_error"] == pytest.approx(2 * abs(80 / 48 - 96 / 64) / 6)
    assert metadata == {
        "ss_num_train_images": 30,
        "ss_num_reg_images": 30,
        "ss_num_validation_images": 0,
        "ss_num_batches_per_epoch": 30,
        "ss_batch_size_per_device": 2,
        "ss_enable_bucket": True,
        "ss_min_bucket_reso": 32,
        "ss_max_bucket_reso": 128,
        "ss_bucket_no_upscale": False,
        "ss_resolution": "(64, 64)",
        "ss_shuffle_caption": False,
        "ss_keep_tokens": 0,
        "ss_caption_dropout_rate": 0.0,
        "ss_caption_dropout_every_n_epochs": 0,
        "ss_caption_tag_dropout_rate": 0.0,
        "ss_color_aug": False,
        "ss_flip_aug": False,
        "ss_random_crop": False,
        "ss_face_crop_aug_range": None,
        "ss_resize_interpolation": None,
        "ss_validation_split": 0.0,
        "ss_validation_seed": None,
        "ss_dataset_dirs": {"10_sks dog": {"n_repeats": 10, "img_count": 3}},
        "ss_reg_dataset_dirs": {"1_dog": {"n_repeats": 1, "img_count": 3}},
        "ss_tag_frequency": {
            "10_sks dog": {"sks dog": 3, "tag0": 1, "tag1": 1, "tag2": 1},
            "1_dog": {"dog": 3},
        },
    }


def test_metadata_tells_what_the_subsets_do(tmp_path):
    for name in ("a", "b"):
        picture(tmp_path / name / "0.png", caption="x")
    plain, other = (
        subset(tmp_path / "a"),
        subset(tmp_path / "b", num_repeats=2.5, caption_tag_dropout_rate=0.1, random_crop=True, keep_tokens=2),
    )
    _, metadata = described(dataset(plain, other))
    assert metadata["ss_caption_tag_dropout_rate"] == 0.1
    assert (metadata["ss_random_crop"], metadata["ss_keep_tokens"]) == (True, 2)
    assert metadata["ss_dataset_dirs"]["b"]["n_repeats"] == 2.5
    assert json.dumps(metadata["ss_dataset_dirs"]["a"]["n_repeats"]) == "1"
    _, metadata = described(dataset(plain), dataset(other))
    first, second = (entry["subsets"][0] for entry in metadata["ss_datasets"])
    assert (first["random_crop"], second["random_crop"]) == (False, True)
    assert (first["num_repeats"], second["num_repeats"]) == (1, 2.5)


def test_the_most_frequent_tags_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("library.data.report.metadata_facts.TAGS_KEPT", 3)
    for name in ("a", "b"):
        for number in range(4):
            picture(
                tmp_path / name / f"{number}.png", caption=f"only in {number}, {name}, all" + ", half" * (number % 2)
            )
    _, metadata = described(dataset(subset(tmp_path / "a"), subset(tmp_path / "b")))
    assert metadata["ss_tag_frequency"] == {name: {name: 4, "all": 4, "half": 2} for name in ("a", "b")}


def test_the_table_counts_as_the_plan_does(tmp_path):
    for number in range(4):
        picture(tmp_path / "a" / f"{number}.png", caption="x")
        picture(tmp_path / "b" / f"{number}.png", caption="x")
    summary, metadata = described(dataset(subset(tmp_path / "a"), subset(tmp_path / "b", num_repeats=0.1)))
    assert [row.per_epoch for row in summary.folders] == [4, 1]
    assert summary.images_per_epoch == metadata["ss_num_train_images"] == 5


def test_single_things_are_said_in_the_singular(tmp_path):
    for number in range(2):
        picture(tmp_path / "a" / f"{number}.png", caption="x")
    summary, _ = described(dataset(subset(tmp_path / "a", validation_split=0.5)))
    assert summary.lines() == ["held out for validation: 1 image", "per epoch: 1 image in 1 batch, 1 optimizer step"]


def test_metadata_of_several_datasets_is_a_list(folders):
    _, metadata = described(dataset(*folders), dataset(folders[0], batch_size=4, enable_bucket=False))
    assert metadata["ss_num_train_images"] == 60
    first, second = metadata["ss_datasets"]
    assert (first["num_reg_images"], second["num_reg_images"]) == (30, 0)
    assert (second["batch_size_per_device"], second["bucket_info"]) == (4, None)
    assert [entry["image_dir"] for entry in first["subsets"]] == ["10_sks dog", "1_dog"]
    assert first["is_dreambooth"]
    assert "ss_resolution" not in metadata


def test_metadata_of_fine_tuning_datasets(tmp_path):
    picture(tmp_path / "a" / "0.png")
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"0": {"caption": "a dog", "tags": "brown"}}))
    data = dataset(subset(tmp_path / "a", metadata_file=captions))
    _, metadata = described(data)
    assert metadata["ss_dataset_dirs"] == {"captions.json": {"n_repeats": 1, "img_count": 1}}
    assert metadata["ss_tag_frequency"] == {"captions.json": {"a dog": 1, "brown": 1}}
    _, metadata = described(data, data)
    entry = metadata["ss_datasets"][0]
    assert not entry["is_dreambooth"]
    (facts,) = entry["subsets"]
    assert (facts["image_dir"], facts["metadata_file"]) == ("a", "captions.json")
    assert "is_reg" not in facts


def test_buckets_that_come_from_metadata_are_buckets_too(tmp_path):
    captions, entries = tmp_path / "captions.json", {}
    for number, size in enumerate([(96, 32), (96, 32), (64, 64)]):
        picture(tmp_path / "a" / f"{number}.png", size)
        entries[str(number)] = {"caption": "x", "train_resolution": size}
    captions.write_text(json.dumps(entries))
    _, metadata = described(dataset(subset(tmp_path / "a", metadata_file=captions), enable_bucket=False))
    assert metadata["ss_enable_bucket"] is True
    buckets = metadata["ss_bucket_info"]["buckets"].values()
    assert sorted((*bucket["resolution"], bucket["count"]) for bucket in buckets) == [(64, 64, 1), (96, 32, 2)]
    del entries["0"]["train_resolution"]
    captions.write_text(json.dumps(entries))
    _, metadata = described(dataset(subset(tmp_path / "a", metadata_file=captions), enable_bucket=False))
    assert (metadata["ss_enable_bucket"], metadata["ss_bucket_info"]) == (False, None)
