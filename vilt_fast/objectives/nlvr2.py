"""NLVR2: whether a text is true of two images, by cross entropy over the pooled outputs of both, side by side.

The original runs the text with each image by itself; an accelerated model runs both as one packed batch of 2B samples,
with the text embedded once. Source: ViLT (Kim et al. 2021) sec. 4.2; `compute_nlvr2` of the original.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from ._batch import classes, of_forward, tensor, wide


def nlvr2_loss(model: nn.Module, batch: Mapping) -> torch.Tensor:
    """Mean cross entropy.

    Args:
        model: `ViltForImagesAndTextClassification`, accelerated or not, or what wraps one: it is called.
        batch: input_ids, attention_mask; pixel_values [B, 2, 3, H, W], pixel_mask [B, 2, H, W]; `labels` [B].

    Returns:
        A scalar in at least float32.

    Raises:
        InputError: labels are missing, of another shape, or no classes (looked at on a CPU).
    """
    tensor(batch, "labels", (len(tensor(batch, "input_ids")),), "one a sample")
    logits = wide(model(**of_forward(batch)).logits)
    return F.cross_entropy(logits, classes(batch, "labels", logits.shape[:1], logits.shape[1]).to(logits.device))
