"""The flags against the table of what users' command lines rely on, and the values behind the defaults."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies

from library import options
from library.errors import UserError
from library.options import (
    CacheOptions,
    DatasetOptions,
    DreamBoothOptions,
    FineTuneOptions,
    FullModelOptions,
    NetworkOptions,
    OptimizerOptions,
    Option,
    PreviewOptions,
    SchedulerOptions,
    SdxlFineTuneOptions,
    TextualInversionOptions,
    TrainingOptions,
    options_of,
)
from library.options.base import STEPS_OR_FRACTION, parse_key_values
from library.options.loader import LoaderOptions
from library.options.logging import LogOptions

GROUPS = [value for name, value in vars(options).items() if name.endswith("Options") and value is not FullModelOptions]
# A script has one of them.
METHODS = (DreamBoothOptions, FineTuneOptions, SdxlFineTuneOptions, NetworkOptions, TextualInversionOptions)
FLAGS = [option for group in GROUPS if group not in METHODS or group is NetworkOptions for option in options_of(group)]
TYPE_NAMES = {bool: "", int: "int", float: "float", str: "str", Path: "Path", STEPS_OR_FRACTION: "int_or_float"}


OF_THE_DATA = re.compile(
    "^in_json|^dataset|_dataset|_data_dir|^caption_|_caption$|_wildcard|token_warmup|keep_tokens|_separator|_aug|_crop|"
    "^resize|_bucket$|bucket_(reso|no)|^resolution|alpha_mask|masked_loss|^cache|_cache_check|batch_size|^validation_"
)
TABLES = ("train_network", "sdxl_train_network", "tools__cache_latents")
OURS = {
    "no_rehearsal",
    "dry_run",
    "deterministic",
    "legacy_image_decode",
    "recache_unknown",
    "ema",
    "ema_decay",
    "save_best",
    "stop_after_no_improvement",
    "resume_new_learning_rate",
    "timestep_distribution",
    "masked_loss_normalize",
    "fused_optimizer_groups",  # sdxl_train.py's in the toolkit of the tables
}


def flag_table(tables: Sequence[str] = TABLES) -> dict[str, dict[str, str]]:
    found = {}
    for table in tables:
        path = Path(__file__).parent / "data" / "flags" / f"{table}.tsv"
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            found = {row["dest"]: row for row in rows} | found
    return found


@pytest.mark.parametrize("option", [one for one in FLAGS if one.name not in OURS], ids=lambda option: option.name)
def test_flag_is_that_of_the_table(option):
    assert_is_flag(option, flag_table([*TABLES, "fine_tune"])[option.name])


@pytest.mark.parametrize("option", options_of(FineTuneOptions), ids=lambda option: option.name)
def test_flag_of_fine_tuning_is_that_of_its_table(option):
    assert_is_flag(option, flag_table(["fine_tune"])[option.name])


@pytest.mark.parametrize("table", ["train_textual_inversion", "sdxl_train_textual_inversion"])
def test_flags_of_textual_inversion_are_those_of_its_tables(table):
    rows, own = flag_table([table]), options_of(TextualInversionOptions)
    there = {option.name: option for option in (*FLAGS, *own)}
    for option in own:
        assert_is_flag(option, rows[option.name])
    aliases = {alias for option in there.values() for alias in option.details.aliases}
    assert rows.keys() - there.keys() - aliases == set()


def assert_is_flag(option: Option, row: dict[str, str]) -> None:
    assert row["flags"] == f"--{option.name}"
    assert row["type"] == TYPE_NAMES[option.kind]
    assert row["nargs"] == ("*" if option.many else "")
    assert row["default"] == repr(option.default) or float(row["default"]) == option.default
    choices = [str(choice) for choice in option.details.choices]
    # configuration files of front ends have 75 where it is left out on command lines
    spelled = row["choices"].replace("None|150", "75|150").removeprefix("None|")
    assert spelled == "|".join(choices)
    assert row["action"] == ("StoreTrueAction" if option.kind is bool else "StoreAction")


def test_every_flag_of_the_table_about_data_and_caches_is_there():
    named = {name for name in flag_table() if OF_THE_DATA.search(name)}
    assert named <= {option.name for option in FLAGS} | {"caption_extention"}
    assert len(named) > 45
    assert not OURS & flag_table().keys()


@pytest.mark.parametrize("one", METHODS, ids=lambda group: group.__name__)
def test_no_flag_of_a_script_is_in_two_groups(one):
    names = [option.name for group in GROUPS if group not in METHODS or group is one for option in options_of(group)]
    assert len(set(names)) == len(names)


def test_old_spellings_are_in_the_table_and_no_other_flags_names():
    names = [option.name for option in FLAGS]
    aliases = {alias for option in FLAGS for alias in option.details.aliases}
    assert aliases <= flag_table().keys()
    assert not aliases & set(names)


@pytest.mark.parametrize(
    ("words", "pairs"),
    [
        (["a=1", "b=2"], {"a": "1", "b": "2"}),
        (
            ["scale_parameter=False,relative_step=False,warmup_init=False"],
            {"scale_parameter": "False", "relative_step": "False", "warmup_init": "False"},
        ),
        (["betas=.9,.999"], {"betas": ".9,.999"}),
        (["betas=.9,.999,weight_decay=0.01"], {"betas": ".9,.999", "weight_decay": "0.01"}),
        (["down_lr_weight=0,0,1"], {"down_lr_weight": "0,0,1"}),
        (["down_lr_weight=sine+.5", "mid_lr_weight=1.5"], {"down_lr_weight": "sine+.5", "mid_lr_weight": "1.5"}),
        (["a = 1, b = 2,", ""], {"a": "1", "b": "2"}),
        (["preset=x=y", "preset=z"], {"preset": "z"}),
        (["path=x=y"], {"path": "x=y"}),
        (["empty="], {"empty": ""}),
        ([], {}),
    ],
)
def test_key_values(words, pairs):
    assert parse_key_values(words, "--network_args") == pairs


@pytest.mark.parametrize("word", ["conv_dim", "=4", "conv_dim,conv_alpha=1"])
def test_key_values_name_the_flag_of_a_word_that_is_no_pair(word):
    with pytest.raises(UserError, match=r"^--network_args: '.*' is not written as name=value$"):
        NetworkOptions(network_args=(word,))


@settings(max_examples=50, deadline=None)
@given(
    strategies.dictionaries(strategies.from_regex(r"[a-z_]\w{0,5}", fullmatch=True), strategies.integers(), max_size=4)
)
def test_key_values_read_the_same_in_one_word_or_in_several(values):
    words = [f"{name}={value}" for name, value in values.items()]
    expected = {name: str(value) for name, value in values.items()}
    assert parse_key_values(words, "--x") == parse_key_values([",".join(words)], "--x") == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("100", 100), ("100.0", 100), ("1", 1), ("1e3", 1000), ("0.05", 0.05), ("10%", 0.1), ("0.0", 0)],
)
def test_warmup_is_steps_or_a_fraction(text, value):
    option = next(option for option in FLAGS if option.name == "lr_warmup_steps")
    assert option.from_text(text) == value
    assert type(option.from_text(text)) is type(value)


@pytest.mark.parametrize("text", ["1.5", "-0.1", "-3", "nan", "inf", "ten", "100%", "%", ""])
def test_warmup_refuses_what_is_neither(text):
    option = next(option for option in FLAGS if option.name == "lr_warmup_steps")
    with pytest.raises(ValueError, match=r"whole number of steps or a fraction below 1|use 0 or more"):
        option.from_text(text)


@settings(max_examples=50, deadline=None)
@given(strategies.sampled_from([option for option in FLAGS if option.kind is not bool]), strategies.text(max_size=8))
def test_any_text_gives_a_value_of_the_type_or_a_reason_that_quotes_it(option, text):
    reason = None
    try:
        assert isinstance(option.from_text(text), option.kind)
    except ValueError as problem:
        reason = str(problem)
    assert reason is None or repr(text) in reason or reason.startswith(text)


def test_effective_values_behind_the_defaults(monkeypatch):
    assert NetworkOptions().rank == 4
    assert NetworkOptions(network_dim=16).rank == 16
    assert OptimizerOptions().optimizer == OptimizerOptions(optimizer_type="adamw").optimizer == "AdamW"
    assert OptimizerOptions().clip_norm == 1.0
    assert OptimizerOptions(max_grad_norm=0).clip_norm is None
    assert OptimizerOptions(optimizer_args=("betas=.9,.999",)).optimizer_keywords == {"betas": ".9,.999"}
    assert SchedulerOptions(lr_warmup_steps=0.25).warmup_steps(10) == 2
    assert SchedulerOptions(lr_warmup_steps=3).warmup_steps(10) == 3
    assert TrainingOptions().total_steps(7) == 1600
    assert TrainingOptions(max_train_epochs=3).total_steps(7) == 21
    assert PreviewOptions(sample_every_n_steps=5).step_interval == 5
    both = PreviewOptions(sample_every_n_steps=5, sample_every_n_epochs=2)
    assert (both.step_interval, both.epoch_interval) == (None, 2)
    assert PreviewOptions(sample_every_n_steps=0).step_interval is None
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert LoaderOptions().workers == 3
    assert LoaderOptions(max_data_loader_n_workers=2).workers == 2
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert LoaderOptions().workers == 0


def test_to_disk_switches_its_cache_on():
    def caches(*flags):
        options = CacheOptions(**dict.fromkeys(flags, True))
        return options.latents, options.cache_latents_to_disk, options.text, options.cache_text_encoder_outputs_to_disk

    assert caches() == (False, False, False, False)
    assert caches("cache_latents", "cache_text_encoder_outputs") == (True, False, True, False)
    assert caches("cache_latents_to_disk") == (True, True, False, False)
    assert caches("cache_text_encoder_outputs_to_disk") == (False, False, True, True)


@pytest.mark.parametrize(
    ("group", "values", "sentence"),
    [
        (OptimizerOptions, {"optimizer_type": "my.Own()"}, r"--optimizer_type: my.Own\(\) is none of those in --help"),
        (OptimizerOptions, {"optimizer_type": "AdamX"}, "did you mean Adam"),
        (
            SchedulerOptions,
            {"lr_scheduler": "cosin"},
            "cosin is not available, choose constant, .* or adafactor, did you mean cosine",
        ),
        (LogOptions, {"log_with": "all"}, "--logging_dir"),
        (DatasetOptions, {"dataset_class": "my.Own"}, "--dataset_class: my.Own cannot be used"),
        (NetworkOptions, {"network_dropout": 1.0}, "--network_dropout: 1.0 is not a chance"),
        (
            NetworkOptions,
            {"network_train_unet_only": True, "network_train_text_encoder_only": True},
            "together they leave nothing to train",
        ),
    ],
)
def test_what_is_not_there_or_contradicts_itself_is_refused(group, values, sentence):
    with pytest.raises(UserError, match=sentence):
        group(**values)
