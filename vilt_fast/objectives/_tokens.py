"""What losses of text tokens share: their labels, what is read because of them, and the cross entropy on it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from ..errors import InputError
from ..models.vilt.reads import Reads
from ..models.vilt.states import States, compact
from ._batch import tensor, wide

IGNORED = -100  #: the label of a token that is not to be predicted


def labels_of(batch: Mapping, what: str, why: str = "") -> torch.Tensor:
    """The batch's `labels`, int64 [B, T] as its text is, where that is; `what` names them in errors, as `why` does."""
    ids = tensor(batch, "input_ids", (None, None))
    labels = tensor(batch, "labels", ids.shape, why)
    if labels.dtype != torch.int64:
        raise InputError(f"labels must be int64 {what}, got {labels.dtype}.")
    return labels.to(ids.device)


def reads(labels: torch.Tensor, tokenwise: bool, **others) -> Reads:
    """What is read of samples that have these labels: labelled tokens, or all for a head that may look across them."""
    return Reads(len(labels), labels != IGNORED if tokenwise and compact(labels) else None, **others)


def of_read(found: States, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the labels [m] of the tokens that were read, how many of all are labelled but at least 1).

    Raises:
        ValueError: one is of padding that has not been computed (looked at on a CPU).
    """
    flat = labels.flatten()
    own = flat.to(found.places.device).index_select(0, found.places)
    count = (flat != IGNORED).sum()
    if compact(labels) and (own != IGNORED).sum() != count:
        raise ValueError(
            "labels name padding (attention_mask 0), which is not computed: label it -100, or compute it, with "
            "vilt_fast.accelerate(model, padding='reference')."
        )
    return own, count.clamp(min=1).to(own.device)


def logits(head, found: States, shape: torch.Size, tokenwise: bool) -> torch.Tensor:
    """The head's logits [m, classes] of what was read; one that may look across tokens is given the padded text."""
    if tokenwise:
        return head(found.texts)
    rows = found.texts.new_zeros(shape.numel(), found.texts.shape[1]).index_copy(0, found.places, found.texts)
    return head(rows.view(*shape, -1)).flatten(0, 1).index_select(0, found.places)


def summed(logits: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """The sum of the cross entropies of labelled tokens.

    Raises:
        IndexError: a label is neither -100 nor a class (looked at on a CPU).
    """
    if compact(own) and (bad := own[(own != IGNORED) & ((own < 0) | (own >= logits.shape[1]))]).numel():
        raise IndexError(f"label {bad[0].item()} is outside 0..{logits.shape[1] - 1} and is not {IGNORED}.")
    return F.cross_entropy(wide(logits), own, ignore_index=IGNORED, reduction="sum")
