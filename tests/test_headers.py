"""Sizes from the first bytes: the same as Pillow's, or none."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from library.data.images import read_size
from library.data.scanning.headers import parse
from library.data.scanning.reading import read_header

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 50, 4), dtype=np.uint8)


def saved(kind, mode="RGB", **options):
    file = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(file, kind, **options)
    return file.getvalue()


def exif(orientation=None, **more):
    block = Image.Exif()
    block[0x010F] = "Maker"
    if orientation:
        block[0x0112] = orientation
    return {"exif": block, **more}


TEXT = PngInfo()
TEXT.add_text("parameters", "a prompt, " * 300)
XMP = b'<x:xmpmeta tiff:Orientation="6"/>'
FRAMES = [Image.new("RGB", (50, 30), colour) for colour in ("red", "blue")]
FILES = {
    "plain.png": saved("PNG"),
    "text.png": saved("PNG", pnginfo=TEXT),
    "palette.png": saved("PNG", "P"),
    "turned.png": saved("PNG", **exif(6)),
    "animated.png": saved("PNG", save_all=True, append_images=FRAMES),
    "plain.jpg": saved("JPEG"),
    "grey.jpg": saved("JPEG", "L"),
    "print.jpg": saved("JPEG", "CMYK"),
    "progressive.jpg": saved("JPEG", progressive=True),
    "profile.jpg": saved("JPEG", icc_profile=bytes(100_000)),
    "xmp.jpg": saved("JPEG", xmp=XMP),
    "exif and xmp.jpg": saved("JPEG", xmp=XMP, **exif(1)),
    "unturned exif.jpg": saved("JPEG", **exif()),
    **{f"{n}.jpg": saved("JPEG", **exif(n)) for n in range(1, 9)},
    "lossy.webp": saved("WEBP"),
    "lossless.webp": saved("WEBP", lossless=True),
    "alpha.webp": saved("WEBP", "RGBA"),
    "turned.webp": saved("WEBP", **exif(8)),
    "animated.webp": saved("WEBP", save_all=True, append_images=FRAMES),
    "plain.bmp": saved("BMP"),
    "grey.bmp": saved("BMP", "L"),
}
LEFT_TO_PILLOW = {"turned.png", "profile.jpg", "xmp.jpg", "turned.webp"}


@pytest.mark.parametrize("name", FILES)
def test_sizes_are_those_of_pillow(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    for legacy in (False, True):
        size, animated = read_header(str(path), legacy=legacy)
        assert size == read_size(path, legacy=legacy)
        assert animated == name.startswith("animated")
    assert (parse(FILES[name][:4096]) is None) == (name in LEFT_TO_PILLOW)


@pytest.mark.parametrize("name", FILES)
def test_a_cut_file_is_in_doubt_or_has_its_size(name):
    whole = parse(FILES[name])
    for length in range(0, min(len(FILES[name]), 2000), 3):
        assert parse(FILES[name][:length]) in (None, whole)


@given(st.sampled_from(sorted(FILES)), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=5))
def test_damage_is_no_crash(name, damage):
    data = bytearray(FILES[name][:4096])
    for position, byte in damage:
        data[position % len(data)] = byte
    header = parse(bytes(data))
    assert header is None or header.width * header.height > 0


def test_a_size_beyond_reason_is_left_to_pillow():
    assert parse(saved("BMP")[:18] + (100_000).to_bytes(4, "little") * 2 + saved("BMP")[26:]) is None
