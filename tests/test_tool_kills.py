"""The tools that prepare pictures, killed, interrupted and out of space at any moment.

The random moments come from a seed that a failure shows; KILL_SEED repeats it.
"""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from tests.pictures import picture
from tests.test_kills import at_operations, at_random, chance
from tests.tool_kills import Place, Whole, Work, assert_tidy, assert_whole, break_and_mend, start, undisturbed

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked")

NAMES = ("a b", "c", "ä")


def draw(folder: Path, extension: str | None = None, text: str = "a picture of {name}") -> None:
    """Pictures that are always of the same time: files that are made of them may note it."""
    for name in NAMES:
        caption = None if extension is None else text.format(name=name)
        os.utime(picture(folder / f"{name}.png", (64, 48), caption, extension or ""), (10**9, 10**9))


def described(here: Path, **tags: str) -> None:
    entries = {name: {"caption": "a woman", "more": [number], **tags} for number, name in enumerate(NAMES)}
    (here / "meta.json").write_text(json.dumps(entries), encoding="utf-8")


def paint(folder: Path) -> None:
    """Pictures of red faces on grey."""
    for name in NAMES:
        pixels = np.full((64, 64, 3), 128, np.uint8)
        pixels[21:41, 23:43] = (255, 0, 0)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{name}.png")


def helper(name: str) -> ModuleType:
    """A module of tests that imports what is heavy."""
    return importlib.import_module(f"tests.{name}")


def save_tagger(shared: Path) -> None:
    """Tags each picture with its colours."""
    tags = [("blue_sky", 0), ("green_field", 0), ("red_house", 4)]
    helper("tagger_models").write_tagger(shared / "tagger", helper("tagger_models").mean_model(), tags)


TAGGER = "--model_dir {shared}/tagger --thresh 0.1 --provider cpu"
WORKS = {
    "resize": Work(
        "tools.resize_images_to_resolution",
        "{here}/from {here}/to --max_resolution 32x32,16x16 --save_as_png --copy_associated_files "
        "--max_data_loader_n_workers 2",
        lambda here: draw(here / "from", ".caption"),
        [
            f"to/{name}{size}.{kind}"
            for name in NAMES
            for size in ("", "+32x32", "+16x16")
            for kind in ("png", "caption")
        ],
        again="--force",
        at_once=2 * 6,  # pictures that threads work on, with their files
    ),
    "canny": Work(
        "tools.canny",
        "--input {here}/from --output {here}/to --max_data_loader_n_workers 1",
        lambda here: draw(here / "from"),
        [f"to/{name}.png" for name in NAMES],
        again="--force",
    ),
    "merge captions": Work(
        "finetune.merge_captions_to_metadata",
        "{here}/train --full_path {here}/meta.json",
        lambda here: draw(here / "train", ".caption"),
        ["meta.json"],
    ),
    "merge tags": Work(
        "finetune.merge_dd_tags_to_metadata",
        "{here}/train --in_json {here}/meta.json {here}/meta.json",
        lambda here: (draw(here / "train", ".txt", "{name}, sky"), described(here)),
        ["meta.json"],
    ),
    "clean": Work(
        "finetune.clean_captions_and_tags",
        "{here}/meta.json {here}/clean.json",
        lambda here: described(here, tags="long_hair, 1girl, rating:safe"),
        ["clean.json"],
    ),
    "captions": Work(
        "finetune.make_captions",
        "{here} --caption_weights {shared}/blip --batch_size 2 --max_length 12 --device cpu",
        draw,
        [f"{name}.caption" for name in NAMES],
        share=lambda shared: helper("captioners").save_blip(shared / "blip"),
        again="--force",
    ),
    "captions by GIT": Work(
        "finetune.make_captions_by_git",
        "{here} --model_id {shared}/git --batch_size 2 --max_length 12 --device cpu",
        draw,
        [f"{name}.caption" for name in NAMES],
        share=lambda shared: helper("captioners").save_git(shared / "git"),
        again="--force",
    ),
    "tags": Work(
        "finetune.tag_images_by_wd14_tagger",
        f"{{here}} {TAGGER} --batch_size 2",
        draw,
        [f"{name}.txt" for name in NAMES],
        share=lambda shared: save_tagger(shared),
        again="--force",
    ),
    "more tags": Work(
        "finetune.tag_images_by_wd14_tagger",
        f"{{here}} {TAGGER} --append_tags",
        lambda here: draw(here, ".txt", "{name}"),
        [f"{name}.txt" for name in NAMES],
        share=lambda shared: save_tagger(shared),
    ),
    "tags in metadata": Work(
        "finetune.tag_images_by_wd14_tagger",
        f"{{here}} {TAGGER} --output_path {{here}}/meta.json",
        lambda here: (draw(here), described(here)),
        ["meta.json"],
        share=lambda shared: save_tagger(shared),
    ),
    "latents": Work(
        "finetune.prepare_buckets_latents",
        "{here} {here}/meta.json {here}/lat.json {shared}/model.safetensors --max_resolution 32,32 --batch_size 2 "
        "--min_bucket_reso 16 --max_bucket_reso 64 --bucket_reso_steps 8 --flip_aug",
        lambda here: (draw(here), described(here)),
        [*(f"{name}.npz" for name in NAMES), "lat.json"],
        share=lambda shared: helper("tiny").save_model(shared / "model.safetensors", "sd1"),
        again="--force",
        at_once=2,  # a batch
        each_time=["lat.json"],
    ),
    "faces": Work(
        "tools.detect_face_rotate",
        "--src_dir {here}/from --dst_dir {here}/to --model {shared}/yolo.onnx --max_data_loader_n_workers 1",
        lambda here: paint(here / "from"),
        [f"to/{name}_33_31_20_20.png" for name in NAMES],
        share=lambda shared: helper("face_models").yolo(shared / "yolo.onnx"),
        again="--force",
    ),
}
QUICK = ("resize", "merge captions")
FORCED = [name for name, work in WORKS.items() if work.again]
Start = Callable[[str], Place]


@pytest.fixture(scope="module")
def places(fork_server, tmp_path_factory) -> Start:
    """`places(name)`: where a work is done."""
    made: dict[str, Place] = {}

    def make(name: str) -> Place:
        if name not in made:
            made[name] = Place(WORKS[name], tmp_path_factory.mktemp("kills"), fork_server)
        return made[name]

    return make


@pytest.fixture(scope="module")
def wholes(places) -> Callable[[str, bool], Whole]:
    """`wholes(name, again)`: an undisturbed run of a work."""
    made: dict[tuple[str, bool], Whole] = {}

    def make(name: str, again: bool = False) -> Whole:
        if (name, again) not in made:
            made[name, again] = undisturbed(places(name), WORKS[name].again if again else None)
        return made[name, again]

    return make


@pytest.mark.parametrize("name", QUICK)
def test_killed_at_any_moment(places, wholes, name):
    whole = wholes(name)
    kills = [*at_random(2)(whole.ended), *at_operations(3)(whole.ended)]
    ends = break_and_mend(places(name), kills, whole)
    assert signal.SIGKILL in [-ended.status for ended in ends]


@pytest.mark.parametrize(
    "name", [name if name in ("resize", "canny") else pytest.param(name, marks=pytest.mark.slow) for name in FORCED]
)
def test_forced_work_goes_on_where_it_was_killed(places, wholes, name):
    place, whole, again = places(name), wholes(name, again=True), WORKS[name].again
    start(place, again)
    ended = place.run(again, at=whole.ended.operations * 2 // 3)
    assert ended.status == -signal.SIGKILL, ended.said
    assert_whole(place, whole)
    noted, stamps = place.noted(), place.stamps()
    assert noted
    ended = place.run(again)
    assert ended.status == 0, ended.said
    assert not noted & place.changed_since(stamps)
    assert place.contents() == whole.after
    assert_tidy(place)


@pytest.mark.parametrize("name", QUICK)
def test_interrupted_at_any_moment(places, wholes, name):
    whole = wholes(name)
    kills = [kill | {"by": signal.SIGINT} for kill in at_operations(3)(whole.ended)]
    for ended in break_and_mend(places(name), kills, whole)[:-1]:
        (line,) = re.findall(r"^error: .*", ended.said, re.M)
        assert line.startswith("error: interrupted: ")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in WORKS]
)
def test_what_is_done_is_not_done_again(places, wholes, name):
    place, whole = places(name), wholes(name)
    break_and_mend(place, (), whole)
    stamps = place.stamps()
    ended = place.run()
    assert ended.status == 0, ended.said
    assert place.contents() == whole.after
    if WORKS[name].again:
        written = place.changed_since(stamps)
        assert written == set(WORKS[name].each_time)
        assert re.search(r": 0 written, [1-9]\d* skipped, 0 failed", ended.said), ended.said


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKS)
def test_killed_at_many_moments(places, wholes, name):
    whole = wholes(name)
    for _ in range(5):
        break_and_mend(places(name), at_random(4)(whole.ended), whole)


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("name", WORKS)
def test_killed_by_every_operation_on_files(places, wholes, name, again):
    if again and not WORKS[name].again:
        pytest.skip("is done as a whole")
    place, whole, more = places(name), wholes(name, again), WORKS[name].again if again else None
    print(f"{whole.ended.operations} operations")
    for operation in range(1, whole.ended.operations + 1):
        by = signal.SIGINT if operation % 5 == 0 else signal.SIGKILL
        break_and_mend(place, [{"at": operation, "by": by}], whole, more)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORCED)
def test_killed_again_and_again_when_all_is_done_again(places, wholes, name):
    """What one of the killed runs did, none of the later ones does."""
    whole = wholes(name, again=True)
    drawn = chance()
    kills = [{"at": drawn.randint(1, whole.ended.operations // 3)} for _ in range(8)]
    break_and_mend(places(name), kills, whole, WORKS[name].again)


@pytest.fixture
def full(places, wholes) -> Iterator[Callable[[str, int], Place]]:
    """`full(name, pages)`: where a work is done, on a disk that has this much room left."""
    if sys.platform != "linux" or os.geteuid():
        pytest.skip("mounts a small disk")
    mounted = []

    def make(name: str, pages: int) -> Place:
        place = places(name)
        wholes(name)
        place.renew()
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place.here]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("may not mount a disk")
        mounted.append(place.here)
        WORKS[name].make(place.here)
        fill(place.here / ".unfinished", pages)
        return place

    yield make
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def fill(path: Path, pages: int) -> None:
    """Take all of a disk but for so many pages of 4096 bytes."""
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            file.truncate(max(file.tell() // 4096 - pages, 0) * 4096)


@pytest.mark.parametrize(
    ("name", "pages"),
    [
        (name, pages) if name in QUICK and pages == 4 else pytest.param(name, pages, marks=pytest.mark.slow)
        for name in WORKS
        for pages in (0, 1, 4)
    ],
)
def test_a_full_disk_is_said_and_harms_nothing(full, wholes, name, pages):
    whole, place = wholes(name), full(name, pages)
    ended = place.run()
    assert "Traceback" not in ended.said
    assert_whole(place, whole)
    if ended.status or not pages:
        assert ended.status == 2, ended.said
        (sentence,) = re.findall(r"^error: .*", ended.said, re.M)
        assert re.search("No space left on device|disk is full", sentence), sentence
        assert "so far: 0 written, 0 skipped, 0 failed" not in ended.said
    (place.here / ".unfinished").unlink()
    assert place.run().status == 0
    assert place.contents() == whole.after
    assert_tidy(place)
