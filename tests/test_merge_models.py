"""tools/merge_models.py against sums in float64, and what it refuses."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library import cli
from library.models.files.checkpoint import hash_file, open_weights, write_tensors
from tests.processes import python, run
from tools import merge_models

SCRIPT = "tools/merge_models.py"
UNET = "model.diffusion_model."
CONV = f"{UNET}input_blocks.0.0.weight"
CONTEXT = f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight"
TEXT = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
POSITIONS = "cond_stage_model.transformer.text_model.embeddings.position_ids"
IMPLEMENTATION = "modelspec.implementation_version"
EPSILON = {"modelspec.architecture": "stable-diffusion-v1", "modelspec.prediction_type": "epsilon"}

Tensors = dict[str, torch.Tensor]


def weights(seed: int, channels: int = 4, context: int = 6, dtype: torch.dtype = torch.float32) -> Tensors:
    """What a checkpoint of SD 1.x has one of each of."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        CONV: (8, channels, 3, 3),
        f"{UNET}time_embed.0.weight": (8, 8),
        f"{UNET}time_embed.0.bias": (8,),
        f"{UNET}middle_block.1.norm.weight": (8,),
        CONTEXT: (8, context),
        "first_stage_model.decoder.conv_in.weight": (5, 4, 3, 3),
        TEXT: (6,),
    }
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return tensors | {
        POSITIONS: torch.arange(7)[None] + seed,
        "alphas_cumprod": torch.rand(9, generator=generator),
    }


@pytest.fixture
def save(tmp_path):
    def save(name: str, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
        write_tensors(tmp_path / name, tensors, None, metadata)
        return tmp_path / name

    return save


@pytest.fixture
def tool(monkeypatch, fresh_console):
    """The script in this process."""

    def call(*words: object) -> None:
        monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, words)])
        cli.run(merge_models.main)

    return call


def expected(ratios: tuple[float, ...], *models: Tensors) -> Tensors:
    """The sum in float64, of what is to be summed."""
    fixed = {POSITIONS, "alphas_cumprod"}
    summed = {
        key: sum(ratio * model[key].double() for ratio, model in zip(ratios, models, strict=True))
        for key in models[0].keys() - fixed
    }
    return summed | {key: models[0][key] for key in fixed}


def assert_close(ours: Tensors, wanted: Tensors, tolerance: float = 1e-6) -> None:
    assert ours.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(ours[key].double(), wanted[key].double(), rtol=tolerance, atol=tolerance)


def test_a_weighted_sum_of_three(tool, save, tmp_path, capsys):
    models = [weights(seed) for seed in range(3)]
    files = [save(f"{seed}.safetensors", model) for seed, model in enumerate(models)]
    tool("--models", *files, "--output", tmp_path / "out.safetensors", "--ratios", 0.7, 0.8, -0.5)
    merged = load_file(tmp_path / "out.safetensors")
    assert_close(merged, expected((0.7, 0.8, -0.5), *models))
    assert merged[POSITIONS].dtype == torch.int64
    assert torch.equal(merged["alphas_cumprod"], models[0]["alphas_cumprod"])
    assert "ratios sum to" not in capsys.readouterr().err


def test_equal_shares_and_both_formats_as_a_program_of_its_own(save, tmp_path):
    models = [weights(seed) for seed in range(2)]
    files = [save("a.safetensors", models[0]), save("b.ckpt", models[1])]
    words = ["--models", *files, "--output", tmp_path / "new" / "out.ckpt"]
    done = run([sys.executable, SCRIPT, *words], 60, OMP_NUM_THREADS="1")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'new' / 'out.ckpt'} written\n"), done.stderr
    merged = torch.load(tmp_path / "new" / "out.ckpt", weights_only=True)["state_dict"]
    assert_close(merged, expected((0.5, 0.5), *models))


def test_ratios_that_do_not_sum_to_one_are_used_and_said(tool, save, tmp_path, capsys):
    models = [weights(seed) for seed in range(2)]
    files = [save(f"{seed}.safetensors", model) for seed, model in enumerate(models)]
    tool("--models", *files, "--output", tmp_path / "out.safetensors", "--ratios", 1, 1)
    assert_close(load_file(tmp_path / "out.safetensors"), expected((1, 1), *models))
    assert capsys.readouterr().err.count("the ratios sum to 2, not to 1, and are used as they are") == 1


def test_the_first_model_decides_what_is_in_the_result(tool, save, tmp_path, capsys):
    """An inpainting U-Net has more input channels; another model may lack a part, or have one too many."""
    first, other = weights(0, channels=9), weights(1)
    del other[TEXT]
    files = [save("first.safetensors", first), save("other.safetensors", other | {"extra.weight": torch.ones(3)})]
    words = ["--models", *files, "--output", tmp_path / "out.safetensors"]
    tool(*words)
    merged = load_file(tmp_path / "out.safetensors")
    assert merged.keys() == first.keys()
    assert torch.equal(merged[CONV], first[CONV])
    assert torch.equal(merged[TEXT], first[TEXT])
    torch.testing.assert_close(merged[CONTEXT], (first[CONTEXT] + other[CONTEXT]) / 2)
    said = capsys.readouterr()
    assert "2 tensors are missing in another model or have another shape there" in said.err
    assert CONV not in said.out
    tool(*words, "--show_skipped")
    assert sorted(capsys.readouterr().out.splitlines()[:2]) == sorted([CONV, TEXT])


def test_unet_only(tool, save, tmp_path):
    first, other = weights(0), weights(1)
    files = [save("a.safetensors", first), save("b.safetensors", other)]
    tool("--models", *files, "--output", tmp_path / "out.safetensors", "--unet_only", "--ratios", 0.25, 0.75)
    merged, sums = load_file(tmp_path / "out.safetensors"), expected((0.25, 0.75), first, other)
    assert_close(merged, {key: sums[key] if key.startswith(UNET) else first[key] for key in first})


@pytest.mark.parametrize(("flags", "dtype"), [((), torch.float16), (("--saving_precision", "bf16"), torch.bfloat16)])
def test_sums_are_rounded_once(tool, save, tmp_path, flags, dtype):
    """They are made in float32, and stored like the first model's tensors or as asked for."""
    models = [weights(0, dtype=torch.float16), weights(1, dtype=torch.bfloat16)]
    files = [save(f"{number}.safetensors", model) for number, model in enumerate(models)]
    tool("--models", *files, "--output", tmp_path / "out.safetensors", "--ratios", 0.3, 0.7, *flags)
    merged = load_file(tmp_path / "out.safetensors")
    total = models[0][CONV].float() * 0.3 + models[1][CONV].float() * 0.7
    assert merged[CONV].dtype == dtype
    torch.testing.assert_close(merged[CONV].float(), total, rtol=torch.finfo(dtype).eps / 2 * 1.001, atol=1e-7)


def test_precision_is_that_of_the_sum(tool, save, tmp_path):
    models = [weights(seed) for seed in range(2)]
    files = [save(f"{seed}.safetensors", model) for seed, model in enumerate(models)]
    tool("--models", *files, "--output", tmp_path / "out.safetensors", "--precision", "bf16")
    merged = load_file(tmp_path / "out.safetensors")[CONV]
    assert merged.dtype == torch.float32
    assert torch.equal(merged, merged.bfloat16().float())
    torch.testing.assert_close(merged, (models[0][CONV] + models[1][CONV]) / 2, rtol=0.02, atol=0.02)


def test_other_spellings_of_a_name_are_found(tool, save, tmp_path):
    first, other = weights(0), weights(1)
    other[TEXT.replace("text_model.", "")] = other.pop(TEXT)
    files = [save("a.safetensors", first), save("b.safetensors", other)]
    tool("--models", *files, "--output", tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    torch.testing.assert_close(merged[TEXT], (first[TEXT] + weights(1)[TEXT]) / 2)


def test_averaged_weights_of_the_training_are_left_out(tool, save, tmp_path, capsys):
    """They would be those of the unmerged U-Net, and some programs prefer them."""
    first = weights(0) | {"model_ema.diffusion_modelout2weight": torch.ones(3)}
    files = [save("a.safetensors", first), save("b.safetensors", weights(1))]
    tool("--models", *files, "--output", tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors").keys() == weights(0).keys()
    assert "1 tensors of training (averaged weights, losses) are left out" in capsys.readouterr().err


def test_metadata_names_the_models_and_no_paths(tool, save, tmp_path):
    metadata = EPSILON | {"ss_seed": "1"}
    files = [save("one.safetensors", weights(0), metadata), save("two.ckpt", weights(1))]
    tool("--models", *files, "--output", tmp_path / "out.safetensors", "--ratios", 0.4, 0.6, "--unet_only")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        found = file.metadata()
    assert found.items() >= EPSILON.items()
    assert (found["modelspec.title"], found["modelspec.merged_from"]) == ("out", "one, two")
    assert "ss_seed" not in found
    recipe, models = json.loads(found["sd_merge_recipe"]), json.loads(found["sd_merge_models"])
    assert (recipe["ratios"], recipe["unet_only"]) == ([0.4, 0.6], True)
    assert recipe["models"] == [hash_file(file).sha256 for file in files]
    assert [models[hash]["name"] for hash in recipe["models"]] == ["one.safetensors", "two.ckpt"]
    assert str(tmp_path) not in str(found)


def test_warns_of_overflow_and_of_different_predictions(tool, save, tmp_path, capsys):
    large = weights(0) | {CONV: torch.full((8, 4, 3, 3), 1e5)}
    files = [save("a.safetensors", large, EPSILON), save("b.safetensors", large | {"v_pred": torch.tensor([])})]
    tool("--models", *files, "--output", tmp_path / "out.safetensors", "--saving_precision", "fp16")
    said = capsys.readouterr().err
    assert (
        f"1 tensors hold values that are not finite, or too large for the number format they are saved in: {CONV}"
        in said
    )
    assert "the models predict different things (epsilon, v_prediction): their sum may not work" in said


def test_one_prediction_under_two_names_is_one(tool, save, tmp_path, capsys):
    names = ("v", "v_prediction")
    files = [
        save(f"{name}.safetensors", weights(seed), {"modelspec.prediction_type": name})
        for seed, name in enumerate(names)
    ]
    tool("--models", *files, "--output", tmp_path / "out.safetensors")
    assert "predict different things" not in capsys.readouterr().err
    files.append(save("zero.safetensors", weights(2) | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}))
    tool("--models", *files, "--output", tmp_path / "out.safetensors")
    assert "(v_prediction, v_prediction with zero terminal SNR)" in capsys.readouterr().err


def test_an_existing_file_is_replaced_only_by_a_whole_one(tool, mistake, save, tmp_path, monkeypatch):
    first, other = save("a.safetensors", weights(0)), save("b.safetensors", weights(1))
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"old")
    words = ["--models", first, other, "--output", output]
    with monkeypatch.context() as patch:
        reader = type(open_weights(first))
        full = reader.get
        reads = []

        def fail_late(self, key, dtype=None):
            reads.append(key)
            if len(reads) == 9:
                raise OSError(5, "Input/output error")
            return full(self, key, dtype)

        patch.setattr(reader, "get", fail_late)
        assert f"{first} cannot be read: Input/output error" in mistake(*words)
    assert output.read_bytes() == b"old"
    tool(*words)
    assert load_file(output).keys() == weights(0).keys()


def test_memory_stays_near_one_tensor_per_model(tmp_path):
    """Two files of 128 MiB in tensors of 4 MiB are merged in much less than one of them."""
    tensors = {f"{UNET}layer.{number}.weight": torch.full((1024, 1024), float(number)) for number in range(32)}
    for name in ("a", "b"):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    done = python(
        f"""
        import resource, sys
        import torch
        from library.models import merging
        from tools import merge_models
        torch.ones(1 << 20).mul_(2).add_(torch.ones(1 << 20), alpha=3).isfinite().all()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        folder = {str(tmp_path)!r}
        models = [folder + "/a.safetensors", folder + "/b.safetensors"]
        sys.argv = ["", "--models", *models, "--output", folder + "/out.safetensors"]
        merge_models.main()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        """,
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 32 * 1024  # KiB


# Mistakes


def test_numbers_of_models_and_ratios(mistake, save, tmp_path):
    one, two = save("one.safetensors", weights(0)), save("two.safetensors", weights(1))
    output = ("--output", tmp_path / "out.safetensors")
    assert "no models are given" in mistake(*output)
    assert "only one model is given, give two or more" in mistake("--models", one, *output)
    assert "--output: the file to write is not named" in mistake("--models", one, two)
    assert "--ratios: 3 for 2 models" in mistake("--models", one, two, *output, "--ratios", 1, 2, 3)
    assert "'half' is not a number" in mistake("--models", one, two, *output, "--ratios", "half", 1)
    assert "--device: gpu cannot be used" in mistake("--models", one, two, *output, "--device", "gpu")


def test_outputs_that_cannot_be(mistake, save, tmp_path):
    models = ("--models", save("one.safetensors", weights(0)), save("two.safetensors", weights(1)))
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "two.safetensors")
    for name in ("one.safetensors", "link.safetensors"):
        assert f"{name} is one of the files to read" in mistake(*models, "--output", tmp_path / name)
    assert "ends in none of .safetensors" in mistake(*models, "--output", tmp_path / "out.txt")
    assert hash_file(tmp_path / "two.safetensors") == hash_file(models[2])


def test_files_that_are_missing_or_broken(mistake, save, tmp_path):
    one, two = save("one.safetensors", weights(0)), save("two.safetensors", weights(1))
    output = ("--output", tmp_path / "out.safetensors")
    sentence = mistake("--models", one, tmp_path / "too.safetensors", *output)
    assert f"too.safetensors does not exist, did you mean {two}?" in sentence
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(two.read_bytes()[:-100])
    assert "its last 100 bytes are missing" in mistake("--models", one, cut, *output)


def test_damage_is_found_before_and_after(tool, mistake, tmp_path, save):
    """A flipped bit would change the sum and nothing would say so."""
    whole, output = save("whole.safetensors", weights(0)), tmp_path / "out.safetensors"
    write_tensors(tmp_path / "b.safetensors", weights(1), None, {IMPLEMENTATION: "atelier"}, content_hash=True)
    tool("--models", whole, tmp_path / "b.safetensors", "--output", output)
    with open_weights(output) as file:
        assert "modelspec.hash_sha256" in file.metadata
        file.verify()
    for path in (output, tmp_path / "b.safetensors", save("c.ckpt", weights(1))):
        content = bytearray(path.read_bytes())
        place = content.index(b"PK\x03\x04", 3000) - 5 if path.suffix == ".ckpt" else -5
        content[place] ^= 1
        path.write_bytes(content)
        assert f"{path} is damaged: its contents" in mistake(
            "--models", whole, path, "--output", tmp_path / "new.safetensors"
        )


def test_models_of_different_families(mistake, save, tmp_path):
    one = save("one.safetensors", weights(0))
    output = ("--output", tmp_path / "out.safetensors")
    sdxl = weights(1) | {"conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": torch.ones(3)}
    del sdxl[TEXT], sdxl[POSITIONS]
    file = save("sdxl.safetensors", sdxl)
    assert f"{file} is an SDXL model and {one} is a Stable Diffusion 1.x model" in mistake(
        "--models", one, file, *output
    )
    file = save("wide.safetensors", weights(1, context=9))  # SD 1.x and 2.x differ in the width of the text
    assert "is built differently from" in mistake("--models", one, file, *output)
    renamed = {key.replace("block", "part").replace("time", "date"): value for key, value in weights(1).items()}
    file = save("renamed.safetensors", renamed)
    assert "0 of 5 tensors of the U-Net have the same name and shape" in mistake("--models", one, file, *output)
    file = save("both.safetensors", weights(1) | {TEXT.replace("text_model.", ""): weights(2)[TEXT]})
    assert f"{file} holds one tensor under two names, " in mistake("--models", one, file, *output)
    file = save("lora.safetensors", {"lora_unet_x.lora_down.weight": torch.ones(2, 2)})
    assert f"{file} has no U-Net" in mistake("--models", one, file, *output)
