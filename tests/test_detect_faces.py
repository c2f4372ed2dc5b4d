"""tools/detect_face_rotate.py: what is found, what is written of it, and that names tell where the face is."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library import cli
from library.data.augment import face_in
from library.preprocessing.faces import folder as faces
from tests.face_models import both
from tests.painted_faces import EMPTY, GREEN, MAGENTA, RED, found, painted, red_box, save
from tests.processes import ROOT
from tools import detect_face_rotate

SCRIPT = "tools/detect_face_rotate.py"


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    return both(tmp_path_factory.mktemp("detectors"))


@pytest.fixture
def tool(monkeypatch, fresh_console, capsys):
    """`tool(words)`: what the script prints in this process."""

    def call(*words: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, words)])
        cli.run(detect_face_rotate.main)
        return capsys.readouterr()

    return call


@pytest.fixture
def cut(tool, models, tmp_path):
    """`cut(words, model=)`: the files in `out` by name, made of the pictures in `in`."""

    def call(*words: object, model: str = "yunet.onnx") -> dict[str, np.ndarray]:
        tool("--src_dir", tmp_path / "in", "--dst_dir", tmp_path / "out", "--model", models / model, *words)
        return {path.name: np.asarray(Image.open(path)) for path in sorted((tmp_path / "out").rglob("*.png"))}

    return call


# --- the tool ---


def test_names_tell_the_dataset_where_the_face_is(cut, tmp_path):
    save(tmp_path / "in" / "über alles_1.png", painted(30))
    save(tmp_path / "in" / "side ways.bmp", painted(90))
    made = cut("--rotate", "--crop_size", "256,200")
    assert len(made) == 2
    for name, pixels in made.items():
        assert pixels.shape == (200, 256, 3)
        face = face_in(name)
        assert np.allclose((*face.centre, *face.size), red_box(pixels), atol=3)
        found(pixels, 0)


def test_every_face_or_the_largest(cut, tmp_path):
    pixels = painted()
    pixels[250:300, 400:420] = MAGENTA
    save(tmp_path / "in" / "two.png", pixels)
    ((name, _),) = cut(model="yolo.onnx").items()
    assert face_in(name).size[0] > 60
    made = cut("--multiple_faces", "--crop_ratio", "2,1", "--resize_face_size", 50, model="yolo.onnx")
    first, second = (made[name] for name in sorted(made) if "_face" in name)
    assert first.shape == second.shape == (50, 100, 3)
    assert first[25, 70].tolist() == list(RED)
    assert second[25, 50].tolist() == list(MAGENTA)
    assert len(made) == 2  # in place of the one without a number
    assert len(cut(model="yolo.onnx")) == 1


def test_boxes_are_drawn_into_files_that_are_no_results(cut, tmp_path):
    save(tmp_path / "in" / "a.png", painted())
    ((name, pixels),) = cut("--debug").items()
    assert "_debug_" in name
    face = face_in(name)
    assert pixels[face.centre[1], face.centre[0] - face.size[0] // 2].tolist() == list(GREEN)
    assert len(cut()) == 2


def test_folders_below_and_sizes(cut, tmp_path, capsys):
    for name in ("a.png", "below/a.png", "below/deep/b.png"):
        save(tmp_path / "in" / name, painted())
    save(tmp_path / "in" / "below" / "small.png", painted(size=(320, 300)))
    assert len(cut()) == 1
    cut("--recursive", "--min_size", 301, "--max_size", 600)
    folders = sorted(path.parent.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png"))
    assert folders == [".", "below", "below/deep"]
    cut("--recursive", "--max_size", 599)
    assert len(list((tmp_path / "out").rglob("small*"))) == 1


def test_what_became_of_the_pictures_is_told(tool, models, tmp_path):
    save(tmp_path / "in" / "a.png", painted())
    save(tmp_path / "in" / "b.png", painted())
    save(tmp_path / "in" / "empty.png", EMPTY)
    (tmp_path / "in" / "broken.png").write_bytes((tmp_path / "in" / "a.png").read_bytes()[:200])
    save(tmp_path / "in" / "tiny.png", painted(size=(300, 250)))
    words = ["--src_dir", tmp_path / "in", "--dst_dir", tmp_path / "out", "--model", models / "yunet.onnx"]
    broken = tmp_path / "in" / "broken.png"
    out, err = tool(*words, "--min_size", 64, "--max_size", 600, "--crop_size", "64,64")
    assert out == f"faces: 3 written, 0 skipped, 1 failed ({broken}), on CPUExecutionProvider\n"
    assert f"no face is found in 1 of the pictures: {tmp_path / 'in' / 'empty.png'}" in err
    out, err = tool(*words, "--min_size", 64, "--max_size", 500, "--crop_size", "64,64", "--force")
    assert out == "faces: 1 written, 0 skipped, 0 failed, on CPUExecutionProvider\n"
    assert "3 of the pictures left out for --min_size or --max_size" in err
    assert sorted(contents(tmp_path / "out"))[1:] == sorted(path.name for path in (tmp_path / "out").glob("*.png"))


def test_nothing_is_done_twice_unless_forced(tool, cut, models, tmp_path):
    save(tmp_path / "in" / "a.png", painted())
    save(tmp_path / "in" / "a_1.png", painted(radius=60))
    before = cut("--crop_size", "64,64")
    times = {path: path.stat().st_ctime_ns for path in (tmp_path / "out").iterdir()}
    assert len(before) == 2
    assert cut("--crop_size", "64,64").keys() == before.keys()
    assert {path: path.stat().st_ctime_ns for path in (tmp_path / "out").iterdir()} == times
    other = cut("--crop_size", "96,64")  # in place of what was there, though the name is another
    assert len(other) == 2
    assert all(pixels.shape == (64, 96, 3) for pixels in other.values())
    save(tmp_path / "in" / "a.png", painted(radius=20))
    moved = cut("--crop_size", "96,64")
    assert len(moved) == 2
    assert moved.keys() != other.keys()
    again = cut("--crop_size", "96,64", "--force")
    assert again.keys() == moved.keys()
    assert not times.items() & {path: path.stat().st_ctime_ns for path in (tmp_path / "out").iterdir()}.items()


def test_what_was_not_made_here_stays_unless_forced(cut, tmp_path):
    save(tmp_path / "in" / "a.png", painted())
    save(tmp_path / "out" / "a_1_2_3_4.png", EMPTY)
    assert cut().keys() == {"a_1_2_3_4.png"}
    save(tmp_path / "in" / "a_face1.png", painted())  # its one face looks like the first of several
    made = cut("--multiple_faces")
    assert {"a_1_2_3_4.png"} < made.keys()
    assert len(cut("--force")) == 2
    assert len(cut("--force")) == 2


def test_pictures_of_one_stem_have_files_of_their_own(cut, tmp_path):
    for name in ("a.bmp", "a.png"):
        save(tmp_path / "in" / name, painted())
    second, first = cut()
    assert second == first.replace("a_", "a.png_")


def test_two_folders_may_go_to_one(tool, cut, models, tmp_path):
    save(tmp_path / "in" / "a.png", painted())
    save(tmp_path / "others" / "a.png", painted(radius=50))
    save(tmp_path / "others" / "b.png", painted())
    save(tmp_path / "third" / "a.png", painted())
    made = cut()
    words = ["--dst_dir", tmp_path / "out", "--model", models / "yunet.onnx"]
    assert tool("--src_dir", tmp_path / "others", *words)[0].startswith("faces: 2 written, 0 skipped")
    assert tool("--src_dir", tmp_path / "others", *words)[0].startswith("faces: 0 written, 2 skipped")
    assert made.keys() < cut().keys()
    (tmp_path / "out" / next(iter(made))).rename(tmp_path / "of the first.png")
    save(tmp_path / "third" / "b.png", painted())
    out, err = tool("--src_dir", tmp_path / "third", *words)  # its b is where that of the others is
    assert out.startswith(f"faces: 1 written, 0 skipped, 1 failed ({tmp_path / 'third' / 'b.png'})")
    assert "is there already, of another picture, others/b.png" in err


def test_pictures_without_a_face_are_remembered(tool, cut, models, tmp_path, monkeypatch):
    save(tmp_path / "in" / "a.png", painted())
    save(tmp_path / "in" / "empty.png", EMPTY)
    cut()
    seen = []
    write = faces.Cutter.write
    monkeypatch.setattr(faces.Cutter, "write", lambda *of: (seen.append(of[1].name), write(*of))[1])
    words = ["--src_dir", tmp_path / "in", "--dst_dir", tmp_path / "out", "--model", models / "yunet.onnx"]
    out, _ = tool(*words)
    assert out == "faces: 0 written, 1 skipped, 0 failed, on CPUExecutionProvider\n"
    assert not seen
    cut("--force")
    assert sorted(seen) == ["a.png", "empty.png"]
    cut("--score_threshold", 0.8)
    assert len(seen) == 4
    save(tmp_path / "in" / "empty.png", painted(size=(500, 400)))
    assert len(cut("--score_threshold", 0.8)) == 2


def test_no_picture_with_a_face_is_an_error(tool, models, tmp_path, capsys):
    save(tmp_path / "in" / "empty.png", EMPTY)
    with pytest.raises(SystemExit, match="2"):
        tool("--src_dir", tmp_path / "in", "--dst_dir", tmp_path / "out", "--model", models / "yunet.onnx")
    said = capsys.readouterr()
    assert said.out.startswith("faces: 0 written, 0 skipped, 0 failed")
    assert "error: no faces are written" in said.err


def test_a_picture_that_would_become_too_large_fails(cut, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    for name, radius in (("small", 20), ("large", 40)):
        save(tmp_path / "in" / f"{name}.png", painted(size=(100, 100), centre=(50, 50), radius=radius))
    ((name, _),) = cut("--resize_face_size", 120).items()
    assert name.startswith("large")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--dst_dir {0}/out", "--src_dir: the folder of pictures is not named"),
        ("--src_dir {0}/in", "--dst_dir: the folder for the results is not named"),
        ("--src_dir {0}/inn --dst_dir {0}/out", "does not exist, did you mean {0}/in?"),
        ("--src_dir {0}/in --dst_dir {0}/in", "--dst_dir: {0}/in is one of the folders to read"),
        ("--src_dir {0}/in --dst_dir {0}/in/out", "lies in {0}/in, which is read"),
        ("--src_dir {0}/in --dst_dir {0} --recursive", "{0} holds {0}/in, which is read"),
        ("--src_dir {0}/in --dst_dir {0}/file/out", "{0}/file is a file and can hold no faces"),
        ("--src_dir {0}/in --dst_dir {0}/out --crop_size 512", "'512' is not written as width,height"),
        ("--src_dir {0}/in --dst_dir {0}/out --crop_size 512,0", "'512,0' is not written as width,height"),
        ("--src_dir {0}/in --dst_dir {0}/out --crop_ratio 2;2", "'2;2' is not written as across,down"),
        ("--src_dir {0}/in --dst_dir {0}/out --crop_ratio 2,2 --crop_size 5,5", "contradict each other"),
        ("--src_dir {0}/in --dst_dir {0}/out --resize_fit", "there is nothing to fit, add --crop_size"),
        (
            "--src_dir {0}/in --dst_dir {0}/out --resize_fit --crop_size 5,5 --resize_face_size 9",
            "--resize_fit and --resize_face_size contradict",
        ),
        ("--src_dir {0}/in --dst_dir {0}/out --min_size 9 --max_size 8", "9 is more than --max_size 8"),
        ("--src_dir {0}/in --dst_dir {0}/out --score_threshold 50", "50.0 is too large, use 1 or less"),
        ("--src_dir {0}/in --dst_dir {0}/out --model {0}/in", "is a folder, give the .onnx file in it"),
        ("--src_dir {0}/in --dst_dir {0}/out --model {1}/yolo.onnx --rotate", "--rotate: this --model does not tell"),
        ("--src_dir {0}/in --dst_dir {0}/out --model {1}/yunets.onnx", "did you mean {1}/yunet.onnx?"),
        ("--src_dir {0}/in --dst_dir {0}/out --rotat", "--rotat: unknown option, did you mean --rotate?"),
    ],
)
def test_mistakes(mistake, models, tmp_path, words, sentence):
    save(tmp_path / "in" / "a.png", painted())
    (tmp_path / "file").touch()
    assert sentence.format(tmp_path, models) in mistake(*words.format(tmp_path, models).split())


# --- killed runs ---


def test_what_is_not_complete_is_made_complete_and_the_rest_left(tool, cut, models, tmp_path, monkeypatch, capsys):
    save(tmp_path / "in" / "0.png", EMPTY)
    pixels = painted()
    pixels[250:300, 400:420] = MAGENTA
    save(tmp_path / "in" / "1.png", pixels)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "1_face1_1_2_3_4.png.99999999.tmp").touch()  # of a process that was killed
    words = ["--multiple_faces", "--max_data_loader_n_workers", 1]
    save_picture, calls = faces.save_picture, []

    def interrupted(path: Path, *rest: object) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        save_picture(path, *rest)

    monkeypatch.setattr(faces, "save_picture", interrupted)
    with pytest.raises(SystemExit, match="130"):
        cut(*words, model="yolo.onnx")
    assert len(list((tmp_path / "out").glob("*.png"))) == 1
    empty = tmp_path / "in" / "0.png"
    state = empty.stat()
    empty.write_bytes(bytes(state.st_size))  # nobody looks at it again
    os.utime(empty, ns=(state.st_atime_ns, state.st_mtime_ns))
    capsys.readouterr()
    folders = ["--src_dir", tmp_path / "in", "--dst_dir", tmp_path / "out"]
    out, _ = tool(*words, *folders, "--model", models / "yolo.onnx")
    assert out == "faces: 2 written, 0 skipped, 0 failed, on CPUExecutionProvider\n"
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


def start(words: list[object]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("how", "force"),
    [
        (signal.SIGKILL, True),
        (signal.SIGINT, False),
        pytest.param(signal.SIGKILL, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, True, marks=pytest.mark.slow),
    ],
)
def test_a_broken_off_run_goes_on(cut, models, tmp_path, how, force):
    """Pictures with two faces, and some without any; those of an earlier run are replaced."""
    for number in range(12):
        pixels = painted(size=(300, 300))
        pixels[250 : 270 + number, 250:280] = MAGENTA
        save(tmp_path / "in" / f"{number}.png", pixels if number % 4 else EMPTY)
    words = ["--multiple_faces", "--crop_ratio", "1.5,1.5", "--max_data_loader_n_workers", 2]
    cut(*words, model="yolo.onnx")
    out, calm = tmp_path / "out", tmp_path / "calm"
    out.rename(calm)
    expected, before = contents(calm), {}
    if force:
        cut("--multiple_faces", model="yolo.onnx")
        before = contents(out)
        assert before.keys() & expected.keys() == {".detect_face_rotate.faceless"}
        words.append("--force")
    words += ["--src_dir", tmp_path / "in", "--dst_dir", out, "--model", models / "yolo.onnx"]
    run = start(words)
    while sum((out / name).exists() for name in expected if name.endswith(".png")) < 7:
        assert run.poll() is None
    run.send_signal(how)
    printed, _ = run.communicate(timeout=60)
    assert run.returncode == (130 if how == signal.SIGINT else -9)
    assert ("so far: " in printed) == (how == signal.SIGINT)
    left = contents(out)
    for name, data in left.items():
        if name.endswith(".png"):
            assert data == (before | expected)[name]  # never a half one
    done = {name: (out / name).stat().st_mtime_ns for name in expected.keys() & left.keys() if "_face1_" in name}
    again = start(words)
    printed, err = again.communicate(timeout=60)
    assert again.returncode == 0
    assert "no face is found in 3 of the pictures" in err
    again = contents(out)
    lines = [sorted(files.pop(".detect_face_rotate.faceless").splitlines()) for files in (again, expected)]
    assert lines[0] == lines[1]
    assert again == expected
    kept = sum((out / name).stat().st_mtime_ns == stamp for name, stamp in done.items())
    assert kept >= len(done) - (2 if force else 0)  # where the name says nothing, what was not noted yet is done again
