"""Indexing a folder of images and captions, against the package `imagesize` plus plain reading, in one thread.

    pip install imagesize
    python benchmarks/index_images.py [--images N] [--rounds N] [--folder DIR]

The files are in memory after a first round, and have the headers of what people train on: JPEG pictures from the web
with and without a colour profile, photographs with EXIF data, PNG renderings with their parameters. Ours does the whole
of `scan`: names sorted, buckets chosen, the table written. The sides take turns, round by round, so that a machine that
gets slower or busier does so for all. `stat` is nothing but Python asking the system for the times of all files;
without that no index can be checked.

On a virtual machine with two cores: a scan takes 0.6 of the time of `imagesize` and plain reads, a first scan that also
writes the index 0.8, a second one 0.25, of which `stat` is 0.16; so the second start is 3 times as fast as the first.
"""

import argparse
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from library.data.records import scan
from library.data.scanning.index import index_path
from tests.pictures import dataset, subset

EXTENSION = ".txt"


def encoded(kind: str, size: tuple[int, int], rng: np.random.Generator) -> bytes:
    """One picture of noise as a file of this kind."""
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    profile = rng.bytes(3144)  # the length of the most common one
    file = io.BytesIO()
    if kind == "web":
        image.save(file, "JPEG")
    elif kind == "profile":
        image.save(file, "JPEG", icc_profile=profile)
    elif kind == "photograph":
        exif = Image.Exif()
        exif[0x010F], exif[0x0110], exif[0x0131] = "Maker", "Model 100", "Software 1.0"
        exif[0x0112] = int(rng.integers(1, 9))
        exif[0x9286] = rng.bytes(8000)  # as much as a small preview
        image.save(file, "JPEG", exif=exif, icc_profile=profile)
    else:
        text = PngInfo()
        text.add_text("parameters", "a detailed prompt, " * 40)
        image.save(file, "PNG", pnginfo=text)
    return file.getvalue()


def make_folder(folder: Path, count: int) -> None:
    """`count` pictures in equal parts of each kind, with captions."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(48, 128, (400, 2)).tolist()
    kinds = ("web", "profile", "photograph", "rendering")
    pool = [(kind, encoded(kind, sizes[number % 400], rng)) for number in range(200) for kind in kinds]
    for number in range(count):
        kind, data = pool[int(rng.integers(len(pool)))]
        (folder / f"{number:06d}.{'png' if kind == 'rendering' else 'jpg'}").write_bytes(data)
        (folder / f"{number:06d}{EXTENSION}").write_text(
            "a photograph of a thing, a tag, another tag, " * 5 + str(number)
        )


def plain(folder: Path) -> None:
    """Sizes by `imagesize`, captions as they are."""
    import imagesize

    names = os.listdir(folder)
    for name in sorted(names):
        if name.endswith((".jpg", ".png")):
            imagesize.get(folder / name)
            with open(folder / f"{name[:-4]}{EXTENSION}", encoding="utf-8") as file:
                file.read()


def stat(folder: Path) -> None:
    """The times of all files."""
    place = os.fspath(folder)
    for name in os.listdir(place):
        os.stat(f"{place}/{name}")


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Time to index images and captions, against imagesize.")
    parser.add_argument("--images", type=int, default=20_000, metavar="N", help="pictures (default 20000)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="turns of each side (default 7)")
    parser.add_argument("--folder", type=Path, help="where the pictures go (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        folder = Path(place)
        make_folder(folder, arguments.images)
        without, with_index = (
            [dataset(subset(folder, caption_extension=EXTENSION, cache_info=keep))] for keep in (False, True)
        )

        def first() -> None:
            index_path(folder, EXTENSION).unlink(missing_ok=True)
            scan(with_index)

        sides = {
            "imagesize and plain reads": lambda: plain(folder),
            "scan": lambda: scan(without),
            "first scan with index": first,
            "second scan with index": lambda: scan(with_index),
            "stat": lambda: stat(folder),
        }
        for work in sides.values():
            work()
        seconds = {name: [] for name in sides}
        for _ in range(arguments.rounds):
            for name, work in sides.items():
                seconds[name].append(timed(work))
    times = {name: median(values) for name, values in seconds.items()}
    for name, value in times.items():
        print(
            f"{name:26} {value:6.3f} s  {value / times['imagesize and plain reads']:.2f} of imagesize and plain reads"
        )
    ratios = [a / b for a, b in zip(seconds["first scan with index"], seconds["second scan with index"], strict=True)]
    print(
        f"the second start is {median(ratios):.1f} times as fast as the first ({min(ratios):.1f} to {max(ratios):.1f})"
    )


if __name__ == "__main__":
    main()
