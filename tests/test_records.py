"""The scan of image folders, the table it makes, and the decoding of images."""

import os
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from library.data import images
from library.data.records import balanced_repeats, scan
from library.errors import UserError
from tests.pictures import dataset, picture, subset


@pytest.fixture
def said(monkeypatch):
    """Warnings to the user."""
    messages = []
    monkeypatch.setattr("library.data.records.warn", messages.append)
    return messages


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

    def test_the_other_way_round(self, tmp_path):
        picture(tmp_path / "a.png", caption="x")
        with pytest.raises(UserError, match=r"--caption_extension \.caption$"):
            scan([dataset(subset(tmp_path, caption_extension=".txt"))])

    def test_a_mixture_is_a_warning(self, tmp_path, said):
        picture(tmp_path / "a.png", caption="x", extension=".txt")
        picture(tmp_path / "b.png", caption="y")
        assert len(scan([dataset(subset(tmp_path, class_tokens="dog"))])) == 2
        assert "1 of the 2 images have a .txt file" in said[0]

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
        repeats = np.array(training + regularisation)
        is_reg = np.array([False] * len(training) + [True] * len(regularisation))
        balanced = balanced_repeats(repeats, is_reg)
        assert balanced[~is_reg].tolist() == training
        assert balanced[is_reg].sum() == sum(training)
        rounds = balanced[is_reg] / regularisation
        assert rounds.max() - rounds.min() <= 1


class TestDecoding:
    def test_exif_orientation_turns_the_image(self, tmp_path):
        pixels = np.zeros((20, 30, 3), dtype=np.uint8)
        pixels[:, :15] = 255
        exif = Image.Exif()
        exif[0x0112] = 6  # show turned by 90 degrees clockwise
        for name in ("a.png", "a.webp"):
            options = {"lossless": True} if name.endswith("webp") else {}
            Image.fromarray(pixels).save(tmp_path / name, exif=exif, **options)
            assert images.read_size(tmp_path / name) == (20, 30)
            decoded = images.load(tmp_path / name)
            assert decoded.shape == (30, 20, 3)
            assert decoded[0].min() == 255
            assert decoded[-1].max() == 0

    def test_exif_orientation_of_a_transparent_image(self, tmp_path):
        pixels = np.zeros((20, 30, 4), dtype=np.uint8)
        pixels[:, :15, 3] = 255
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
        decoded = images.load(tmp_path / "a.png")
        assert decoded.shape == (30, 20, 3)
        assert (decoded[0].max(), decoded[-1].min()) == (0, 255)

    def test_transparency_shows_white(self, tmp_path):
        pixels = np.zeros((4, 4, 4), dtype=np.uint8)
        pixels[:2, :, 3] = 255
        pixels[2, :, 3] = 127
        Image.fromarray(pixels).save(tmp_path / "rgba.png")
        decoded = images.load(tmp_path / "rgba.png")
        assert decoded[0].max() == 0
        assert abs(int(decoded[2, 0, 0]) - 128) <= 1
        assert decoded[3].min() == 255

    def test_palettes_with_and_without_transparency(self, tmp_path):
        image = Image.new("P", (4, 4))
        image.putpalette([255, 0, 0, 0, 0, 255])
        image.putpixel((1, 1), 1)
        image.save(tmp_path / "plain.png")
        image.save(tmp_path / "clear.png", transparency=0)
        assert images.load(tmp_path / "plain.png")[0, 0].tolist() == [255, 0, 0]
        decoded = images.load(tmp_path / "clear.png")
        assert decoded[0, 0].tolist() == [255, 255, 255]
        assert decoded[1, 1].tolist() == [0, 0, 255]

    def test_grey_16_bit_and_cmyk(self, tmp_path):
        Image.fromarray(np.full((4, 4), 0x80FF, dtype=np.uint16)).save(tmp_path / "deep.png")
        assert images.load(tmp_path / "deep.png")[0, 0].tolist() == [0x80] * 3
        Image.fromarray(np.full((4, 4), 7, dtype=np.uint8)).save(tmp_path / "grey.png")
        assert images.load(tmp_path / "grey.png")[0, 0].tolist() == [7] * 3
        Image.new("CMYK", (4, 4), (0, 0, 0, 255)).save(tmp_path / "print.jpg")
        assert images.load(tmp_path / "print.jpg").max() < 5

    def test_broken_files(self, tmp_path):
        whole = picture(tmp_path / "a.png", (200, 200)).read_bytes()
        (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
        assert images.read_size(tmp_path / "cut.png") == (200, 200)
        for name in ("cut.png", "gone.png"):
            with pytest.raises(images.BrokenImage):
                images.load(tmp_path / name)

    @pytest.mark.parametrize("size", [(90, 40), (40, 90), (20, 20), (64, 64), (65, 63)])
    def test_examples_have_the_size_of_the_bucket(self, tmp_path, size):
        path = picture(tmp_path / "a.png", size)
        geometry = dataset().buckets().choose(size)
        assert images.example(path, geometry).shape == (geometry.bucket[1], geometry.bucket[0], 3)

    def test_shrinking_averages(self):
        image = np.zeros((8, 8, 3), dtype=np.uint8)
        image[::2] = 200
        assert np.unique(images.resize(image, (4, 4))).tolist() == [100]

    def test_model_range_and_mirroring(self):
        image = np.zeros((2, 3, 3), dtype=np.uint8)
        image[:, 0] = 255
        values = images.to_model_range(images.flip(image))
        assert values.shape == (3, 2, 3)
        assert values.dtype == np.float32
        assert values[0, 0].tolist() == [-1, -1, 1]
