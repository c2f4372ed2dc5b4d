"""The table before training and the metadata that describes the data."""

import pytest

from library.data.plan import RunPlan
from library.data.records import scan
from library.data.summary import dataset_metadata, summarise
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


def described(*datasets):
    table = scan(datasets)
    plan = RunPlan(table, datasets, seed=0, accumulation=2)
    return summarise(table, datasets, plan), dataset_metadata(table, datasets, plan)


def test_the_table_before_training(folders):
    summary, _ = described(dataset(*folders))
    training, regularisation = summary.folders
    assert (training.images, training.repeats, training.per_epoch, training.unreadable) == (3, 10, 30, 1)
    assert (regularisation.images, regularisation.per_epoch, regularisation.no_caption) == (3, 30, 3)
    assert [(row.bucket, row.images, row.per_epoch, row.batches) for row in summary.buckets] == [
        ("64x64", 4, 40, 20),
        ("80x48", 2, 20, 10),
    ]
    text = str(summary)
    assert "10_sks dog" in text
    assert "per epoch: 60 images in 30 batches, 15 optimizer steps" in text
    rows = text.splitlines()
    assert len({len(row) for row in rows[:3]}) == 1


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
        "ss_num_batches_per_epoch": 30,
        "ss_batch_size_per_device": 2,
        "ss_enable_bucket": True,
        "ss_min_bucket_reso": 32,
        "ss_max_bucket_reso": 128,
        "ss_bucket_no_upscale": False,
        "ss_resolution": "(64, 64)",
        "ss_shuffle_caption": False,
        "ss_flip_aug": False,
        "ss_keep_tokens": 0,
        "ss_dataset_dirs": {"10_sks dog": {"n_repeats": 10, "img_count": 3}},
        "ss_reg_dataset_dirs": {"1_dog": {"n_repeats": 1, "img_count": 3}},
        "ss_tag_frequency": {
            "10_sks dog": {"sks dog": 3, "tag0": 1, "tag1": 1, "tag2": 1},
            "1_dog": {"dog": 3},
        },
    }


def test_metadata_of_several_datasets_is_a_list(folders):
    _, metadata = described(dataset(*folders), dataset(folders[0], batch_size=4, enable_bucket=False))
    assert metadata["ss_num_train_images"] == 60
    first, second = metadata["ss_datasets"]
    assert (first["num_reg_images"], second["num_reg_images"]) == (30, 0)
    assert (second["batch_size_per_device"], second["bucket_info"]) == (4, None)
    assert [entry["image_dir"] for entry in first["subsets"]] == ["10_sks dog", "1_dog"]
    assert "ss_resolution" not in metadata
