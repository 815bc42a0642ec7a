"""RandAugment as ViLT was trained with it: two of fourteen operations, drawn with replacement, at strength 9 of 30.

It is applied before the resize. Inversion changes colours that the text may name and cutout hides small objects: ViLT
leaves both out. (torchvision's RandAugment has other operations, ranges and a strength of its own.)
Source: RandAugment (Cubuk et al. 2020); ViLT (Kim et al. 2021) sec. 4.4; the original's `randaug.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

STEPS = 30  #: strengths run from 0 to this


@dataclasses.dataclass(frozen=True)
class Operation:
    """`apply(image, value)`: an RGB image, and a value that goes from `low` to `high` with the strength."""

    apply: Callable[[Image.Image, float], Image.Image]
    low: float
    high: float
    signed: bool = False  #: the value's sign is drawn

    def value(self, strength: float) -> float:
        """The value at a strength of 0 to 30."""
        return strength / STEPS * (self.high - self.low) + self.low


def _affine(image, *matrix):
    """Nearest pixel, black where nothing comes from, the size as it was."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


def _solarize_add(image, value):
    """Brighter by `value`, then inverted from 128 on."""
    brighter = image.point([min(255, level + int(value)) for level in range(256)] * 3)
    return ImageOps.solarize(brighter, 128)


#: Value in pixels for translations, degrees for rotation, bits for posterize, else a factor or a level of 0..255.
OPERATIONS = {
    "AutoContrast": Operation(lambda image, _: ImageOps.autocontrast(image), 0, 1),
    "Equalize": Operation(lambda image, _: ImageOps.equalize(image), 0, 1),
    "Rotate": Operation(lambda image, v: image.rotate(v), 0, 30, signed=True),
    "Posterize": Operation(lambda image, v: ImageOps.posterize(image, max(1, int(v))), 0, 4),
    "Solarize": Operation(lambda image, v: ImageOps.solarize(image, v), 0, 256),
    "SolarizeAdd": Operation(_solarize_add, 0, 110),
    "Color": Operation(lambda image, v: ImageEnhance.Color(image).enhance(v), 0.1, 1.9),
    "Contrast": Operation(lambda image, v: ImageEnhance.Contrast(image).enhance(v), 0.1, 1.9),
    "Brightness": Operation(lambda image, v: ImageEnhance.Brightness(image).enhance(v), 0.1, 1.9),
    "Sharpness": Operation(lambda image, v: ImageEnhance.Sharpness(image).enhance(v), 0.1, 1.9),
    "ShearX": Operation(lambda image, v: _affine(image, 1, v, 0, 0, 1, 0), 0, 0.3, signed=True),
    "ShearY": Operation(lambda image, v: _affine(image, 1, 0, 0, v, 1, 0), 0, 0.3, signed=True),
    "TranslateX": Operation(lambda image, v: _affine(image, 1, 0, v, 0, 1, 0), 0, 100, signed=True),
    "TranslateY": Operation(lambda image, v: _affine(image, 1, 0, 0, 0, 1, v), 0, 100, signed=True),
}


class RandAugment:
    """`augment(image, generator)`: `count` operations at `strength` (0 to 30) on a PIL image in RGB, one after another.

    Raises:
        ValueError: a negative count, or a strength that is not 0 to 30.
    """

    def __init__(self, count: int = 2, strength: float = 9):
        if count < 0 or not 0 <= strength <= STEPS:
            raise ValueError(f"RandAugment: count {count}, strength {strength}; expected 0 or more, and 0 to {STEPS}.")
        self.count, self.strength = count, strength

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        names = list(OPERATIONS)
        for drawn in generator.integers(len(names), size=self.count):
            operation = OPERATIONS[names[drawn]]
            value = operation.value(self.strength)
            negative = generator.random() < 0.5  # drawn for all, so that the next draw is the same whatever came before
            image = operation.apply(image, -value if operation.signed and negative else value)
        return image
