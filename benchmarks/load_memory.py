"""Memory that loading and saving a model of the published size take, as ratios to the weights in memory.

    python benchmarks/load_memory.py --family sd1|sd2|sdxl [--work_dir DIR]

Every line is a process of its own, on a random file (see `random_model.py`). The peak is the most the process had in
memory (resident, VmHWM) above what it had after its imports; of it, "anonymous" is what no file lies behind, sampled.
Both are divided by the bytes of the loaded weights in their precision. Saving is counted with the model that is saved,
so it cannot be below 1. The baselines, in the same run, are what one would write with the libraries themselves:
`load_file` or `torch.load` and a cast, `save_file` or `torch.save` of a dictionary, Diffusers' pipelines for folders.
Baselines whose weights are mapped files read them once, as using them would.

Exit status 1 if one of our lines is above its bound: 1.2 for loading, 1.1 for saving. Linux only.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.full_size import CONFIGS

# torch is imported by the measured processes alone, and counts as an import there.
if TYPE_CHECKING:
    import torch
    from torch import Tensor

BOUNDS = {"load": 1.2, "save": 1.1}
_SAMPLES_PER_SECOND = 200


class Line(NamedTuple):
    """One process: what it does, on which file or folder, in which precision; `target` is what it writes."""

    title: str
    work: str
    source: str
    dtype: str = "float16"
    target: str | None = None

    @property
    def bound(self) -> float | None:
        """Ours alone have one."""
        return None if self.work.startswith("plain") else BOUNDS[self.work]


def lines(name: str) -> list[Line]:
    """What is measured, in an order in which sources are there when they are read."""
    fp16, fp32, ckpt, folder = "fp16.safetensors", "fp32.safetensors", "fp16.ckpt", "folder"
    casts = [
        Line(".safetensors fp16 -> fp32", "load", fp16, "float32"),
        Line("load_file and .to(), fp16 -> fp32", "plain_load", fp16, "float32"),
        Line(".safetensors fp32 -> fp16", "load", fp32),
        Line("load_file and .to(), fp32 -> fp16", "plain_load", fp32),
    ]
    if name == "sdxl":  # a baseline would hold 21 GB
        casts = []
    return [
        Line(".safetensors fp16", "load", fp16),
        Line("load_file fp16", "plain_load", fp16),
        *casts,
        Line("saving .ckpt fp16", "save", fp16, target=ckpt),
        Line(".ckpt fp16", "load", ckpt),
        Line("torch.load fp16", "plain_load", ckpt),
        Line("torch.save, fp16", "plain_save", fp16, target="again.ckpt"),
        Line("saving .safetensors fp16", "save", fp16, target="again.safetensors"),
        Line("save_file, fp16", "plain_save", fp16, target="again.safetensors"),
        Line("saving a folder fp16", "save", fp16, target=folder),
        Line("folder fp16", "load", folder),
        Line("from_pretrained, folder fp16", "plain_load", folder),
        Line("save_pretrained, folder fp16", "plain_save", folder, target="again"),
    ]


# --- The measured process ---


class Peak:
    """Memory within a `with`, in bytes above what there was when it was made."""

    def __init__(self) -> None:
        self._base = _status()

    def __enter__(self) -> "Peak":
        Path("/proc/self/clear_refs").write_text("5")  # the highest resident size starts anew
        self._anonymous, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self._done.set()
        self._thread.join()
        self.resident = _status()["VmHWM"] - self._base["VmRSS"]
        self.anonymous = self._anonymous - self._base["RssAnon"]

    def _watch(self) -> None:
        while not self._done.wait(1 / _SAMPLES_PER_SECOND):
            self._anonymous = max(self._anonymous, _status()["RssAnon"])


def _status() -> dict[str, int]:
    text = Path("/proc/self/status").read_text()
    return {name: int(size) * 1024 for name, size in re.findall(r"(VmHWM|VmRSS|RssAnon):\s+(\d+) kB", text)}


def measure(line: Line) -> dict[str, float]:
    """Does what the line says, after the imports."""
    from library import console

    with console.quiet_dependencies():
        import torch
        from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline  # noqa: F401 - else imported on use

        import library.models.diffusers_writer
        import library.models.registry  # noqa: F401

    works = {"load": load, "save": save, "plain_load": plain_load, "plain_save": plain_save}
    peak = Peak()
    weights = works[line.work](line, getattr(torch, line.dtype), peak)
    size = sum(tensor.nbytes for tensor in weights)
    return {
        "weights": size,
        "resident": peak.resident / size,
        "anonymous": peak.anonymous / size,
        "seconds": peak.seconds,
    }


def load(line: Line, dtype: "torch.dtype", peak: Peak) -> "list[Tensor]":
    from library.models.registry import load_model

    with peak:
        model = load_model(line.source, dtype)
    tensors = [*model.parameters(), *model.buffers(), *model.carried.values()]
    assert not any(tensor.is_meta for tensor in tensors), "something was never filled"
    return tensors


def save(line: Line, dtype: "torch.dtype", peak: Peak) -> "list[Tensor]":
    from library.models.diffusers_writer import write_folder
    from library.models.registry import load_model

    model = load_model(line.source, dtype)
    with peak:
        if Path(line.target).suffix:
            model.save(line.target, dtype)
        else:
            write_folder(model, Path(line.target), dtype)
    return [*model.parameters(), *model.carried.values()]


def plain_load(line: Line, dtype: "torch.dtype", peak: Peak) -> "list[Tensor]":
    import torch
    from diffusers import DiffusionPipeline
    from safetensors.torch import load_file

    source = Path(line.source)
    with peak:
        if source.is_dir():
            tensors = _of_pipeline(DiffusionPipeline.from_pretrained(source, dtype=dtype, local_files_only=True))
        else:
            pickled = source.suffix != ".safetensors"
            state = torch.load(source, weights_only=True)["state_dict"] if pickled else load_file(source)
            tensors = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in state.values()]
        for tensor in tensors:
            tensor.detach().reshape(-1).view(torch.uint8)[::4096].sum()  # one byte of each page
    return tensors


def plain_save(line: Line, dtype: "torch.dtype", peak: Peak) -> "list[Tensor]":
    import torch
    from diffusers import DiffusionPipeline
    from safetensors.torch import load_file, save_file

    source, target = Path(line.source), Path(line.target)
    if source.is_dir():
        pipeline = DiffusionPipeline.from_pretrained(source, dtype=dtype, local_files_only=True)
        with peak:
            pipeline.save_pretrained(target)
        return _of_pipeline(pipeline)
    state = {name: tensor.clone() for name, tensor in load_file(source).items()}
    with peak:
        save_file(state, target) if target.suffix == ".safetensors" else torch.save(state, target)
    return list(state.values())


def _of_pipeline(pipeline: Any) -> "list[Tensor]":
    modules = (part for part in pipeline.components.values() if hasattr(part, "parameters"))
    return [parameter for module in modules for parameter in module.parameters()]


# --- The table ---


def run(line: Line, place: Path) -> dict[str, float]:
    """Measures a line in a process of its own, in the folder of the files."""
    command = [sys.executable, __file__, "--measure", json.dumps(line)]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{line.title}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def write_source(name: str, place: Path, float32: bool) -> None:
    kind = ["--float32", "fp32.safetensors"] if float32 else ["fp16.safetensors"]
    script = Path(__file__).resolve().parent / "random_model.py"
    subprocess.run([sys.executable, script, "--family", name, *kind], cwd=place, check=True)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory that loading and saving a model of the published size take.")
    parser.add_argument("--family", choices=tuple(CONFIGS), help="whose size the model has")
    parser.add_argument("--work_dir", type=Path, help="where the files go (default: a temporary folder)")
    parser.add_argument("--only", default="", metavar="TEXT", help="leave out lines whose title is without this text")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(Line(*json.loads(arguments.measure)))))
        return
    if arguments.family is None:
        parser.error("--family is missing: sd1, sd2 or sdxl")
    if arguments.work_dir:
        arguments.work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as place:
        above = table(arguments.family, Path(place), arguments.only)
    sys.exit(1 if above else 0)


def table(name: str, place: Path, only: str) -> list[str]:
    """Prints it line by line; the titles of those above their bounds."""
    wanted = [line for line in lines(name) if only in line.title]
    for source in ("fp16.safetensors", "fp32.safetensors"):
        if source == "fp16.safetensors" or any(line.source == source for line in wanted):
            write_source(name, place, float32=source == "fp32.safetensors")
    above = []
    print(f"{name:38} {'weights':>9} {'peak':>6} {'anonymous':>10} {'seconds':>8}")
    for line in wanted:
        found = run(line, place)
        bound = ""
        if line.bound is not None:
            bound = f"at most {line.bound}"
            if found["resident"] > line.bound:
                above.append(line.title)
                bound += ": above it"
        print(
            f"{line.title:38} {found['weights'] / 1e9:6.2f} GB {found['resident']:6.2f} {found['anonymous']:10.2f} "
            f"{found['seconds']:8.1f} {bound}",
            flush=True,
        )
        if line.target and line.target.startswith("again"):
            remove(place / line.target)
    return above


if __name__ == "__main__":
    main()
