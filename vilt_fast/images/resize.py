"""Resizing with Pillow, as the reference does it, in threads; or from a smaller image that the JPEG decoder gives."""

from __future__ import annotations

import functools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

LARGE = 2**19  #: pixels from which on a single image is resized in bands
GAP = 2.0  #: what `decode="fast"` leaves to the filter: an image is reduced to no less than this times the target
LEFT = 1.5  #: and what a JPEG's decoder leaves; from 1 on, pixels that differ twice as much (benchmarks/NOTES.md)


def exact(image: Image.Image, size: tuple[int, int], resample: int, threads: int, box=None) -> Image.Image:
    """`image.resize`, bit for bit, with up to `threads` threads; `size` is (height, width), `box` Pillow's."""
    bands = min(threads, size[0])
    if bands > 1 and image.width * image.height >= LARGE and _can_be_cut(image.size, size, resample, bands, box):
        return _in_bands(image, size, resample, bands, box)
    return image.resize(size[::-1], resample, box=box)


def _in_bands(image, size, resample, bands, box=None):
    """Each band of the result from the part of the image that lies under it."""
    image.load()  # once, not by every thread
    (height, width), (left, upper, right, lower) = size, box or (0, 0, *image.size)
    step = (lower - upper) / height
    edges = [height * i // bands for i in range(bands + 1)]

    def rows(top, bottom):
        part = (left, upper + top * step, right, upper + bottom * step)
        return image.resize((width, bottom - top), resample, box=part)

    whole = Image.new(image.mode, (width, height))
    whole.info = dict(image.info)  # as Pillow's own resize: it says which way up the image is
    with ThreadPoolExecutor(bands) as pool:
        for top, band in zip(edges, pool.map(rows, edges, edges[1:]), strict=False):
            whole.paste(band, (0, top))
    return whole


def _can_be_cut(given, size, resample, bands, box):
    """Whether bands are made of the same sums as the whole.

    Where a row of the result lies in the image has to be a number that Pillow's float32 box holds exactly, in a band as
    in the whole; and rows have to be filtered before columns in both, for what is between them is rounded to bytes.
    """
    upper, lower = (box or (0, 0, *given))[1::2]
    steps = (lower - upper) * _EXACT / size[0]
    whole_numbers = steps == int(steps) and upper * _EXACT == int(upper * _EXACT)
    rows_first = all(_rows_come_first(given, (size[1], height)) for height in (size[0], size[0] // bands))
    return whole_numbers and rows_first and resample != Image.Resampling.NEAREST and _probed()


_EXACT = 256  #: float32 has 24 bits: 16 for the place, 8 behind the point


def _rows_come_first(given, wanted):
    """Whether every Pillow filters rows before columns: 13 turns that round where the height shrinks by far more."""
    return 0 < given[1] - wanted[1] <= 2 * (given[0] - wanted[0])


@functools.cache
def _probed():
    """Whether the Pillow that is here does so too, asked with small images."""
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    for width, height in ((96, 48), (96, 72), (72, 96)):
        image, size = Image.fromarray(noise[:height, :width]), (height // 6, width // 6)
        whole = image.resize(size[::-1], Image.Resampling.BICUBIC)
        if _in_bands(image, size, Image.Resampling.BICUBIC, 2).tobytes() != whole.tobytes():
            return False
    return True


def smaller(image: Image.Image, size: tuple[int, int]) -> tuple[float, float, float, float] | None:
    """Have a JPEG's decoder give a smaller image, no smaller than `LEFT` times `size` (height, width).

    Returns where in it the whole image lies, as Pillow's `box`; None for what is no JPEG or would not shrink.
    """
    drafted = image.draft(None, tuple(math.ceil(LEFT * side) for side in size[::-1]))
    return drafted and drafted[1]


def reduced(image: Image.Image, size: tuple[int, int], resample: int, threads: int, box=None) -> Image.Image:
    """`image.resize` after a reduction by whole factors, where there is room for one; arguments as of `exact`."""
    if min(image.height / size[0], image.width / size[1]) < 2 * GAP:
        return exact(image, size, resample, threads, box)
    return image.resize(size[::-1], resample, box=box, reducing_gap=GAP)
