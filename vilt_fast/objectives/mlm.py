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
from . import _tokens
from ._batch import wide
from ._tokens import IGNORED


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
    return _tokens.labels_of(mlm_inputs(batch), "ids of tokens", "which masked language modelling learns")


def mlm_reads(model: nn.Module, labels: torch.Tensor, **others) -> Reads:
    """What is read of the samples that have these labels."""
    return _tokens.reads(labels, not why_head_not_packable(model.mlm_score), **others)


def of_states(
    head: nn.Module,
    found: States,
    labels: torch.Tensor,
    *,
    soft_labels: torch.Tensor | None = None,
    num_items: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of the text states that were read."""
    own, count = _tokens.of_read(found, labels)
    tokenwise = not why_head_not_packable(head)
    if tokenwise and type(head.decoder) is nn.Linear:
        rows, target, decoder = found.texts, own, head.decoder
        if soft_labels is not None:
            places, target = _soft(own, soft_labels)
            rows = rows.index_select(0, places)
        weights = decoder.weight, decoder.bias
        total = functional.linear_cross_entropy(head.transform(rows), *weights, target, reduction="sum")
    else:
        logits = _tokens.logits(head, found, labels.shape, tokenwise)
        if soft_labels is None:
            total = _tokens.summed(logits, own)
        else:
            places, target = _soft(own, soft_labels)
            logits = wide(logits.index_select(0, places))
            total = F.cross_entropy(logits, target.to(logits.dtype), reduction="sum")
    return total / (count if num_items is None else num_items)


def _soft(own, soft_labels):
    """(which of these are the labelled tokens, their probabilities, checked)."""
    labelled = own != IGNORED
    count = int(labelled.sum()) if compact(own) else len(soft_labels)
    if soft_labels.ndim != 2 or len(soft_labels) != count or not soft_labels.is_floating_point():
        raise InputError(
            f"soft_labels must be floating [{count}, vocabulary], a row a labelled token, got {soft_labels.dtype} "
            f"{list(soft_labels.shape)}."
        )
    # The first `count` of the labelled ones put first: picking by a mask would wait for the device.
    return torch.argsort(~labelled, stable=True)[:count], soft_labels.to(own.device)
