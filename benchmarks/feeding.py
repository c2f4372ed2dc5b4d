"""What the benchmarks share that ask how busy pictures keep a model: the pictures, the loops, and what is printed."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from library.replacing import replacing

SIZE = (1500, 1000)
_FILES = 50


def arguments(description: str | None, **others: int) -> argparse.Namespace:
    """The command line: what both have, and the numbers of `others` with their defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32])
    for name, default in ({"pictures": 64, "threads": 2, "rounds": 3} | others).items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{default} when left out")
    return parser.parse_args()


def save_pictures(folder: Path, number: int) -> list[Path]:
    """Photographs, as far as a decoder can tell: smooth shapes with some noise."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    paths = [folder / f"{index:04}.jpg" for index in range(number)]
    for path in paths:
        coarse = Image.fromarray(rng.integers(0, 256, (25, 38, 3), dtype=np.uint8)).resize(SIZE)
        pixels = np.asarray(coarse) + rng.normal(0, 6, (SIZE[1], SIZE[0], 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=92)
    return paths


def compare(what: str, loops: dict[str, Callable[[], object]], pictures: int, rounds: int) -> None:
    """Print each loop's milliseconds for a picture, as the median of rounds in which they take turns, and as a ratio to
    the first, which is the model alone.
    """
    took: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            start = time.perf_counter()
            loop()
            took[name].append(time.perf_counter() - start)
    medians = {name: float(np.median(times)) for name, times in took.items()}
    first = next(iter(medians.values()))
    print(what)
    for name, seconds in medians.items():
        print(f"  {name:18} {1000 * seconds / pictures:8.1f} ms a picture  {seconds / first:.3f}", flush=True)


def time_of_writing(folder: Path) -> None:
    """Print what a text file costs that is on the disk before the next one: it is written while the model waits."""
    start = time.perf_counter()
    for number in range(_FILES):
        with replacing(folder / f"{number}.written") as file:
            file.write(b"a picture of something\n")
    print(f"writing a text file: {1000 * (time.perf_counter() - start) / _FILES:.2f} ms, part of the loops' times")
