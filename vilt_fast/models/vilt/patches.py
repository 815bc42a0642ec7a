"""Patches on the host: which a mask shows, which of them are kept, and where they lie in the position table."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

from ...errors import InputError


def patch_grids(pixel_mask, batch, grid) -> tuple[tuple[int, int], ...]:
    """(h, w) in patches of each image; the mask is sampled at the reference's nearest-neighbour positions."""
    if pixel_mask is None:
        return ((grid[0], grid[1]),) * batch
    if pixel_mask.ndim != 3 or pixel_mask.shape[0] != batch:
        raise InputError(
            f"pixel_mask must be [{batch}, height, width] like pixel_values, got {list(pixel_mask.shape)}."
        )
    mask = _sampled(pixel_mask, grid)
    real = mask != 0
    if not (mask[real] == 1).all():
        raise InputError("pixel_mask must hold 0 (padding) and 1 (image) only.")
    if real.all():
        return (tuple(grid),) * batch
    mask = real
    heights, widths = mask[:, :, 0].sum(1), mask[:, 0, :].sum(1)
    for b, (h, w) in enumerate(zip(heights.tolist(), widths.tolist(), strict=True)):
        if h == 0 or w == 0:
            what = "is empty" if not mask[b].any() else "does not start at the top left corner (0, 0)"
            raise InputError(f"pixel_mask of sample {b} {what}: every image needs a rectangle of ones from (0, 0).")
        if not mask[b, :h, :w].all() or mask[b].sum() != h * w:
            raise InputError(
                f"pixel_mask of sample {b} is not one rectangle of ones from the top left corner: ViLT takes the "
                "image's height and width from its first column and row, so holes or loose pieces would be computed "
                "wrongly."
            )
    return tuple(zip(heights.tolist(), widths.tolist(), strict=True))


def _sampled(mask: torch.Tensor, grid: Sequence[int]) -> np.ndarray:
    """The mask [B, h, w] at one place a patch, on the host."""
    sides = [(int(size), int(out)) for size, out in zip(mask.shape[1:], grid, strict=True)]  # traced, sizes are tensors
    rows, columns = (_evenly(*side) for side in sides)
    if rows is None or columns is None:
        rows, columns = (torch.from_numpy(_nearest(*side)).to(mask.device) for side in sides)
        rows = rows[:, None]
    sampled = mask.detach()[:, rows, columns].cpu()  # of slices a view: no indices have to get to a device
    return (sampled.float() if sampled.dtype == torch.bfloat16 else sampled).numpy()


@functools.lru_cache(maxsize=256)
def _evenly(size: int, out: int) -> slice | None:
    """`_nearest` as a slice; None where that is none, as of a side that holds no whole number of patches."""
    places = _nearest(size, out)
    found = slice(0, size, size // out) if out and not size % out else None
    return found if found and np.array_equal(np.arange(size)[found], places) else None


def cells(pixels: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Pixels [B, C, H, W] as patches [B, gh, gw, C, ph, pw], a view; what is left beyond whole patches is cut off."""
    (ph, pw), (images, channels, height, width) = size, pixels.shape
    image, channel, row, column = pixels.stride()
    shape = images, height // ph, width // pw, channels, ph, pw
    return pixels.as_strided(shape, (image, ph * row, pw * column, channel, row, column))  # one view in place of five


def sampled_mask(pixels: torch.Tensor, grid: Sequence[int], is_image) -> torch.Tensor:
    """A patch-grid mask bool [B, gh, gw]: `is_image` of the pixels [B, C, gh, gw] where a full mask is sampled."""
    rows, columns = (
        torch.from_numpy(_nearest(s, g)).to(pixels.device) for s, g in zip(pixels.shape[2:], grid, strict=True)
    )
    return is_image(pixels[:, :, rows[:, None], columns])


@functools.lru_cache(maxsize=256)
def _nearest(size: int, out: int) -> np.ndarray:
    """Source positions that `torch.nn.functional.interpolate(mode="nearest")` reads."""
    if size < 1:
        raise InputError("pixel_mask has a side of length 0.")
    line = torch.arange(size, dtype=torch.float32)[None, None, :, None]
    return torch.nn.functional.interpolate(line, size=(out, 1))[0, 0, :, 0].long().numpy()


def choose_patches(grids, grid, max_image_length, patch_order, generator, fill):
    """Flat cells (y * gw + x) of the kept patches of each image, and of what fills it up to the longest.

    The latter are cells beside the image, none without `fill`. The reference draws them at random, with replacement.
    """
    if patch_order not in ("raster", "reference"):
        raise InputError(f"patch_order must be 'raster' or 'reference', got {patch_order!r}.")
    counts = [h * w for h, w in grids]
    limit = max(counts)
    if isinstance(max_image_length, int) and max_image_length >= 0:
        if max_image_length == 0:
            raise InputError("max_image_length 0 keeps no patch: use -1 for all, or a positive number.")
        limit = min(limit, max_image_length)
    cells = [(np.arange(h)[:, None] * grid[1] + np.arange(w)).reshape(-1) for h, w in grids]
    choose = _reference_draws if patch_order == "reference" else functools.partial(_in_raster_order, generator)
    beside = [np.zeros(0, np.int64)] * len(grids)
    for b, (h, w) in enumerate(grids):
        missing = limit - counts[b]
        if patch_order == "raster" and (missing == 0 or (missing > 0 and not fill)):
            continue
        places = choose(counts[b], grid[0] * grid[1] - counts[b], limit)
        if missing <= 0:
            cells[b] = cells[b][places]
        elif fill:
            image = np.zeros(grid, bool)
            image[:h, :w] = True
            beside[b] = np.flatnonzero(~image)[places]
    return cells, beside


def _in_raster_order(generator, count, others, limit):
    """Of `count` patches, `limit` at random where there are more; where there are less, of `others` as many as lack.

    Those are spread over the others evenly, so that nothing is drawn for them.
    """
    missing = limit - count
    if missing > 0:
        return np.arange(missing) * others // missing
    keep = torch.randperm(count, generator=generator, device=generator.device if generator else "cpu")[:limit]
    return np.sort(keep.cpu().numpy())


def _reference_draws(count, others, limit):
    """The same by the reference's own random draws, call for call, from torch's default CPU generator.

    That of `others` is made even where it is not looked at: it moves the generator on.
    """
    if count >= limit:
        return torch.multinomial(torch.ones(count), limit).numpy()
    return torch.multinomial(torch.ones(others), limit - count, replacement=True).numpy()


@functools.lru_cache(maxsize=1024)
def bilinear(h: int, w: int, side: int, row_width: int, exact: bool) -> tuple[np.ndarray, np.ndarray]:
    """Table rows [cells, 4] and weights [cells, 4] of the bilinear (align_corners) resize of a side x side table.

    Indexed by the cell number y * row_width + x that `choose_patches` uses (cells outside the image are zero).
    Arithmetic is float32 (float64 if `exact`) in the order of `torch.nn.functional.interpolate`, so that weights agree
    to the last bit.
    """
    real_type = np.float64 if exact else np.float32

    def axis(n):
        scale = real_type(side - 1) / real_type(n - 1) if n > 1 else real_type(0)
        real = scale * np.arange(n, dtype=real_type)
        low = np.minimum(real.astype(np.int64), side - 1)
        fraction = real - low.astype(real_type)
        return low, np.minimum(low + 1, side - 1), fraction

    y0, y1, fy = axis(h)
    x0, x1, fx = axis(w)
    index = np.zeros((h, row_width, 4), np.int64)
    weight = np.zeros((h, row_width, 4), real_type)
    one = real_type(1)
    corners = ((y0, x0, one - fy, one - fx), (y0, x1, one - fy, fx), (y1, x0, fy, one - fx), (y1, x1, fy, fx))
    for corner, (ys, xs, wy, wx) in enumerate(corners):
        index[:, :w, corner] = 1 + ys[:, None] * side + xs
        weight[:, :w, corner] = wy[:, None] * wx
    return index.reshape(-1, 4), weight.reshape(-1, 4)
