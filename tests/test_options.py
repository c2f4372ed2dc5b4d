"""The flags against the table of what users' command lines rely on, and the values behind the defaults."""

import ast
import csv
import importlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import given, settings, strategies

from library import cli, options
from library.errors import UserError
from library.options import (
    METHODS,
    CacheOptions,
    DatasetOptions,
    FullModelOptions,
    MetadataOptions,
    NetworkOptions,
    OptimizerOptions,
    PreviewOptions,
    SchedulerOptions,
    TrainingOptions,
    options_of,
)
from library.options.base import STEPS_OR_FRACTION, parse_key_values
from library.options.loader import LoaderOptions
from library.options.logging import LogOptions
from library.training.preflight import tell_of_relics

GROUPS = [value for name, value in vars(options).items() if name.endswith("Options") and value is not FullModelOptions]
FLAGS = [option for group in GROUPS if group not in METHODS or group is NetworkOptions for option in options_of(group)]

TABLES = Path(__file__).parent / "data" / "flags"
LIBRARY = Path(cli.__file__).parent
SCRIPTS = (
    "fine_tune",
    "train_db",
    "train_network",
    "train_textual_inversion",
    "sdxl_train",
    "sdxl_train_network",
    "sdxl_train_textual_inversion",
)
TYPE_NAMES = {bool: "", int: "int", float: "float", str: "str", Path: "Path", STEPS_OR_FRACTION: "int_or_float"}
# Flags that no table has.
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
}
# What is not as in the tables. Both spellings of the extension are one setting, and so are both of its values; 75 is
# what configuration files of front ends have where the length is left out on command lines.
OTHERWISE = {
    "--caption_extention": {"dest": "caption_extension", "default": "'.caption'"},
    "--max_token_length": {"choices": "75|150|225"},
}


@cache
def groups_of(script: str) -> tuple[type, ...]:
    """The options groups that a script reads its command line with."""
    found = []

    def parse(groups: Sequence[type], **_: object) -> NoReturn:
        found.extend(groups)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(cli, "parse", parse)
        importlib.import_module(script).main()
    return tuple(found)


def table(script: str) -> dict[str, dict[str, str]]:
    """A script's flags as users know them: what argparse was told, by spelling."""
    with (TABLES / f"{script}.tsv").open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return {row["flags"]: {key: value for key, value in row.items() if key != "flags"} for row in rows}


def flags_of(script: str) -> dict[str, dict[str, str]]:
    """The same of our script."""
    groups = groups_of(script)
    there = {option.name: option for group in groups for option in options_of(group)}
    found = {}
    for action in cli.make_parser(groups, "")._actions:
        if action.dest == "help":
            continue
        option = there[action.dest]
        spelling = " ".join(action.option_strings) or action.dest
        found[spelling] = {
            "dest": action.dest,
            "type": TYPE_NAMES[option.kind],
            "nargs": action.nargs if option.many else "",
            "default": repr(option.default),
            "choices": "|".join(map(str, option.details.choices)),
            "action": type(action).__name__.strip("_"),
            "required": "True" if action.required else "",
        }
    return found


def alike(row: Mapping[str, str]) -> dict[str, str]:
    """A row without what makes no difference: 1 and 1.0, and the None that some lists of choices begin with."""
    default = row["default"]
    with suppress(ValueError):
        default = repr(float(default))
    return {**row, "default": default, "choices": row["choices"].removeprefix("None|")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_of_a_script_are_those_of_its_table(script):
    rows, ours = table(script), flags_of(script)
    assert len(rows) > 160
    expected = {flag: alike(row | OTHERWISE.get(flag, {})) for flag, row in rows.items()}
    there = {flag: alike(row) for flag, row in ours.items() if flag in rows}
    assert there == expected


@pytest.mark.parametrize("script", SCRIPTS)
def test_further_flags_of_a_script_are_ours_or_those_of_another_one(script):
    known = {flag for path in TABLES.glob("*.tsv") for flag in table(path.stem)}
    further = flags_of(script).keys() - table(script).keys()
    assert further - known == {f"--{name}" for name in OURS}


@pytest.mark.parametrize("script", SCRIPTS)
def test_config_file_of_all_defaults_changes_nothing(script, tmp_path):
    """Front ends write every flag with the value that it has anyway."""
    defaults = {row["dest"]: ast.literal_eval(row["default"]) for row in table(script).values()}
    unset = {"config_file", "output_config"}
    lines = [f"{name} = {json.dumps(value)}" for name, value in defaults.items() if name not in unset]
    file = tmp_path / "all.toml"
    file.write_text("\n".join(line for line in lines if not line.endswith(" null")))
    groups = groups_of(script)
    read = cli.parse(groups, ["--config_file", str(file)], description="").flat()
    assert read == cli.parse(groups, [], description="").flat() | {"config_file": str(file)}


def test_every_option_is_read_somewhere():
    """By its name, as an attribute or in a text; those two files name many that they have nothing to do with."""
    read = set()
    for path in LIBRARY.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            elif isinstance(node, ast.Constant) and path.name not in ("metadata.py", "differences.py"):
                read.add(node.value)
    names = {option.name for group in GROUPS if group is not MetadataOptions for option in options_of(group)}
    assert not names - read


@pytest.mark.parametrize(
    "words", [["--tokenizer_cache_dir", "x"], ["--persistent_data_loader_workers"], ["--disable_mmap_load_safetensors"]]
)
def test_flags_that_can_do_nothing_any_more_say_so_once(words, fresh_console, capsys):
    tell_of_relics(cli.parse(groups_of("sdxl_train_network"), words, description=""))
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count(f"{words[0]} has no effect: ") == 1
    tell_of_relics(cli.parse(groups_of("sdxl_train_network"), [], description=""))
    assert "has no effect" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("one", METHODS, ids=lambda group: group.__name__)
def test_no_flag_of_a_script_is_in_two_groups(one):
    names = [option.name for group in GROUPS if group not in METHODS or group is one for option in options_of(group)]
    assert len(set(names)) == len(names)


def test_old_spellings_are_in_the_table_and_no_other_flags_names():
    names = [option.name for option in FLAGS]
    aliases = {alias for option in FLAGS for alias in option.details.aliases}
    assert {f"--{alias}" for alias in aliases} <= table("train_network").keys()
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
    with pytest.raises(UserError, match=r"^--network_args: '.*' is not written as name=value, without spaces$"):
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
