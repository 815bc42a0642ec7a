"""Retrieval: the text of an image is to score higher than texts that are not its own.

Of an accelerated model the image of 16 texts is embedded and projected once; its patches are repeated into the packed
rows of each, where dropout and the modality are each sample's own. From the first block on an image's rows differ from
text to text. Source: ViLT (Kim et al. 2021) sec. 4.3; `compute_irtr` of the original.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from ..models.vilt.reads import Reads
from ..models.vilt.states import states, trunk_of
from ._batch import tensor, wide


def retrieval_scores(model: nn.Module, batch: Mapping) -> torch.Tensor:
    """Scores [B, 1 + N] of each image with its own text and with N others, in that order.

    Args:
        model: `ViltForImageAndTextRetrieval`, accelerated or not.
        batch: input_ids [B, T], pixel_values and their masks; `false_input_ids` [B, N, T], `false_attention_mask`.

    Raises:
        InputError: missing or misshapen tensors.
    """
    trunk = trunk_of(model, "rank_output")
    ids = tensor(batch, "input_ids", (None, None))
    false = tensor(batch, "false_input_ids", (len(ids), None, ids.shape[1]), "texts that are not the image's")
    given = {name: batch.get(name) for name in ("pixel_values", "pixel_mask")}
    given["input_ids"] = torch.cat([ids[:, None], false], dim=1).flatten(0, 1)
    masks = batch.get("attention_mask"), batch.get("false_attention_mask")
    if any(mask is not None for mask in masks):
        own, others = (torch.ones_like(i) if m is None else m for m, i in zip(masks, (ids, false), strict=True))
        own = tensor({"attention_mask": own}, "attention_mask", ids.shape)
        others = tensor({"false_attention_mask": others}, "false_attention_mask", false.shape)
        given["attention_mask"] = torch.cat([own[:, None], others], dim=1).flatten(0, 1)
    texts = 1 + false.shape[1]
    image_of = tuple(image for image in range(len(ids)) for _ in range(texts))
    read = states(trunk, given, Reads(0), image_of)
    return model.rank_output(read.pooled)[:, 0].view(len(ids), texts)


def retrieval_loss(model: nn.Module, batch: Mapping) -> torch.Tensor:
    """Mean cross entropy of :func:`retrieval_scores`, in which the image's own text is the right class.

    The original draws 15 false texts an image; any number does. Returns a scalar in at least float32.
    """
    scores = wide(retrieval_scores(model, batch))
    return F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long, device=scores.device))
