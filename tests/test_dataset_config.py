"""The folder convention and the dataset file: how they are read, and what is said about mistakes in them."""

import json
import pickle
from pathlib import Path

import pytest

from library import console
from library.data.config import check_resolutions, load_datasets
from library.errors import UserError
from library.options.dataset import DatasetOptions
from tests.pictures import picture


@pytest.fixture
def said(monkeypatch):
    """Messages to the user."""
    messages = []
    for module in ("config", "folders"):
        monkeypatch.setattr(f"library.data.{module}.notice", messages.append)
    return messages


def load(given=frozenset(), **options):
    return load_datasets(DatasetOptions(**({"resolution": "64"} | BUCKETS | options)), frozenset(given))


BUCKETS = {"min_bucket_reso": 32, "max_bucket_reso": 128, "bucket_reso_steps": 16}


def from_toml(tmp_path: Path, text: str, **options):
    path = tmp_path / "my.toml"
    path.write_text(text.replace("DIR", tmp_path.as_posix()), encoding="utf-8")
    return load(dataset_config=path, **options)


def message(*args, **options) -> str:
    with pytest.raises(UserError) as error:
        load(*args, **options)
    text = str(error.value)
    assert "\n" not in text
    return text


def toml_message(tmp_path, text, **options) -> str:
    with pytest.raises(UserError) as error:
        from_toml(tmp_path, text, **options)
    return str(error.value)


class TestFolders:
    def test_names_give_repeats_and_class_tokens(self, tmp_path):
        picture(tmp_path / "train/10_sks dog/a.png")
        picture(tmp_path / "train/2_my_cat/a.png")
        picture(tmp_path / "reg/1_dog/a.png")
        (dataset,) = load(
            train_data_dir=str(tmp_path / "train"), reg_data_dir=str(tmp_path / "reg"), train_batch_size=3
        )
        assert dataset.batch_size == 3
        assert dataset.resolution == (64, 64)
        assert [(s.image_dir.name, s.num_repeats, s.class_tokens, s.is_reg) for s in dataset.subsets] == [
            ("10_sks dog", 10, "sks dog", False),
            ("2_my_cat", 2, "my_cat", False),
            ("1_dog", 1, "dog", True),
        ]

    def test_folders_without_repeats_are_named_and_left_out(self, tmp_path, said):
        picture(tmp_path / "3_dog/a.png")
        picture(tmp_path / "masks/a.png")
        picture(tmp_path / "0_cat/a.png")
        picture(tmp_path / "loose.png")
        (dataset,) = load(train_data_dir=str(tmp_path))
        assert [s.image_dir.name for s in dataset.subsets] == ["3_dog"]
        assert len(said) == 3
        assert any(str(tmp_path / "masks") in line and "10_masks" in line for line in said)
        assert any(str(tmp_path / "0_cat") in line for line in said)
        assert any("1 images directly" in line for line in said)

    def test_a_leaf_folder_is_answered_with_its_parent(self, tmp_path):
        picture(tmp_path / "train/10_dog/a.png")
        text = message(train_data_dir=str(tmp_path / "train/10_dog"))
        assert text.endswith(f"use --train_data_dir={tmp_path / 'train'}")
        reg = message(train_data_dir=str(tmp_path / "train"), reg_data_dir=str(tmp_path / "train/10_dog"))
        assert f"--reg_data_dir={tmp_path / 'train'}" in reg

    def test_a_leaf_folder_given_by_a_relative_path(self, tmp_path, monkeypatch):
        picture(tmp_path / "10_dog/a.png")
        monkeypatch.chdir(tmp_path / "10_dog")
        assert message(train_data_dir=".").endswith(f"use --train_data_dir={tmp_path}")
        monkeypatch.chdir(tmp_path)
        assert message(train_data_dir="10_dog").endswith("use --train_data_dir=.")

    def test_loose_images_are_answered_with_a_folder_name_and_a_dataset_file(self, tmp_path):
        picture(tmp_path / "dogs/a.png")
        text = message(train_data_dir=str(tmp_path / "dogs"))
        assert str(tmp_path / "dogs" / "10_dogs") in text
        assert "--dataset_config" in text
        assert f"image_dir = '{tmp_path / 'dogs'}'" in text
        picture(tmp_path / "train/10_sks dog/a.png")
        reg = message(train_data_dir=str(tmp_path / "train"), reg_data_dir=str(tmp_path / "dogs"))
        assert f"move the images into {tmp_path / 'dogs' / '1_<class>'}, or give a dataset file with image_dir" in reg
        assert f"image_dir = '{tmp_path / 'dogs'}' and is_reg = true as --dataset_config" in reg

    def test_a_folder_too_far_up_is_answered_with_the_right_one(self, tmp_path):
        picture(tmp_path / "train/10_dog/a.png")
        assert message(train_data_dir=str(tmp_path)).endswith(f"use --train_data_dir={tmp_path / 'train'}")

    def test_folders_that_all_lack_repeats(self, tmp_path):
        picture(tmp_path / "dog/a.png")
        text = message(train_data_dir=str(tmp_path))
        assert f"rename {tmp_path / 'dog'} to {tmp_path / '10_dog'}" in text

    def test_an_empty_folder(self, tmp_path):
        assert f"--train_data_dir={tmp_path} holds no images" in message(train_data_dir=str(tmp_path))

    def test_a_missing_folder_is_answered_with_the_nearest(self, tmp_path):
        (tmp_path / "training").mkdir()
        text = message(train_data_dir=str(tmp_path / "trainin"))
        assert text.startswith("--train_data_dir: ")
        assert f"did you mean {tmp_path / 'training'}?" in text
        assert f"nor is there a folder {tmp_path / 'x'}" in message(train_data_dir=str(tmp_path / "x" / "y"))

    def test_a_file_as_folder(self, tmp_path):
        path = picture(tmp_path / "a.png")
        assert "is a file" in message(train_data_dir=str(path))

    def test_nothing_given(self):
        assert "--train_data_dir" in message()


class TestFile:
    def test_precedence_is_subset_dataset_general_command_line(self, tmp_path):
        for name in "abc":
            picture(tmp_path / name / "a.png")
        text = """
            [general]
            num_repeats = 2
            keep_tokens = 1
            [[datasets]]
            resolution = [64, 48]
            keep_tokens = 3
              [[datasets.subsets]]
              image_dir = 'DIR/a'
              num_repeats = 5
              [[datasets.subsets]]
              image_dir = 'DIR/b'
              is_reg = true
              class_tokens = "dog"
            [[datasets]]
            batch_size = 7
              [[datasets.subsets]]
              image_dir = 'DIR/c'
              caption_extension = "txt"
        """
        first, second = from_toml(tmp_path, text, train_batch_size=4, flip_aug=True)
        assert (first.resolution, first.batch_size) == ((64, 48), 4)
        assert (second.resolution, second.batch_size) == ((64, 64), 7)
        a, b, c = (*first.subsets, *second.subsets)
        assert (a.num_repeats, a.captions.keep_tokens, a.is_reg, a.images.flip_aug) == (5, 3, False, True)
        assert (b.num_repeats, b.captions.keep_tokens, b.is_reg, b.class_tokens) == (2, 3, True, "dog")
        assert (c.num_repeats, c.captions.keep_tokens, c.caption_extension) == (2, 1, ".txt")
        assert b.caption_extension == ".caption"

    def test_repeats_fall_back_to_the_flag(self, tmp_path):
        text = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'DIR'"
        assert from_toml(tmp_path, text, dataset_repeats=4)[0].subsets[0].num_repeats == 4

    def test_folders_of_the_command_line_are_ignored_with_a_notice(self, tmp_path, said):
        text = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'DIR'"
        from_toml(tmp_path, text, train_data_dir="x", reg_data_dir="y", given={"train_data_dir", "reg_data_dir"})
        assert len(said) == 1
        assert "--train_data_dir and --reg_data_dir ignored" in said[0]

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("num_repeat = 3", "datasets[0].subsets[0].num_repeat: unknown option, did you mean num_repeats?"),
            ("num_repeats = '3'", "datasets[0].subsets[0].num_repeats: '3' must be a number, 0 or more"),
            ("num_repeats = true", "datasets[0].subsets[0].num_repeats: True must be a number"),
            ("num_repeats = -1", "datasets[0].subsets[0].num_repeats: -1 must be a number, 0 or more"),
            ("flip_aug = 1", "datasets[0].subsets[0].flip_aug: 1 must be true or false"),
            ("class_tokens = 1", "datasets[0].subsets[0].class_tokens: 1 must be a text"),
            ("num_repeats = nan", "datasets[0].subsets[0].num_repeats: nan must be a number"),
            (
                "images_per_epoch = 1.5",
                "datasets[0].subsets[0].images_per_epoch: 1.5 must be a whole number, 1 or more",
            ),
            ("caption_separator = ''", "datasets[0].subsets[0].caption_separator: '' must be a text of at least one"),
            (
                "caption_dropout_rate = 1.1",
                "datasets[0].subsets[0].caption_dropout_rate: 1.1 must be a number from 0 to",
            ),
            (
                "caption_tag_dropout_rate = -1",
                "datasets[0].subsets[0].caption_tag_dropout_rate: -1 must be a number from",
            ),
            (
                "validation_split = 1",
                "datasets[0].subsets[0].validation_split: 1 must be a number from 0 to less than 1",
            ),
            ("validation_seed = 1.0", "datasets[0].subsets[0].validation_seed: 1.0 must be a whole number"),
            ("custom_attributes = 3", "datasets[0].subsets[0].custom_attributes: 3 must be a table"),
            (
                "custom_attributes = { diff_output_preservaton = true }",
                "datasets[0].subsets[0].custom_attributes: {'diff_output_preservaton': True} must have another name "
                "than diff_output_preservaton for what is yours, did you mean diff_output_preservation?",
            ),
            ("face_crop_aug_range = [3.0, 1.0]", "datasets[0].subsets[0].face_crop_aug_range: [3.0, 1.0] must be two"),
            ("face_crop_aug_range = '1.0'", "datasets[0].subsets[0].face_crop_aug_range: '1.0' must be two numbers"),
            (
                "resize_interpolation = 'lancos'",
                "datasets[0].subsets[0].resize_interpolation: 'lancos' must be one of lanczos, nearest, bilinear, "
                "linear, bicubic, cubic, area, did you mean lanczos?",
            ),
            (
                "num_repeats = 2\nimages_per_epoch = 5",
                "datasets[0].subsets[0]: num_repeats and images_per_epoch say the same in two ways",
            ),
            ("batch_size = 2", "datasets[0].subsets[0].batch_size: is an option of a whole dataset"),
        ],
    )
    def test_mistakes_in_a_subset(self, tmp_path, text, expected):
        text = f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'DIR'\n{text}"
        assert toml_message(tmp_path, text).startswith(f"{tmp_path / 'my.toml'}: {expected}")

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("[general]\nenable_buckets = true", "general.enable_buckets: unknown option, did you mean enable_bucket?"),
            ("[general]\nimage_dir = 'x'", "general.image_dir: is an option of a single folder"),
            ("[genral]\n", "genral: unknown section, did you mean general?"),
            ("[general]\nresolution = [1, 2, 3]", "general.resolution: [1, 2, 3] must be one size"),
            ("[general]\nresolution = 64.5", "general.resolution: 64.5 must be one size"),
            ("general = 3", "general: must be a table"),
            ("", "describes no datasets"),
            (
                "[datasets]",
                "datasets: must be a list of tables, each started with two pairs of brackets, as [[datasets]]",
            ),
            ("[[datasets]]", "datasets[0]: has no images"),
            ("[[datasets]]\n[datasets.subsets]", "datasets[0].subsets: must be a list of tables"),
            ("[[datasets]]\n[[datasets.subsets]]", "datasets[0].subsets[0]: image_dir"),
        ],
    )
    def test_mistakes_elsewhere(self, tmp_path, text, expected):
        assert toml_message(tmp_path, text).startswith(f"{tmp_path / 'my.toml'}: {expected}")

    def test_windows_paths_in_double_quotes_get_a_hint(self, tmp_path):
        text = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "C:\\hoge"'
        text = toml_message(tmp_path, text)
        assert text.startswith(f"{tmp_path / 'my.toml'}, line 3: this dataset file is not valid TOML")
        assert "'single' quotes" in text

    def test_a_missing_image_dir_is_answered_with_the_nearest(self, tmp_path):
        (tmp_path / "dogs").mkdir()
        text = toml_message(tmp_path, "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'DIR/dgos'")
        assert text.startswith(f"{tmp_path / 'my.toml'}: datasets[0].subsets[0].image_dir: ")
        assert text.endswith(f"did you mean {tmp_path / 'dogs'}?")

    def test_a_missing_file(self, tmp_path):
        (tmp_path / "data.toml").touch()
        assert f"no such dataset file, did you mean {tmp_path / 'data.toml'}?" in message(
            dataset_config=tmp_path / "dat.toml"
        )

    def test_a_missing_resolution(self, tmp_path):
        text = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'DIR'"
        assert "datasets[0].resolution is missing" in toml_message(tmp_path, text, resolution=None)
        picture(tmp_path / "1_a/a.png")
        assert "--resolution" in message(train_data_dir=str(tmp_path), resolution=None)

    def test_the_same_folder_twice_counts_once_per_dataset(self, tmp_path, said):
        one = "[[datasets.subsets]]\nimage_dir = 'DIR'\n"
        same = f"[[datasets.subsets]]\nimage_dir = 'DIR/../{tmp_path.name}'\n"
        first, second = from_toml(tmp_path, f"[[datasets]]\n{one}{same}[[datasets]]\n{one}")
        assert (len(first.subsets), len(second.subsets)) == (1, 1)
        assert len(said) == 1
        assert "datasets[0].subsets[1]" in said[0]

    def test_a_byte_order_mark_and_comments_in_any_script(self, tmp_path):
        text = "\ufeff[general]  # 全般\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'DIR'  # 画像\n"
        assert len(from_toml(tmp_path, text)) == 1

    def test_json_says_the_same_and_null_says_nothing(self, tmp_path):
        content = {
            "general": {"keep_tokens": 2, "class_tokens": None},
            "datasets": [{"resolution": [64, 48], "subsets": [{"image_dir": str(tmp_path), "keep_tokens": None}]}],
        }
        path = tmp_path / "my.JSON"
        path.write_text(json.dumps(content), encoding="utf-8-sig")
        (dataset,) = load(dataset_config=path)
        assert dataset.resolution == (64, 48)
        assert dataset.subsets[0].captions.keep_tokens == 2
        content["datasets"][0]["subsets"][0]["keep_token"] = None
        path.write_text(json.dumps(content))
        expected = f"{path}: datasets[0].subsets[0].keep_token: unknown option, did you mean keep_tokens?"
        assert message(dataset_config=path) == expected

    def test_json_that_is_none(self, tmp_path):
        path = tmp_path / "my.json"
        path.write_text('{\n"datasets": [\n}')
        assert message(dataset_config=path).startswith(f"{path}, line 3: this dataset file is not valid JSON")
        path.write_text("[]")
        assert message(dataset_config=path) == f"{path}: must be a table of options"
        assert message(dataset_config=tmp_path / "mi.json").endswith(f"did you mean {path}?")

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("x = [1.0, 3", ": this dataset file is not valid TOML (Unclosed array)"),
            ("[general]", ", line 3: this dataset file is not valid TOML (Cannot declare"),
        ],
    )
    def test_toml_that_is_none(self, tmp_path, text, expected):
        text = toml_message(tmp_path, f"[general]\nkeep_tokens = 1\n{text}")
        assert text.startswith(f"{tmp_path / 'my.toml'}{expected}")

    def test_datasets_can_be_sent_to_other_processes(self, tmp_path):
        text = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'DIR'\ncustom_attributes = { who = { name = 'me' } }"
        datasets = from_toml(tmp_path, text)
        assert pickle.loads(pickle.dumps(datasets)) == datasets


class TestResolutions:
    def dataset(self, tmp_path, **options):
        picture(tmp_path / "1_a/a.png")
        return load(train_data_dir=str(tmp_path), **options)

    def test_width_and_height(self, tmp_path):
        assert self.dataset(tmp_path, resolution="64, 96")[0].resolution == (64, 96)

    @pytest.mark.parametrize("resolution", ["", "a", "64,", "1,2,3", "0", "64x64", "-64"])
    def test_nonsense(self, tmp_path, resolution):
        picture(tmp_path / "1_a/a.png")
        assert message(train_data_dir=str(tmp_path), resolution=resolution).startswith(f"--resolution={resolution}: ")

    def test_the_model_decides_which_steps_are_legal(self, tmp_path):
        datasets = self.dataset(tmp_path, resolution="80,64", enable_bucket=True)
        check_resolutions(datasets, 16)
        with pytest.raises(UserError, match=r"--resolution: 80,64 .* multiples of 64, the nearest is 64$"):
            check_resolutions(datasets, 64)
        with pytest.raises(UserError, match=r"--resolution: 80,64 .* multiples of 32, the nearest is 96,64$"):
            check_resolutions(datasets, 32)
        datasets = self.dataset(
            tmp_path, enable_bucket=True, bucket_reso_steps=48, resolution="96", max_bucket_reso=192
        )
        with pytest.raises(UserError, match=r"--bucket_reso_steps: 48 .* a multiple of 32, the nearest is 64$"):
            check_resolutions(datasets, 32)

    def test_steps_do_not_matter_without_buckets(self, tmp_path):
        check_resolutions(self.dataset(tmp_path, bucket_reso_steps=7), 64)

    def test_places_in_a_file_are_named(self, tmp_path):
        text = "[[datasets]]\nresolution = 100\n[[datasets.subsets]]\nimage_dir = 'DIR'"
        with pytest.raises(UserError, match=r"my.toml: datasets\[0\].resolution: 100 .* the nearest is 96$"):
            check_resolutions(from_toml(tmp_path, text), 16)

    def test_limits_of_buckets_are_moved_to_whole_steps(self, tmp_path, said):
        (dataset,) = self.dataset(tmp_path, enable_bucket=True, min_bucket_reso=40, max_bucket_reso=100)
        assert (dataset.min_bucket_reso, dataset.max_bucket_reso) == (32, 112)
        assert len(said) == 2

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"min_bucket_reso": 256, "max_bucket_reso": 128}, "--min_bucket_reso: 256 is more than max_bucket_reso"),
            ({"min_bucket_reso": 80}, "--min_bucket_reso: 80 is more than the resolution 64, use 64 or less"),
            ({"bucket_reso_steps": 80}, "--bucket_reso_steps: 80 is more than the resolution 64, use 64 or less"),
            ({"resolution": "256"}, "--max_bucket_reso: 128 is less than the resolution 256, use 256 or more"),
        ],
    )
    def test_limits_that_contradict_each_other(self, tmp_path, options, expected):
        picture(tmp_path / "1_a/a.png")
        assert message(train_data_dir=str(tmp_path), enable_bucket=True, **options).startswith(expected)

    def test_limits_are_not_used_without_upscaling(self, tmp_path, said):
        self.dataset(tmp_path, enable_bucket=True, bucket_no_upscale=True, min_bucket_reso=250, max_bucket_reso=3)
        assert not said


def test_messages_go_through_the_console(tmp_path, capsys):
    console.setup(None)
    picture(tmp_path / "1_a/a.png")
    (tmp_path / "other").mkdir()
    load(train_data_dir=str(tmp_path))
    assert str(tmp_path / "other") in capsys.readouterr().err
