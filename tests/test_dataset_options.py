"""Every option of datasets and subsets: it arrives from where it may be set, and is refused where it means nothing."""

import json
from pathlib import Path

import pytest

from library import cli
from library.data.config import BOTH_KINDS, DREAMBOOTH, FINETUNING, check_combinations, check_resolutions, load_datasets
from library.data.config_values import OF_GENERAL, OF_SUBSET
from library.errors import UserError
from library.options.cache import CacheOptions
from library.options.dataset import DatasetOptions
from tests.pictures import dataset, subset


@pytest.fixture
def said(monkeypatch):
    """Messages to the user."""
    messages = []
    for name in ("notice", "warn"):
        monkeypatch.setattr(f"library.data.config.{name}", messages.append)
    return messages


@pytest.fixture
def folders(tmp_path, monkeypatch) -> Path:
    """A working folder with `images`, `masks`, `other_masks`, `meta.json` and `more.json`."""
    for name in ("images", "masks", "other_masks"):
        (tmp_path / name).mkdir()
    for name in ("meta.json", "more.json"):
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(content: dict, *flags: str, kinds=BOTH_KINDS):
    """The datasets of a file with this content, and of these flags."""
    Path("my.json").write_text(json.dumps(content))
    return load(*flags, "--dataset_config=my.json", kinds=kinds)


def load(*flags: str, kinds=BOTH_KINDS):
    settings = cli.parse([DatasetOptions], flags, description="")
    return load_datasets(settings[DatasetOptions], settings.given, kinds)


def refusal(*arguments, **keywords) -> str:
    action = read if isinstance(arguments[0], dict) else load
    with pytest.raises(UserError) as error:
        action(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


def with_subset(dataset_table=None, **options) -> dict:
    """A dataset file with one subset of these options."""
    return {"datasets": [{"resolution": 64, **(dataset_table or {}), "subsets": [options]}]}


# Name of an option, its values in a dataset file and what they come to; where it is in the result; words that mean the
# first value on the command line.
OF_SUBSETS = [
    ("class_tokens", ("dog", "dog"), ("cat", "cat"), "", None),
    ("caption_extension", ("txt", ".txt"), (".tags", ".tags"), "", "--caption_extension=txt"),
    ("cache_info", (True, True), (False, False), "", "--cache_info"),
    ("num_repeats", (3, 3), (2.5, 2.5), "", "--dataset_repeats=3"),
    ("images_per_epoch", (7, 7), (9, 9), "", None),
    ("weight", (0.5, 0.5), (2, 2), "", None),
    ("conditioning_data_dir", ("masks", Path("masks")), ("other_masks", Path("other_masks")), "", "masks"),
    ("conditioning_data_dir", ("masks", Path("masks")), ("", None), "", "masks"),
    ("validation_split", (0.1, 0.1), (0.2, 0.2), "", "--validation_split=0.1"),
    ("validation_seed", (3, 3), (-4, -4), "", "--validation_seed=3"),
    ("caption_separator", (";", ";"), (".", "."), "captions", "--caption_separator=;"),
    ("keep_tokens", (1, 1), (0, 0), "captions", "--keep_tokens=1"),
    ("keep_tokens_separator", ("|||", "|||"), ("", ""), "captions", "--keep_tokens_separator=|||"),
    ("secondary_separator", (";;;", ";;;"), ("", ""), "captions", "--secondary_separator=;;;"),
    ("shuffle_caption", (True, True), (False, False), "captions", "--shuffle_caption"),
    ("enable_wildcard", (True, True), (False, False), "captions", "--enable_wildcard"),
    ("caption_prefix", ("a", "a"), ("b", "b"), "captions", "--caption_prefix=a"),
    ("caption_suffix", ("a", "a"), ("", ""), "captions", "--caption_suffix=a"),
    ("caption_dropout_rate", (0.25, 0.25), (1, 1), "captions", "--caption_dropout_rate=0.25"),
    ("caption_dropout_every_n_epochs", (3, 3), (0, 0), "captions", "--caption_dropout_every_n_epochs=3"),
    ("caption_tag_dropout_rate", (0.25, 0.25), (0, 0), "captions", "--caption_tag_dropout_rate=0.25"),
    ("token_warmup_min", (2, 2), (0, 0), "captions", "--token_warmup_min=2"),
    ("token_warmup_step", (0.5, 0.5), (100, 100), "captions", "--token_warmup_step=0.5"),
    ("flip_aug", (True, True), (False, False), "images", "--flip_aug"),
    ("color_aug", (True, True), (False, False), "images", "--color_aug"),
    ("random_crop", (True, True), (False, False), "images", "--random_crop"),
    ("face_crop_aug_range", ([1, 3.0], (1, 3)), ("2,4.5", (2, 4.5)), "images", "--face_crop_aug_range=1.0,3.0"),
    ("face_crop_aug_range", ([1, 3.0], (1, 3)), ("", None), "images", "--face_crop_aug_range=1.0,3.0"),
    ("resize_interpolation", ("cubic", "cubic"), ("", None), "images", "--resize_interpolation=cubic"),
    ("alpha_mask", (True, True), (False, False), "images", "--alpha_mask"),
    ("legacy_image_decode", (True, True), (False, False), "images", "--legacy_image_decode"),
]
OF_DATASETS = [
    ("resolution", ([64, 96], (64, 96)), (128, (128, 128)), "--resolution=64,96"),
    ("batch_size", (3, 3), (4, 4), "--train_batch_size=3"),
    ("enable_bucket", (True, True), (False, False), "--enable_bucket"),
    ("min_bucket_reso", (32, 32), (48, 48), "--min_bucket_reso=32"),
    ("max_bucket_reso", (512, 512), (640, 640), "--max_bucket_reso=512"),
    ("bucket_reso_steps", (32, 32), (16, 16), "--bucket_reso_steps=32"),
    ("bucket_no_upscale", (True, True), (False, False), "--bucket_no_upscale"),
    ("skip_image_resolution", (100, (100, 100)), ([1, 2], (1, 2)), None),
    ("network_multiplier", (0.5, 0.5), (-1, -1), None),
]


@pytest.mark.parametrize(("name", "first", "second", "group", "word"), OF_SUBSETS)
def test_an_option_of_subsets_is_inherited_and_overruled(folders, said, name, first, second, group, word):
    def found(content, *words) -> object:
        (subset,) = read(content, *words)[0].subsets
        return getattr(getattr(subset, group) if group else subset, name)

    (value, meant), (other, other_meant) = first, second
    images = {"image_dir": "images"}
    default = found(with_subset(**images))
    assert default != meant
    assert found(with_subset(**images, **{name: value})) == meant
    assert found(with_subset({name: value}, **images)) == meant
    assert found({"general": {name: value}, **with_subset(**images)}) == meant
    assert found(with_subset({name: value}, **images, **{name: other})) == other_meant
    assert found({"general": {name: value}, **with_subset({name: other}, **images)}) == other_meant
    if word:
        word = word if word.startswith("--") else f"--{name}={word}"
        assert found(with_subset(**images), word) == meant
        assert found({"general": {name: other}, **with_subset(**images)}, word) == other_meant


@pytest.mark.parametrize(("name", "first", "second", "word"), OF_DATASETS)
def test_an_option_of_datasets_is_inherited_and_overruled(folders, name, first, second, word):
    def found(of_dataset, of_general, *words) -> object:
        content = {"general": of_general, "datasets": [{**of_dataset, "subsets": [{"image_dir": "images"}]}]}
        return getattr(read(content, *(words or ["--resolution=512"]))[0], name)

    (value, meant), (other, other_meant) = first, second
    assert found({}, {}) != meant
    assert found({name: value}, {}) == meant
    assert found({}, {name: value}) == meant
    assert found({name: other}, {name: value}) == other_meant
    if word:
        words = [word] if name == "resolution" else ["--resolution=512", word]
        assert found({}, {}, *words) == meant
        assert found({}, {name: other}, *words) == other_meant


def test_custom_attributes_are_overruled_one_by_one(folders):
    content = with_subset(
        {"custom_attributes": {"b": 2, "c": 2}}, image_dir="images", custom_attributes={"c": 3, "deep": {"x": [1]}}
    )
    content["general"] = {"custom_attributes": {"a": 1, "b": 1, "c": 1, "deep": {"y": 1}}}
    expected = {"a": 1, "b": 2, "c": 3, "deep": {"x": [1]}}
    assert read(content)[0].subsets[0].custom_attributes == expected


def test_the_nearer_of_repeats_and_images_per_epoch_counts(folders):
    def found(of_dataset, **options):
        subset = read(with_subset(of_dataset, image_dir="images", **options))[0].subsets[0]
        return subset.images_per_epoch or subset.num_repeats

    assert found({"images_per_epoch": 5}, num_repeats=2) == 2
    assert found({"num_repeats": 2}, images_per_epoch=5) == 5
    assert found({"num_repeats": 0}, images_per_epoch=5) == 5


def test_whole_repeats_are_an_int_and_none_leaves_the_subset_out(folders, said):
    assert repr(read(with_subset(image_dir="images", num_repeats=10.0))[0].subsets[0].num_repeats) == "10"
    assert not read(with_subset(image_dir="images", num_repeats=0))[0].subsets
    assert said == ["my.json: datasets[0].subsets[0] is left out: its num_repeats is 0"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--caption_dropout_rate=2"], "--caption_dropout_rate=2.0: must be a number from 0 to 1"),
        (["--validation_split=1"], "--validation_split=1.0: must be a number from 0 to less than 1"),
        (["--face_crop_aug_range=5"], "--face_crop_aug_range=5: must be two numbers above 0, the smaller one first"),
        (["--caption_separator="], "--caption_separator=: must be a text of at least one character"),
        (
            ["--conditioning_data_dir=mask"],
            "--conditioning_data_dir: the folder mask does not exist, did you mean masks?",
        ),
        (["--conditioning_data_dir=meta.json"], "--conditioning_data_dir: meta.json is a file, not a folder"),
    ],
)
def test_flags_with_unfit_values(folders, words, sentence):
    assert refusal("--train_data_dir=images", *words).startswith(sentence)


@pytest.mark.parametrize("level", ["general", "datasets[0]", "datasets[0].subsets[0]"])
def test_a_missing_folder_of_masks_is_answered_with_the_nearest(folders, level):
    wrong = {"conditioning_data_dir": "mask"}
    content = with_subset(wrong if level == "datasets[0]" else {}, image_dir="images")
    (content.setdefault("general", {}) if level == "general" else content["datasets"][0]["subsets"][0]).update(
        wrong if level != "datasets[0]" else {}
    )
    place = f"my.json: {level}.conditioning_data_dir"
    assert refusal(content) == f"{place}: the folder mask does not exist, did you mean masks?"


def test_the_docs_name_every_option_and_their_example_works(folders, said):
    text = (Path(__file__).parent.parent / "docs/datasets.md").read_text(encoding="utf-8")
    assert not [name for name in OF_GENERAL | OF_SUBSET if f"`{name}`" not in text]
    example = text.split("```toml")[1].split("```")[0]
    for name in ("photos/dog/masks", "photos/other_dogs", "drawings"):
        (folders / name).mkdir(parents=True)
    (folders / "drawings.json").touch()
    (folders / "example.toml").write_text(example)
    photos, drawings = load("--dataset_config=example.toml", "--masked_loss")
    assert [part.is_reg for part in photos.subsets] == [False, True]
    assert (drawings.kind, drawings.subsets[0].custom_attributes) == (FINETUNING, {"style": "ink"})
    assert not drawings.subsets[0].captions.shuffle_caption
    assert not said


# --- metadata files ---


def test_a_metadata_file_makes_a_fine_tuning_subset(folders):
    content = with_subset({"resolution": None}, metadata_file="meta.json")
    content["datasets"][0]["subsets"].append({"metadata_file": "more.json", "image_dir": "images", "num_repeats": 2})
    flags = ["--caption_extension=.txt", "--cache_info"]
    (found,) = read({"general": {"class_tokens": "dog"}, **content}, *flags)
    assert (found.kind, found.resolution) == (FINETUNING, None)
    first, second = found.subsets
    assert (first.metadata_file, first.image_dir) == (Path("meta.json"), None)
    assert (first.class_tokens, first.caption_extension, first.cache_info) == ("", ".caption", False)
    assert (second.image_dir, second.num_repeats, second.name) == (Path("images"), 2, "images")
    check_resolutions([found], 64)
    found.buckets()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"is_reg": True}, "my.json: datasets[0].subsets[0].is_reg: does not apply here"),
        ({"class_tokens": "dog"}, "my.json: datasets[0].subsets[0].class_tokens: does not apply here"),
        ({"caption_extension": "txt"}, "my.json: datasets[0].subsets[0].caption_extension: does not apply here"),
        ({"cache_info": True}, "my.json: datasets[0].subsets[0].cache_info: does not apply here"),
        (
            {"metadata_file": "mata.json"},
            "my.json: datasets[0].subsets[0].metadata_file: there is no metadata file mata.json",
        ),
        ({"metadata_file": "images"}, "my.json: datasets[0].subsets[0].metadata_file: images is a folder"),
        ({"image_dir": "image"}, "my.json: datasets[0].subsets[0].image_dir: the folder image does not exist"),
    ],
)
def test_mistakes_in_a_fine_tuning_subset(folders, options, sentence):
    assert refusal(with_subset(**({"metadata_file": "meta.json"} | options))).startswith(sentence)
    if "does not apply" in sentence and "is_reg" not in options:
        text = refusal(with_subset(options, metadata_file="meta.json"))
        assert text.startswith(sentence.replace(".subsets[0]", ""))


def test_a_dataset_is_of_one_kind_and_a_run_may_have_both(folders):
    files, images = {"metadata_file": "meta.json"}, {"image_dir": "images"}
    mixed = {"datasets": [{"resolution": 64, "subsets": [images, files]}]}
    assert refusal(mixed).startswith("my.json: datasets[0].subsets[1]: has a metadata_file, unlike those before it")
    mixed["datasets"][0]["subsets"].reverse()
    assert refusal(mixed).startswith("my.json: datasets[0].subsets[1]: has no metadata_file, unlike those before it")
    apart = {"datasets": [{"resolution": 64, "subsets": [part]} for part in (files, images)]}
    assert [part.kind for part in read(apart)] == [FINETUNING, DREAMBOOTH]


def test_the_same_metadata_file_counts_once(folders, said):
    content = with_subset(metadata_file="meta.json", image_dir="images")
    content["datasets"][0]["subsets"] += [{"metadata_file": "./meta.json"}, {"metadata_file": "more.json"}]
    (found,) = read(content)
    assert [part.metadata_file.name for part in found.subsets] == ["meta.json", "more.json"]
    assert said == ["my.json: datasets[0].subsets[1] is left out: its dataset has meta.json already"]


def test_in_json_is_one_fine_tuning_subset(folders, said):
    (found,) = load("--in_json=meta.json", "--train_data_dir=images", "--dataset_repeats=4", "--reg_data_dir=masks")
    (only,) = found.subsets
    assert (only.metadata_file, only.image_dir, only.num_repeats) == (Path("meta.json"), Path("images"), 4)
    assert (found.resolution, found.kind, only.is_reg) == (None, FINETUNING, False)
    assert said == ["--reg_data_dir ignored: there are no regularisation images with --in_json"]
    assert load("--in_json=meta.json")[0].subsets[0].image_dir is None
    assert load("--in_json=meta.json", "--resolution=64")[0].resolution == (64, 64)
    text = refusal("--in_json=meto.json")
    assert text == "--in_json: there is no metadata file meto.json, did you mean meta.json?"
    assert refusal("--in_json=meta.json", "--train_data_dir=image").startswith(
        "--train_data_dir: the folder image does"
    )


def test_a_dataset_file_makes_in_json_void(folders, said):
    (found,) = read(with_subset(image_dir="images"), "--in_json=nowhere.json", "--train_data_dir=nowhere")
    assert found.kind == DREAMBOOTH
    expected = "--train_data_dir and --in_json ignored: --dataset_config my.json describes the datasets"
    assert said == [expected]


def test_a_script_names_the_other_one_for_what_it_does_not_take(folders):
    dreambooth, finetuning = frozenset({DREAMBOOTH}), frozenset({FINETUNING})
    files, images = with_subset(metadata_file="meta.json"), with_subset(image_dir="images")
    assert read(files, kinds=finetuning)
    assert read(images, kinds=dreambooth)
    for place, *arguments in (("my.json: datasets[0]", files), ("--in_json", "--in_json=meta.json")):
        text = refusal(*arguments, kinds=dreambooth)
        assert text.startswith(f"{place}: this script takes no metadata files: use fine_tune.py")
    for place, *arguments in (("my.json: datasets[0]", images), ("--train_data_dir", "--train_data_dir=images")):
        text = refusal(*arguments, kinds=finetuning)
        assert text.startswith(place)
        assert "use train_db.py for folders" in text
    assert "give --in_json" in refusal("--keep_tokens=1", kinds=finetuning)


# --- regularisation images, masks, caches ---


@pytest.mark.parametrize("own", [{"images_per_epoch": 5}, {"validation_split": 0.5}])
def test_what_means_nothing_for_regularisation_images(folders, own):
    (name,) = own
    regular = {"image_dir": "images", "is_reg": True}
    assert refusal(with_subset(**regular, **own)).startswith(f"my.json: datasets[0].subsets[0].{name}: does not apply")
    (subset,) = read(with_subset(own, **regular))[0].subsets
    assert (subset.images_per_epoch, subset.validation_split) == (None, 0)


def test_regularisation_images_have_whole_repeats(folders):
    regular = {"image_dir": "images", "is_reg": True}
    place = "my.json: datasets[0].subsets[0].num_repeats: 2.5 does not fit"
    assert refusal(with_subset(**regular, num_repeats=2.5)).startswith(place)
    assert refusal(with_subset({"num_repeats": 2.5}, **regular)).startswith(place)
    assert read(with_subset({"num_repeats": 2.5}, **regular, num_repeats=3))[0].subsets[0].num_repeats == 3


def test_folders_of_regularisation_images_take_no_part_in_the_validation(folders):
    for path in ("data/1_a", "reg/1_b"):
        (folders / path).mkdir(parents=True)
    (found,) = load("--train_data_dir=data", "--reg_data_dir=reg", "--resolution=64", "--validation_split=0.2")
    assert [(part.is_reg, part.validation_split) for part in found.subsets] == [(False, 0.2), (True, 0)]


def test_masked_loss_needs_masks_and_masks_need_masked_loss(folders, said):
    images, masks = with_subset(image_dir="images"), with_subset(image_dir="images", conditioning_data_dir="masks")
    assert refusal(images, "--masked_loss").startswith(
        "--masked_loss: there are no masks: give --conditioning_data_dir"
    )
    read(masks, "--masked_loss")
    read(images, "--masked_loss", "--conditioning_data_dir=masks")
    read(images, "--masked_loss", "--alpha_mask")
    read(images, "--alpha_mask")
    assert not said
    read(masks)
    place = "my.json: datasets[0].subsets[0].conditioning_data_dir"
    assert said == [f"{place}: masks are not used without --masked_loss"]


LATENTS, TEXT = CacheOptions(cache_latents=True), CacheOptions(cache_text_encoder_outputs_to_disk=True)


@pytest.mark.parametrize("options", [{"color_aug": True}, {"random_crop": True}, {"face_crop_aug_range": (1.0, 2.0)}])
def test_latents_that_differ_each_time_are_not_cached(options):
    (name,) = options
    varied = [
        dataset(subset(Path("a"))),
        dataset(subset(Path("b"), place="my.toml: datasets[1].subsets[0]", **options)),
    ]
    with pytest.raises(
        UserError, match=rf"^my.toml: datasets\[1\].subsets\[0\].{name}: .* drop it or --cache_latents$"
    ):
        check_combinations(varied, LATENTS, False)
    with pytest.raises(UserError, match=f"^--{name}: .* drop it or --cache_latents_to_disk$"):
        check_combinations([dataset(subset(Path("b"), **options))], CacheOptions(cache_latents_to_disk=True), False)
    check_combinations(varied, TEXT, False)


@pytest.mark.parametrize(
    "options",
    [
        {"shuffle_caption": True},
        {"enable_wildcard": True},
        {"caption_tag_dropout_rate": 0.1},
        {"token_warmup_step": 5},
    ],
)
def test_captions_that_differ_each_time_are_not_cached(options):
    (name,) = options
    varied = [dataset(subset(Path("a"), place="my.toml: datasets[0].subsets[0]", **options))]
    expected = rf"^my.toml: datasets\[0\].subsets\[0\].{name}: .* drop it or --cache_text_encoder_outputs_to_disk$"
    with pytest.raises(UserError, match=expected):
        check_combinations(varied, TEXT, False)
    check_combinations(varied, LATENTS, True)


def test_what_caching_allows():
    calm = [dataset(subset(Path("a"), flip_aug=True, alpha_mask=True, caption_dropout_rate=0.5, caption_prefix="a"))]
    check_combinations(calm, CacheOptions(cache_latents=True, cache_text_encoder_outputs=True), False)


def test_outputs_of_a_text_encoder_that_is_trained_are_not_cached():
    with pytest.raises(UserError, match=r"^--cache_text_encoder_outputs_to_disk: .* --network_train_unet_only"):
        check_combinations([], TEXT, True)
    check_combinations([], LATENTS, True)
