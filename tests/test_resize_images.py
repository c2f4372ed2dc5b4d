"""tools/resize_images_to_resolution.py: what lies in the new folder, whatever happens on the way there."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies
from PIL import Image, ImageCms

from library import cli
from library.data.buckets import Buckets
from library.preprocessing import resizing
from library.preprocessing.resizing import shrink, shrunk_size
from tests.pictures import picture
from tests.processes import ROOT, run
from tools import resize_images_to_resolution

SCRIPT = "tools/resize_images_to_resolution.py"


@pytest.fixture
def tool(monkeypatch, fresh_console):
    """`tool(words)`: the script in this process."""

    def call(*words: object) -> None:
        monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, words)])
        cli.run(resize_images_to_resolution.main, "the same command goes on")

    return call


@pytest.fixture
def source(tmp_path) -> Path:
    return tmp_path / "from"


@pytest.fixture
def made(tool, source, tmp_path):
    """`made(*flags)`: the new folder of the source, with versions of 32x32 unless told otherwise."""

    def call(*flags: object) -> Path:
        sizes = () if "--max_resolution" in flags else ("--max_resolution", "32x32")
        tool(source, tmp_path / "to", *sizes, *flags)
        return tmp_path / "to"

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_a_folder_as_a_program_of_its_own(tmp_path):
    source = tmp_path / "元 画像"
    picture(source / "wide é.png", (400, 100), "a wide one", ".txt")
    picture(source / "small.webp", (30, 30), "a small one")
    (source / "notes.md").write_text("notes")
    (source / "broken.jpg").write_bytes(picture(source / "whole.jpg", (90, 90)).read_bytes()[:700])
    os.utime(source / "wide é.png", ns=(10**18, 10**18 + 1))
    words = [source, tmp_path / "変 換", "--max_resolution", "100x100,64x64,64X64", "--copy_associated_files"]
    source.chmod(0o555)
    first, second = (run([sys.executable, SCRIPT, *words], 60, PYTHONIOENCODING="utf-8") for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr
    others = "other files: 3 written, 0 skipped\n"
    assert first.stdout == f"{others}pictures: 3 written, 0 skipped, 1 failed ({source / 'broken.jpg'}), on CPU\n"
    others = "other files: 0 written, 3 skipped\n"
    assert second.stdout == f"{others}pictures: 0 written, 3 skipped, 1 failed ({source / 'broken.jpg'}), on CPU\n"
    found = contents(tmp_path / "変 換")
    versions = {f"wide é+{size}.{end}" for size in ("100x100", "64x64") for end in ("jpg", "txt")} | {"whole+64x64.jpg"}
    originals = contents(source)
    del originals["broken.jpg"]
    assert found.keys() == originals.keys() | versions
    assert originals.items() <= found.items()
    assert found["wide é+64x64.txt"] == b"a wide one"
    assert size_of(tmp_path / "変 換" / "wide é+100x100.jpg") == (200, 50)
    assert size_of(tmp_path / "変 換" / "wide é+64x64.jpg") == (128, 32)
    assert (tmp_path / "変 換" / "wide é.png").stat().st_mtime_ns == 10**18 + 1


@pytest.mark.parametrize(
    ("size", "resolution", "wanted"),
    [
        ((1000, 1000), (512, 512), (512, 512)),
        ((1920, 1080), (512, 512), (682, 384)),
        ((1080, 1920), (512, 512), (384, 682)),
        ((1001, 1001), (384, 768), (543, 543)),
        ((4000, 1000), (128, 512), (512, 128)),
        ((100_000, 2), (32, 32), (1024, 1)),
    ],
)
def test_sizes(size, resolution, wanted):
    assert shrunk_size(size, resolution) == wanted


SIDES = strategies.integers(64, 5000)


@given(SIDES, SIDES, strategies.sampled_from([(512, 512), (384, 640), (64, 60)]))
def test_datasets_take_smaller_versions_as_they_are(width, height, resolution):
    area = resolution[0] * resolution[1]
    if width * height <= area:
        return
    smaller = shrunk_size((width, height), resolution)
    assert Buckets(resolution, step=1, no_upscale=True).choose(smaller).resized == smaller
    assert max(smaller) == pytest.approx(min(smaller) * max(width, height) / min(width, height), abs=1)
    assert (min(smaller) + 1) ** 2 * max(width, height) / min(width, height) > area


def test_each_version_is_made_of_the_original(made, source):
    original = picture(source / "a.png", (300, 200))
    folder = made("--max_resolution", "100x100,20x30", "--save_as_png")
    for name, size in (("a+100x100.png", (122, 81)), ("a+20x30.png", (30, 20))):
        assert np.array_equal(pixels_of(folder / name), shrink(np.asarray(Image.open(original)), size, "area"))


def test_pictures_that_are_not_larger_get_no_version(made, source):
    picture(source / "as_large.png", (64, 16))
    picture(source / "smaller.png", (31, 33))
    picture(source / "larger.png", (25, 41))
    assert contents(made()).keys() == {"as_large.png", "smaller.png", "larger.png", "larger+32x32.jpg"}


def test_versions_are_cut_around_their_middle(made, source, capsys):
    """400x150 is 51x19 pixels of the area of 32x32, of which 48x16 are left: of three each, one goes in front."""
    grid = np.dstack(np.broadcast_arrays(np.arange(400) * 255 // 399, np.arange(150)[:, None], np.uint8(0)))
    source.mkdir()
    Image.fromarray(grid.astype(np.uint8)).save(source / "a.png")
    picture(source / "narrow.png", (300, 8), "a caption", ".txt")
    folder = made("--divisible_by", 16, "--save_as_png", "--copy_associated_files")
    assert np.array_equal(
        pixels_of(folder / "a+32x32.png"), shrink(grid.astype(np.uint8), (51, 19), None)[1:17, 1:49].astype(int)
    )
    assert contents(folder).keys() == {"a.png", "a+32x32.png", "narrow.png", "narrow.txt"}
    said = capsys.readouterr()
    assert "narrow.png: a version of 188x5 pixels is left out: it is smaller than --divisible_by 16" in said.err
    assert "pictures: 2 written, 0 skipped, 0 failed" in said.out


def test_turned_pictures_and_other_colours(made, source):
    source.mkdir()
    colours = np.zeros((40, 80, 3), np.uint8)
    colours[:, :40] = (200, 40, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # the left of what is stored is the top
    Image.fromarray(colours).save(source / "turned.jpg", exif=exif, quality=100, subsampling=0)
    # red and green change places
    swapped = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes().replace(b"rXYZ", b"tXYZ")
    swapped = swapped.replace(b"gXYZ", b"rXYZ").replace(b"tXYZ", b"gXYZ")
    Image.fromarray(colours).save(source / "swapped.png", icc_profile=swapped)
    folder = made("--save_as_png")
    with Image.open(folder / "turned+32x32.png") as image:
        assert image.size == (22, 44)
        assert not image.getexif()
        assert np.asarray(image)[2, 10, 0] > 190
        assert np.asarray(image)[-3, 10, 0] < 10
    with Image.open(folder / "swapped+32x32.png") as image:
        assert "icc_profile" not in image.info
        red, green, _ = np.asarray(image)[0, 0]
        assert green > 150 > 100 > red
    assert (folder / "turned.jpg").read_bytes() == (source / "turned.jpg").read_bytes()


def test_transparency_is_kept_in_png_and_white_in_jpg(made, source):
    """Of a red disc on nothing, under which there is green."""
    y, x = np.mgrid[:200, :200]
    disc = (x - 100) ** 2 + (y - 100) ** 2 < 80**2
    drawn = np.where(disc[..., None], (255, 0, 0, 255), (0, 255, 0, 0)).astype(np.uint8)
    source.mkdir()
    Image.fromarray(drawn).save(source / "disc.png")
    over_white = np.where(disc[..., None], (255, 0, 0), 255).astype(np.uint8)
    for kernel in ("area", "cubic", "nearest"):
        made("--save_as_png", "--force", "--interpolation", kernel)
        wanted = shrink(over_white, (32, 32), kernel).astype(int)
        with Image.open(made("--save_as_png") / "disc+32x32.png") as image:
            found = np.asarray(image).astype(int)
            laid = Image.alpha_composite(Image.new("RGBA", (32, 32), "white"), image).convert("RGB")
        # negative lobes of a kernel are cut off in another place
        assert np.abs(np.asarray(laid).astype(int) - wanted).max() <= (9 if kernel == "cubic" else 1)
        assert found[0, 0].tolist() == [0, 255, 0, 0]
        assert not (found[..., 1] * found[..., 3]).any()
    jpeg = pixels_of(made() / "disc+32x32.jpg")
    assert np.abs(jpeg - shrink(over_white, (32, 32), "area")).max() < 12


def test_interpolations():
    """Stripes of one pixel become grey, as no kernel skips any; the nearest pixel is always one of them."""
    stripes = np.zeros((90, 90, 3), np.uint8)
    stripes[:, ::2] = 255
    for name in (None, "area", "box", "linear", "cubic", "lanczos4"):
        middle = shrink(stripes, (20, 20), name)[5:-5, 5:-5]
        assert 90 < middle.min() <= middle.max() < 165
    assert set(np.unique(shrink(stripes, (20, 20), "nearest"))) <= {0, 255}
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    made = {
        name: shrink(noise, (20, 20), name).tobytes() for name in (None, "area", "box", "linear", "cubic", "lanczos4")
    }
    assert made[None] == made["area"] == made["box"]
    assert len(set(made.values())) == 4
    means = noise.reshape(20, 3, 20, 3, 3).mean(axis=(1, 3))
    assert np.abs(shrink(noise, (20, 20), "area") - means).max() <= 0.5


def test_what_belongs_to_a_picture(made, source):
    for name in ("a.png", "a.b.png", "shared.jpg", "shared.png"):
        picture(source / name, (90, 90))
    for name in ("a.txt", "a.caption", "a.b.txt", "a.tags.txt", "ab.txt", "a.npz", "shared.txt"):
        (source / name).write_text(name)
    found = contents(made("--copy_associated_files"))
    new = {name: text for name, text in found.items() if "+" in name and not name.endswith("jpg")}
    assert new == {
        "a+32x32.txt": b"a.txt",
        "a+32x32.caption": b"a.caption",
        "a+32x32.tags.txt": b"a.tags.txt",
        "a.b+32x32.txt": b"a.b.txt",
        "shared+32x32.txt": b"shared.txt",
        "shared.png+32x32.txt": b"shared.txt",
    }
    assert {"a+32x32.jpg", "a.b+32x32.jpg", "shared+32x32.jpg", "shared.png+32x32.jpg", "a.npz"} <= found.keys()


def test_what_is_named_as_a_version_already_is_copied_as_it_is(made, source, capsys):
    picture(source / "a.png", (90, 90), "of the original", ".txt")
    own = picture(source / "a+32x32.jpg", (10, 10), "its own", ".txt")
    found = contents(made("--copy_associated_files"))
    assert found["a+32x32.jpg"] == own.read_bytes()
    assert found["a+32x32.txt"] == b"its own"
    assert capsys.readouterr().err.count("are named as smaller versions already, as a+32x32.jpg") == 1


def test_only_what_changed_is_done_again(made, source, capsys):
    for name in ("a.png", "b.png"):
        os.utime(picture(source / name, (90, 90), "old", ".txt"), (10**9, 10**9))
        os.utime((source / name).with_suffix(".txt"), (10**9, 10**9))
    folder = made("--copy_associated_files")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    Image.new("RGB", (60, 60)).save(source / "a.png")
    (folder / "b+32x32.txt").write_text("corrected here")
    (folder / "a+32x32.txt").unlink()
    made("--copy_associated_files")
    changed = {path.name for path in folder.iterdir() if path.stat().st_mtime_ns != before[path]}
    assert changed == {"a.png", "a+32x32.jpg", "b+32x32.txt"}
    assert pixels_of(folder / "a+32x32.jpg").max() < 5
    assert (folder / "b+32x32.txt").read_text() == "corrected here"
    newer = f"1 file is newer than the original and left as found, as {folder / 'b+32x32.txt'}"
    assert newer in capsys.readouterr().err
    os.utime(source / "b.png", (10**8, 10**8))  # another one, of an older time
    made("--copy_associated_files")
    assert "3 files are newer than the original" in capsys.readouterr().err
    made("--copy_associated_files", "--force")
    assert (folder / "b+32x32.txt").read_text() == "old"


def test_folders_below(made, source, capsys):
    picture(source / "a.png", (90, 90))
    picture(source / "below" / "a.png", (90, 90), "a caption")
    assert contents(made()).keys() == {"a.png", "a+32x32.jpg"}
    assert "what lies in the 1 folder below is left out, --recursive takes it along" in capsys.readouterr().err
    below = {"below/a.png", "below/a+32x32.jpg", "below/a.caption"}
    assert contents(made("--recursive")).keys() == {"a.png", "a+32x32.jpg"} | below


def test_a_name_that_is_too_long_is_one_pictures_fault(made, source, capsys):
    long = picture(source / f"{'長' * 81}.png", (90, 90))
    picture(source / "short.png", (90, 90))
    assert contents(made()).keys() == {"short.png", "short+32x32.jpg"}
    said = capsys.readouterr()
    assert f"{'長' * 81}+32x32.jpg is too long" in said.err
    assert f"pictures: 1 written, 0 skipped, 1 failed ({long}), on CPU" in said.out


def test_a_version_that_is_too_long_is_one_pictures_fault(made, source, capsys):
    long = picture(source / "a.png", (70_000, 1))
    picture(source / "b.png", (90, 90))
    assert contents(made("--max_resolution", "260x260,32x32")).keys() == {"b.png", "b+32x32.jpg"}
    said = capsys.readouterr()
    assert "a+260x260.jpg would be 67600x1 pixels, and .jpg holds 65500 a side" in said.err
    assert f"pictures: 1 written, 0 skipped, 1 failed ({long}), on CPU" in said.out


def test_nothing_but_broken_pictures_is_a_mistake(made, source, capsys):
    source.mkdir()
    (source / "empty.png").touch()
    (source / "empty.txt").write_text("a caption")
    with pytest.raises(SystemExit, match="2"):
        made()
    assert "no pictures are written: none of the pictures could be used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--max_resolution", "64x64,512"], "--max_resolution: '512' is not a width and a height in pixels"),
        (["--max_resolution", "512*512"], "'512*512' is not a width"),
        (["--max_resolution", "0x10"], "'0x10' is not a width"),
        (["--max_resolution", ","], "--max_resolution: no size is given"),
        (["--divisible_by", "0"], "--divisible_by: 0 is too small, use 1 or more"),
        (["--interpolation", "lanczos"], "did you mean lanczos4?"),
        (["--safe_as_png"], "did you mean --save_as_png?"),
    ],
)
def test_mistakes_in_flags(mistake, source, tmp_path, flags, sentence):
    picture(source / "a.png")
    assert sentence in mistake(source, tmp_path / "to", *flags)


def test_mistakes_in_folders(mistake, source, tmp_path):
    file = picture(source / "sub" / "a.png")
    assert "the following arguments are required: dst_img_folder" in mistake(source)
    assert f"did you mean {source}?" in mistake(tmp_path / "form", tmp_path / "to")
    assert "there are no pictures in" in (said := mistake(source, tmp_path / "to"))
    assert "add --recursive" in said
    assert "is a file, not a folder" in mistake(file, tmp_path / "to")
    other = picture(tmp_path / "b.png")
    assert f"{other} is a file and can hold no a.png" in mistake(source / "sub", other)
    assert "is one of the folders to read" in mistake(source, source)
    assert f"lies in {source}, which is read" in mistake(source, source / "to")
    picture(source / "sub" / "sub" / "a.png")
    assert f"{source} holds {source / 'sub'}, which is read" in mistake(source / "sub", source, "--recursive")


# --- runs that are stopped ---


def test_a_killed_run_leaves_whole_files_and_goes_on(made, source, tmp_path):
    for number in range(12):
        picture(source / f"{number}.png", (250, 250), "a caption", ".txt")
    words = ["--max_resolution", "200x200,100x100", "--save_as_png", "--copy_associated_files"]
    process = subprocess.Popen([sys.executable, SCRIPT, source, tmp_path / "to", *words], cwd=ROOT, stderr=-3)
    while not (tmp_path / "to" / "0.png").exists():
        time.sleep(0.01)
        assert process.poll() is None
    process.kill()
    process.wait()
    killed = contents(tmp_path / "to")
    (tmp_path / "to" / f"9+100x100.png.{process.pid}.tmp").write_text("half")
    (tmp_path / "to" / f"another.png.{process.pid}.tmp").write_text("not ours")
    times = {path: path.stat().st_ctime_ns for path in (tmp_path / "to").iterdir() if path.name in killed}
    whole = contents(made(*words))
    kept = {path for path, time in times.items() if path.exists() and path.stat().st_ctime_ns == time}
    assert len(kept) >= len(killed) - 8  # all but what two threads and the kill left without its time
    assert {name: data for name, data in killed.items() if not name.endswith(".tmp")}.items() <= whole.items()
    assert whole.pop(f"another.png.{process.pid}.tmp") == b"not ours"
    (tmp_path / "to").rename(tmp_path / "first")
    assert contents(made(*words, "--max_data_loader_n_workers", 1)) == whole


def test_forced_work_that_is_stopped_goes_on_too(made, source, monkeypatch, capsys):
    for number in range(5):
        picture(source / f"{number}.png", (90, 90))
    folder = made()
    before = {path: path.stat().st_ctime_ns for path in folder.iterdir()}

    def stopped(path: Path, target: Path) -> None:
        if path.name >= "3.png":
            raise KeyboardInterrupt
        copy(path, target)

    copy = resizing.copy_file
    monkeypatch.setattr(resizing, "copy_file", stopped)
    with pytest.raises(SystemExit, match="130"):
        made("--force", "--max_data_loader_n_workers", 1)
    monkeypatch.undo()
    assert capsys.readouterr().out.endswith("so far: 3 written, 0 skipped, 0 failed\n")
    made("--force")
    assert capsys.readouterr().out == "pictures: 2 written, 3 skipped, 0 failed, on CPU\n"
    assert {path for path in folder.iterdir() if before.get(path) == path.stat().st_ctime_ns} == set()
    made("--force")
    assert capsys.readouterr().out == "pictures: 5 written, 0 skipped, 0 failed, on CPU\n"
    (folder / ".resize_images_to_resolution.unfinished").touch()
    made()
    assert not list(folder.glob(".*"))


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small disk")
def test_a_full_disk(tool, source, tmp_path, capsys):
    for number in range(4):
        picture(source / f"{number}.png", (300, 300))
    (tmp_path / "to").mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", tmp_path / "to"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a disk")
    try:
        with pytest.raises(SystemExit, match="2"):
            tool(source, tmp_path / "to", "--max_resolution", "32x32")
        assert "cannot be written: No space left on device" in capsys.readouterr().err
        found = contents(tmp_path / "to")
        assert found
        assert {name: data for name, data in found.items() if "+" not in name}.items() <= contents(source).items()
        assert not [name for name in found if name.endswith(".tmp")]
    finally:
        subprocess.run(["umount", tmp_path / "to"], check=True)
