"""Resizing with Pillow, as the reference does it, in threads; or from a smaller image that the JPEG decoder gives."""

from __future__ import annotations

import functools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

LARGE = 2**18  #: pixels from which on a single image is resized in bands
GAP = 2.0  #: what `decode="fast"` leaves to the filter: an image is reduced to no less than this times the target
LEFT = 1.5  #: and what a JPEG's decoder leaves; from 1 on, pixels that differ twice as much (benchmarks/NOTES.md)


def exact(image: Image.Image, size: tuple[int, int], resample: int, threads: int, box=None) -> Image.Image:
    """`image.resize`, bit for bit, with up to `threads` threads; `size` is (height, width), `box` Pillow's."""
    height, width = size
    known = resample != Image.Resampling.NEAREST and _rows_come_first(image.size, (width, height)) and _probed()
    if threads > 1 and image.width * image.height >= LARGE and known:
        return _in_bands(image, size, resample, threads, box)
    return image.resize((width, height), resample, box=box)


def _in_bands(image, size, resample, bands, box=None):
    """Pillow filters rows, rounds to bytes, then filters columns: so each band of rows can be filtered on its own."""
    image.load()  # once, not by every thread that cuts a band
    left, upper, right, lower = box or (0, 0, *image.size)
    bands = min(bands, image.height)
    edges = [image.height * i // bands for i in range(bands + 1)]

    def rows(top, bottom):
        band = image.crop((0, top, image.width, bottom))
        return band.resize((size[1], bottom - top), resample, box=(left, 0, right, bottom - top))

    narrow = Image.new(image.mode, (size[1], image.height))
    narrow.info = dict(image.info)  # as Pillow's own resize: it says which way up the image is
    with ThreadPoolExecutor(bands) as pool:
        for top, band in zip(edges, pool.map(rows, edges, edges[1:]), strict=False):
            narrow.paste(band, (0, top))
    return narrow.resize(size[::-1], resample, box=(0, upper, size[1], lower))


def _rows_come_first(given, wanted):
    """Whether every Pillow filters rows before columns: 13 turns that round where the height shrinks by far more."""
    return 0 < given[1] - wanted[1] <= 2 * (given[0] - wanted[0])


@functools.cache
def _probed():
    """Whether the Pillow that is here does so too, asked with small images on either side of the rule."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    for width, height in ((48, 27), (48, 48), (27, 48)):
        image = Image.fromarray(noise[:height, :width])
        whole = image.resize((width // 7, height // 7), Image.Resampling.BICUBIC)
        if _in_bands(image, (height // 7, width // 7), Image.Resampling.BICUBIC, 2).tobytes() != whole.tobytes():
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
