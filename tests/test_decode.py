"""Image files of every kind against the pixels they stand for, and files that are none."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from library.data.images import BrokenImage, ImageOptions, is_animated, load, load_mask, read_size

PLAIN, ALPHA = ImageOptions(), ImageOptions(alpha_mask=True)
LEGACY = ImageOptions(legacy_image_decode=True)
NUMBERED = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40  # no two pixels alike


def rgb(path, options=PLAIN):
    return load(path, options)[0]


def first_pixel(path, options=PLAIN):
    return rgb(path, options)[0, 0].tolist()


def power_profile(exponent, space="RGB "):
    """The profile of a device whose light is a power of its values, for `space` "RGB " or "GRAY"."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    curve = profile.index(b"para\0\0\0\0") + 12
    profile[curve : curve + 20] = struct.pack(">5i", round(exponent * 0x10000), 0x10000, 0, 0x10000, 0)
    profile[16:20] = space.encode()
    return bytes(profile.replace(b"rTRC", b"kTRC") if space == "GRAY" else profile)


def black_only_profile():
    """The profile of a press whose cyan, magenta and yellow inks cannot be seen."""
    ramp = bytes(range(256))
    corners = b"".join(bytes([0 if corner & 1 else 255, 128, 128]) for corner in range(16))  # black changes fastest
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + struct.pack(">9i", *([0x10000, 0, 0, 0] * 2), 0x10000)
    table += ramp * 4 + corners + ramp * 3
    text = b"text\0\0\0\0x\0\0\0"
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D)
    tags, body = b"", b""
    contents = {b"desc": b"desc\0\0\0\0\0\0\0\2x\0" + bytes(78), b"cprt": text, b"wtpt": white, b"A2B0": table}
    for name, data in contents.items():
        tags += name + struct.pack(">2I", 132 + 12 * len(contents) + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = struct.pack(">I", 132 + len(tags) + len(body))
    header = size + bytes(4) + b"\2\x40\0\0prtrCMYKLab " + bytes(12) + b"acsp" + bytes(28)
    header += struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D)
    return header.ljust(128, b"\0") + struct.pack(">I", len(contents)) + tags + body


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


class TestOrientation:
    @pytest.mark.parametrize(
        ("orientation", "shown"),
        [
            (1, NUMBERED),
            (2, NUMBERED[:, ::-1]),
            (3, NUMBERED[::-1, ::-1]),
            (4, NUMBERED[::-1]),
            (5, NUMBERED.T),
            (6, np.rot90(NUMBERED, -1)),
            (7, NUMBERED[::-1, ::-1].T),
            (8, np.rot90(NUMBERED)),
            (9, NUMBERED),
        ],
    )
    @pytest.mark.parametrize("name", ["a.png", "a.webp"])
    def test_images_are_turned_as_they_are_shown(self, tmp_path, orientation, shown, name):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(NUMBERED).convert("RGB").save(tmp_path / name, exif=exif, lossless=True)
        assert (rgb(tmp_path / name) == shown[..., None]).all()
        assert read_size(tmp_path / name) == shown.shape[::-1]
        assert (load_mask(tmp_path / name) * 255 == shown).all()

    def test_the_older_toolkit_did_not_turn_them(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(NUMBERED).save(tmp_path / "a.jpg", exif=exif)
        assert (read_size(tmp_path / "a.jpg"), read_size(tmp_path / "a.jpg", legacy=True)) == ((2, 3), (3, 2))
        assert (rgb(tmp_path / "a.jpg").shape, rgb(tmp_path / "a.jpg", LEGACY).shape) == ((3, 2, 3), (2, 3, 3))

    def test_alpha_turns_with_its_image(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        image = Image.new("RGB", (3, 2))
        image.putalpha(Image.fromarray(NUMBERED))
        image.save(tmp_path / "a.png", exif=exif)
        assert (load(tmp_path / "a.png", ALPHA)[1] == np.rot90(NUMBERED, -1)).all()
        assert (rgb(tmp_path / "a.png")[..., 0] == 255 - np.rot90(NUMBERED, -1)).all()


class TestModes:
    def test_grey_of_any_depth(self, tmp_path):
        for name, values in {
            "8.png": np.full((4, 4), 0x80, dtype=np.uint8),
            "16.png": np.full((4, 4), 0x80FF, dtype=np.uint16),
            "32.tiff": np.full((4, 4), 0x80FF, dtype=np.int32),
            "unit.tiff": np.full((4, 4), 0.5, dtype=np.float32),
            "float.tiff": np.full((4, 4), 128.2, dtype=np.float32),
        }.items():
            Image.fromarray(values).save(tmp_path / name)
            assert first_pixel(tmp_path / name) == [0x80] * 3, name
        Image.new("1", (4, 4), 1).save(tmp_path / "1.png")
        assert first_pixel(tmp_path / "1.png") == [255] * 3

    def test_a_see_through_shade_of_16_bit_grey(self, tmp_path):
        values = np.array([[0x1234, 0x1235]], dtype=np.uint16)
        Image.fromarray(values).save(tmp_path / "a.png", transparency=0x1234)
        assert rgb(tmp_path / "a.png")[0, :, 0].tolist() == [255, 0x12]

    def test_palettes_with_and_without_transparency(self, tmp_path):
        image = Image.new("P", (2, 1))
        image.putpalette([255, 0, 0, 0, 0, 255])
        image.putpixel((1, 0), 1)
        image.save(tmp_path / "plain.png")
        image.save(tmp_path / "clear.png", transparency=0)
        image.save(tmp_path / "half.png", transparency=b"\xff\x80")
        assert rgb(tmp_path / "plain.png")[0].tolist() == [[255, 0, 0], [0, 0, 255]]
        assert rgb(tmp_path / "clear.png")[0].tolist() == [[255, 255, 255], [0, 0, 255]]
        assert rgb(tmp_path / "half.png")[0].tolist() == [[255, 0, 0], [127, 127, 255]]

    def test_cmyk(self, tmp_path):
        Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "a.jpg")  # stored inverted, as Adobe's are
        assert b"Adobe" in (tmp_path / "a.jpg").read_bytes()
        assert np.abs(np.array(first_pixel(tmp_path / "a.jpg")) - (0, 255, 255)).max() <= 2

    def test_of_an_animation_the_first_frame_is_used(self, tmp_path):
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
        for name in ("a.png", "a.webp"):
            frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
            assert is_animated(tmp_path / name)
            assert first_pixel(tmp_path / name) == [255, 0, 0]

    def test_a_photograph_with_a_second_view_is_no_animation(self, tmp_path):
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black")]
        frames[0].save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=frames[1:])
        assert not is_animated(tmp_path / "a.jpg")
        assert first_pixel(tmp_path / "a.jpg") == [255, 255, 255]


class TestTransparency:
    @pytest.fixture
    def path(self, tmp_path):
        """Three red pixels: clear, half clear, solid."""
        pixels = np.array([[[200, 0, 0, 0], [200, 0, 0, 128], [200, 0, 0, 255]]], dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "a.png")
        return tmp_path / "a.png"

    def test_shows_white(self, path):
        colours, alpha = load(path, PLAIN)
        assert colours[0].tolist() == [[255, 255, 255], [227, 127, 127], [200, 0, 0]]
        assert alpha is None

    def test_with_alpha_masks_the_colours_beneath_stay_also_where_they_cannot_be_seen(self, path):
        for options in (ALPHA, ImageOptions(alpha_mask=True, legacy_image_decode=True)):
            colours, alpha = load(path, options)
            assert (colours == (200, 0, 0)).all()
            assert alpha[0].tolist() == [0, 128, 255]

    def test_was_not_looked_at_by_the_older_toolkit(self, path):
        assert (rgb(path, LEGACY) == (200, 0, 0)).all()

    def test_grey_with_alpha(self, tmp_path):
        Image.new("LA", (2, 2), (100, 128)).save(tmp_path / "a.png")
        assert first_pixel(tmp_path / "a.png") == [177] * 3
        assert load(tmp_path / "a.png", ALPHA)[1][0, 0] == 128

    def test_images_without_it_have_no_alpha(self, tmp_path):
        Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
        assert load(tmp_path / "a.png", ALPHA)[1] is None


class TestColourProfiles:
    @pytest.mark.parametrize(
        ("mode", "value", "space"),
        [
            ("RGB", (128,) * 3, "RGB "),
            ("RGBA", (128, 128, 128, 255), "RGB "),
            ("L", 128, "GRAY"),
            ("LA", (128, 255), "GRAY"),
            ("L", 128, "RGB "),
        ],
    )
    def test_colours_become_srgb(self, tmp_path, mode, value, space):
        Image.new(mode, (4, 4), value).save(tmp_path / "a.png", icc_profile=power_profile(1, space))
        assert np.abs(np.array(first_pixel(tmp_path / "a.png")) - 188).max() <= 1
        assert first_pixel(tmp_path / "a.png", LEGACY) == [128] * 3

    def test_cmyk_by_its_profile(self, tmp_path):
        Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "a.jpg", icc_profile=black_only_profile())
        assert min(first_pixel(tmp_path / "a.jpg")) >= 253

    def test_white_is_put_under_the_converted_colours(self, tmp_path):
        Image.new("RGBA", (4, 4), (128, 128, 128, 128)).save(tmp_path / "a.png", icc_profile=power_profile(1))
        assert np.abs(np.array(first_pixel(tmp_path / "a.png")) - (188 + 255) / 2).max() <= 1

    @pytest.mark.parametrize("kind", ["srgb", "nearly srgb", "nonsense", "cut", "of grey"])
    def test_srgb_and_useless_profiles_change_nothing(self, tmp_path, kind):
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        curve = srgb.index(b"para") + 12
        nearly = srgb[:curve] + struct.pack(">i", int.from_bytes(srgb[curve : curve + 4]) - 1500) + srgb[curve + 4 :]
        profiles = {
            "srgb": srgb,
            "nearly srgb": nearly,
            "nonsense": b"no profile",
            "cut": srgb[:200],
            "of grey": power_profile(1, "GRAY"),
        }
        colours = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(colours).save(tmp_path / "a.png", icc_profile=profiles[kind])
        assert (rgb(tmp_path / "a.png") == colours).all()


class TestBrokenFiles:
    @pytest.mark.parametrize("name", ["a.jpg", "progressive.jpg", "a.png", "a.webp", "a.bmp"])
    @pytest.mark.parametrize("share", [0.05, 0.5, 0.98])
    def test_a_cut_file_is_broken_rather_than_grey(self, tmp_path, name, share):
        pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name, progressive=name.startswith("progressive"))
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: int(len(data) * share)])
        with pytest.raises(BrokenImage):
            load(tmp_path / name, PLAIN)
        with pytest.raises(BrokenImage):
            load_mask(tmp_path / name)

    def test_a_cut_file_is_called_one(self, tmp_path):
        Image.effect_noise((64, 64), 90).save(tmp_path / "a.jpg")
        (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-500])
        with pytest.raises(BrokenImage, match="breaks off"):
            load(tmp_path / "a.jpg", PLAIN)

    def test_the_size_of_a_cut_file_is_known_from_its_header(self, tmp_path):
        Image.new("RGB", (64, 32)).save(tmp_path / "a.bmp")
        (tmp_path / "a.bmp").write_bytes((tmp_path / "a.bmp").read_bytes()[:100])
        assert read_size(tmp_path / "a.bmp") == (64, 32)

    @pytest.mark.parametrize("read", [read_size, is_animated, load_mask, rgb])
    def test_the_reason_is_told(self, tmp_path, read):
        header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
        bomb = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")
        files = {"bomb.png": bomb, "empty.png": b"", "text.png": b"hello"}
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
        (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
        reasons = {
            "bomb.png": "178 million pixels",
            "empty.png": "empty",
            "text.png": "known format",
            "gone.png": "no longer",
            "link.png": "a link to a file that is not there",
        }
        for name, reason in reasons.items():
            with pytest.raises(BrokenImage, match=reason):
                read(tmp_path / name)


class TestMaskFiles:
    def test_the_red_channel_counts_and_nothing_else(self, tmp_path):
        Image.new("RGBA", (2, 2), (51, 200, 100, 0)).save(tmp_path / "a.png", icc_profile=power_profile(1))
        mask = load_mask(tmp_path / "a.png")
        assert (mask.dtype, mask.shape) == (np.float32, (2, 2))
        assert mask[0, 0] == np.float32(0.2)

    @pytest.mark.parametrize(
        ("mode", "white"), [("1", 1), ("L", 255), ("P", 255), ("I;16", 0xFFFF), ("RGB", (255, 0, 0))]
    )
    def test_of_any_mode(self, tmp_path, mode, white):
        image = Image.new(mode, (2, 1))
        if mode == "P":
            image.putpalette([value for grey in range(256) for value in (grey,) * 3])
        image.putpixel((1, 0), white)
        image.save(tmp_path / "a.png")
        assert load_mask(tmp_path / "a.png")[0].tolist() == [0, 1]
