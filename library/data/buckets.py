"""Aspect-ratio buckets: which size an image is trained at, and how it gets there. Pure functions of sizes.

All sizes are (width, height) in pixels. The arithmetic is an agreement with existing caches and LoRA files:
tests/data/golden holds tables of it, so even a change of rounding is a change of format.
"""

import math
from dataclasses import dataclass

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Geometry:
    """How one image becomes a training example: scaled to `resized`, then cut centrally to `bucket`."""

    bucket: Size
    resized: Size
    crop_ltrb: tuple[float, float, float, float]
    """Left, top, right, bottom of the picture if it were fitted whole into the bucket: SDXL's size conditioning."""
    aspect_error: float
    """|bucket aspect - image aspect|"""

    @property
    def offset(self) -> Size:
        """Left and top of the bucket within the resized image."""
        return (self.resized[0] - self.bucket[0]) // 2, (self.resized[1] - self.bucket[1]) // 2


def bucket_resolutions(resolution: Size, min_size: int, max_size: int, step: int) -> list[Size]:
    """All bucket sizes for a pixel budget, sorted: multiples of `step` that do not exceed the area of `resolution`."""
    area = resolution[0] * resolution[1]
    square = math.isqrt(area) // step * step
    sizes = {(square, square)}
    for width in range(min_size, max_size + 1, step):
        height = min(max_size, area // width // step * step)
        if height >= min_size:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


class Buckets:
    """Chooses the geometry of images for one dataset; answers are remembered per image size."""

    def __init__(
        self,
        resolution: Size,
        *,
        enabled: bool = True,
        min_size: int = 256,
        max_size: int = 1024,
        step: int = 64,
        no_upscale: bool = False,
    ):
        self.resolution = resolution
        self.step = step
        self.no_upscale = enabled and no_upscale
        self.sizes = bucket_resolutions(resolution, min_size, max_size, step) if enabled else [resolution]
        self._known: dict[Size, Geometry] = {}

    def choose(self, image: Size) -> Geometry:
        """The geometry of an image of this size."""
        geometry = self._known.get(image)
        if geometry is None:
            geometry = self._shrunk(image) if self.no_upscale else cover(image, self._nearest(image))
            self._known[image] = geometry
        return geometry

    def _nearest(self, image: Size) -> Size:
        """The bucket of the image's own size, else the one with the most similar aspect ratio."""
        if image in self.sizes:
            return image
        aspect = image[0] / image[1]
        return min(self.sizes, key=lambda size: abs(size[0] / size[1] - aspect))

    def _shrunk(self, image: Size) -> Geometry:
        """Without enlarging: the image at its own size, or shrunk to the area of `resolution`, cut to whole steps."""
        area = self.resolution[0] * self.resolution[1]
        aspect = image[0] / image[1]
        fits = image[0] * image[1] <= area
        width, height = image if fits else (math.sqrt(area * aspect), math.sqrt(area / aspect))
        if min(width, height) < self.step:  # there is no bucket that narrow, so this image alone has to grow
            longest = area // self.step
            bucket = tuple(max(self.step, self._whole_steps(min(length, longest))) for length in (width, height))
            return cover(image, bucket)
        resized = image if fits else self._shrunk_size(aspect, width, height)
        return _geometry(image, tuple(length // self.step * self.step for length in resized), resized)

    def _shrunk_size(self, aspect: float, exact_width: float, exact_height: float) -> Size:
        """The exact size with one side cut to whole steps: the side that changes the aspect ratio less."""
        width, height = self._whole_steps(exact_width), self._whole_steps(exact_height)
        by_width = (width, self._whole_steps(width / aspect))
        by_height = (self._whole_steps(height * aspect), height)
        if _aspect_error(by_width, aspect) < _aspect_error(by_height, aspect):
            return width, _rounded(width / aspect)
        return _rounded(height * aspect), height

    def _whole_steps(self, length: float) -> int:
        return _rounded(length) // self.step * self.step


def cover(image: Size, bucket: Size) -> Geometry:
    """Scales the image until it just covers the bucket."""
    wider = image[0] / image[1] > bucket[0] / bucket[1]
    scale = bucket[1] / image[1] if wider else bucket[0] / image[0]
    return _geometry(image, bucket, (_rounded(image[0] * scale), _rounded(image[1] * scale)))


def _geometry(image: Size, bucket: Size, resized: Size) -> Geometry:
    aspect = image[0] / image[1]
    if bucket[0] / bucket[1] > aspect:
        width, height = bucket[1] * aspect, bucket[1]
    else:
        width, height = bucket[0], bucket[0] / aspect
    left, top = (bucket[0] - width) // 2, (bucket[1] - height) // 2
    return Geometry(bucket, resized, (left, top, left + width, top + height), _aspect_error(bucket, aspect))


def _aspect_error(size: Size, aspect: float) -> float:
    return abs(size[0] / size[1] - aspect) if size[1] else math.inf


def _rounded(length: float) -> int:
    """Half up: Python's round() goes to the even neighbour and would miss sizes by one pixel."""
    return int(length + 0.5)
