"""Detectors of faces, and the geometry of what is written of a picture with a face."""

import math
from pathlib import Path

import cv2
import huggingface_hub
import numpy as np
import pytest

from library.errors import UserError
from library.preprocessing.faces.crops import Detected, Wanted, moved, plan, render
from library.preprocessing.faces.detectors import Boxes, different, letterbox, open_detector
from library.preprocessing.faces.files import find_detector
from tests.face_models import both, yolo
from tests.hub_stand_in import Repository, ask, hub_stand_in
from tests.painted_faces import MAGENTA, found, painted, red_box


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    return both(tmp_path_factory.mktemp("detectors"))


# --- geometry ---


WANTED = {
    "all": Wanted(upright=True),
    "size": Wanted(upright=True, face_size=30),
    "large": Wanted(upright=True, face_size=150),
    "crop": Wanted(upright=True, crop=(200, 300)),
    "fit": Wanted(upright=True, crop=(150, 200), fit=True),
    "ratio": Wanted(upright=True, ratio=(2, 1.5)),
    "ratio and size": Wanted(upright=True, ratio=(3, 4), face_size=64),
    "larger than the picture": Wanted(upright=True, crop=(800, 800)),
}


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
@pytest.mark.parametrize("angle", [0, 20, -45, 93, 180, -120])
def test_the_face_is_upright_and_where_it_is_said_to_be(wanted, angle):
    pixels = painted(angle)
    face = found(pixels, angle)
    cut = plan((600, 400), face, wanted)
    result = render(pixels, cut)
    assert result.shape[1::-1] == cut.size
    told = moved((600, 400), face, cut)
    scale = told.size[0] / face.size[0]
    assert np.allclose((*told.centre, *told.size), red_box(result), atol=1.5 + 1.5 * scale)
    assert told.size[0] == pytest.approx(told.size[1], rel=0.05)
    turned = found(result, 0)
    assert np.allclose(turned.marks[:2], told.marks[:2], atol=1.5 + 1.5 * scale)
    if wanted.face_size:
        assert max(told.size) == pytest.approx(wanted.face_size, rel=0.02)
    if wanted.crop:
        assert cut.size == wanted.crop


def test_what_is_not_turned_nor_scaled_keeps_its_pixels():
    pixels = np.random.default_rng(1).integers(0, 256, (400, 600, 3), dtype=np.uint8)
    face = Detected((190.0, 150.0), (80.0, 100.0), 1.0)
    cut = plan((600, 400), face, Wanted(upright=True, crop=(200, 100)))
    assert np.array_equal(render(pixels, cut), pixels[100:200, 90:290])
    assert np.array_equal(render(pixels, plan((600, 400), face, Wanted())), pixels)
    upside_down = Detected(
        (190.0, 150.0), (80.0, 100.0), 1.0, ((210, 170), (170, 170), (190, 150), (210, 130), (170, 130))
    )
    assert np.array_equal(render(pixels, plan((600, 400), upside_down, Wanted(upright=True))), np.rot90(pixels, 2))


@pytest.mark.parametrize("centre", [(12.0, 10.0), (590.0, 390.0), (300.0, 395.0)])
def test_a_crop_stays_in_the_picture_and_the_name_tells_what_is_seen_of_the_face(centre):
    face = Detected(centre, (60.0, 60.0), 1.0)
    cut = plan((600, 400), face, Wanted(crop=(100, 100)))
    left, top, right, bottom = cut.window
    assert (right - left, bottom - top) == (100, 100)
    assert min(left, top) >= 0
    assert (right <= 600, bottom <= 400) == (True, True)
    told = moved((600, 400), face, cut)
    for axis in (0, 1):
        low = max(centre[axis] - 30, 0)
        high = min(centre[axis] + 30, (600, 400)[axis])
        assert told.centre[axis] == (low + high) / 2 - cut.window[axis]
        assert told.size[axis] == high - low


def test_beyond_the_edge_of_a_turned_picture_its_edge_goes_on():
    pixels = painted(30, size=(120, 120), centre=(60, 60), radius=20)
    assert np.abs(render(pixels, plan((120, 120), found(pixels, 30), Wanted(upright=True)))[0, 0] - 128.0).max() < 2


def test_a_face_in_profile_is_turned_by_its_mouth():
    eye, mouth = (100.0, 100.0), (130.0, 130.0)  # 45 degrees anticlockwise
    face = Detected((110.0, 110.0), (60.0, 100.0), 1.0, (eye, eye, eye, mouth, mouth))
    assert face.tilt == pytest.approx(-45)
    told = moved((300, 300), face, plan((300, 300), face, Wanted(upright=True)))
    assert told.size == pytest.approx((math.sqrt((60**2 + 100**2) / 2),) * 2)  # of an ellipse turned by 45 degrees


# --- detectors ---


def test_yunet_is_read_as_opencv_reads_it(models):
    pixels = painted(25, size=(640, 640))
    outputs = cv2.FaceDetectorYN.create(str(models / "yunet.onnx"), "", (640, 640), 0.5)
    _, ((left, top, width, height, *marks, score),) = outputs.detect(pixels[..., ::-1].copy())
    (face,) = open_detector(models / "yunet.onnx").faces(pixels)
    assert face.centre == pytest.approx((left + width / 2, top + height / 2), abs=1e-3)
    assert face.size == pytest.approx((width, height), abs=1e-3)
    assert np.ravel(face.marks) == pytest.approx(marks, abs=1e-3)
    assert face.score == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize("size", [(300, 200), (1500, 900), (201, 640)])
@pytest.mark.parametrize("model", ["yunet.onnx", "yolo.onnx"])
def test_places_are_those_in_the_picture_whatever_its_size(models, model, size):
    pixels = painted(0, size=size, centre=(100, 110), radius=60)
    (face,) = open_detector(models / model).faces(pixels)
    # to the pixel of the detector's smaller view
    assert (*face.centre, *face.size) == pytest.approx(red_box(pixels), abs=2 * max(1, max(size) / 320))


def test_yunet_is_shown_large_faces_in_a_size_that_it_knows(models):
    pixels = painted(size=(400, 400), centre=(200, 200), radius=150)
    (face,) = open_detector(models / "yunet.onnx").faces(pixels)
    assert (*face.centre, *face.size) == pytest.approx(red_box(pixels), abs=3)


def test_a_model_of_any_input_size_and_thresholds(models, tmp_path):
    pixels = painted()
    pixels[200:350, 400:580] = MAGENTA
    sizes = [face.size for face in open_detector(yolo(tmp_path / "any.onnx", dynamic=True)).faces(pixels)]
    assert [pytest.approx(size, abs=3) for size in ((180, 150), (141, 141))] == sizes  # the largest first, each once
    assert len(open_detector(models / "yolo.onnx", 0.65).faces(pixels)) == 1
    assert open_detector(models / "yolo.onnx", 0.95).faces(pixels) == []
    assert open_detector(models / "yunet.onnx", 0.96).faces(pixels) == []


def test_boxes_that_share_too_much_are_one_face():
    centres = np.array([[10.0, 10], [12, 10], [10, 30], [18, 10]])
    boxes = Boxes(np.array([0.5, 0.9, 0.4, 0.8]), centres, np.full((4, 2), 10.0), np.empty((4, 0, 2)))
    assert different(boxes, 0.3).tolist() == [1, 3, 2]
    assert different(boxes, 0.2).tolist() == [1, 2]
    assert different(boxes[np.zeros(4, dtype=bool)]).tolist() == []


def test_a_letterbox_keeps_the_aspect():
    pixels = np.full((100, 200, 3), 7, dtype=np.uint8)
    shown, scales = letterbox(pixels, (64, 64), 0.5, 114)
    assert scales.tolist() == [0.16, 0.16]
    assert (shown[:16, :32] == 7).all()
    assert (shown == 114).sum() == shown.size - 16 * 32 * 3


def test_models_of_other_kinds_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"neither YuNet nor a YOLO model for faces alone \(its outputs are output0"):
        open_detector(yolo(tmp_path / "things.onnx", rows=84))
    text = tmp_path / "text.onnx"
    text.write_text("not a model")
    with pytest.raises(UserError, match=r"text.onnx: this model cannot be read, it is damaged or no ONNX model"):
        open_detector(text)


def test_detectors_from_the_hub(monkeypatch, tmp_path, fresh_console):
    with hub_stand_in() as hub:
        ask(monkeypatch, hub.url, tmp_path)
        monkeypatch.chdir(tmp_path)
        files = {"README.md": b"", "one/model.onnx": b"first", "two/model.onnx": b"second"}
        hub.repositories["models", "me/faces"] = Repository(False, [("1" * 40, files)])
        hub.repositories["models", "me/face"] = Repository(False, [("2" * 40, {"face.onnx": b"only"})])
        assert find_detector("me/faces/two/model.onnx").read_bytes() == b"second"
        assert find_detector("me/face").read_bytes() == b"only"
        with pytest.raises(UserError, match=r"has several models, add one of one/model\.onnx, two/model\.onnx"):
            find_detector("me/faces")
        with pytest.raises(UserError, match=r"has no two/modle\.onnx, did you mean two/model\.onnx"):
            find_detector("me/faces/two/modle.onnx")
        hub.answer = 503  # what is in the cache does not need the hub
        assert find_detector("me/faces/two/model.onnx").read_bytes() == b"second"
        assert find_detector("me/face").read_bytes() == b"only"
    asked = len(hub.requests)
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "yunet.onnx").touch()
    for name in ("my/yunett.onnx", "my/x/yunet.onnx", "yunet.onnx"):
        with pytest.raises(UserError, match=rf"--model: {name} does not exist"):
            find_detector(name)
    assert len(hub.requests) == asked
    assert str(tmp_path / "cache") == huggingface_hub.constants.HF_HUB_CACHE
