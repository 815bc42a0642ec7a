"""What objectives ask of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..errors import InputError
from ..models.vilt.given import check_tensors
from ..ops._check import limits


def tensor(batch: Mapping, name: str, shape: Sequence[int | None] = (), why: str = "") -> torch.Tensor:
    """A tensor that has to be there, of this shape (None: any size).

    Raises:
        InputError: it is missing, or of another shape. TypeError: it is no tensor.
    """
    value = batch.get(name)
    if value is None:
        raise InputError(f"the batch has no {name}{why and ', '}{why}.")
    check_tensors(**{name: value})
    fits = value.ndim == len(shape) and all(w in (None, n) for n, w in zip(value.shape, shape, strict=True))
    if shape and not fits:
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise InputError(f"{name} must be [{wanted}], got {list(value.shape)}.")
    return value


def classes(batch: Mapping, name: str, shape: Sequence[int | None], count: int) -> torch.Tensor:
    """int64 labels in 0..count-1, looked at where that waits for nothing.

    Raises:
        InputError: missing, of another shape, no integers, or out of range.
    """
    labels = tensor(batch, name, shape)
    if labels.dtype not in (torch.int64, torch.int32, torch.bool):
        raise InputError(f"{name} must be integers, got {labels.dtype}.")
    labels = labels.long()
    low, high = limits(labels) or (0, 0)
    if low < 0 or high >= count:
        raise InputError(f"{name} must be in [0, {count}), got values from {low} to {high}.")
    return labels


def wide(logits: torch.Tensor) -> torch.Tensor:
    """In at least float32, which losses are computed in."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def of_forward(batch: Mapping) -> dict:
    """What a HuggingFace task's forward takes of a batch, without labels."""
    names = ("input_ids", "attention_mask", "token_type_ids", "pixel_values", "pixel_mask")
    return {name: batch[name] for name in names if batch.get(name) is not None}
