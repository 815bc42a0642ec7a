"""A world of shapes: pictures of one or two coloured shapes, and captions that are true of them, all drawn.

    there is only a red circle and nothing else in the whole picture
    there is a green cross to the left of a red triangle and nothing else in the picture

Two shapes are of different kinds and stand in different cells of a canvas, beside each other or one above the other;
colours are drawn on their own. So a masked colour can be told only by looking at the shape that its noun names.

Captions are wordy for the sake of transport plans, in which each word weighs alike, and so does each part of a picture:
the words of a shape are to be no larger a share of them than its cell is of the largest canvas.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from PIL import Image, ImageDraw

from .draws import SCENE, generator

COLOURS = {
    "red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220), "yellow": (235, 205, 50),
    "purple": (140, 60, 180), "black": (35, 35, 40),
}  # fmt: skip
KINDS = ("circle", "square", "triangle", "cross")
CELL = 48  #: pixels of a cell; a shape is nearly as large
CANVASES = ((96, 96), (96, 144), (144, 96))  #: height and width of the pictures

#: Every word of the captions, behind the special tokens of BERT's vocabulary.
VOCABULARY = (
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "there", "is", "a", "to", "the", "left", "right", "of", "above",
    "below", "only", "in", "picture", "and", "nothing", "else", "whole", *COLOURS, *KINDS,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shape:
    """One shape of a scene; lengths in pixels."""

    kind: str
    colour: str
    y: float
    x: float
    radius: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(top, left, bottom, right)."""
        return self.y - self.radius, self.x - self.radius, self.y + self.radius, self.x + self.radius

    def draw(self, on: ImageDraw.ImageDraw) -> None:
        top, left, bottom, right = self.box
        fill, thin = COLOURS[self.colour], 0.64 * self.radius
        if self.kind == "circle":
            on.ellipse((left, top, right, bottom), fill)
        elif self.kind == "square":
            on.rectangle((left, top, right, bottom), fill)
        elif self.kind == "triangle":
            on.polygon([(self.x, top), (right, bottom), (left, bottom)], fill)
        else:
            on.rectangle((left + thin, top, right - thin, bottom), fill)
            on.rectangle((left, top + thin, right, bottom - thin), fill)


@dataclasses.dataclass(frozen=True)
class Scene:
    """What stands where: `size` is (height, width), the caption speaks of the shapes in their order."""

    size: tuple[int, int]
    background: tuple[int, int, int]
    shapes: tuple[Shape, ...]
    relation: str = ""  #: of the first to the second
    wordy: bool = True  #: whether the caption ends in words that name nothing

    @property
    def caption(self) -> str:
        first, *second = (f"a {shape.colour} {shape.kind}" for shape in self.shapes)
        if second:
            parts = ["there is", first, self.relation, *second, "and nothing else in the picture" * self.wordy]
        else:
            parts = [
                "there is only",
                first,
                "and nothing else in the whole picture" if self.wordy else "in the picture",
            ]
        return " ".join(filter(None, parts))

    def named(self) -> list[tuple[int, Shape]]:
        """(place among the caption's words, the shape) of each colour and each noun."""
        articles = [place for place, word in enumerate(self.caption.split()) if word == "a"]
        both = zip(articles, self.shapes, strict=True)
        return [(article + further, shape) for article, shape in both for further in (1, 2)]

    def draw(self) -> Image.Image:
        """The picture, in RGB."""
        image = Image.new("RGB", self.size[::-1], self.background)
        for shape in self.shapes:
            shape.draw(ImageDraw.Draw(image))
        return image


class World(Sequence):
    """`count` scenes; as a sequence, their pictures, each drawn when it is asked for.

    Args:
        seed: worlds of two seeds have different scenes. kinds, colours: how many of `KINDS` and `COLOURS` there are.
        pairs: the share of scenes with two shapes. canvases: (height, width) of the pictures, multiples of `cell` with
            two cells at least. cell: pixels. wordy: whether captions end in "and nothing else ...".
    """

    def __init__(
        self, count: int, *, seed: int = 0, kinds: int = len(KINDS), colours: int = len(COLOURS),
        pairs: float = 0.5, canvases: Sequence[tuple[int, int]] = CANVASES, cell: int = CELL, wordy: bool = True,
    ):  # fmt: skip
        parts = KINDS[:kinds], tuple(COLOURS)[:colours], pairs, canvases, cell, wordy
        self.scenes = [_scene(generator(seed, 0, i, SCENE), *parts) for i in range(count)]

    @property
    def captions(self) -> list[str]:
        return [scene.caption for scene in self.scenes]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each picture."""
        return [scene.size for scene in self.scenes]

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Image.Image:
        return self.scenes[index].draw()


def _scene(draw, kinds, colours, pairs, canvases, cell, wordy):
    height, width = canvases[draw.integers(len(canvases))]
    rows, columns = height // cell, width // cell
    places = [
        (a, b) for a in range(rows * columns) for b in range(rows * columns)
        if (a // columns == b // columns) != (a % columns == b % columns)
    ]  # fmt: skip
    first, second = places[draw.integers(len(places))]
    alone = draw.random() >= pairs
    if alone:
        relation = ""
    elif first // columns == second // columns:
        relation = f"to the {'left' if first < second else 'right'} of"
    else:
        relation = "above" if first < second else "below"
    named = draw.permutation(len(kinds))
    shapes = []
    for place, kind in zip((first,) if alone else (first, second), named, strict=False):
        radius = cell / 2 * draw.uniform(0.8, 0.98)
        y, x = draw.uniform(radius, cell - radius, 2)
        y, x = y + place // columns * cell, x + place % columns * cell
        shapes.append(Shape(kinds[kind], colours[draw.integers(len(colours))], y, x, radius))
    background = tuple(int(level) for level in draw.integers(205, 245, 3))
    return Scene((height, width), background, tuple(shapes), relation, wordy)
