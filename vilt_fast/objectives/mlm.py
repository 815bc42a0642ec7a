"""Masked language modelling: the head's cross entropy on the labelled tokens, the only ones that it is computed for.

Of the trunk, the last block computes keys and values of all rows and the rest of the labelled ones alone; the head runs
on these, and `functional.linear_cross_entropy` keeps no [tokens, vocabulary] logits.
Source: ViLT (Kim et al. 2021) sec. 3.2; `compute_mlm` of the original.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from .. import functional
from ..errors import InputError
from ..models.vilt.reads import Reads
from ..models.vilt.states import States, compact, states, trunk_of
from ..models.vilt.tasks import why_head_not_packable
from ._batch import tensor, wide

IGNORED = -100  #: the label of a token that is as it was


def mlm_loss(model: nn.Module, batch: Mapping, *, num_items: int | torch.Tensor | None = None) -> torch.Tensor:
    """Mean cross entropy of the masked tokens.

    Args:
        model: has a `vilt` and an `mlm_score`: `ViltForMaskedLM`, :class:`ViltForPreTraining`; accelerated or not. A
            head that has hooks or is not HuggingFace's own is called itself, on all text tokens.
        batch: `mlm_input_ids` (`input_ids` where it is missing), `labels` int64 [B, T], -100 where nothing is to be
            predicted; attention_mask, token_type_ids; pixel_values, pixel_mask. With `soft_labels`, float
            [n, vocabulary], the n labelled tokens, in the order of `labels`, are held against these probabilities.
        num_items: divide the sum by this in place of the number of labelled tokens, for accumulated gradients.

    Returns:
        A scalar in at least float32; 0 with gradient 0 where no token is labelled (the original: NaN).

    Raises:
        InputError: missing or misshapen tensors. IndexError: a label is neither -100 nor in the vocabulary (looked at
        on a CPU). ValueError: a label is of padding.
    """
    trunk = trunk_of(model, "mlm_score")
    given, labels = mlm_inputs(batch), mlm_labels(batch)
    found = states(trunk, given, mlm_reads(model, labels))
    return of_states(model.mlm_score, found, labels, soft_labels=batch.get("soft_labels"), num_items=num_items)


def mlm_inputs(batch: Mapping) -> dict:
    """The batch with its masked text as `input_ids`."""
    masked = batch.get("mlm_input_ids")
    return dict(batch) if masked is None else {**batch, "input_ids": masked}


def mlm_labels(batch: Mapping) -> torch.Tensor:
    """The labels, shaped as the text is."""
    ids = tensor(mlm_inputs(batch), "input_ids", (None, None))
    labels = tensor(batch, "labels", ids.shape, "which masked language modelling learns")
    if labels.dtype != torch.int64:
        raise InputError(f"labels must be int64 ids of tokens, got {labels.dtype}.")
    return labels


def mlm_reads(model: nn.Module, labels: torch.Tensor, **others) -> Reads:
    """What is read of the samples that have these labels."""
    picked = compact(labels) and not why_head_not_packable(model.mlm_score)
    return Reads(len(labels), labels != IGNORED if picked else None, **others)


def of_states(
    head: nn.Module,
    found: States,
    labels: torch.Tensor,
    *,
    soft_labels: torch.Tensor | None = None,
    num_items: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of the text states that were read."""
    flat = labels.flatten()
    own = flat.to(found.places.device).index_select(0, found.places)
    labelled = (flat != IGNORED).sum()
    if compact(labels) and (own != IGNORED).sum() != labelled:
        raise ValueError(
            "labels name padding (attention_mask 0), which is not computed: label it -100, or compute it, with "
            "vilt_fast.accelerate(model, padding='reference')."
        )
    if why_head_not_packable(head):
        rows = _padded(found, labels.shape)
        logits = head(rows).flatten(0, 1).index_select(0, found.places)
        total = _cross_entropy(logits, own, soft_labels)
    elif type(head.decoder) is nn.Linear:
        rows, decoder = head.transform(found.texts), head.decoder
        target = own if soft_labels is None else _soft(own, soft_labels)
        if soft_labels is not None:
            rows = rows[own != IGNORED]
        total = functional.linear_cross_entropy(rows, decoder.weight, decoder.bias, target, reduction="sum")
    else:
        total = _cross_entropy(head(found.texts), own, soft_labels)
    if num_items is None:
        num_items = labelled.clamp(min=1).to(total.device)
    return total / num_items


def _padded(found, shape):
    rows = found.texts.new_zeros(shape.numel(), found.texts.shape[1])
    return rows.index_copy(0, found.places, found.texts).view(*shape, -1)


def _soft(own, soft_labels):
    """The probabilities of the labelled tokens, checked."""
    if soft_labels.ndim != 2 or len(soft_labels) != (own != IGNORED).sum() or not soft_labels.is_floating_point():
        raise InputError(
            f"soft_labels must be floating [{int((own != IGNORED).sum())}, vocabulary], a row a labelled token, got "
            f"{soft_labels.dtype} {list(soft_labels.shape)}."
        )
    return soft_labels.to(own.device)


def _cross_entropy(logits, own, soft_labels):
    if soft_labels is not None:
        return F.cross_entropy(wide(logits[own != IGNORED]), wide(_soft(own, soft_labels)), reduction="sum")
    if compact(own) and ((own != IGNORED) & ((own < 0) | (own >= logits.shape[1]))).any():
        raise IndexError(f"labels must be {IGNORED} or in [0, {logits.shape[1]}).")
    return F.cross_entropy(wide(logits), own, ignore_index=IGNORED, reduction="sum")
