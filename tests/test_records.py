"""The scan of image folders and the table it makes."""

import os
import pickle
import threading
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from library.data.records import geometry_of, scan
from library.data.scanning.listing import list_folder
from library.data.scanning.reading import read_header
from library.data.scanning.scan import balanced_repeats
from library.errors import UserError
from tests.pictures import dataset, picture, subset


class TestScan:
    def test_records_are_sorted_and_complete(self, tmp_path):
        picture(tmp_path / "b.png", (100, 50), "two\nlines")
        picture(tmp_path / "a.PNG", (64, 64))
        picture(tmp_path / "ö.jpg", (50, 100), "naïve, 猫")
        picture(tmp_path / "below" / "c.png")
        picture(tmp_path / "._a.png")
        (tmp_path / "notes.md").write_text("no image")
        table = scan([dataset(subset(tmp_path, class_tokens="sks dog", num_repeats=3))])
        assert [os.path.basename(record.path) for record in table] == ["a.PNG", "b.png", "ö.jpg"]
        assert [record.caption for record in table] == ["sks dog", "two\nlines", "naïve, 猫"]
        assert [(record.width, record.height) for record in table] == [(64, 64), (100, 50), (50, 100)]
        assert [record.bucket for record in table] == [(64, 64), (80, 48), (48, 80)]
        assert [record.key for record in table] == ["0/0/a.PNG", "0/0/b.png", "0/0/ö.jpg"]
        assert table.key(1) == table[1].key
        assert [record.repeats for record in table] == [3, 3, 3]
        (report,) = table.reports
        assert (report.images, report.captions_missing, report.broken) == (3, 1, ())

    def test_a_pickled_table_is_its_path(self, tmp_path):
        for number in range(50):
            picture(tmp_path / f"{number}.png", caption="a long caption " * 20)
        table = scan([dataset(subset(tmp_path))])
        data = pickle.dumps(table)
        assert len(data) < 500
        assert list(pickle.loads(data)) == list(table)

    def test_the_folder_of_the_table_goes_with_it(self, tmp_path):
        picture(tmp_path / "a.png")
        table = scan([dataset(subset(tmp_path, class_tokens="a"))])
        folder, copy = table.folder, pickle.loads(pickle.dumps(table))
        del copy
        assert folder.exists()
        del table
        assert not folder.exists()

    def test_opening_a_table_makes_no_objects_per_record(self, tmp_path):
        for number in range(300):
            picture(tmp_path / f"{number}.png", (8, 8), caption="caption " * 50)
        data = pickle.dumps(scan_keep := scan([dataset(subset(tmp_path))]))
        tracemalloc.start()
        table = pickle.loads(data)
        assert table[299].caption
        used = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(scan_keep) == 300
        assert used < 60_000

    def test_broken_images_are_skipped_counted_and_named(self, tmp_path, said):
        picture(tmp_path / "good.png", caption="x")
        (tmp_path / "empty.png").touch()
        (tmp_path / "text.jpg").write_text("hello")
        (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:20])
        table = scan([dataset(subset(tmp_path))])
        assert len(table) == 1
        assert table.reports[0].broken == ("cut.png", "empty.png", "text.jpg")
        (message,) = said
        assert "3 of 4 images cannot be read" in message
        assert "empty.png (the file is empty)" in message

    def test_an_empty_folder_among_others_is_skipped(self, tmp_path, said):
        picture(tmp_path / "a" / "1.png", caption="x")
        (tmp_path / "b").mkdir()
        assert len(scan([dataset(subset(tmp_path / "a"), subset(tmp_path / "b"))])) == 1
        assert said == [f"{tmp_path / 'b'}: no images in it, the folder is left out"]

    def test_nothing_left_is_an_error(self, tmp_path, said):
        picture(tmp_path / "reg" / "1.png")
        (tmp_path / "train").mkdir()
        (tmp_path / "train" / "1.png").touch()
        both = [dataset(subset(tmp_path / "train"), subset(tmp_path / "reg", is_reg=True))]
        with pytest.raises(UserError, match=f"no image to train on is left in {tmp_path / 'train'}"):
            scan(both)

    def test_neither_caption_nor_class_tokens_is_one_warning(self, tmp_path, said):
        for number in range(3):
            picture(tmp_path / f"{number}.png")
        picture(tmp_path / "3.png", caption="")
        table = scan([dataset(subset(tmp_path))])
        assert [record.caption for record in table] == [""] * 4
        (message,) = said
        assert message.startswith("4 images have neither")

    def test_captions_in_other_encodings(self, tmp_path, said):
        for name in ("bom", "utf16", "latin"):
            picture(tmp_path / f"{name}.png")
        (tmp_path / "bom.caption").write_bytes("\ufeffhé\r\nx".encode())
        (tmp_path / "utf16.caption").write_text("hé", encoding="utf-16")
        (tmp_path / "latin.caption").write_bytes("hé".encode("latin-1"))
        table = scan([dataset(subset(tmp_path))])
        assert [record.caption for record in table] == ["hé\nx", "hé", "hé"]
        (message,) = said
        assert "latin.caption" in message


class TestOtherCaptionExtensions:
    def test_none_of_the_chosen_and_some_of_another_is_an_error_naming_the_flag(self, tmp_path):
        picture(tmp_path / "a.png", caption="x", extension=".txt")
        picture(tmp_path / "b.png")
        with pytest.raises(UserError, match=r"1 of the 2 images .* use --caption_extension \.txt$"):
            scan([dataset(subset(tmp_path, class_tokens="dog"))])
        with pytest.raises(
            UserError, match=r'set caption_extension = "\.txt" in my.toml: datasets\[0\].subsets\[0\], or'
        ):
            scan([dataset(subset(tmp_path, place="my.toml: datasets[0].subsets[0]"))])

    def test_captions_of_another_kind_are_not_replaced_by_those_beside_them(self, tmp_path, said):
        """A class that is to be kept must not get the captions with the new word in them."""
        picture(tmp_path / "a.png", caption="a photo of sks dog", extension=".txt")
        marked = {"custom_attributes": {"diff_output_preservation": True}, "class_tokens": "dog", "place": "my.toml: x"}
        with pytest.raises(UserError, match=r'write the \.class files, or set caption_extension = "" in my.toml: x'):
            scan([dataset(subset(tmp_path, caption_extension=".class", **marked))])
        with pytest.raises(UserError, match=r'write the \.caption files, or set caption_extension = "" in my.toml: x'):
            scan([dataset(subset(tmp_path, **marked))])
        table = scan([dataset(subset(tmp_path, caption_extension="", cache_info=True, **marked))])
        assert [record.caption for record in table] == ["dog"]
        assert not said

    def test_the_other_way_round(self, tmp_path):
        picture(tmp_path / "a.png", caption="x")
        with pytest.raises(UserError, match=r"--caption_extension \.caption$"):
            scan([dataset(subset(tmp_path, caption_extension=".txt"))])

    def test_a_mixture_is_a_warning(self, tmp_path, said):
        picture(tmp_path / "a.png", caption="x", extension=".txt")
        picture(tmp_path / "b.png", caption="y")
        assert len(scan([dataset(subset(tmp_path, class_tokens="dog"))])) == 2
        assert "1 of the 2 images has a .txt file" in said[0]

    def test_regularisation_images_may_come_with_prompts_nobody_wants(self, tmp_path, said):
        picture(tmp_path / "train/a.png")
        picture(tmp_path / "reg/a.png", caption="x", extension=".txt")
        scan(
            [
                dataset(
                    subset(tmp_path / "train", class_tokens="a"),
                    subset(tmp_path / "reg", is_reg=True, class_tokens="b"),
                )
            ]
        )
        assert len(said) == 1


class TestRegularisation:
    def counts(self, tmp_path, training, regularisation, **options):
        for name, count in (("train", training), ("reg", regularisation)):
            for number in range(count):
                picture(tmp_path / name / f"{number}.png", (8, 8), caption="x")
        train, reg = subset(tmp_path / "train", num_repeats=2), subset(tmp_path / "reg", is_reg=True, **options)
        return [r.repeats for r in scan([dataset(train, reg)]) if r.subset == 1]

    def test_few_are_cycled(self, tmp_path):
        assert self.counts(tmp_path, 4, 3) == [3, 3, 2]

    def test_many_are_cut(self, tmp_path):
        assert self.counts(tmp_path, 2, 6) == [1, 1, 1, 1, 0, 0]

    @given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.lists(st.integers(1, 9), min_size=1, max_size=20))
    def test_there_are_always_as_many_as_training_samples(self, training, regularisation):
        balanced = balanced_repeats(np.array(regularisation), sum(training))
        assert balanced.sum() == sum(training)
        rounds = balanced / regularisation
        assert rounds.max() - rounds.min() <= 1


class TestBadFolders:
    def test_captions_without_image_are_counted_and_named(self, tmp_path, said):
        picture(tmp_path / "a.png", caption="x")
        (tmp_path / "b.caption").write_text("y")
        (tmp_path / "c.caption").write_text("y")
        assert scan([dataset(subset(tmp_path))]).reports[0].captions_without_image == 2
        assert said == [f"{tmp_path}: 2 captions have no image: b.caption, c.caption"]

    def test_one_of_a_kind_is_said_in_the_singular(self, tmp_path, said):
        for name in ("a", "b"):
            picture(tmp_path / f"{name}.png", caption="x")
        (tmp_path / "c.caption").write_text("y")
        (tmp_path / "b.caption").write_bytes("hé".encode("latin-1"))
        (tmp_path / "d.png").touch()
        scan([dataset(subset(tmp_path))])
        assert said == [
            f"{tmp_path}: 1 of 3 images cannot be read and is left out: d.png (the file is empty)",
            f"{tmp_path}: 1 caption is not UTF-8 and is read as Latin-1: b.caption",
            f"{tmp_path}: 1 caption has no image: c.caption",
        ]

    def test_two_images_may_share_a_caption(self, tmp_path, said):
        picture(tmp_path / "a.png", caption="x")
        picture(tmp_path / "a.bmp")
        table = scan([dataset(subset(tmp_path))])
        assert [record.caption for record in table] == ["x", "x"]
        assert said == []

    def test_files_that_vanish_while_they_are_read(self, tmp_path, said, monkeypatch):
        for name in "abc":
            picture(tmp_path / f"{name}.png", caption=name)

        def listing(*arguments, **options):
            found = list_folder(*arguments, **options)
            (tmp_path / "a.png").unlink()
            (tmp_path / "b.caption").unlink()
            return found

        monkeypatch.setattr("library.data.scanning.sources.list_folder", listing)
        table = scan([dataset(subset(tmp_path, class_tokens="dog"))])
        assert [record.caption for record in table] == ["dog", "c"]
        assert table.reports[0].broken == ("a.png",)
        assert "a.png (it is no longer there)" in said[0]
        assert "1 caption cannot be read and counts as missing: b.caption" in said[1]

    def test_a_folder_that_vanishes_is_left_out(self, tmp_path, said):
        picture(tmp_path / "a/1.png", caption="x")
        assert len(scan([dataset(subset(tmp_path / "a"), subset(tmp_path / "gone"))])) == 1
        assert "gone: the folder cannot be read and is left out" in said[0]

    def test_animations_are_counted(self, tmp_path, said):
        frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
        frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
        picture(tmp_path / "still.png")
        assert scan([dataset(subset(tmp_path, class_tokens="a"))]).reports[0].animated == 1
        assert "1 image is an animation, of which the first frame is used: moving.webp" in said[0]

    def test_slow_disks_are_read_by_several_threads_in_the_same_order(self, tmp_path, monkeypatch):
        for number in range(200):
            picture(tmp_path / f"{number:03d}.png", (8 + number, 8), caption=str(number))
        threads = set()

        def slow(path, **options):
            time.sleep(0.002)
            threads.add(threading.get_ident())
            return read_header(path, **options)

        monkeypatch.setattr("library.data.scanning.sources.read_header", slow)
        table = scan([dataset(subset(tmp_path))])
        assert len(threads) > 2
        assert [(record.width - 8, record.caption) for record in table] == [(n, str(n)) for n in range(200)]


class TestSizes:
    def test_turned_images_are_read_as_stored_in_the_legacy_way(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (100, 50)).save(tmp_path / "a.jpg", exif=exif)
        sizes = [
            (table[0].width, table[0].height)
            for legacy in (False, True)
            for table in [scan([dataset(subset(tmp_path, class_tokens="a", legacy_image_decode=legacy))])]
        ]
        assert sizes == [(50, 100), (100, 50)]

    def test_small_images_are_skipped_and_counted(self, tmp_path, said):
        for width in (16, 32, 33):
            picture(tmp_path / f"{width}.png", (width, 32), caption="x")
        table = scan([dataset(subset(tmp_path), skip_image_resolution=(32, 32))])
        assert [record.width for record in table] == [33]
        assert table.reports[0].skipped_small == 2
        assert (
            "2 of 3 images are not larger than skip_image_resolution 32x32 and are left out; the first is 16.png"
            in said[0]
        )

    def test_enlarged_images_and_aspect_errors_are_reported(self, tmp_path):
        picture(tmp_path / "large.png", (128, 128), caption="x")
        picture(tmp_path / "small.png", (30, 30), caption="x")
        picture(tmp_path / "wide.png", (90, 50), caption="x")
        report = scan([dataset(subset(tmp_path))]).reports[0]
        assert report.upscaled == 1
        assert report.aspect_error == pytest.approx(abs(90 / 50 - 80 / 48) / 3)

    def test_small_images_stay_small_without_upscaling(self, tmp_path):
        picture(tmp_path / "large.png", (128, 128), caption="x")
        picture(tmp_path / "small.png", (50, 33), caption="x")
        buckets = {}
        for no_upscale in (False, True):
            table = scan([dataset(subset(tmp_path), bucket_no_upscale=no_upscale)])
            buckets[no_upscale] = [record.bucket for record in table], table.reports[0].upscaled
        assert buckets == {False: ([(64, 64), (80, 48)], 1), True: ([(64, 64), (48, 32)], 0)}

    def test_the_geometry_leads_to_the_bucket(self, tmp_path):
        picture(tmp_path / "a.png", (90, 50), caption="x")
        config = dataset(subset(tmp_path))
        (record,) = scan([config])
        assert geometry_of(record, config.buckets()) == config.buckets().choose((90, 50))


class TestUses:
    def test_images_per_epoch_are_shared_by_those_that_train(self, tmp_path):
        for number in range(8):
            picture(tmp_path / f"{number}.png", caption="x")
        table = scan([dataset(subset(tmp_path, images_per_epoch=12, validation_split=0.25))])
        assert sorted({record.repeats for record in table}) == [0, 2]
        assert table.repeats.sum() == 12

    def test_regularisation_matches_whole_uses(self, tmp_path):
        for name in ("train/1", "train/2", "train/3", "reg/1", "reg/2"):
            picture(tmp_path / f"{name}.png", caption="x")
        table = scan([dataset(subset(tmp_path / "train", num_repeats=1.3), subset(tmp_path / "reg", is_reg=True))])
        assert table.repeats.tolist() == [1.3, 1.3, 1.3, 2, 2]
