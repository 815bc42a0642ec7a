"""Image-text matching: of a batch, floor(B / 2) texts keep their image, the others are given a false one.

Source: ViLT (Kim et al. 2021) sec. 3.2; `compute_itm_wpa` of the original.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import InputError
from ..models.vilt.given import repeated
from ..models.vilt.reads import Reads
from ..models.vilt.states import states, trunk_of
from ._batch import classes, tensor, wide

PAIR, OTHER = 1, 0


def itm_labels(size: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """int64 [size] on the CPU: floor(size / 2) ones (pairs), the rest zeros, in an order that `generator` draws.

    A batch of one has no pair. The draw is the original's, `torch.randperm(size)`.
    """
    labels = torch.full((size,), OTHER)
    labels[: size // 2] = PAIR
    device = "cpu" if generator is None else generator.device
    return labels[torch.randperm(size, generator=generator, device=device).cpu()]


def itm_loss(model: nn.Module, batch: Mapping, *, generator: torch.Generator | None = None) -> torch.Tensor:
    """Mean cross entropy of whether image and text belong together.

    Args:
        model: has a `vilt` and an `itm_score` (hidden size to 2), as :class:`ViltForPreTraining`; accelerated or not.
        batch: input_ids, pixel_values, false_pixel_values and their masks. With `itm_labels` [B] (1: the sample keeps
            its image) nothing is drawn.
        generator: draws which samples keep their image.

    Returns:
        A scalar in at least float32.

    Raises:
        InputError: missing or misshapen tensors, images smaller than a patch, labels other than 0 and 1.
    """
    trunk = trunk_of(model, "itm_score")
    labels = labels_of(batch, generator)
    found = states(trunk, {**batch, **images_of(trunk, batch, labels)}, Reads(0))
    return of_pooled(model.itm_score, found.pooled, labels)[0]


def labels_of(batch: Mapping, generator: torch.Generator | None) -> torch.Tensor:
    """The labels that the batch has, or drawn ones; on the CPU."""
    ids = tensor(batch, "input_ids", (None, None))
    if batch.get("itm_labels") is None:
        return itm_labels(len(ids), generator)
    return classes(batch, "itm_labels", ids.shape[:1], 2).cpu()


def of_pooled(head: nn.Module, pooled: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the loss of what the pooler gave, the logits [B, 2])."""
    logits = head(pooled)
    return F.cross_entropy(wide(logits), labels.to(logits.device, non_blocking=True)), logits


def images_of(trunk: nn.Module, batch: Mapping, labels: torch.Tensor) -> dict:
    """pixel_values and pixel_mask [B, ...] in which samples labelled 0 have their false image."""
    return repeated(*shared_images(trunk, batch, labels))


def shared_images(trunk: nn.Module, batch: Mapping, labels: torch.Tensor) -> tuple[dict, tuple[int, ...]]:
    """(pixel_values and pixel_mask of the true images, then of the false ones that are used; which each sample has)."""
    true = tensor(batch, "pixel_values", (len(labels), None, None, None))
    false = tensor(batch, "false_pixel_values", (*true.shape[:2], None, None), "which image-text matching swaps in")
    others = (labels == OTHER).nonzero()[:, 0]
    _check_sides(trunk, pixel_values=true, false_pixel_values=false)
    place = {sample: len(labels) + i for i, sample in enumerate(others.tolist())}
    others = others.to(true.device, non_blocking=True)
    size = [max(sides) for sides in zip(true.shape[2:], false.shape[2:], strict=True)]
    masks = _mask(batch, "pixel_mask", true), _mask(batch, "false_pixel_mask", false)[others]
    images = {
        "pixel_values": torch.cat([_to_size(true, size), _to_size(false[others].to(true.dtype), size)]),
        "pixel_mask": torch.cat([_to_size(mask, size) for mask in masks]),
    }
    return images, tuple(place.get(sample, sample) for sample in range(len(labels)))


def _check_sides(trunk, **images):
    """Padded to the size of the others, an image that is smaller than a patch would have one."""
    patches = getattr(trunk.embeddings, "patch_embeddings", None)
    patch = getattr(getattr(patches, "projection", None), "kernel_size", (1, 1))
    for name, pixels in images.items():
        sides = tuple(pixels.shape[2:])
        if sides[0] < patch[0] or sides[1] < patch[1]:
            size = f"{sides[0]}x{sides[1]} hold no whole patch of {patch[0]}x{patch[1]}"
            raise InputError(f"{name} of {size}: resize the images.")


def _mask(batch, name, pixels):
    shape = (len(pixels), *pixels.shape[2:])
    mask = batch.get(name)
    if mask is None:
        return torch.ones(shape, dtype=torch.long, device=pixels.device)
    mask = tensor(batch, name)
    if mask.shape != shape:
        raise InputError(f"{name} must be {list(shape)} like its pixel_values, got {list(mask.shape)}.")
    return mask.long()


def _to_size(images, size):
    height, width = (want - have for want, have in zip(size, images.shape[-2:], strict=True))
    return F.pad(images, (0, width, 0, height)) if height or width else images
