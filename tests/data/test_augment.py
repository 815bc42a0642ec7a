"""RandAugment: each of its operations beside Pillow's own, and how they are drawn."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy.stats import chisquare

from vilt_fast.commands.samples import scenes
from vilt_fast.data import OPERATIONS, RandAugment

STRENGTHS = (3, 9, 27)  #: of 30
PHOTOGRAPH = Image.fromarray(scenes(3)[2][0]).resize((150, 100))


def affine(*matrix):
    return PHOTOGRAPH.transform(PHOTOGRAPH.size, Image.AFFINE, matrix)


def brighter_then_solarized(by):
    levels = np.clip(np.asarray(PHOTOGRAPH).astype(int) + by, 0, 255).astype(np.uint8)
    return ImageOps.solarize(Image.fromarray(levels), 128)


#: What Pillow calls each of them, and the values of the three strengths.
EXPECTED = {
    "AutoContrast": (lambda _: ImageOps.autocontrast(PHOTOGRAPH), (0.1, 0.3, 0.9)),
    "Equalize": (lambda _: ImageOps.equalize(PHOTOGRAPH), (0.1, 0.3, 0.9)),
    "Rotate": (PHOTOGRAPH.rotate, (3, 9, 27)),
    "Posterize": (lambda v: ImageOps.posterize(PHOTOGRAPH, {0.4: 1, 1.2: 1, 3.6: 3}[v]), (0.4, 1.2, 3.6)),
    "Solarize": (lambda v: ImageOps.solarize(PHOTOGRAPH, v), (25.6, 76.8, 230.4)),
    "SolarizeAdd": (brighter_then_solarized, (11, 33, 99)),
    "Color": (lambda v: ImageEnhance.Color(PHOTOGRAPH).enhance(v), (0.28, 0.64, 1.72)),
    "Contrast": (lambda v: ImageEnhance.Contrast(PHOTOGRAPH).enhance(v), (0.28, 0.64, 1.72)),
    "Brightness": (lambda v: ImageEnhance.Brightness(PHOTOGRAPH).enhance(v), (0.28, 0.64, 1.72)),
    "Sharpness": (lambda v: ImageEnhance.Sharpness(PHOTOGRAPH).enhance(v), (0.28, 0.64, 1.72)),
    "ShearX": (lambda v: affine(1, v, 0, 0, 1, 0), (0.03, 0.09, 0.27)),
    "ShearY": (lambda v: affine(1, 0, 0, v, 1, 0), (0.03, 0.09, 0.27)),
    "TranslateX": (lambda v: affine(1, 0, v, 0, 1, 0), (10, 30, 90)),
    "TranslateY": (lambda v: affine(1, 0, 0, 0, 1, v), (10, 30, 90)),
}
SIGNED = {"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_operation_is_pillows_own(name):
    operation, (expected, values) = OPERATIONS[name], EXPECTED[name]
    for strength, value in zip(STRENGTHS, values, strict=True):
        assert operation.value(strength) == pytest.approx(value)
        for sign in (1, -1) if name in SIGNED else (1,):
            assert operation.apply(PHOTOGRAPH, sign * value).tobytes() == expected(sign * value).tobytes()
    assert operation.signed == (name in SIGNED)


def test_there_are_fourteen_and_neither_inversion_nor_cutout():
    assert OPERATIONS.keys() == EXPECTED.keys() and len(OPERATIONS) == 14


def test_two_are_drawn_with_replacement_and_signs_both_ways(monkeypatch):
    drawn = []
    for name, operation in OPERATIONS.items():
        told = lambda image, value, name=name: drawn.append((name, value)) or image  # noqa: E731
        monkeypatch.setitem(OPERATIONS, name, type(operation)(told, operation.low, operation.high, operation.signed))
    augment, generator = RandAugment(), np.random.default_rng(0)
    for _ in range(7000):
        augment(PHOTOGRAPH, generator)
    names = [name for name, _ in drawn]
    assert len(drawn) == 14_000 and chisquare([names.count(name) for name in OPERATIONS]).pvalue > 1e-4
    pairs = list(zip(names[::2], names[1::2], strict=True))
    assert chisquare([500, 6500], [sum(a == b for a, b in pairs), sum(a != b for a, b in pairs)]).pvalue > 1e-4
    for name, operation in OPERATIONS.items():
        values = [value for n, value in drawn if n == name]
        assert set(np.abs(values)) == {operation.value(9)}
        negative = sum(value < 0 for value in values)
        assert chisquare([negative, len(values) - negative]).pvalue > 1e-4 if name in SIGNED else negative == 0


def test_bad_strengths_are_named():
    for wrong in ({"count": -1}, {"strength": 31}):
        with pytest.raises(ValueError, match="0 or more, and 0 to 30"):
            RandAugment(**wrong)
