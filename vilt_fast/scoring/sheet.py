"""A contact sheet: a row a text, with its best images and their scores."""

from __future__ import annotations

import math
import textwrap

import numpy as np

from .pictures import Picture

PANEL = 1.7  #: inches, the side of the square that an image is fitted into
TEXT = 2.6  #: inches, the column of texts


def draw(matrix, path, *, top_k: int | None = None, texts=None, note: str = "", dpi: int = 120) -> None:
    """Draw each text of a `ScoreMatrix` with its best images, best first, and write the picture to `path`.

    Of question answering: each question with its images in their order, and the likeliest answer below each.

    Args:
        top_k: images a text, by default those of the matrix, at most 5.
        texts: numbers of the texts to draw, by default the first 20.
        note: written small below. dpi: pixels an inch.

    Raises:
        ImportError: matplotlib is missing. ValueError: an unknown suffix, a text that is not there, or `top_k` below 1.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        message = 'pictures are drawn with matplotlib; run: pip install "vilt_fast[demo]"'
        raise ImportError(message, name="matplotlib") from error

    chosen = list(range(min(20, len(matrix.texts))) if texts is None else texts)
    if not chosen or not all(0 <= text < len(matrix.texts) for text in chosen):
        raise ValueError(f"sheet: texts must be numbers from 0 to {len(matrix.texts) - 1}, got {chosen}.")
    if top_k is None:
        top_k = 5 if matrix.top_k is None else min(matrix.top_k, 5)
    if top_k < 1:
        raise ValueError(f"sheet: top_k must be at least 1, got {top_k}.")
    count = min(top_k, len(matrix.images))
    best = matrix.top(count) if matrix.answers is None else None
    panels = [_panels(matrix, text, count, best) for text in chosen]
    width, row = TEXT + count * (PANEL + 0.15) + 0.2, PANEL + 0.42
    below = 0.3 if note else 0.1
    height = len(chosen) * row + below + 0.1
    figure = Figure(figsize=(width, height), facecolor="white")
    seen = {}
    for place, (text, found) in enumerate(zip(chosen, panels, strict=True)):
        top = height - 0.1 - place * row
        words = textwrap.shorten(" ".join(matrix.texts[text].split()), 150, placeholder="…")
        lines = textwrap.fill(words, 30)
        figure.text(
            0.12 / width, (top - PANEL / 2) / height, lines, va="center", ha="left", fontsize=10, parse_math=False
        )
        for column, (image, label) in enumerate(found):
            left = TEXT + column * (PANEL + 0.15)
            axis = figure.add_axes((left / width, (top - PANEL) / height, PANEL / width, PANEL / height))
            axis.set_axis_off()
            axis.set_anchor("S")  # what is written below it belongs to it
            if image not in seen:
                seen[image] = _thumbnail(matrix, image, dpi)
            picture = seen[image]
            if picture is None:
                axis.text(0.5, 0.5, "cannot be\nread", ha="center", va="center", fontsize=9, color="0.5")
            else:
                axis.imshow(picture)
            figure.text(
                (left + PANEL / 2) / width, (top - PANEL - 0.06) / height, label, ha="center", va="top",
                fontsize=8.5, color="0.25", parse_math=False, linespacing=1.1,
            )  # fmt: skip
    figure.text(0.5, 0.08 / height, note, ha="center", va="bottom", fontsize=8, color="0.4", parse_math=False)
    figure.savefig(path, dpi=dpi)


def _panels(matrix, text, count, best):
    """(image, what is written below it) of the panels of a text; `best` is what `top` gives, None of answers."""
    if best is not None:
        images, scores = best
        shown = zip(images[text].tolist(), scores[text].tolist(), strict=True)
        return [(image, f"{score:.3g}") for image, score in shown if image >= 0]
    if matrix.pairs is None:
        pairs = [(image, (text, image)) for image in range(count)]
    else:
        at = np.flatnonzero(matrix.pairs[:, 0] == text)[:count].tolist()
        pairs = [(int(matrix.pairs[pair, 1]), (pair,)) for pair in at]
    panels = []
    for image, pair in pairs:
        found = matrix.answer(*pair)
        panels.append(
            (image, f"{textwrap.shorten(found[0][0], 22, placeholder='…')} {found[0][1]:.0%}" if found else "-")
        )
    return panels


def _thumbnail(matrix, image, dpi):
    """The photograph no larger than it is shown; None where there is none."""
    from PIL import Image

    if image in matrix.errors or not matrix.sources:
        return None
    try:
        picture = Picture(matrix.sources[image], image, None).opened().copy()
    except Exception:  # gone or unreadable since it was scored, or processed inputs: a sheet without it is one
        return None
    picture.thumbnail((math.ceil(PANEL * dpi),) * 2, Image.Resampling.LANCZOS)
    return np.asarray(picture)
