"""Scenes of colored shapes on a 3x3 grid, and the images of them.

A scene is held out when the hash of its layout says so. The split is therefore a property of the scene itself: no seed
and no number of training steps can bring a held-out layout into training.
"""

import hashlib
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageDraw

Split = Literal["train", "held_out"]

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 45, 45),
    "green": (45, 190, 60),
    "blue": (55, 90, 235),
    "yellow": (235, 220, 50),
    "purple": (175, 60, 215),
    "white": (235, 235, 235),
}
SHAPES = ("circle", "square", "triangle", "star")
POSITIONS = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
IMAGE_SIZE = 64
CELL_SIZE = IMAGE_SIZE / 3
_SCALE = 2  # supersampling
_HELD_OUT_RATIO = 16


@dataclass(frozen=True, order=True)
class Thing:
    """One colored shape in a cell of the grid (cells count in reading order)."""

    cell: int
    shape: str
    color: str

    @property
    def position(self) -> str:
        return POSITIONS[self.cell]

    def __str__(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Things in reading order, at most one a cell."""

    things: tuple[Thing, ...]

    def count(self, color: str | None = None, shape: str | None = None) -> int:
        """Return the number of things of a color and shape; None matches any."""
        return len(self.things_matching(color, shape))

    def things_matching(self, color: str | None = None, shape: str | None = None) -> list[Thing]:
        return [t for t in self.things if color in (None, t.color) and shape in (None, t.shape)]

    def thing_at(self, cell: int) -> Thing | None:
        return next((t for t in self.things if t.cell == cell), None)


def is_held_out(scene: Scene) -> bool:
    """Return True if the layout belongs to the held-out split."""
    layout = ";".join(f"{t.cell} {t.shape} {t.color}" for t in sorted(scene.things))
    digest = hashlib.blake2b(layout.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _HELD_OUT_RATIO == 0


def random_scene(rng: random.Random, split: Split = "train") -> Scene:
    """Return a random scene of the split, with few colors and shapes, so that counts above one are common."""
    while True:
        colors = rng.sample(list(COLORS), rng.randint(1, 3))
        shapes = rng.sample(SHAPES, rng.randint(1, 3))
        (count,) = rng.choices((1, 2, 3, 4), weights=(2, 3, 4, 4))
        cells = sorted(rng.sample(range(len(POSITIONS)), count))
        scene = Scene(tuple(Thing(cell, rng.choice(shapes), rng.choice(colors)) for cell in cells))
        if is_held_out(scene) == (split == "held_out"):
            return scene


def draw_scene(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw a scene as a 64x64 RGB image; sizes, positions, colors and the background are jittered."""
    background = tuple(rng.randint(0, 50) for _ in range(3))
    image = Image.new("RGB", (IMAGE_SIZE * _SCALE, IMAGE_SIZE * _SCALE), background)
    canvas = ImageDraw.Draw(image)
    for thing in scene.things:
        row, column = divmod(thing.cell, 3)
        x = (column + 0.5) * CELL_SIZE + rng.uniform(-1.2, 1.2)
        y = (row + 0.5) * CELL_SIZE + rng.uniform(-1.2, 1.2)
        fill = tuple(min(255, max(0, c + rng.randint(-22, 22))) for c in COLORS[thing.color])
        _fill(canvas, thing.shape, x * _SCALE, y * _SCALE, rng.uniform(7.0, 9.8) * _SCALE, fill)
    return image.reduce(_SCALE)


def _fill(canvas: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, fill: tuple[int, ...]) -> None:
    if shape == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif shape == "square":
        side = 0.85 * radius
        canvas.rectangle((x - side, y - side, x + side, y + side), fill=fill)
    elif shape == "triangle":
        canvas.polygon(_corners(x, y + 0.2 * radius, [1.1 * radius] * 3), fill=fill)
    else:
        canvas.polygon(_corners(x, y, [1.1 * radius, 0.45 * radius] * 5), fill=fill)


def _corners(x: float, y: float, radii: Iterable[float]) -> list[tuple[float, float]]:
    """Corners spread evenly around (x, y), the first one straight up."""
    radii = list(radii)
    angles = [2 * math.pi * i / len(radii) for i in range(len(radii))]
    steps = [(r * math.sin(angle), r * math.cos(angle)) for r, angle in zip(radii, angles, strict=True)]
    return [(x + dx, y - dy) for dx, dy in steps]
