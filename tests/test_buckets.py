"""Bucket arithmetic against tables made by the toolkit whose files and metadata we share."""

import csv
import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from library.data.buckets import Buckets, bucket_resolutions

GOLDEN = Path(__file__).parent / "data" / "golden"
lengths = st.integers(1, 6000)


def size(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    return int(width), int(height)


def golden_rows() -> list[dict[str, str]]:
    with open(GOLDEN / "buckets.tsv", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_geometry_equals_every_golden_row():
    rows = golden_rows()
    assert len(rows) == 300
    for row in rows:
        buckets = Buckets(
            size(row["max_reso"]),
            min_size=int(row["min_size"]),
            max_size=int(row["max_size"]),
            step=int(row["reso_steps"]),
            no_upscale=row["no_upscale"] == "true",
        )
        geometry = buckets.choose(size(row["image"]))
        assert (geometry.bucket, geometry.resized) == (size(row["bucket"]), size(row["resized"])), row
        assert " ".join(f"{x:g}" for x in geometry.crop_ltrb) == row["crop_ltrb"], row


def test_resolutions_equal_the_golden_lists():
    for name, expected in json.loads((GOLDEN / "bucket_resolutions.json").read_text()).items():
        area, min_size, max_size, step = name.split("_")
        resolution = tuple(json.loads(area.replace("(", "[").replace(")", "]")))
        assert bucket_resolutions(resolution, int(min_size), int(max_size), int(step)) == [tuple(x) for x in expected]


@given(lengths, lengths, st.booleans(), st.booleans())
def test_an_image_always_covers_its_bucket(width, height, enabled, no_upscale):
    buckets = Buckets((512, 384), enabled=enabled, no_upscale=no_upscale, step=32, min_size=64)
    geometry = buckets.choose((width, height))
    assert geometry.bucket[0] % 32 == geometry.bucket[1] % 32 == 0
    assert min(geometry.bucket) > 0
    assert geometry.resized[0] >= geometry.bucket[0]
    assert geometry.resized[1] >= geometry.bucket[1]
    assert min(geometry.offset) >= 0


@given(lengths, lengths)
def test_without_buckets_every_image_has_the_one_resolution(width, height):
    assert Buckets((448, 640), enabled=False).choose((width, height)).bucket == (448, 640)


@given(st.integers(64, 6000), st.integers(64, 6000))
def test_no_upscale_never_enlarges(width, height):
    resized = Buckets((512, 512), no_upscale=True).choose((width, height)).resized
    assert resized[0] <= width
    assert resized[1] <= height


def test_a_strip_narrower_than_a_step_grows_to_one_within_the_area():
    buckets = Buckets((512, 512), no_upscale=True)
    assert buckets.choose((1000, 20)).bucket == (960, 64)
    assert buckets.choose((40000, 40)).bucket == (4096, 64)
