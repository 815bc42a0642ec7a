"""The original `ViLTransformerSS` on pairs of a text and an image that are embedded on their own."""

from __future__ import annotations

import functools

import torch
from torch import nn

from ...engine import encode as engine
from ...errors import InputError
from ..base import wrapper_of
from . import features
from .original import InferSwap, _block, _is_original, _refusal, _tables, _why_not_known
from .pairs import ViltPairs

_HEADS = ("rank_output", "vqa_classifier", "itm_score")


def find(model: nn.Module) -> ViltPairs | None:
    """`model` as a task on pairs; None where it is none that is known here."""
    if not _is_original(model):
        return None
    head = next((name for name in _HEADS if isinstance(getattr(model, name, None), nn.Module)), None)
    return None if head is None else OriginalPairs(model, head)


class OriginalPairs(ViltPairs):
    """`ViLTransformerSS` with its head for ranking, questions, or image-text matching, the first that it has."""

    def __init__(self, model: nn.Module, head: str):
        super().__init__(model, head, model, InferSwap, model.text_embeddings)
        self.answers = head == "vqa_classifier"

    def image(self, pixels, mask):
        channels = self.model.transformer.patch_embed.proj.in_channels
        if pixels.shape[1] != channels:
            raise InputError(f"image must have {channels} channels, [1, {channels}, H, W], got {list(pixels.shape)}.")
        none = self._no_text()
        swapped = features.in_raster_order(self._swapped)
        swapped.options = self._image_options()
        return swapped._embed(none, none, _masked(pixels, mask), None, None, 1)[0]

    def whole(self, ids, pixels, mask):
        ids = ids[None]
        batch = {"text_ids": ids, "text_masks": torch.ones_like(ids), "text_labels": ids}
        feats = self.model.infer(batch | {"image": [_masked(pixels, mask)]})["cls_feats"]
        return getattr(self.model, self.head)(feats)

    def _why_own(self):
        model = self.model
        if wrapper_of(model, "infer") is not None:
            return f"something is wrapped around the infer of {type(model).__name__}"
        return _refusal(model) or _why_not_known(model)

    def _tables(self):
        return _tables(self.model)

    def _pooled(self, rows, places, *, apart):
        norm, pooler = self.model.transformer.norm, self.model.pooler
        few = not (engine.why_norm_padded(norm) or engine.why_pooler_padded(pooler, True))
        describe = functools.partial(_block, masks=places.key_mask())
        wanted = places.pooled if few else None
        encoded = self._swapped.encode(self.model.transformer.blocks, describe, rows, places, wanted=wanted)
        return engine.pool(pooler, engine.final_norm(norm, encoded.rows, places), places, selected=few, apart=apart)


def _masked(pixels, mask):
    """Zero beside the image, by which the original knows where it ends."""
    return pixels if mask is None else pixels * (mask[:, None] != 0).to(pixels.dtype)
