"""Memory and time of a run over very many pictures: the scan, and one epoch through the loader with its workers.

    python benchmarks/million_records.py [--records N] [--workers N] [--start_method spawn|fork] [--folder DIR]

The pictures are hard links to a few small ones, with captions of about 100 characters. Nothing is decoded: the workers
look up the records of each batch, and their captions. Memory is the sum over all processes of what each holds for
itself and its part of what they share (PSS), at its highest; the imports' part of it is measured by the same run over
64 pictures, and given beside the sum.

A million records with 3 spawned workers, of the data alone: 0.79 GB at the peak of the scan, 0.5 GB over the epoch.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil

SIZES = [(64, 64), (48, 80), (80, 48), (96, 40), (40, 96), (72, 56), (56, 72), (64, 48)]
MAX_LINKS = 30_000  # to one file, which file systems limit


def make_folder(folder: Path, count: int) -> None:
    """`count` small pictures with captions."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    sources: dict[str, Path] = {}
    for number in range(count):
        kind = f"{number % len(SIZES)}_{number // MAX_LINKS}"
        if kind not in sources:
            sources[kind] = folder.parent / kind
            width, height = SIZES[number % len(SIZES)]
            Image.fromarray(np.full((height, width, 3), 127, np.uint8)).save(f"{sources[kind]}.png")
            Path(f"{sources[kind]}.txt").write_text("a photograph of something, with a tag, another tag, " * 2 + kind)
        for suffix in (".png", ".txt"):
            os.link(f"{sources[kind]}{suffix}", folder / f"picture_{number:07d}{suffix}")


def memory() -> int:
    """Bytes held by this process and its children."""
    total = 0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            info = process.memory_full_info()
        except psutil.Error:
            continue
        total += getattr(info, "pss", info.uss)
    return total


class Peak:
    """The highest memory within a `with`, looked at ten times a second."""

    def __enter__(self) -> "Peak":
        self.bytes, self._done = memory(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            self.bytes = max(self.bytes, memory())


class Lookup:
    """A dataset that looks up what a batch is made of, and decodes nothing."""

    def __init__(self, table):
        self.table = table

    def __getitem__(self, plan) -> int:
        records = [self.table[item.record] for item in plan.items]
        return sum(len(record.path) + len(record.caption) for record in records)


def measure(folder: Path, workers: int, start_method: str) -> dict[str, float]:
    """Scans the folder and goes through one epoch, in this process and its workers."""
    from torch.utils.data import DataLoader

    from library.data.plan import PlanSampler, RunPlan
    from library.data.records import scan
    from tests.pictures import dataset, subset

    datasets = [dataset(subset(folder, caption_extension=".txt", cache_info=True), batch_size=8)]
    with Peak() as scanning:
        table = scan(datasets)
    with Peak() as again:
        table = scan(datasets)
    with Peak() as iterating:
        plan = RunPlan(table, datasets, seed=1)
        sampler = PlanSampler(plan, 0, plan.steps_per_epoch)
        context = multiprocessing.get_context(start_method) if workers else None
        loader = DataLoader(
            Lookup(table), batch_size=None, sampler=sampler, num_workers=workers, multiprocessing_context=context
        )
        batches = sum(1 for _ in loader)
    assert batches == plan.batches_per_epoch
    parts = {"scan": scanning, "scan with index": again, "epoch": iterating}
    return {f"{name} {unit}": getattr(part, unit) for name, part in parts.items() for unit in ("seconds", "bytes")}


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and time of a run over very many pictures.")
    parser.add_argument("--records", type=int, default=1_000_000, metavar="N", help="pictures (default 1000000)")
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="loader processes (default 4)")
    parser.add_argument("--start_method", choices=("spawn", "fork"), default="spawn")
    parser.add_argument("--folder", type=Path, help="where the pictures go (default: a temporary folder)")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.workers, arguments.start_method)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        results = []
        for count in (64, arguments.records):
            make_folder(Path(place, str(count), "pictures"), count)
            command = [sys.executable, __file__, "--measure", str(Path(place, str(count), "pictures"))]
            command += ["--workers", str(arguments.workers), "--start_method", arguments.start_method]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results.append(json.loads(output.splitlines()[-1]))
    imports, all_of_it = results
    print(f"{arguments.records} records, {arguments.workers} workers ({arguments.start_method})")
    for part in ("scan", "scan with index", "epoch"):
        total, base = (result[f"{part} bytes"] / 1e6 for result in (all_of_it, imports))
        seconds = all_of_it[f"{part} seconds"]
        print(f"{part:16} {seconds:7.1f} s  {total:6.0f} MB: imports {base:.0f} MB, data {total - base:.0f} MB")


if __name__ == "__main__":
    main()
