"""The flags of the tools for networks against the tables of what users' command lines rely on."""

import re

import pytest

from library import cli
from library.errors import UserError
from library.options.merge_lora import MergeLoraOptions, SdxlMergeLoraOptions
from tests.test_options import alike, flags_of, table

TOOLS = (
    "networks.check_lora_weights",
    "networks.extract_lora_from_dylora",
    "networks.extract_lora_from_models",
    "networks.lora_interrogator",
    "networks.merge_lora",
    "networks.resize_lora",
    "networks.sdxl_merge_lora",
    "networks.svd_merge_lora",
)
# Flags that no table has.
OURS = {
    "networks.extract_lora_from_models": {"--exact"},
    "networks.merge_lora": {"--allow_partial"},
    "networks.sdxl_merge_lora": {"--allow_partial"},
}


@pytest.mark.parametrize("tool", TOOLS)
def test_flags_of_a_tool_are_those_of_its_table(tool):
    # what is missing is said in a sentence of ours, not in that of the parser
    expected = {flag: {**alike(row), "required": ""} for flag, row in table(tool.replace(".", "__")).items()}
    ours = {flag: {**alike(row), "required": ""} for flag, row in flags_of(tool).items()}
    assert {flag: row for flag, row in ours.items() if flag in expected} == expected
    assert ours.keys() - expected.keys() == OURS.get(tool, set())


@pytest.mark.parametrize(
    ("group", "words", "sentence"),
    [
        (MergeLoraOptions, "--sd_model m --save_to x.ckpt", "--models: no networks are given"),
        (MergeLoraOptions, "--sd_model m --models a", "--save_to: the file to write is not named"),
        (MergeLoraOptions, "--models a --save_to x.ckpt --ratios 1 2", "--ratios: 2 for 1 networks"),
        (SdxlMergeLoraOptions, "--models a b --save_to x.ckpt --lbws [1]", "--lbws: 1 for 2 networks"),
        (MergeLoraOptions, "--models a --save_to x.ckpt --allow_partial", "give --sd_model, or drop it"),
        (MergeLoraOptions, "--models a --save_to x.ckpt --lbws [1]", "--lbws: networks/svd_merge_lora.py takes block"),
    ],
)
def test_flags_of_merging_that_contradict(group, words, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        cli.parse((group,), words.split(), description="")
