"""Pictures with captions for the miniature model: one coloured shape on a coloured background.

Everything is drawn with NumPy from formulas, so the same seed gives the same picture on every machine.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 48, 44),
    "green": (56, 158, 66),
    "blue": (44, 84, 214),
    "yellow": (246, 214, 56),
    "purple": (148, 62, 176),
    "cyan": (64, 204, 216),
    "black": (28, 28, 32),
    "white": (248, 248, 248),
}

# Corners around the square of area 64 x 64, all multiples of 16.
SIZES: tuple[tuple[int, int], ...] = ((64, 64), (80, 48), (48, 80))

Mask = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Five points: the polygon through alternating radii 1 and 0.42, tip upwards."""
    angle = np.arctan2(u, -v)
    sector = np.pi / 5
    folded = np.abs(((angle + sector) % (2 * sector)) - sector)
    radius = np.hypot(u, v)
    x, y = radius * np.cos(folded), radius * np.sin(folded)
    inner_x, inner_y = 0.42 * np.cos(sector), 0.42 * np.sin(sector)
    return y * (1 - inner_x) <= (1 - x) * inner_y


# Each shape is a test on coordinates in units of its radius, u to the right and v downwards.
SHAPES: dict[str, Mask] = {
    "circle": lambda u, v: np.hypot(u, v) <= 0.95,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) <= 0.82,
    "triangle": lambda u, v: (v <= 0.75) & (np.abs(u) <= (v + 1.0) * 0.58),
    "star": _star,
    "cross": lambda u, v: (np.minimum(np.abs(u), np.abs(v)) <= 0.3) & (np.maximum(np.abs(u), np.abs(v)) <= 0.95),
    "ring": lambda u, v: (np.hypot(u, v) <= 1.0) & (np.hypot(u, v) >= 0.56),
}


def heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A shape outside the miniature's vocabulary: two discs side by side and a wedge that points down."""
    discs = np.hypot(np.abs(u) - 0.48, v + 0.35) <= 0.5
    between = (np.abs(u) <= 0.48) & (np.abs(v + 0.2) <= 0.15)
    wedge = (v >= -0.1) & (np.abs(u) * 1.12 <= 0.95 - v)
    return discs | between | wedge


@dataclass(frozen=True)
class Scene:
    """One picture: `radius` and the centre are fractions of the shorter side, from the picture's middle."""

    shape: str
    colour: str
    background: str
    radius: float = 0.33
    centre: tuple[float, float] = (0.0, 0.0)
    size: tuple[int, int] = (64, 64)

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} on a {self.background} background"


def coverage(
    mask: Mask, size: tuple[int, int], radius: float, centre: tuple[float, float], oversample: int = 4
) -> np.ndarray:
    """How much of each pixel the shape covers, (H, W) float32 in 0..1, from `oversample`^2 points a pixel."""
    width, height = size
    scale = radius * min(size)
    x = (np.arange(width * oversample) + 0.5) / oversample - width / 2 - centre[0] * min(size)
    y = (np.arange(height * oversample) + 0.5) / oversample - height / 2 - centre[1] * min(size)
    inside = mask(x[None, :] / scale, y[:, None] / scale)
    inside = np.broadcast_to(inside, (height * oversample, width * oversample))
    return inside.reshape(height, oversample, width, oversample).mean(axis=(1, 3), dtype=np.float32)


def paint_over(picture: np.ndarray, cover: np.ndarray, rgb: tuple[int, ...]) -> np.ndarray:
    """`rgb` laid over `picture` (H, W, 3) float32 0..255 where `cover` (H, W) says."""
    return picture * (1 - cover[..., None]) + np.asarray(rgb, np.float32) * cover[..., None]


def draw(scene: Scene, mask: Mask | None = None) -> np.ndarray:
    """The picture of a scene, (H, W, 3) uint8; `mask` draws a shape that SHAPES does not know."""
    width, height = scene.size
    picture = np.empty((height, width, 3), np.float32)
    picture[:] = COLOURS[scene.background]
    cover = coverage(mask or SHAPES[scene.shape], scene.size, scene.radius, scene.centre)
    return paint_over(picture, cover, COLOURS[scene.colour]).round().astype(np.uint8)


def random_scene(rng: np.random.Generator, shape: str | None = None, size: tuple[int, int] | None = None) -> Scene:
    """A scene with two different colours, a radius of 0.26 to 0.4 and a centre that keeps the shape inside."""
    colour, background = rng.choice(list(COLOURS), size=2, replace=False)
    radius = float(rng.uniform(0.26, 0.4))
    reach = 0.47 - radius
    return Scene(
        shape=shape or str(rng.choice(list(SHAPES))),
        colour=str(colour),
        background=str(background),
        radius=radius,
        centre=(float(rng.uniform(-reach, reach)), float(rng.uniform(-reach, reach))),
        size=size or SIZES[int(rng.choice(len(SIZES), p=(0.8, 0.1, 0.1)))],
    )
