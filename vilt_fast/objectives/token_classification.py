"""Token classification: cross entropy of labelled text tokens, of which alone the last block computes all."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..models.vilt.states import states, trunk_of
from ..models.vilt.tasks import why_classifier_not_packable
from . import _tokens


def token_classification_loss(model: nn.Module, batch: Mapping) -> torch.Tensor:
    """Mean cross entropy of the labelled tokens.

    Args:
        model: `ViltForTokenClassification`, accelerated or not.
        batch: input_ids, pixel_values and their masks; `labels` int64 [B, T], -100 where nothing is to be predicted.

    Returns:
        A scalar in at least float32; 0 with gradient 0 where no token is labelled.

    Raises:
        InputError: missing or misshapen tensors. IndexError: a label is neither -100 nor a class. ValueError: one is
        of padding. Values are looked at on a CPU.
    """
    trunk = trunk_of(model, "classifier", "dropout")
    labels = _tokens.labels_of(batch, "classes of tokens")
    tokenwise = not why_classifier_not_packable(model)
    found = states(trunk, batch, _tokens.reads(labels, tokenwise))
    own, count = _tokens.of_read(found, labels)
    logits = _tokens.logits(lambda rows: model.classifier(model.dropout(rows)), found, labels.shape, tokenwise)
    return _tokens.summed(logits, own) / count
