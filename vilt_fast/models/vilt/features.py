"""What `features` of both kinds of ViLT share: processed inputs as tensors, patches in raster order."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from ...errors import InputError
from ..base import SwappedTrunk
from .given import check_tensors


def tensors(inputs: Mapping, device: torch.device, *names: str, also: tuple[str, ...] = ()) -> dict:
    """The inputs called `names`, which must be there, and those called `also`, None where missing, on `device`."""
    missing = [name for name in names if inputs.get(name) is None]
    if missing:
        raise InputError(
            f"the processed inputs lack {' and '.join(missing)}; they have {', '.join(inputs) or 'nothing'}. "
            "Words need token ids and pictures need pixels: ready embeddings do not tell which word and place they are."
        )
    check_tensors(**{name: inputs.get(name) for name in (*names, *also)})
    return {name: None if inputs.get(name) is None else inputs[name].to(device) for name in (*names, *also)}


def in_raster_order(swapped: SwappedTrunk) -> SwappedTrunk:
    """The same, with what it keeps, in raster order: the reference draws an order at random and does not tell it.

    Padding is not computed.
    """
    options = dataclasses.replace(swapped.options, patch_order="raster", padding="zero")
    other = type(swapped)(swapped.module, options)
    other.weights, other.graphs, other.runs = swapped.weights, swapped.graphs, swapped.runs
    return other


def cells(positions: torch.Tensor, width: int) -> torch.Tensor:
    """y * width + x of (y, x) [P, 2]."""
    return positions[:, 0] * width + positions[:, 1]
