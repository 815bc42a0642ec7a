"""Visual question answering: binary cross entropy of soft scores, times the number of answers.

Source: ViLT (Kim et al. 2021) sec. 4.2; `compute_vqa` of the original.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import InputError
from ..ops._check import limits
from ._batch import of_forward, tensor, wide


def vqa_loss(model: nn.Module, batch: Mapping) -> torch.Tensor:
    """Mean binary cross entropy of the logits, times the number of answers (the sum of a sample's, averaged).

    Args:
        model: `ViltForQuestionAnswering`, accelerated or not, or what wraps one: it is called.
        batch: input_ids, pixel_values and their masks; `labels` floating [B, answers], scores in 0..1.

    Returns:
        A scalar in at least float32.

    Raises:
        InputError: labels are missing, of another shape, no floats, or beyond 0..1 (looked at on a CPU).
    """
    labels = tensor(batch, "labels", (None, None), "soft scores of the answers")
    if not labels.is_floating_point():
        raise InputError(f"labels must be floating scores [B, answers], got {labels.dtype}.")
    low, high = limits(labels) or (0, 1)
    if not (low >= 0 and high <= 1):
        raise InputError(f"labels must be scores in [0, 1], got values from {low} to {high}.")
    logits = wide(model(**of_forward(batch)).logits)
    tensor(batch, "labels", logits.shape)
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits)) * logits.shape[1]
