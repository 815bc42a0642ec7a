"""Pictures of an alignment: the photograph, then a panel a word with its heat over the grey."""

import math
import textwrap

import torch

from .picture import rgb

COLOURS = "inferno"
PANEL = 2.3  #: inches, the longer side of a panel
DIM = 0.6  #: the lightest grey of the photograph under the heat, below the brightness of the hottest colours
OPACITY = 0.7  #: of the heat where it is largest; where there is none the photograph is bare


def draw(alignment, image, path, *, text="", note="", dpi=150, step=lambda word: None):
    """Draw `alignment` over `image` and write the picture to `path`.

    A panel's colours go from 0 to the largest value of that word's row of the plan, so that panels compare places, not
    masses.

    Args:
        alignment: an :class:`~vilt_fast.alignment.align.Alignment`.
        image: the photograph, as :func:`~vilt_fast.align` takes it, of the same aspect.
        path: where to; the suffix decides the format (png, pdf, svg, jpg).
        text: written above the panels. note: written small below them.
        dpi: pixels an inch. step: called with each word before its panel is drawn, for a progress bar.

    Raises:
        ImportError: matplotlib is missing. ValueError: an unknown suffix, or a plan that holds NaN.
    """
    if not torch.isfinite(alignment.plan).all():
        raise ValueError(
            "the plan holds NaN: the model's hidden states do. Look at its weights, or compute in float32."
        )
    try:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.figure import Figure
    except ImportError as error:
        message = 'pictures are drawn with matplotlib; run: pip install "vilt_fast[demo]"'
        raise ImportError(message, name="matplotlib") from error

    height, width = alignment.image_size
    photograph, grey = _prepared(image, dpi)
    columns, rows = _layout(len(alignment.tokens) + 1, width / height)
    scale = PANEL / max(height, width)
    panels = (columns * (width * scale + 0.14) + 0.9, rows * (height * scale + 0.4) + 0.25)  # inches, with the bar
    heading = textwrap.fill(text, max(20, int(panels[0] * 9)))
    footing = textwrap.fill(note, max(20, int(panels[0] * 13)))
    above = 0.1 + 0.22 * len(heading.splitlines())
    below = 0.1 + 0.16 * len(footing.splitlines())
    total = panels[1] + above + below
    figure = Figure(figsize=(panels[0], total), facecolor="white", layout="constrained")
    side = 0.1 / panels[0]
    figure.get_layout_engine().set(
        w_pad=0.05, h_pad=0.04, wspace=0.0, hspace=0.0, rect=(side, below / total, 1 - 2 * side, panels[1] / total)
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    extent = (0, width, height, 0)
    for axis in axes.flat:
        axis.set_axis_off()
    axes.flat[0].imshow(photograph, extent=extent)
    _title(axes.flat[0], "photograph", width * scale, color="0.45", style="italic")
    for axis, word, heat in zip(axes.flat[1:], alignment.tokens, alignment.heatmaps().numpy(), strict=False):
        step(word)
        axis.imshow(grey, extent=extent, cmap="gray", vmin=0, vmax=1)
        axis.imshow(heat, extent=extent, cmap=COLOURS, vmin=0, vmax=1, alpha=OPACITY * heat, interpolation="nearest")
        _title(axis, word, width * scale)
    bar = figure.colorbar(
        ScalarMappable(cmap=colormaps[COLOURS]), ax=axes, location="right", aspect=28, pad=0.015, fraction=0.03,
        shrink=min(3.4, 0.97 * rows * height * scale) / panels[1], ticks=(0, 1),
    )  # fmt: skip
    bar.ax.set_yticklabels(("none", "most"), fontsize=9)
    bar.ax.tick_params(length=0)
    bar.set_label("transported from the word", fontsize=8, labelpad=-14)
    bar.outline.set_visible(False)
    figure.text(0.5, 1 - 0.1 / total, heading, ha="center", va="top", fontsize=12, parse_math=False)
    figure.text(0.5, 0.08 / total, footing, ha="center", va="bottom", fontsize=8.5, color="0.4", parse_math=False)
    figure.savefig(path, dpi=dpi)


def _layout(panels, aspect):
    """(columns, rows): one row while there are few, then what comes nearest to a page of 3:2."""
    if panels <= 4:
        return panels, 1
    ratio = 1.5
    columns = min(
        range(1, min(panels, 10) + 1), key=lambda c: abs(math.log(c * aspect / math.ceil(panels / c) / ratio))
    )
    return columns, math.ceil(panels / columns)


def _prepared(image, dpi):
    """The photograph no larger than a panel shows it, and its grey, from 0 to `DIM`."""
    import numpy as np
    from PIL import Image

    picture = rgb(image).copy()
    picture.thumbnail((math.ceil(PANEL * dpi),) * 2, Image.Resampling.LANCZOS)
    return np.asarray(picture), np.asarray(picture.convert("L")) / 255 * DIM


def _title(axis, word, inches, **style):
    """The word above its panel, in a smaller size where it would not fit, cut where it could not be read."""
    fits = inches * 72 / 0.62  # characters of size 1: the letters of the font are about 0.62 wide
    fontsize = min(12, max(7, fits / max(len(word), 1)))
    most = max(3, int(fits / fontsize))
    shown = word if len(word) <= most else word[: most - 1] + "…"
    axis.set_title(shown, fontsize=fontsize, pad=4, parse_math=False, **style)
