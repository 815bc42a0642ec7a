"""The losses ViLT is trained with, on the ops of `vilt_fast.functional`.

Each takes a model, accelerated or not, and a batch, a dict of tensors with HuggingFace's names where it has one:

    input_ids, attention_mask, token_type_ids [B, T]; pixel_values [B, 3, H, W], pixel_mask [B, H, W]
    mlm_input_ids [B, T], labels [B, T]               masked text, and what it was (-100 where it is as it was)
    false_pixel_values [B, 3, H', W'], false_pixel_mask    an image that is not the text's
    false_input_ids [B, N, T], false_attention_mask        texts that are not the image's (retrieval, N = 15)

`labels` are soft scores [B, answers] for question answering, and classes [B] for NLVR2, whose samples have two images.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for type checkers and editors, which do not run __getattr__
    from .itm import itm_labels, itm_loss
    from .mlm import mlm_loss
    from .mpp import MaskedPatchHead, mpp_loss
    from .nlvr2 import nlvr2_loss
    from .pretraining import PretrainingOutput, ViltForPreTraining, pretraining_loss
    from .retrieval import retrieval_loss, retrieval_scores
    from .token_classification import token_classification_loss
    from .vqa import vqa_loss
    from .wpa import wpa_loss

_PUBLIC = {
    "MaskedPatchHead": "mpp",
    "PretrainingOutput": "pretraining",
    "ViltForPreTraining": "pretraining",
    "itm_labels": "itm",
    "itm_loss": "itm",
    "mlm_loss": "mlm",
    "mpp_loss": "mpp",
    "nlvr2_loss": "nlvr2",
    "pretraining_loss": "pretraining",
    "retrieval_loss": "retrieval",
    "retrieval_scores": "retrieval",
    "token_classification_loss": "token_classification",
    "vqa_loss": "vqa",
    "wpa_loss": "wpa",
}

__all__ = [
    "MaskedPatchHead", "PretrainingOutput", "ViltForPreTraining", "itm_labels", "itm_loss", "mlm_loss", "mpp_loss",
    "nlvr2_loss", "pretraining_loss", "retrieval_loss", "retrieval_scores", "token_classification_loss", "vqa_loss",
    "wpa_loss",
]  # fmt: skip


def __getattr__(name):
    """Public names are imported when they are first used: `objectives.wpa` needs no transformers."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
