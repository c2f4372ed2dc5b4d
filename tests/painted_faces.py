"""Pictures with painted faces, and where these are in what is made of them."""

import math
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from library.preprocessing.faces.crops import Detected

GREY, RED, GREEN, BLUE, YELLOW, MAGENTA = (
    (128, 128, 128),
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (255, 255, 0),
    (255, 0, 255),
)
EMPTY = np.full((64, 70, 3), GREY, dtype=np.uint8)
CENTRE, RADIUS = (190, 150), 70


def painted(
    angle: float = 0.0, size: tuple[int, int] = (600, 400), centre: tuple[int, int] = CENTRE, radius: int = RADIUS
) -> np.ndarray:
    """A round red face with eyes and mouth, turned clockwise."""
    pixels = np.full((size[1], size[0], 3), GREY, dtype=np.uint8)
    cv2.circle(pixels, centre, radius, RED, -1)
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    for x, y, colour in ((-0.4, -0.3, GREEN), (0.4, -0.3, BLUE), (0, 0.45, YELLOW)):
        place = (centre[0] + radius * (cosine * x - sine * y), centre[1] + radius * (sine * x + cosine * y))
        cv2.circle(pixels, tuple(round(value) for value in place), radius // 8, colour, -1)
    return pixels


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def box_of(pixels: np.ndarray, colour: tuple[int, int, int]) -> tuple[float, float, float, float]:
    """Centre and size of what is of a colour, nearly."""
    rows, columns = np.nonzero(np.abs(pixels.astype(int) - colour).max(axis=2) < 100)
    low, high = (columns.min(), rows.min()), (columns.max() + 1, rows.max() + 1)
    return (low[0] + high[0]) / 2, (low[1] + high[1]) / 2, high[0] - low[0], high[1] - low[1]


def red_box(pixels: np.ndarray) -> tuple[float, float, float, float]:
    return box_of(pixels, RED)


def found(pixels: np.ndarray, angle: float) -> Detected:
    x, y, width, height = red_box(pixels)
    eyes = [box_of(pixels, colour)[:2] for colour in (GREEN, BLUE)]
    mouth = box_of(pixels, YELLOW)[:2]
    face = Detected((x, y), (width, height), 1.0, (*eyes, (x, y), mouth, mouth))
    assert abs((face.tilt - angle + 180) % 360 - 180) < 3
    return face
