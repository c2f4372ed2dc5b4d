"""Metadata files of fine-tuning subsets: captions, where images are looked for, sizes they bring along."""

import json
import tracemalloc
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.records import check_buckets, geometry_of, scan
from library.data.scanning.metadata import read_metadata
from library.errors import UserError
from tests.pictures import dataset, picture, subset


@pytest.fixture
def table(tmp_path):
    def make(entries, image_dir=tmp_path / "images", subset_options=None, **options):
        file = tmp_path / "meta.json"
        file.write_text(entries if isinstance(entries, str) else json.dumps(entries, ensure_ascii=False), "utf-8")
        return scan([dataset(subset(image_dir, metadata_file=file, **(subset_options or {})), **options)])

    return make


class TestReading:
    @given(
        st.dictionaries(
            st.text(), st.fixed_dictionaries({"caption": st.text()}, optional={"train_resolution": st.just([64, 32])})
        ),
        st.sampled_from([None, 2]),
        st.booleans(),
        st.integers(1, 40),
    )
    def test_entries_are_those_of_json(self, tmp_path_factory, entries, indent, ascii_only, piece):
        path = tmp_path_factory.mktemp("metadata") / "m.json"
        text = json.dumps(entries, indent=indent, ensure_ascii=ascii_only)
        try:
            path.write_text(text, "utf-8", newline="")
        except UnicodeEncodeError:
            return
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("library.data.scanning.members._PIECE", piece)
            found = list(read_metadata(path))
        assert [(e.key, e.train_resolution and list(e.train_resolution)) for e in found] == [
            (key, value.get("train_resolution")) for key, value in entries.items()
        ]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", r"meta.json: line 1: no valid JSON \(\{ is expected here\)"),
            ("[]", r"line 1: no valid JSON"),
            ('{\n"a": {"caption": "x"},\n"b": {"caption" "y"}}', r"line 3: no valid JSON"),
            ('{"a": {"caption": "x"}', r"line 1: no valid JSON \(, is expected here\)"),
            ('{"a": {"caption": "x"},}', r"a name in quotes is expected here"),
            ('{"a": "x"}', r"meta.json: a: must be an object"),
            ('{"a": {"caption": 3}}', r"meta.json: a: caption must be text, not 3"),
            ('{"a": {"tags": ["b"]}}', r'meta.json: a: tags must be text, not \["b"\]'),
            (
                '{"a": {"train_resolution": [64]}}',
                r"meta.json: a: train_resolution must be \[width, height\], not \[64\]",
            ),
            ('{"a": {"train_resolution": [64.5, 64]}}', r"train_resolution must be"),
        ],
    )
    def test_mistakes_name_file_and_place(self, table, text, message):
        with pytest.raises(UserError, match=message):
            table(text)

    def test_another_encoding_is_refused(self, tmp_path):
        (tmp_path / "m.json").write_bytes('{"é": {}}'.encode("latin-1"))
        with pytest.raises(UserError, match=r"m.json: this metadata file is not UTF-8"):
            list(read_metadata(tmp_path / "m.json"))

    def test_entries_are_not_held_while_reading(self, tmp_path):
        path = tmp_path / "m.json"
        path.write_text(json.dumps({f"image {n:08d}": {"caption": "word " * 20} for n in range(100_000)}))
        tracemalloc.start()
        assert sum(1 for _ in read_metadata(path)) == 100_000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert path.stat().st_size > 13_000_000
        assert peak < 8_000_000


class TestCaptions:
    def test_tags_follow_each_line_of_the_caption(self, tmp_path, table):
        for name in "abcd":
            picture(tmp_path / f"images/{name}.png")
        entries = {
            "d": {"caption": None, "tags": ""},
            "a": {"caption": "one\ntwo", "tags": "x, y"},
            "b": {"caption": " one "},
            "c": {"tags": "x, y"},
        }
        found = table(entries)
        assert [record.caption for record in found] == ["one, x, y\ntwo, x, y", "one", "x, y", ""]
        assert found.reports[0].captions_missing == 1


class TestFinding:
    def test_by_stem_name_and_full_path(self, tmp_path, table):
        images = tmp_path / "images"
        for name in ("a.png", "b.c.jpg", "c.png", "sub/d.png"):
            picture(images / name, caption="ignored")
        picture(tmp_path / "elsewhere/e.png")
        keys = ["sub/d", str(tmp_path / "elsewhere/e.png"), "b.c", "c.png", "a"]
        found = table({key: {"caption": key} for key in keys})
        assert {record.path: record.caption for record in found} == {
            str(images / "a.png"): "a",
            str(images / "b.c.jpg"): "b.c",
            str(images / "c.png"): "c.png",
            str(images / "sub/d.png"): "sub/d",
            str(images / "../elsewhere/e.png"): str(tmp_path / "elsewhere/e.png"),
        }

    def test_full_paths_need_no_image_dir_and_keys_do_not_tell_them(self, tmp_path, table):
        for name in ("one/a.png", "two/a.png"):
            picture(tmp_path / name)
        found = table({str(tmp_path / name): {} for name in ("two/a.png", "one/a")}, image_dir=None)
        assert [record.key for record in found] == ["0/0/one/a.png", "0/0/two/a.png"]
        assert [record.path for record in found] == [str(tmp_path / name) for name in ("one/a.png", "two/a.png")]

    @pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
    def test_accents_may_be_composed_differently(self, tmp_path, table, forms):
        on_disk, in_file = (unicodedata.normalize(form, "été") for form in forms)
        picture(tmp_path / f"images/{on_disk}.png")
        assert len(table({in_file: {"caption": "x"}})) == 1

    def test_entries_without_image_are_counted_and_named(self, tmp_path, table, said):
        picture(tmp_path / "images/a.png")
        assert len(table({"a": {"caption": "x"}, "b": {"caption": "x"}, "gone/c.png": {"caption": "x"}})) == 1
        (message,) = said
        assert message.endswith(
            f"2 of 3 entries have no image in {tmp_path / 'images'} and are left out: b, gone/c.png"
        )

    def test_of_two_entries_for_one_image_the_later_counts(self, tmp_path, table, said):
        picture(tmp_path / "images/a.png")
        (record,) = table({"a": {"caption": "first"}, "a.png": {"caption": "second"}})
        assert record.caption == "second"
        assert "1 entries name an image that a later entry names" in said[0]

    def test_nothing_left_names_the_remedy(self, table, said):
        with pytest.raises(UserError, match=r"meta.json: set image_dir to the folder of its images"):
            table({"a": {}}, image_dir=None)

    def test_a_broken_image_is_left_out(self, tmp_path, table, said):
        picture(tmp_path / "images/a.png")
        (tmp_path / "images/b.png").touch()
        found = table({"a": {"caption": "x"}, "b": {"caption": "y"}})
        assert [record.caption for record in found] == ["x"]
        assert found.reports[0].broken == ("b.png",)


class TestTrainResolution:
    def test_if_all_entries_have_one_they_are_the_buckets(self, tmp_path, table):
        for name in "ab":
            picture(tmp_path / f"images/{name}.png", (100, 50))
        entries = {
            "a": {"caption": "x", "train_resolution": [96, 32]},
            "b": {"caption": "x", "train_resolution": [32, 32]},
        }
        found = table(entries, resolution=None)
        assert found.predefined(0)
        assert [record.bucket for record in found] == [(96, 32), (32, 32)]
        assert geometry_of(found[1], None).resized == (64, 32)
        assert [bucket for _, bucket, _ in found.by_bucket()] == [(32, 32), (96, 32)]
        assert table(entries, enable_bucket=False)[0].bucket == (96, 32)

    def test_if_some_have_none_the_resolution_decides(self, tmp_path, table):
        for name in "ab":
            picture(tmp_path / f"images/{name}.png", (100, 50))
        entries = {"a": {"caption": "x", "train_resolution": [96, 32]}, "b": {"caption": "x"}}
        found = table(entries)
        assert not found.predefined(0)
        assert [record.bucket for record in found] == [(80, 48)] * 2
        with pytest.raises(UserError, match=r"meta.json: b.png: has no train_resolution, .* --resolution"):
            table(entries, resolution=None)

    def test_latents_stand_for_an_image_that_is_gone(self, tmp_path, table, said):
        picture(tmp_path / "images/a.png", (100, 50))
        np.savez(tmp_path / "images/b.npz", latents=np.zeros((4, 4, 8)), original_size=np.array([90, 45]))
        np.savez(tmp_path / "images/c.npz", np.zeros((4, 4, 8)))
        (tmp_path / "images/d.npz").write_text("damaged")
        entries = {name: {"caption": name, "train_resolution": [64, 32]} for name in "abcd"} | {"e": {"caption": "e"}}
        np.savez(tmp_path / "images/e.npz", latents=np.zeros((4, 4, 8)), original_size=np.array([90, 45]))
        found = table(entries)
        assert [(r.caption, r.width, r.height, r.bucket) for r in found] == [
            ("a", 100, 50, (64, 32)),
            ("b", 90, 45, (64, 32)),
            ("c", 64, 32, (64, 32)),
            ("d", 64, 32, (64, 32)),
        ]
        assert found[1].path == str(tmp_path / "images/b.png")
        assert found[1].cache_stem == str(tmp_path / "images/b")
        assert "e" in said[0]

    def test_sizes_that_the_model_cannot_take_are_refused(self, tmp_path, table):
        picture(tmp_path / "images/a.png")
        config = [dataset(subset(tmp_path / "images", metadata_file=tmp_path / "meta.json"))]
        found = table({"a": {"caption": "x", "train_resolution": [96, 40]}})
        check_buckets(found, config, 8)
        with pytest.raises(UserError, match=r"meta.json: a.png: train_resolution 96x40 is no multiple of 32"):
            check_buckets(found, config, 32)


def test_misspelt_names_in_entries_are_told_once_and_foreign_ones_are_not(tmp_path, table, said):
    for name in "ab":
        picture(tmp_path / f"images/{name}.png")
    table({"a": {"caption": "x", "tag": "y", "score": 3}, "b": {"caption": "x", "tag": "z"}})
    (message,) = said
    assert message.endswith("meta.json: a: tag means nothing here and is not used, did you mean tags?")
