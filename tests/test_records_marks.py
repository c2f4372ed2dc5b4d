"""What a record knows besides its size: its mask, the name of its cache, whether it is held out."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from library.data.records import scan
from library.errors import UserError
from tests.pictures import dataset, picture, subset


class TestMasks:
    def test_masks_have_the_stem_of_their_image(self, tmp_path, said):
        for name in ("a.jpg", "b.png", "c.png"):
            picture(tmp_path / name, caption="x")
        for name in ("a.PNG", "b.webp", "other.png"):
            picture(tmp_path / "mask" / name)
        table = scan([dataset(subset(tmp_path, conditioning_data_dir=tmp_path / "mask"))])
        assert [record.mask for record in table] == [str(tmp_path / "mask/a.PNG"), str(tmp_path / "mask/b.webp"), ""]
        report = table.reports[0]
        assert (report.masks_found, report.masks_missing, report.stray_masks) == (2, 1, 1)
        assert "1 of 3 images" in said[0]
        assert said[0].endswith("has no mask: c.png")
        assert "1 mask has no image" in said[1]
        assert said[1].endswith(": other.png")
        assert len(said) == 2

    def test_masks_of_other_proportions_are_counted_and_named(self, tmp_path, said):
        masks = {"same": (90, 61), "half": (45, 30), "double": (181, 121), "square": (90, 90), "turned": (61, 90)}
        for name, size in masks.items():
            picture(tmp_path / f"{name}.png", (90, 61), caption="x")
            picture(tmp_path / "mask" / f"{name}.png", size)
        picture(tmp_path / "unreadable.png", caption="x")
        (tmp_path / "mask" / "unreadable.png").write_text("no image")
        report = scan([dataset(subset(tmp_path, conditioning_data_dir=tmp_path / "mask"))]).reports[0]
        assert (report.masks_found, report.masks_wrong_size) == (6, 2)
        assert report.wrong_masks == ("square.png", "turned.png")
        (message,) = said
        assert "2 masks have other proportions than their images" in message
        assert message.endswith("square.png (90x90, the image 90x61), turned.png (61x90, the image 90x61)")

    def test_masks_are_turned_as_their_images_are(self, tmp_path, said):
        exif = Image.Exif()
        exif[0x0112] = 6
        picture(tmp_path / "a.png", (50, 100), caption="x")
        (tmp_path / "mask").mkdir()
        Image.new("RGB", (100, 50)).save(tmp_path / "mask" / "a.jpg", exif=exif)
        for legacy in (False, True):
            config = subset(tmp_path, conditioning_data_dir=tmp_path / "mask", legacy_image_decode=legacy)
            assert scan([dataset(config)]).reports[0].masks_wrong_size == legacy

    def test_no_folder_of_masks_is_no_missing_mask(self, tmp_path):
        picture(tmp_path / "a.png", caption="x")
        table = scan([dataset(subset(tmp_path))])
        assert (table[0].mask, table.reports[0].masks_missing) == ("", 0)


class TestCacheStems:
    def test_images_with_one_stem_have_caches_of_their_own(self, tmp_path):
        for name in ("a.bmp", "a.png", "b.c.png", "b.png"):
            picture(tmp_path / name, caption="x")
        stems = [os.path.basename(record.cache_stem) for record in scan([dataset(subset(tmp_path))])]
        assert stems == ["a", "a.png", "b.c", "b"]

    def test_a_stem_that_is_the_name_of_another_image(self, tmp_path):
        for name in ("a.bmp", "a.jpg", "a.jpg.png", "a.jpg.png.webp", "b.png.png", "c.png"):
            picture(tmp_path / name, caption="x")
        table = scan([dataset(subset(tmp_path, class_tokens="x"))])
        stems = [os.path.basename(record.cache_stem) for record in table]
        assert stems == ["a", "a.jpg", "a.jpg.png", "a.jpg.png.webp", "b.png", "c"]
        assert [record.shared_stem for record in table] == [True, True, True, True, False, False]

    def test_all_images_of_one_stem_know_that_it_is_shared(self, tmp_path):
        for name in ("a.bmp", "a.png", "a.webp", "b.png"):
            picture(tmp_path / name, caption="x")
        (tmp_path / "gone.npz").touch()
        (tmp_path / "b.npz").touch()
        facts = {"caption": "x", "train_resolution": [64, 64]}
        names = ["a.bmp", "a.png", "a.webp", "b.jpg", "b.png", "gone.png"]
        (tmp_path / "all.json").write_text(json.dumps(dict.fromkeys(names, facts)))
        found = {}
        for config in (subset(tmp_path), subset(tmp_path, metadata_file=tmp_path / "all.json")):
            table = scan([dataset(config)])
            found |= {os.path.basename(record.path): record.shared_stem for record in table}
            assert [record.shared_stem for record in table][:3] == [True] * 3
        assert found == dict(zip(names, [True, True, True, True, False, False], strict=True))


class TestHoldingOut:
    def held_out(self, folder, **options):
        tables = [scan([dataset(subset(folder, **options)), dataset(subset(folder, **options), resolution=(96, 96))])]
        return [(r.dataset, os.path.basename(r.path)) for table in tables for r in table if r.validation]

    @pytest.fixture
    def folder(self, tmp_path):
        for number in range(20):
            picture(tmp_path / f"{number}.png", caption="x")
        return tmp_path

    def test_a_share_is_in_no_batch_and_the_same_at_each_resolution(self, folder):
        config = [dataset(subset(folder, validation_split=0.13, num_repeats=2))]
        table = scan(config)
        assert table.reports[0].held_out == 3
        assert [table[i].repeats for i in table.held_out] == [0, 0, 0]
        assert table.in_use == 17
        used = {i for _, _, members in table.by_bucket() for i in members}
        assert not used & set(table.held_out)
        ((_, _, members),) = table.by_bucket(table.held_out)
        assert members.tolist() == table.held_out.tolist()
        pairs = self.held_out(folder, validation_split=0.13)
        assert {name for number, name in pairs if number == 0} == {name for number, name in pairs if number == 1}

    def test_the_same_where_another_resolution_leaves_images_out(self, folder):
        for number in range(0, 20, 2):
            picture(folder / f"{number}.png", (96, 96))
        config = subset(folder, validation_split=0.3)
        table = scan([dataset(config), dataset(config, skip_image_resolution=(64, 64))])
        held_out, trained = (
            [{os.path.basename(r.path) for r in table if (r.dataset, r.validation) == (n, kept)} for n in (0, 1)]
            for kept in (True, False)
        )
        assert len(held_out[0]) == 6
        assert held_out[1] == {name for name in held_out[0] if int(name.partition(".")[0]) % 2 == 0}
        assert not held_out[0] & trained[1]
        assert [report.held_out for report in table.reports] == [len(names) for names in held_out]

    def test_nothing_but_held_out_images_is_nothing_to_train_on(self, tmp_path, said):
        for number in range(2):
            picture(tmp_path / f"{number}.png", caption="x")
        config = subset(tmp_path, validation_split=0.5)
        (held_out,) = (record for record in scan([dataset(config)]) if record.validation)
        picture(Path(held_out.path), (96, 96))
        with pytest.raises(UserError, match="no image to train on is left"):
            scan([dataset(config, skip_image_resolution=(64, 64))])
        assert "the 1 image that is left is held out for validation" in said[-1]

    def test_the_seed_chooses(self, folder):
        choices = [self.held_out(folder, validation_split=0.2, validation_seed=seed) for seed in (None, 0, 1)]
        assert choices[0] == choices[1] != choices[2]

    def test_at_least_one_and_never_all(self, folder, tmp_path):
        assert len(self.held_out(folder, validation_split=0.001)) == 2
        assert len(self.held_out(folder, validation_split=1.0)) == 38
        assert self.held_out(folder, validation_split=0.0) == []

    def test_regularisation_images_are_not(self, folder, tmp_path):
        picture(tmp_path / "train/a.png", caption="x")
        train, reg = subset(tmp_path / "train", validation_split=0.5), subset(folder, is_reg=True, validation_split=0.5)
        assert not scan([dataset(train, reg)]).held_out.size
