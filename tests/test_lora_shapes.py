"""Shapes of layers' weights, told from their names."""

import csv
import gzip
import math
from pathlib import Path

import pytest

from library.lora.names import usual_shape
from library.models.registry import FAMILIES

TABLES = Path(__file__).parent / "data" / "lora_keys"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_flattened_weights_of_published_models_get_their_shapes(family):
    with gzip.open(TABLES / f"{family.name}_conv.tsv.gz", "rt", encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream, delimiter="\t"))[1:]
    kernels = set()
    for name, down, up, _ in rows:
        shape = (int(up.split("x")[0]), *map(int, down.split("x")[1:]))
        assert usual_shape(name, (shape[0], math.prod(shape[1:])), family) == shape, name
        assert usual_shape(name, shape, family) == shape
        kernels.add(shape[2:])
    assert kernels == {(), (1, 1), (3, 3)}


def test_the_first_and_last_layer_are_convolutions():
    for name in ("lora_unet_conv_in", "lora_unet_conv_out", "lora_unet_input_blocks_0_0", "lora_unet_out_2"):
        assert usual_shape(name, (8, 36), None) == (8, 4, 3, 3)
