"""Merging captions into metadata, against a plain script that holds the whole file in a dictionary.

    python benchmarks/merge_metadata.py [--images N] [--rounds N] [--folder DIR]

A folder of pictures (whose contents nobody reads) with captions of about 100 characters is merged into a file that has
tags of about 200 characters for each of them. Both sides are programs of their own and take turns, round by round;
seconds are the median of the rounds, memory is the most that was resident in any. Their results are compared. It ends
with an error if merging takes more than 15 s or 500 MB.

On a virtual machine with two cores, 100,000 captions take about 4 s and 140 MB: 0.8 to 1.1 of the plain script's time,
and 0.65 of its memory.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
CAPTIONS, SECONDS, MEGABYTES = 100_000, 15, 500  # what merging so many may take

PLAIN = """
import json, pathlib, sys
folder, source, target = map(pathlib.Path, sys.argv[1:])
metadata = json.loads(source.read_text(encoding="utf-8"))
for picture in sorted(folder.glob("*.png")):
    text = picture.with_suffix(".caption").read_text(encoding="utf-8")
    metadata.setdefault(picture.stem, {})["caption"] = text.strip()
target.write_text(json.dumps(metadata, indent=2, ensure_ascii=False), encoding="utf-8")
"""


def make_folder(folder: Path, source: Path, count: int) -> None:
    """The pictures and captions, and the file with their tags."""
    words = random.Random(0)
    vocabulary = ["".join(words.choices("abcdefghijklmnopqrstuvwxyz", k=words.randint(3, 9))) for _ in range(2000)]
    entries = {}
    for number in range(count):
        (folder / f"{number:07d}.png").touch()
        (folder / f"{number:07d}.caption").write_text(" ".join(words.choices(vocabulary, k=15)) + "\n")
        entries[f"{number:07d}"] = {"tags": ", ".join(words.choices(vocabulary, k=25))}
    source.write_text(json.dumps(entries, indent=2))


def measured(command: list[str]) -> tuple[float, float]:
    """(seconds, MB resident at most) of a program."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {command[:3]}")
    return time.perf_counter() - start, usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of merging captions into metadata.")
    parser.add_argument("--images", type=int, default=100_000, metavar="N", help="pictures (default 100000)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="turns of each side (default 3)")
    parser.add_argument("--folder", type=Path, help="where the files go (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        folder = Path(place, "train_data")
        folder.mkdir()
        source, ours, plain = (Path(place, f"{name}.json") for name in ("meta_dd", "ours", "plain"))
        # a process of its own, since what is resident in this one counts as that of the programs it starts
        making = get_context("spawn").Process(target=make_folder, args=(folder, source, arguments.images))
        making.start()
        making.join()
        script = str(ROOT / "finetune" / "merge_captions_to_metadata.py")
        sides = {
            "plain dictionary": [sys.executable, "-c", PLAIN, str(folder), str(source), str(plain)],
            "merge_captions": [sys.executable, script, str(folder), str(ours), "--in_json", str(source)],
        }
        figures = {name: [] for name in sides}
        for _ in range(arguments.rounds):
            for name, command in sides.items():
                figures[name].append(measured(command))
        if json.loads(ours.read_text()) != json.loads(plain.read_text()):
            raise SystemExit("the results differ")
    seconds = {name: median(second for second, _ in rounds) for name, rounds in figures.items()}
    memory = {name: max(most for _, most in rounds) for name, rounds in figures.items()}
    for name in sides:
        print(f"{name:18} {seconds[name]:6.2f} s  {memory[name]:6.0f} MB")
    time_ratio, memory_ratio = (one["merge_captions"] / one["plain dictionary"] for one in (seconds, memory))
    print(f"ratios: {time_ratio:.2f} of the time, {memory_ratio:.2f} of the memory")
    if arguments.images > CAPTIONS:
        print(f"the bounds are for up to {CAPTIONS} captions, and are not looked at")
    elif seconds["merge_captions"] > SECONDS or memory["merge_captions"] > MEGABYTES:
        raise SystemExit(f"not held: bounds of {SECONDS} s and {MEGABYTES} MB for {CAPTIONS} captions")


if __name__ == "__main__":
    main()
