"""LoRAs made into one: against sums in float64, in Diffusers, and what is refused."""

import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library import cli
from library.errors import UserError
from library.generation.samplers import make_scheduler
from library.lora.block_weights import read
from library.lora.joining import join_networks, svd_merge
from library.lora.names import named_modules
from library.models.files.checkpoint import hash_file
from library.models.registry import load_model
from networks import merge_lora, sdxl_merge_lora, svd_merge_lora
from networks.lora import create_network
from tests.lora_files import CONV, LINEAR, SHAPES, TEXT, products, sum_of, write_lora
from tests.pipelines import pipeline_of
from tests.tiny import stored

RATIOS = [0.7, -0.4]


@pytest.fixture
def loras(tmp_path) -> list[Path]:
    """Two of different ranks and alphas; the second has no text encoder and no alphas, which are its rank then."""
    unet = {name: shape for name, shape in SHAPES.items() if name != TEXT}
    return [write_lora(tmp_path / "a.safetensors", 1), write_lora(tmp_path / "b.safetensors", 2, 3, None, unet)]


@pytest.fixture
def alike(tmp_path) -> list[Path]:
    """Two of one rank and different alphas."""
    return [write_lora(tmp_path / f"{name}.safetensors", seed, 4, seed) for seed, name in ((1, "a"), (3, "b"))]


@pytest.fixture
def joined(tmp_path):
    """`joined(paths, ...)`: the file that `join_networks` makes of them."""

    def join(paths, ratios=RATIOS, **options: object) -> Path:
        join_networks(paths, ratios, tmp_path / "joined.safetensors", **options)
        return tmp_path / "joined.safetensors"

    return join


@pytest.fixture
def merged(tmp_path):
    """`merged(paths, rank)`: the file that `svd_merge` makes of them."""

    def merge(paths, rank, conv_rank=None, ratios=RATIOS, **options: object) -> Path:
        path = tmp_path / "merged.safetensors"
        svd_merge(paths, ratios, path, rank=rank, conv_rank=conv_rank or rank, **options)
        return path

    return merge


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], relative: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, product in wanted.items():
        assert (found[name] - product).norm() <= relative * product.norm(), name


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def ranks_of(path: Path) -> dict[str, int]:
    tensors = load_file(path)
    return {key.partition(".")[0]: len(tensor) for key, tensor in tensors.items() if key.endswith("lora_down.weight")}


@pytest.mark.parametrize(("dtype", "relative"), [(None, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_side_by_side_they_do_exactly_what_all_do_together(loras, joined, dtype, relative):
    file = joined(loras, concat=True, dtype=dtype)
    assert_same(products(file), sum_of(loras, RATIOS), relative)
    assert ranks_of(file) == {name: 4 if name == TEXT else 7 for name in SHAPES}
    down = load_file(file)[f"{CONV}.lora_down.weight"]
    assert down.shape == (7, 10, 3, 3)
    assert down.dtype == (dtype or torch.float32)


def test_a_large_rank_is_not_rounded_away(tmp_path, joined):
    paths = [write_lora(tmp_path / f"{rank}.safetensors", rank, rank, 1, {LINEAR: (24, 20)}) for rank in (300, 5)]
    file = joined(paths, concat=True, dtype=torch.bfloat16)
    assert load_file(file)[f"{LINEAR}.alpha"].item() == 305


def test_without_concat_factors_are_added(alike, joined):
    one, two = (load_file(path) for path in alike)
    found = load_file(joined(alike))
    shift = math.sqrt(3)  # alphas are 1 and 3
    for name in SHAPES:
        up, down = f"{name}.lora_up.weight", f"{name}.lora_down.weight"
        torch.testing.assert_close(found[up], 0.7 * one[up] + 0.4 * shift * two[up])
        torch.testing.assert_close(found[down], 0.7 * one[down] - 0.4 * shift * two[down])
        assert found[f"{name}.alpha"] == 1


def test_a_layer_of_one_file_alone_keeps_its_alpha(tmp_path, joined):
    paths = [
        write_lora(tmp_path / "unet.safetensors", 1, 4, 1, {LINEAR: (24, 20)}),
        write_lora(tmp_path / "text.safetensors", 2, 4, 3, {TEXT: (28, 22)}),
    ]
    found = joined(paths, [1.0, -1.0])
    assert load_file(found)[f"{TEXT}.alpha"] == 3
    assert_same(products(found), sum_of(paths, [1, -1]))


@pytest.mark.parametrize("concat", [False, True])
def test_shuffled_ranks_do_the_same_in_another_order(alike, joined, concat):
    plain, shuffled, again = (load_file(joined(alike, concat=concat, shuffle=shuffle)) for shuffle in (0, 1, 1))
    for name in SHAPES:
        up, down = f"{name}.lora_up.weight", f"{name}.lora_down.weight"
        torch.testing.assert_close(
            shuffled[up].flatten(1) @ shuffled[down].flatten(1), plain[up].flatten(1) @ plain[down].flatten(1)
        )
        rows = {tuple(row.tolist()) for row in plain[down].flatten(1)}
        assert {tuple(row.tolist()) for row in shuffled[down].flatten(1)} == rows
    orders = [
        torch.cat([tensors[f"{name}.lora_down.weight"].flatten() for name in SHAPES])
        for tensors in (plain, shuffled, again)
    ]
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[1], orders[2])


@pytest.mark.parametrize(("rank", "conv_rank"), [(2, 5), (6, 1)])
def test_svd_merge_is_the_best_of_its_rank(loras, merged, rank, conv_rank):
    file = merged(loras, rank, conv_rank)
    assert ranks_of(file) == {
        name: min(conv_rank if name == CONV else rank, 4 if name == TEXT else 7) for name in SHAPES
    }
    found = products(file)
    for name, product in sum_of(loras, RATIOS).items():
        values = torch.linalg.svdvals(product)
        best = values[ranks_of(file)[name] :].square().sum().sqrt()
        assert (found[name] - product).norm() <= best * (1 + 1e-6) + 1e-6 * values[0], name


def test_a_rank_above_the_true_one_loses_nothing_and_is_not_padded(loras, merged):
    file = merged(loras, 64)
    assert_same(products(file), sum_of(loras, RATIOS))
    assert set(ranks_of(file).values()) == {4, 7}
    assert metadata_of(file)["ss_network_dim"] == "Dynamic"


def test_what_is_no_product_is_decomposed_whole(tmp_path, loras, merged):
    difference = torch.randn(24, 20, generator=torch.Generator().manual_seed(5))
    save_file({f"{LINEAR}.diff": difference}, tmp_path / "full.safetensors")
    paths = [loras[0], tmp_path / "full.safetensors"]
    wanted = 0.7 * products(loras[0])[LINEAR] - 0.4 * difference.double()
    assert_same({LINEAR: products(merged(paths, 20))[LINEAR]}, {LINEAR: wanted})
    best = torch.linalg.svdvals(wanted)[3:].square().sum().sqrt()
    assert (products(merged(paths, 3))[LINEAR] - wanted).norm() <= 1.01 * best


def test_how_much_is_kept_is_said(loras, merged, capsys, fresh_console):
    file = merged(loras, 2)
    kept, all_of_it = (
        sum(product.square().sum() for product in of.values()) for of in (products(file), sum_of(loras, RATIOS))
    )
    assert f"{kept / all_of_it:.2%} of the LoRAs' energy" in capsys.readouterr().err


def test_convolutions_that_a_file_holds_flattened_get_their_kernel(tmp_path, joined):
    generator = torch.Generator().manual_seed(5)
    tensors = {
        f"{CONV}.hada_{part}": torch.randn(shape, generator=generator)
        for part, shape in (("w1_a", (16, 2)), ("w1_b", (2, 90)), ("w2_a", (16, 2)), ("w2_b", (2, 90)))
    }
    save_file(tensors | {f"{CONV}.alpha": torch.tensor(2.0)}, tmp_path / "loha.safetensors")
    file = joined([tmp_path / "loha.safetensors"], [0.5], concat=True)
    assert load_file(file)[f"{CONV}.lora_down.weight"].shape == (4, 10, 3, 3)
    first, second = (tensors[f"{CONV}.hada_w{n}_a"] @ tensors[f"{CONV}.hada_w{n}_b"] for n in (1, 2))
    assert_same(products(file), {CONV: 0.5 * (first * second).double()})


@pytest.mark.parametrize("way", ["added", "concat", "svd"])
def test_biases_and_norms_are_summed(tmp_path, joined, merged, way):
    paths = []
    for seed in (1, 2):
        bias = {f"{LINEAR}__diff_b": torch.full((24,), float(seed))}
        norm = {f"lora_unet_conv_norm_out__{part}": torch.full((6,), seed * 10.0) for part in ("w_norm", "b_norm")}
        paths.append(write_lora(tmp_path / f"{seed}.safetensors", seed, shapes={LINEAR: (24, 20)}, **bias, **norm))
    found = load_file(merged(paths, 4) if way == "svd" else joined(paths, concat=way == "concat"))
    assert found[f"{LINEAR}.diff_b"].tolist() == pytest.approx([0.7 - 0.8] * 24)
    for part in ("w_norm", "b_norm"):
        assert found[f"lora_unet_conv_norm_out.{part}"].tolist() == pytest.approx([7.0 - 8.0] * 6)


def test_block_weights_count_in_their_blocks(loras, joined, merged):
    weights = [2.0, *[1.0] * 25]
    weights[2], weights[13] = 0.25, -0.5  # IN01 and MID
    lbws = [read(json.dumps(weights)), None]
    wanted = sum_of(loras[1:], RATIOS[1:])
    for name, product in products(loras[0]).items():
        weight = 2.0 if name == TEXT else 0.25 if name == CONV else -0.5
        wanted[name] = wanted.get(name, 0) + 0.7 * weight * product
    assert_same(products(joined(loras, concat=True, lbws=lbws)), wanted)
    assert_same(products(merged(loras, 7, lbws=lbws)), wanted)


def test_threads_change_nothing(tmp_path, merged):
    paths = [write_lora(tmp_path / f"{seed}.safetensors", seed, 48, 8, {LINEAR: (700, 900)}) for seed in (1, 2)]
    threads = torch.get_num_threads()
    contents = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            contents.append(stored(merged(paths, 16)))
    finally:
        torch.set_num_threads(threads)
    assert contents[0] == contents[1] == contents[2]


def test_metadata_say_what_it_is_made_of(loras, merged, tmp_path):
    for path, seed in zip(loras, ("1", "2"), strict=True):
        common = {"ss_base_model_version": "sd_v1", "ss_sd_model_name": "base.safetensors"}
        save_file(load_file(path), path, common | {"ss_seed": seed, "ss_tag_frequency": "{}" if seed == "1" else "[]"})
    full = metadata_of(merged(loras, 3, 2))
    assert full["ss_network_dim"] == full["ss_network_alpha"] == "3"
    assert json.loads(full["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "2"}
    assert full["ss_sd_model_name"] == "base.safetensors"
    assert not {"ss_seed", "ss_tag_frequency"} & full.keys()
    sources = [
        {"name": path.name, "sha256": hash_file(path).sha256, "ratio": ratio}
        for path, ratio in zip(loras, RATIOS, strict=True)
    ]
    made_by = {"tool": "networks/svd_merge_lora.py", "sources": sources, "rank": 3, "conv_rank": 2}
    assert json.loads(full["ss_made_by"]) == made_by
    assert str(tmp_path) not in str(full)
    bare = metadata_of(merged(loras, 3, 2, no_metadata=True))
    assert {key: value for key, value in bare.items() if not key.startswith("sshs_")} == {
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "3",
        "ss_network_alpha": "3",
        "ss_network_args": full["ss_network_args"],
    }


@pytest.mark.parametrize(("words", "kept"), [(("sd_v2_v", "sd_v2_v"), "sd_v2_v"), (("sd_v2_v", "sd_v2"), "sd_v2")])
def test_the_word_for_the_base_model_is_that_of_all_files(tmp_path, joined, words, kept):
    paths = [
        write_lora(tmp_path / f"{number}.safetensors", metadata={"ss_base_model_version": word})
        for number, word in enumerate(words)
    ]
    assert metadata_of(joined(paths, [1, 1]))["ss_base_model_version"] == kept


def test_flags_are_compared_with_what_networks_are_for(tmp_path, monkeypatch, capsys, fresh_console):
    def refused(script: ModuleType, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, words), "--save_to", str(tmp_path / "new.ckpt")])
        with pytest.raises(SystemExit, match="2"):
            cli.run(script.main)
        assert not (tmp_path / "new.ckpt").exists()
        return capsys.readouterr().err

    sd1 = write_lora(tmp_path / "a.safetensors")
    sdxl = write_lora(tmp_path / "xl.safetensors", metadata={"ss_base_model_version": "sdxl_base_v0-9"})
    assert f"--models: {sd1} is for Stable Diffusion 1.x: drop --v2" in refused(merge_lora, "--v2", "--models", sd1)
    assert f"{sdxl} is for SDXL: use networks/sdxl_merge_lora.py" in refused(merge_lora, "--models", sdxl)
    assert "use networks/merge_lora.py" in refused(sdxl_merge_lora, "--models", sd1)


def test_networks_that_cancel_each_other_out(loras, merged, capsys, fresh_console):
    merged([loras[0], loras[0]], 4, ratios=[1, -1])
    said = capsys.readouterr().err
    assert "nothing is left of the LoRAs" in said
    assert "energy" not in said
    assert f"{loras[0]} is among the networks more than once" in said


def test_the_family_of_files_that_do_not_tell_is_that_of_the_flags(tmp_path, joined):
    path = write_lora(tmp_path / "a.safetensors", shapes={LINEAR: (24, 20)}, metadata={})
    assert "ss_base_model_version" not in metadata_of(joined([path], [1]))
    assert metadata_of(joined([path], [1], family="sd2"))["ss_v2"] == "True"


@pytest.mark.parametrize("way", ["concat", "svd"])
def test_diffusers_does_with_it_what_all_of_them_do(model_file, tmp_path, joined, merged, way):
    model = load_model(model_file)
    points = model.attach_points()
    paths = []
    with torch.random.fork_rng(devices=[]):
        for rank in (3, 2):
            torch.manual_seed(rank)
            network = create_network(1.0, rank, 1, None, points.text_encoder, points.unet)
            for parameter in network.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
            paths.append(tmp_path / f"{rank}.safetensors")
            network.save_weights(paths[-1])
    file = joined(paths, concat=True, dtype=torch.float32) if way == "concat" else merged(paths, 5)
    layers = named_modules(points)
    before = {name: layers[name].weight.detach().clone() for name in products(file)}
    assert len(before) == len(network.state_dict()) / 3
    pipeline = pipeline_of(model, make_scheduler("ddim", model.noise_process()))
    pipeline.load_lora_weights(file)
    pipeline.fuse_lora()
    for name, product in sum_of(paths, RATIOS).items():
        change = layers[name].weight.detach().double() - before[name]
        torch.testing.assert_close(change.flatten(1), product, rtol=0, atol=1e-6)


@pytest.fixture
def tool(monkeypatch, fresh_console):
    """networks/svd_merge_lora.py in this process."""

    def call(*words: object) -> None:
        monkeypatch.setattr(sys, "argv", ["networks/svd_merge_lora.py", *map(str, words)])
        cli.run(svd_merge_lora.main)

    return call


def test_the_tool_writes_what_its_flags_say(tool, loras, tmp_path, capsys):
    weights = json.dumps([0.5] * 17)
    file = tmp_path / "new.safetensors"
    tool(
        *("--models", *loras, "--ratios", *RATIOS, "--lbws", weights, weights, "--new_rank", 5, "--new_conv_rank", 2),
        *("--precision", "fp16", "--save_to", file),
    )
    assert capsys.readouterr().out == f"{file} written\n"
    assert ranks_of(file) == {name: 2 if name == CONV else 4 if name == TEXT else 5 for name in SHAPES}
    assert load_file(file)[f"{LINEAR}.lora_up.weight"].dtype == torch.float16
    wanted = sum_of(loras, RATIOS)[TEXT]  # of one file alone, so that its rank is enough
    assert_same({TEXT: products(file)[TEXT]}, {TEXT: 0.5 * wanted}, 2e-3)


def test_ratios_left_out_are_one(tool, loras, tmp_path):
    tool("--models", *loras, "--new_rank", 9, "--save_to", tmp_path / "new.safetensors")
    assert_same(products(tmp_path / "new.safetensors"), sum_of(loras, [1, 1]))


def test_flags_that_are_refused(mistake, loras, tmp_path):
    models, output = ("--models", *loras), ("--save_to", tmp_path / "new.safetensors")
    assert "--models: no networks are given" in mistake(*output)
    assert "--save_to: the file to write is not named" in mistake(*models)
    assert "--ratios: 1 for 2 networks" in mistake(*models, *output, "--ratios", 1)
    assert "1 lists for 2 LoRAs" in mistake(*models, *output, "--lbws", "[1]")
    assert "is one of the files to read" in mistake(*models, "--save_to", loras[1])
    assert "did you mean" in mistake("--models", loras[0], tmp_path / "bb.safetensors", *output)
    weights = json.dumps([1] * 12)
    assert f"no list for {loras[0]}, which is for" in mistake(*models, *output, "--lbws", weights, weights)


def test_files_that_are_refused(mistake, loras, tmp_path):
    output = ("--save_to", tmp_path / "new.safetensors")

    def refused(path: Path) -> str:
        return mistake("--models", loras[0], path, *output)

    sdxl = write_lora(tmp_path / "sdxl.safetensors", metadata={"ss_base_model_version": "sdxl_base_v1-0"})
    assert "only networks for one family of models go together" in refused(sdxl)
    wide = write_lora(tmp_path / "wide.safetensors", shapes={LINEAR: (24, 40)})
    assert f"{LINEAR} is 24x20 in {loras[0]} and 24x40 in {wide}" in refused(wide)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(loras[1].read_bytes()[:-100])
    assert str(cut) in refused(cut)
    broken = write_lora(tmp_path / "broken.safetensors", alpha=math.nan)
    assert "not finite" in refused(broken)
    dora = write_lora(tmp_path / "dora.safetensors", **{f"{LINEAR}__dora_scale": torch.ones(24, 1)})
    assert "depends on the model's own weights (DoRA): merge it into a model" in refused(dora)


def test_different_ranks_are_not_added(loras, joined, tmp_path):
    with pytest.raises(UserError, match=f"^{CONV} has rank 4 in .*a.safetensors and 3 in .*: add --concat, or use"):
        joined(loras)
    assert not (tmp_path / "joined.safetensors").exists()


def test_alphas_that_cannot_be_evened_out_are_not_added(tmp_path, joined):
    paths = [write_lora(tmp_path / f"{alpha}.safetensors", alpha=alpha) for alpha in (0, 2)]
    with pytest.raises(UserError, match=r"has alpha 0 in .* and 2 in .*: add --concat"):
        joined(paths)


@pytest.mark.parametrize(("concat", "reason"), [(False, "could be added"), (True, "no product of two small factors")])
def test_what_has_no_factors_is_refused(tmp_path, loras, joined, concat, reason):
    save_file({f"{LINEAR}.diff": torch.ones(24, 20)}, tmp_path / "full.safetensors")
    with pytest.raises(UserError, match=reason):
        joined([loras[0], tmp_path / "full.safetensors"], concat=concat)
