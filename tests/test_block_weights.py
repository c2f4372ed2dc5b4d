"""--lbws: which weight every layer of the published models gets, and lists that are refused."""

import csv
import gzip
import json
from pathlib import Path

import pytest

from library.errors import UserError
from library.lora.block_weights import read, read_all

TABLES = Path(__file__).parent / "data" / "lora_keys"
# Blocks by their numbers in the tables, in the lists' order.
SD = {26: range(25), 17: (1, 2, 4, 5, 7, 8, 12, *range(16, 25))}
SDXL = {20: (*range(1, 10), 10, *range(13, 22)), 12: (5, 6, 8, 9, 10, *range(13, 19))}
MIDDLE_OF_SDXL = (10, 11, 12)


@pytest.mark.parametrize(
    ("family", "count", "blocks"),
    [(family, *of) for family, lists in (("sd1", SD), ("sd2", SD), ("sdxl", SDXL)) for of in lists.items()],
)
def test_every_layer_gets_the_weight_of_its_block(family, count, blocks):
    weights = read(json.dumps([100 + position for position in range(count)]))
    assert weights.sdxl == (family == "sdxl")
    expected = {str(block): 101 + position for position, block in enumerate(blocks)}
    if family == "sdxl":
        expected |= {str(block): expected["10"] for block in MIDDLE_OF_SDXL}
    with gzip.open(TABLES / f"{family}_conv.tsv.gz", "rt", encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream, delimiter="\t"))[1:]
    assert len(rows) > 300
    for name, _, _, block in rows:
        assert weights.of(name) == (expected.get(block, 1) if block else 100), name


def test_what_is_in_no_block_counts_in_full():
    assert read(json.dumps([0] * 26)).of("lora_unet_conv_out") == 1
    assert read(json.dumps([0] * 20)).of("lora_unet_label_emb_0_0") == 1


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[1, 2", "no JSON list"),
        ("0.5", "no JSON list of numbers"),
        (json.dumps([True] * 17), "no JSON list of numbers"),
        (f"[{'NaN,' * 16}1]", "no JSON list of numbers"),
        (
            "[1, 2, 3]",
            "3 weights in [1, 2, 3], give 17 or 26 for Stable Diffusion 1.x and 2.x, 12 or 20 for",
        ),
    ],
)
def test_lists_that_are_refused(text, wanted):
    with pytest.raises(UserError, match=r"^--lbws: ") as error:
        read(text)
    assert wanted in str(error.value)


def test_lists_for_another_family_are_refused():
    with pytest.raises(UserError, match=r"26 weights in .*, give 12 or 20 for SDXL$"):
        read(json.dumps([1] * 26), sdxl=True)


def test_there_is_one_list_for_each_lora():
    assert read_all(None, 2) == (None, None)
    with pytest.raises(UserError, match="1 lists for 2 LoRAs"):
        read_all([json.dumps([1] * 17)], 2)
