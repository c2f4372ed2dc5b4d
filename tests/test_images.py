"""What becomes of an image on its way into its bucket, and of its mask with it."""

import numpy as np
import pytest
from PIL import Image

from library.data import augment, images
from library.data.augment import Draws, face_in
from library.data.buckets import Geometry, cover
from library.data.images import BrokenImage, ImageOptions, example
from library.randomness import generator
from tests.pictures import dataset, picture

EVERYTHING = {"flip_aug": True, "color_aug": True, "random_crop": True, "face_crop_aug_range": (1.5, 3.0)}


@pytest.fixture
def coordinates(tmp_path):
    """A picture of 96x64 pixels that tells where each came from: red is x, green is y; its name tells of a face."""
    pixels = np.zeros((64, 96, 3), dtype=np.uint8)
    pixels[..., 0] = np.arange(96)
    pixels[..., 1] = np.arange(64)[:, None]
    Image.fromarray(pixels).save(tmp_path / "a_60_20_12_16.png")
    return tmp_path / "a_60_20_12_16.png"


def at_full_size(bucket):
    return Geometry(bucket, (96, 64), (0, 0, 0, 0), 0.0)


def corner(image):
    return tuple(int(value) for value in image[0, 0, :2])


def drawn(path, geometry, count=200, **options):
    return [example(path, geometry, ImageOptions(**options), generator(seed)) for seed in range(count)]


def test_without_a_generator_nothing_is_random(coordinates):
    geometry = at_full_size((32, 32))
    plain = example(coordinates, geometry, ImageOptions(**EVERYTHING), None)
    assert corner(plain.image) == (32, 16)
    assert (plain.flipped, plain.mask) == (False, None)
    assert (plain.image == example(coordinates, geometry, ImageOptions(), generator(0)).image).all()


@pytest.mark.parametrize("size", [(90, 40), (40, 90), (20, 20), (64, 64), (65, 63)])
@pytest.mark.parametrize("options", [{}, EVERYTHING])
def test_examples_have_the_size_of_the_bucket(tmp_path, size, options):
    path = picture(tmp_path / "a_10_10_30_30.png", size)
    geometry = dataset().buckets().choose(size)
    image = example(path, geometry, ImageOptions(**options), generator(0)).image
    assert (image.shape, image.dtype) == ((geometry.bucket[1], geometry.bucket[0], 3), np.uint8)


class TestRandomness:
    def test_is_a_function_of_the_generator(self, coordinates):
        geometry = at_full_size((32, 32))
        first, second, other = (
            example(coordinates, geometry, ImageOptions(**EVERYTHING), generator(seed)).image for seed in (0, 0, 1)
        )
        assert (first == second).all()
        assert (first != other).any()

    def test_one_option_does_not_change_what_another_draws(self, coordinates):
        geometry = at_full_size((32, 32))
        for seed in range(20):
            alone = example(coordinates, geometry, ImageOptions(random_crop=True), generator(seed))
            both = example(coordinates, geometry, ImageOptions(random_crop=True, flip_aug=True), generator(seed))
            assert (alone.image == (both.image[:, ::-1] if both.flipped else both.image)).all()
            flip_only = ImageOptions(flip_aug=True)
            assert example(coordinates, geometry, flip_only, generator(seed)).flipped == both.flipped
            assert images.flips(flip_only, generator(seed)) == both.flipped

    def test_mirroring_says_nothing_of_the_place(self, coordinates):
        examples = drawn(coordinates, at_full_size((88, 64)), random_crop=True, flip_aug=True)
        assert {corner(one.image)[0] for one in examples if not one.flipped} == set(range(9))


class TestFlip:
    def test_half_of_the_time(self, coordinates):
        examples = drawn(coordinates, at_full_size((32, 32)), 400, flip_aug=True)
        flipped = [one.flipped for one in examples]
        assert 150 < sum(flipped) < 250
        assert {corner(one.image) for one in examples if one.flipped} == {(63, 16)}
        assert {corner(one.image) for one in examples if not one.flipped} == {(32, 16)}

    def test_model_range_of_a_mirror_image(self):
        image = np.zeros((2, 3, 3), dtype=np.uint8)
        image[:, 0] = 255
        values = images.to_model_range(images.flip(image))
        assert (values.shape, values.dtype) == ((3, 2, 3), np.float32)
        assert values[0, 0].tolist() == [-1, -1, 1]


class TestCrop:
    def test_a_random_crop_is_anywhere_in_the_image(self, coordinates):
        corners = [corner(one.image) for one in drawn(coordinates, at_full_size((88, 62)), random_crop=True)]
        assert {x for x, _ in corners} == set(range(9))
        assert {y for _, y in corners} == {0, 1, 2}

    def test_there_is_only_one_place_for_an_image_of_the_buckets_size(self, coordinates):
        assert {corner(one.image) for one in drawn(coordinates, at_full_size((96, 64)), 20, random_crop=True)} == {
            (0, 0)
        }


class TestFaceCrop:
    # The face: x 54..65, y 12..27
    def test_names_that_tell_of_a_face(self):
        assert face_in("a_b_60_20_12_16.png") == augment.Face((60, 20), (12, 16))
        for name in ("60_20_12_16.png", "a_60_20_12.png", "a_60_20_12_16_.png", "a_60_20_0_16.png", "a.png"):
            assert face_in(name) is None

    def test_the_face_is_in_the_middle_at_the_size_asked_for(self, coordinates):
        # 2 x 16 is the bucket's size, so nothing is resized; above the face there are only 4 pixels to spare
        for one in drawn(coordinates, at_full_size((32, 32)), 10, face_crop_aug_range=(2.0, 2.0)):
            assert corner(one.image) == (44, 4)
        for one in drawn(coordinates, at_full_size((64, 32)), 10, face_crop_aug_range=(2.0, 2.0)):
            assert corner(one.image) == (28, 4)

    def test_sizes_are_drawn_from_the_whole_range(self, coordinates):
        examples = drawn(coordinates, at_full_size((64, 64)), face_crop_aug_range=(1.0, 3.0))
        widths = {int(one.image[0, -1, 0]) - int(one.image[0, 0, 0]) + 1 for one in examples}
        assert (min(widths), max(widths)) == (16, 48)

    def test_displaced_at_random_it_still_holds_the_face(self, coordinates):
        options = {"face_crop_aug_range": (2.0, 2.0), "random_crop": True}
        corners = [corner(one.image) for one in drawn(coordinates, at_full_size((32, 32)), **options)]
        assert (min(corners)[0], max(corners)[0]) == (34, 54)
        rows = [y for _, y in corners]
        assert set(rows) == set(range(13))
        assert max(rows.count(y) for y in range(13)) < 40  # evenly, also at the edge of the image

    def test_its_size_says_nothing_of_its_place(self, coordinates):
        options = {"face_crop_aug_range": (2.0, 2.2), "random_crop": True}
        bounds = [one.image for one in drawn(coordinates, at_full_size((32, 32)), 400, **options)]
        left, width = np.array([(int(i[0, 0, 0]), int(i[0, -1, 0]) - int(i[0, 0, 0])) for i in bounds]).T
        assert abs(np.corrcoef(left, width)[0, 1]) < 0.4

    def test_it_never_leaves_the_image(self, coordinates):
        for options in ({}, {"random_crop": True}):
            one = example(
                coordinates,
                at_full_size((32, 32)),
                ImageOptions(face_crop_aug_range=(9.0, 9.0), **options),
                generator(1),
            )
            height = int(one.image[-1, 0, 1]) - int(one.image[0, 0, 1])
            assert height >= 61  # the largest square in the image, at half its size
        far = coordinates.rename(coordinates.with_name("a_900_900_10_10.png"))
        image = drawn(far, at_full_size((20, 20)), 1, face_crop_aug_range=(2.0, 2.0))[0].image
        assert corner(image) == (76, 44)

    def test_images_without_such_a_name_are_cropped_as_ever(self, coordinates):
        other = coordinates.rename(coordinates.with_name("a.png"))
        image = drawn(other, at_full_size((32, 32)), 1, face_crop_aug_range=(2.0, 2.0))[0].image
        assert corner(image) == (32, 16)


class TestColours:
    def test_change_a_little_every_time_and_leave_grey_grey(self):
        colour = np.full((2, 2, 3), (200, 120, 60), dtype=np.uint8)
        changed = [augment.vary_colours(colour, Draws.of(generator(seed)))[0, 0].astype(int) for seed in range(200)]
        far = np.abs(np.array(changed) - (200, 120, 60)).max(axis=0)
        assert len({tuple(one) for one in changed}) > 150
        assert (far > 8).all()
        assert (far < 45).all()
        grey = augment.vary_colours(np.full((1, 1, 3), 90, dtype=np.uint8), Draws.of(generator(1)))[0, 0]
        assert len(set(grey.tolist())) == 1

    def test_the_middle_of_every_range_changes_nothing(self):
        colours = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        same = augment.vary_colours(colours, Draws(*[0.5] * 8))
        assert np.abs(same.astype(int) - colours).max() <= 1

    def test_are_part_of_an_example(self, coordinates):
        varied = {one.image.tobytes() for one in drawn(coordinates, at_full_size((32, 32)), 5, color_aug=True)}
        assert len(varied) == 5


class TestResizing:
    NAMES = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area")

    def test_every_name_has_its_own_way(self, coordinates):
        geometry = cover((96, 64), (80, 64))
        noise = picture(coordinates.with_name("noise.png"), (77, 50))
        ways = {}
        for name in self.NAMES:
            options = ImageOptions(resize_interpolation=name)
            ways[name] = example(noise, geometry, options, None).image.tobytes()
        assert (ways["linear"], ways["cubic"]) == (ways["bilinear"], ways["bicubic"])
        assert len(set(ways.values())) == 5

    @pytest.mark.parametrize("name", [name for name in NAMES if name != "nearest"])
    def test_all_but_the_nearest_average_when_shrinking(self, name):
        stripes = np.zeros((64, 64, 3), dtype=np.uint8)
        stripes[::2] = 200
        shrunk = images.resize(stripes, (8, 8), name)
        assert np.abs(shrunk.astype(int) - 100).max() <= 12

    def test_the_nearest_invents_no_colours(self):
        noise = np.random.default_rng(0).choice(np.uint8([0, 200]), (9, 9, 3))
        assert set(images.resize(noise, (13, 5), "nearest").ravel().tolist()) == {0, 200}

    def test_without_a_name_areas_when_shrinking_and_lanczos_when_growing(self):
        noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        assert (images.resize(noise, (4, 4)) == images.resize(noise, (4, 4), "area")).all()
        assert (images.resize(noise, (12, 12)) == images.resize(noise, (12, 12), "lanczos")).all()
        stripes = np.zeros((8, 8, 3), dtype=np.uint8)
        stripes[::2] = 200
        assert np.unique(images.resize(stripes, (4, 4))).tolist() == [100]


class TestMasks:
    SIZE = (120, 88)

    @pytest.fixture
    def pair(self, tmp_path):
        """A smooth grey picture with a face in its name, the same picture as its mask, and both in one as alpha."""
        y, x = np.mgrid[: self.SIZE[1], : self.SIZE[0]]
        grey = Image.fromarray((x * 1.5 + y * 0.8).astype(np.uint8))
        both = grey.convert("RGB")
        both.putalpha(grey)
        paths = [tmp_path / name for name in ("a_70_40_20_24.png", "mask.png", "b_70_40_20_24.png")]
        for image, path in zip((grey, grey, both), paths, strict=True):
            image.save(path)
        return paths

    @pytest.mark.parametrize(
        "options",
        [{}, {"flip_aug": True}, {"random_crop": True}, {"face_crop_aug_range": (1.5, 3.0)}, EVERYTHING],
    )
    @pytest.mark.parametrize("bucket", [(64, 64), (48, 80)])
    def test_a_mask_that_equals_its_picture_still_does_afterwards(self, pair, options, bucket):
        picture, mask, with_alpha = pair
        geometry = cover(self.SIZE, bucket)
        options = options | {"color_aug": False, "resize_interpolation": "area"}
        for seed in range(10):
            for one in (
                example(picture, geometry, ImageOptions(**options), generator(seed), mask),
                example(with_alpha, geometry, ImageOptions(**options, alpha_mask=True), generator(seed)),
            ):
                assert (one.mask.shape, one.mask.dtype) == (bucket[::-1], np.float32)
                assert np.abs(one.mask * 255 - one.image[..., 0]).max() < 0.8  # one is whole numbers

    def test_a_file_and_its_own_alpha_multiply(self, pair):
        picture, mask, with_alpha = pair
        geometry = cover(self.SIZE, (64, 64))
        one = example(with_alpha, geometry, ImageOptions(alpha_mask=True), None, mask)
        alone = example(picture, geometry, ImageOptions(), None, mask)
        assert np.allclose(one.mask, alone.mask**2)

    def test_of_another_size_is_resized_to_the_image(self, tmp_path):
        picture(tmp_path / "a.png", (64, 48))
        half = np.zeros((24, 32), dtype=np.uint8)
        half[:, 16:] = 255
        Image.fromarray(half).save(tmp_path / "mask.png")
        mask = example(tmp_path / "a.png", cover((64, 48), (32, 32)), ImageOptions(), None, tmp_path / "mask.png").mask
        assert (mask[:, :15].max(), mask[:, 17:].min()) == (0, 1)

    def test_alone_is_the_same_as_with_its_image(self, pair):
        picture, mask, _ = pair
        geometry = cover(self.SIZE, (48, 80))
        alone = images.mask(mask, geometry, self.SIZE, ImageOptions())
        assert (alone == example(picture, geometry, ImageOptions(), None, mask).mask).all()

    def test_colours_and_kernels_do_not_touch_it(self, pair):
        picture, mask, _ = pair
        geometry = cover(self.SIZE, (64, 64))
        plain = example(picture, geometry, ImageOptions(), generator(0), mask).mask
        options = ImageOptions(color_aug=True, resize_interpolation="lanczos")
        assert (example(picture, geometry, options, generator(0), mask).mask == plain).all()

    def test_a_broken_one_breaks_its_image(self, pair):
        pair[1].write_bytes(b"")
        with pytest.raises(BrokenImage):
            example(pair[0], cover(self.SIZE, (64, 64)), ImageOptions(), None, pair[1])

    def test_latents_get_the_mean_of_their_area(self):
        mask = np.random.default_rng(0).random((32, 64), dtype=np.float32)
        means = mask[:, ::-1].reshape(4, 8, 8, 8).mean(axis=(1, 3))
        small = images.latent_mask(images.flip(mask), (8, 4))
        assert small.dtype == np.float32
        assert np.allclose(small, means, atol=1e-6)
