"""Time and memory of the tools for networks at the full size of Stable Diffusion 1.5, against the dense way.

    python benchmarks/lora_tools.py [--rank N] [--work_dir DIR] [merge resize svd_merge extract]

The dense way, written plainly below, loads everything in float32, multiplies factors out and takes the full singular
value decomposition of each product or difference. Both ways read and write the same kinds of files: a model of 2.1 GB
in fp16, LoRAs of rank N (default 64) with a text encoder, all of random weights. Each is a process of its own; what is
measured begins after its imports. The last column compares what comes out: where a result is approximated, its error
divided by that of the dense way, at every eighth layer; for the merged model the largest difference of a weight, in
units in the last place of its number format.

Exit status 1 if a figure misses its bound. The time of a merge has none: on two cores it was 1.5 times faster than the
dense way with files on a disk, and 2.9 times with files in memory. Linux only; needs 11 GB of disk and 16 GB of memory.
"""

import argparse
import csv
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import console

with console.quiet_dependencies():
    import torch
    from safetensors.torch import load_file, save_file
    from torch import Tensor

    from benchmarks.load_memory import Peak
    from benchmarks.random_model import family_named, write_random_model
    from library.lora.targets import find_layers
    from library.models.registry import inspect_model
    from networks.lora import find_layers as find_lora_layers
    from tests.full_size import CONFIGS

ROOT = Path(__file__).resolve().parent.parent
NAMES = ROOT / "tests" / "data" / "lora_keys" / "sd1.tsv"
RATIOS = (0.6, 0.4)
WAYS = "dense", "ours"
SMALLER = 16  # the rank that is resized to
MEGABYTE = 2**20

Products = Mapping[str, Tensor]
"""What is added to each layer's weight, (out, in x kernel)."""


class Bound(NamedTuple):
    """How many times faster at least, and megabytes beyond the imports at most."""

    faster: float | None = None
    megabytes: float | None = None


BOUNDS = {"merge": Bound(megabytes=1200), "resize": Bound(15), "svd_merge": Bound(15), "extract": Bound(8, 2000)}


class Files(NamedTuple):
    """What is read, all in one folder."""

    folder: Path
    rank: int

    @property
    def model(self) -> Path:
        return self.folder / "model.safetensors"

    @property
    def tuned(self) -> Path:
        return self.folder / "tuned.safetensors"

    @property
    def loras(self) -> tuple[Path, Path]:
        return self.folder / "first.safetensors", self.folder / "second.safetensors"

    def write(self) -> None:
        for seed, path in enumerate((self.model, self.tuned)):
            write_random_model(family_named("sd1"), path, torch.float16, seed)
        for seed, path in enumerate(self.loras):
            write_random_lora(path, self.rank, seed)

    def target(self, work: str, way: str) -> Path:
        return self.folder / f"{work}-{way}.safetensors"


def write_random_lora(path: Path, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    with NAMES.open(encoding="utf-8", newline="") as file:
        for name, down, up, _ in list(csv.reader(file, delimiter="\t"))[1:]:
            for part, sizes in (("lora_down", down), ("lora_up", up)):
                # the tables are of rank 4, which no layer is wide
                shape = [rank if size == "4" else int(size) for size in sizes.split("x")]
                tensors[f"{name}.{part}.weight"] = (torch.randn(shape, generator=generator) * 0.02).half()
            tensors[f"{name}.alpha"] = torch.tensor(rank / 2)
    save_file(tensors, path, {"ss_base_model_version": "sd_v1", "ss_v2": "False", "ss_network_dim": str(rank)})


# --- The dense way ---


def dense(work: str, files: Files, target: Path) -> None:
    if work == "merge":
        save_file(merged(files), target)
    else:
        save_file(decomposed(changes(work, files), SMALLER if work == "resize" else files.rank), target)


def merged(files: Files) -> dict[str, Tensor]:
    """As scripts do it that work on Diffusers' modules."""
    model = family_named("sd1").from_configs(**CONFIGS["sd1"])
    weights = load_file(files.model)
    for module, names in model.components().values():
        shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
        own = {}
        for place in names.places(shapes):
            own |= place.divide(weights[place.key].float(), shapes)
        module.load_state_dict(own)
    points = model.attach_points()
    layers = find_lora_layers(points.text_encoder, points.unet)
    for name, product in products(files.loras[0]).items():
        layers[name].weight.data += RATIOS[0] * product.view_as(layers[name].weight)
    merged = {name: tensor.half() for name, tensor in model.tensors().items()}
    return {name: tensor.contiguous() for name, tensor in weights.items()} | merged


def changes(work: str, files: Files) -> Products:
    """What is to be approximated."""
    if work == "resize":
        return products(files.loras[0])
    if work == "svd_merge":
        first, second = (products(path) for path in files.loras)
        return {name: RATIOS[0] * first[name] + RATIOS[1] * second[name] for name in first}
    tuned, model = ({k: tensor.float() for k, tensor in load_file(path).items()} for path in (files.tuned, files.model))
    layers = find_layers(inspect_model(files.model).outline())
    keys = {name: layers[name].weight.key for name in products(files.loras[0])}
    return {name: (tuned[key] - model[key]).flatten(1) for name, key in keys.items()}


def products(lora: Path) -> dict[str, Tensor]:
    tensors = {name: tensor.float() for name, tensor in load_file(lora).items()}
    multiplied = {}
    for key in tensors:
        name, _, part = key.partition(".")
        if part == "lora_down.weight":
            down, up = tensors[key].flatten(1), tensors[f"{name}.lora_up.weight"].flatten(1)
            multiplied[name] = tensors[f"{name}.alpha"].item() / len(down) * (up @ down)
    return multiplied


def decomposed(wanted: Products, rank: int) -> dict[str, Tensor]:
    tensors = {}
    for name, change in wanted.items():
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
        tensors[f"{name}.lora_up.weight"] = (u[:, :rank] * s[:rank]).half().contiguous()
        tensors[f"{name}.lora_down.weight"] = vh[:rank].half().contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(float(rank))
    return tensors


# --- Ours ---


def command(work: str, files: Files, target: Path) -> list[str]:
    """A script and its flags."""
    first, second = map(str, files.loras)
    model, tuned = str(files.model), str(files.tuned)
    ratios = [str(ratio) for ratio in RATIOS]
    flags = {
        "merge": ["merge_lora.py", "--sd_model", model, "--models", first, "--ratios", ratios[0]],
        "resize": ["resize_lora.py", "--model", first, "--new_rank", str(SMALLER)],
        "svd_merge": [
            "svd_merge_lora.py",
            "--models",
            first,
            second,
            "--ratios",
            *ratios,
            "--new_rank",
            str(files.rank),
        ],
        "extract": [
            *("extract_lora_from_models.py", "--model_org", model, "--model_tuned", tuned),
            *("--dim", str(files.rank), "--clamp_quantile", "1", "--min_diff", "0"),
        ],
    }
    return [*flags[work], "--save_precision", "fp16", "--save_to", str(target)]


def use_tool(work: str, files: Files, target: Path) -> None:
    script, *flags = command(work, files, target)
    sys.argv = [script, *flags]
    try:
        runpy.run_path(str(ROOT / "networks" / script), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise


# --- The measured process ---


class Measured(NamedTuple):
    """What a process took after its imports."""

    seconds: float
    megabytes: float


def measure(way: str, work: str, files: Files) -> Measured:
    with console.quiet_dependencies():
        import diffusers  # noqa: F401 - which the model's outline would import
    peak = Peak()
    with peak:
        (dense if way == "dense" else use_tool)(work, files, files.target(work, way))
    return Measured(peak.seconds, peak.resident / MEGABYTE)


def run(way: str, work: str, files: Files) -> Measured:
    """Measures one way in a process of its own."""
    os.sync()  # what was written before would slow it down
    place = ["--work_dir", str(files.folder), "--rank", str(files.rank)]
    done = subprocess.run([sys.executable, __file__, "--measure", way, work, *place], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{work}, {way}: {done.stdout}{done.stderr}")
    return Measured(*json.loads(done.stdout.splitlines()[-1]))


# --- What comes out ---


def compare(work: str, files: Files, dense: Path, ours: Path) -> str:
    if work == "merge":
        return f"{largest_step(load_file(ours), load_file(dense)):.1f} ulp"
    found, best = products(ours), products(dense)
    sampled = list(changes(work, files).items())[::8]
    return f"{max(distance(wanted, found[name]) / distance(wanted, best[name]) for name, wanted in sampled):.4f}"


def distance(one: Tensor, other: Tensor) -> float:
    return torch.linalg.norm(one - other).item()


def largest_step(ours: Mapping[str, Tensor], dense: Mapping[str, Tensor]) -> float:
    """Between the fp16 numbers of two models, in units in the last place."""
    steps = []
    for name, tensor in dense.items():
        if tensor.dtype == torch.float16:
            one, other = ours[name].float(), tensor.float()
            unit = torch.ldexp(torch.ones_like(other), torch.frexp(other).exponent - 11).clamp_min(2**-24)
            steps.append(((one - other).abs() / unit).max().item())
    return max(steps)


# --- The table ---


def table(works: list[str], files: Files) -> list[str]:
    """Prints it line by line; returns what misses its bound."""
    missed = []
    print(f"{'':10} {'dense':>20} {'ours':>20} {'faster':>8}   result")
    for work in works:
        theirs, ours = (run(way, work, files) for way in WAYS)
        ratio, bound = theirs.seconds / ours.seconds, BOUNDS[work]
        if bound.faster is not None and ratio < bound.faster:
            missed.append(f"{work}: {ratio:.1f} times faster, not {bound.faster:g}")
        if bound.megabytes is not None and ours.megabytes > bound.megabytes:
            missed.append(f"{work}: {ours.megabytes:.0f} MB, not {bound.megabytes:g}")
        targets = [files.target(work, way) for way in WAYS]
        figures = " ".join(f"{way.seconds:7.1f} s {way.megabytes:7.0f} MB" for way in (theirs, ours))
        print(f"{work:10} {figures} {ratio:7.1f}x   {compare(work, files, *targets)}", flush=True)
        for target in targets:
            target.unlink()
        if work == "merge":
            print(f"{'':10} copying the model's file alone takes {copying(files):.1f} s")
    return missed


def copying(files: Files) -> float:
    """Seconds that it takes to read and write as much as a merge does, with nothing done to it."""
    copy = files.folder / "copy.safetensors"
    os.sync()
    start = time.perf_counter()
    with files.model.open("rb") as source, copy.open("wb") as target:
        shutil.copyfileobj(source, target, MEGABYTE)
        os.fsync(target.fileno())
    taken = time.perf_counter() - start
    copy.unlink()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of the tools for networks, against the dense way.")
    parser.add_argument("works", nargs="*", default=list(BOUNDS), metavar="WORK", help=f"some of {', '.join(BOUNDS)}")
    parser.add_argument("--rank", type=int, default=64, help="of the LoRAs (default 64)")
    parser.add_argument("--work_dir", type=Path, help="where the files go (default: a temporary folder)")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure, Files(arguments.work_dir, arguments.rank))))
        return
    if unknown := set(arguments.works) - BOUNDS.keys():
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(BOUNDS)}")
    if arguments.work_dir:
        arguments.work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as place:
        files = Files(Path(place), arguments.rank)
        files.write()
        missed = table(arguments.works, files)
    sys.exit("\n".join(missed) if missed else 0)


if __name__ == "__main__":
    main()
