"""What a model is given: tensors, or an error that says how to come by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


def check_tensors(**given) -> None:
    """TypeError for the first that is neither a tensor nor None."""
    for name, value in given.items():
        if value is not None and not isinstance(value, torch.Tensor):
            raise TypeError(
                f"{name} must be a tensor, got {_described(value)}: pass what the model's processor makes, "
                "processor(images, texts, return_tensors='pt'), or, of plain numbers, torch.as_tensor(...)."
            )


def repeated(given: Mapping, image_of: Sequence[int]) -> dict[str, torch.Tensor]:
    """`pixel_values` and `pixel_mask` of `given` with an image for each sample, which has number `image_of` there."""
    images = {name: given[name] for name in ("pixel_values", "pixel_mask") if given.get(name) is not None}
    of = torch.tensor(image_of)
    return {name: t.index_select(0, of.to(t.device, non_blocking=True)) for name, t in images.items()}


def _described(value) -> str:
    kind, shape, size = type(value).__name__, getattr(value, "shape", None), getattr(value, "size", None)
    if shape is not None:
        return f"{kind} {list(shape)} of {value.dtype}"
    if isinstance(size, tuple):
        return f"{kind} of {'x'.join(map(str, size))} pixels"
    if isinstance(value, list | tuple) and value:
        return f"{kind} of {len(value)} {type(value[0]).__name__}"
    return kind
