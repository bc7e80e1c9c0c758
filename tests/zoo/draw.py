"""Procedural pictures: coloured shapes and short text, drawn the same from the same seed.

A scene is laid out in picture pixels; how large things are is chosen relative to a canvas whose
longest side is `CANVAS`, because that is the size to which the preprocessing brings every picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CANVAS = 128
"""Longest side, in pixels, of a picture after the preprocessing of the tiny checkpoint."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "green": (35, 155, 60),
    "blue": (40, 80, 215),
    "yellow": (242, 208, 20),
    "purple": (145, 50, 190),
    "orange": (247, 130, 15),
    "black": (22, 22, 22),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
CHARACTERS = "0123456789ACEHKLPTXY"
"""No two of them look alike at ten pixels: no I, O, Q, S, B, Z and the like."""

BACKGROUNDS = (
    (255, 255, 255),
    (245, 240, 225),
    (226, 228, 232),
    (215, 232, 246),
    (248, 222, 228),
    (222, 242, 222),
)
ASPECTS: dict[str, tuple[float, ...]] = {
    "square": (1.0, 1.25, 0.8),
    "wide": (1.5, 2.0, 2.5, 3.0),
    "tall": (1 / 1.5, 1 / 2.0, 1 / 2.5, 1 / 3.0),
}
WIDEST = 3.0

Box = tuple[float, float, float, float]
Point = tuple[float, float]
Content = Literal["shapes", "crowd", "text", "both", "page"]
Rng = np.random.Generator


@dataclass(frozen=True)
class Item:
    """One thing in a picture. `box` is (left, top, right, bottom) in picture pixels."""

    shape: str
    """One of `SHAPES`, or `text`."""
    colour: str
    box: Box
    text: str = ""
    characters: tuple[Point, ...] = ()
    """The centre of each character, in picture pixels."""

    @property
    def centre(self) -> Point:
        """The middle of the box, in picture pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Scene:
    """A drawn picture and what is in it."""

    image: Image.Image
    items: tuple[Item, ...]
    aspect: str

    @property
    def shapes(self) -> tuple[Item, ...]:
        """The items that are shapes."""
        return tuple(item for item in self.items if item.shape != "text")

    @property
    def texts(self) -> tuple[Item, ...]:
        """The items that are text: at most one, except on a page."""
        return tuple(item for item in self.items if item.shape == "text")


@dataclass(frozen=True)
class Lettering:
    """How large text is on a canvas of `CANVAS` pixels, and where it may stand."""

    smallest: float = 15.0
    largest: float = 22.0
    """Sizes of the font, in pixels."""
    tiled: bool = True
    """Whether it stays clear of the line where two tiles of the preprocessing meet."""


TILED = Lettering()


@lru_cache(maxsize=256)
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's built-in font at `size` pixels."""
    return ImageFont.load_default(size)


def polygon(shape: str, box: Box) -> list[Point]:
    """The outline of a shape that is not a circle, stretched into `box`."""
    if shape == "square":
        unit = [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)]
    elif shape == "triangle":
        unit = [(0.5, 0.0), (1.0, 1.0), (0.0, 1.0)]
    elif shape == "cross":
        a, b = 0.33, 0.67
        unit = [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b)]
        unit += [(b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]
    elif shape == "star":
        angles = np.arange(10) * np.pi / 5 - np.pi / 2
        radii = np.where(np.arange(10) % 2 == 0, 0.55, 0.22)
        xs, ys = 0.5 + radii * np.cos(angles), 0.53 + radii * np.sin(angles)
        unit = [(float(x), float(y)) for x, y in zip(xs, ys, strict=True)]
    else:
        raise ValueError(f"draw: shape: got {shape!r}, wanted one of {SHAPES}")
    left, top, right, bottom = box
    return [(left + x * (right - left), top + y * (bottom - top)) for x, y in unit]


def draw_scene(
    rng: Rng, content: Content, widest: float = WIDEST, lettering: Lettering = TILED
) -> Scene:
    """Lay out and draw one picture.

    Args:
        rng: Source of every choice; equal states give equal pixels.
        content: What the picture holds. A crowd is three or four shapes and a page is full of
            text; both are for training alone.
        widest: Largest ratio of the longer to the shorter side.
        lettering: How text looks.
    """
    aspect = str(rng.choice(list(ASPECTS), p=[0.34, 0.36, 0.30]))
    ratio = float(rng.choice([r for r in ASPECTS[aspect] if max(r, 1 / r) <= widest]))
    longest = int(rng.integers(CANVAS, 2 * CANVAS + 1))
    width, height = (
        (longest, round(longest / ratio)) if ratio >= 1 else (round(longest * ratio), longest)
    )
    background = np.array(BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))], np.float32)
    background = np.clip(background + rng.integers(-8, 6, 3), 0, 255)
    image = Image.new("RGB", (width, height), (int(background[0]), *map(int, background[1:])))
    pen = ImageDraw.Draw(image)
    items: list[Item] = []
    if content in ("text", "both", "page"):
        for _ in range(30 if content == "page" else 1):
            items += _place_text(rng, pen, (width, height), items, lettering)
    if content != "text":
        most = 2 if content == "both" else 4
        wanted = int(rng.integers(3 if content == "crowd" else 1, most + 1))
        items += _place_shapes(rng, pen, (width, height), items, wanted)
    return Scene(_noisy(rng, image), tuple(items), aspect)


def _place_shapes(
    rng: Rng, pen: ImageDraw.ImageDraw, size: tuple[int, int], placed: list[Item], wanted: int
) -> list[Item]:
    """Draw `wanted` shapes, or fewer where room is short, that touch nothing drawn before."""
    scale = max(size) / CANVAS
    # A picture of one repeated shape or colour makes counting them a question with an answer
    # above one; drawn freely, that would be rare.
    shapes = [str(s) for s in rng.choice(SHAPES, int(rng.integers(1, 5)))]
    colours = [str(c) for c in rng.choice(list(COLOURS), int(rng.integers(1, 5)))]
    largest = min(48.0, 0.8 * min(size) / scale) * (1.0 if wanted < 3 else 0.8)
    found: list[Item] = []
    for attempt in range(60):
        if len(found) == wanted:
            break
        side = float(rng.uniform(18, max(20.0, largest * (1 - attempt / 80)))) * scale
        box = _free_box(rng, size, (side, side), [*placed, *found], 3 * scale)
        if box is None:
            continue
        item = Item(str(rng.choice(shapes)), str(rng.choice(colours)), box)
        colour = _jitter(rng, COLOURS[item.colour])
        if item.shape == "circle":
            pen.ellipse(box, fill=colour)
        else:
            pen.polygon(polygon(item.shape, box), fill=colour)
        found.append(item)
    return found


def _place_text(
    rng: Rng, pen: ImageDraw.ImageDraw, size: tuple[int, int], placed: list[Item], look: Lettering
) -> list[Item]:
    """Draw two to four characters; tiled ones inside one tile of the grid of the picture."""
    scale = max(size) / CANVAS
    text = "".join(str(c) for c in rng.choice(list(CHARACTERS), int(rng.integers(2, 5))))
    face = font(max(8, round(float(rng.uniform(look.smallest, look.largest)) * scale)))
    left, top, right, bottom = pen.textbbox((0, 0), text, font=face)
    # A side of more than half the canvas is split in the middle; text stays clear of that line.
    cells = [2 if look.tiled and side / scale > CANVAS / 2 else 1 for side in size]
    room = [side / n for side, n in zip(size, cells, strict=True)]
    slack = [room[0] - (right - left) - 4 * scale, room[1] - (bottom - top) - 4 * scale]
    if min(slack) < 0:
        return []
    x, y = (
        int(rng.integers(cells[i])) * room[i] + 2 * scale + float(rng.uniform(0, slack[i]))
        for i in (0, 1)
    )
    box = (x, y, x + right - left, y + bottom - top)
    if not _is_free(box, placed, 2 * scale):
        return []
    colour = str(rng.choice(("black", "blue", "red", "purple", "green")))
    pen.text((x - left, y - top), text, font=face, fill=_jitter(rng, COLOURS[colour]))
    edges = [pen.textlength(text[:i], font=face) for i in range(len(text) + 1)]
    middle = y + (bottom - top) / 2
    centres = tuple((x - left + (a + b) / 2, middle) for a, b in pairwise(edges))
    return [Item("text", colour, box, text, centres)]


def _free_box(
    rng: Rng, size: tuple[int, int], sides: Point, items: list[Item], gap: float
) -> Box | None:
    """A random box of `sides` inside the picture that keeps `gap` to all items, or None."""
    room = [size[i] - sides[i] - gap for i in (0, 1)]
    if min(room) <= 0:
        return None
    x, y = (gap / 2 + float(rng.uniform(0, room[i])) for i in (0, 1))
    box = (x, y, x + sides[0], y + sides[1])
    return box if _is_free(box, items, gap) else None


def _is_free(box: Box, items: list[Item], gap: float) -> bool:
    """Whether `box` keeps `gap` to every item."""
    for item in items:
        other = item.box
        apart = box[0] > other[2] + gap or other[0] > box[2] + gap
        if not (apart or box[1] > other[3] + gap or other[1] > box[3] + gap):
            return False
    return True


def _jitter(rng: Rng, colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """A colour a little off the given one."""
    red, green, blue = np.clip(np.array(colour) + rng.integers(-12, 13, 3), 0, 255)
    return int(red), int(green), int(blue)


def _noisy(rng: Rng, image: Image.Image) -> Image.Image:
    """Mild grain, as of a camera, from none to about three per cent."""
    strength = float(rng.uniform(0, 8))
    pixels = np.asarray(image, np.float32)
    grain = rng.standard_normal(pixels.shape, np.float32) * strength
    return Image.fromarray(np.clip(np.rint(pixels + grain), 0, 255).astype(np.uint8))
