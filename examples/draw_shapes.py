"""Draws a folder of pictures without captions, for a try of the scripts that prepare data: coloured shapes, as the
miniature models know them.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from examples.miniature.shapes import draw, random_scene
from library.randomness import generator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to, as 00.png, 01.png ...")
    parser.add_argument("--count", type=int, default=24, help="number of pictures [24]")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rng = generator("shapes to prepare")
    for number in range(arguments.count):
        Image.fromarray(draw(random_scene(rng))).save(arguments.folder / f"{number:02d}.png")
    print(f"{arguments.count} pictures in {arguments.folder}")


if __name__ == "__main__":
    main()
