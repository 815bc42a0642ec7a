"""The original `ViLTransformerSS` on pairs of a text and an image that are embedded on their own."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import nn

from ... import record
from ...engine import encode as engine
from ...engine.head import run_head
from ...errors import InputError
from ..base import swap_of, wrapper_of
from ..pairs import Pairs, packing
from . import embedding, features
from .options import ViltOptions
from .original import InferSwap, _block, _is_original, _refusal, _tables, _why_not_known

_HEADS = ("rank_output", "vqa_classifier", "itm_score")


def find(model: nn.Module) -> Pairs | None:
    """`model` as a task on pairs; None where it is none that is known here."""
    if not _is_original(model):
        return None
    head = next((name for name in _HEADS if isinstance(getattr(model, name, None), nn.Module)), None)
    return None if head is None else OriginalPairs(model, head)


class OriginalPairs(Pairs):
    """`ViLTransformerSS` with its head for ranking, questions, or image-text matching, the first that it has."""

    def __init__(self, model: nn.Module, head: str):
        super().__init__(model)
        self.head, self.answers = head, head == "vqa_classifier"
        found = model.text_embeddings
        self.positions = found.position_embeddings.num_embeddings
        self.vocabulary = found.word_embeddings.num_embeddings
        swapped = swap_of(model)
        self._swapped = features.in_raster_order(
            swapped if isinstance(swapped, InferSwap) else InferSwap(model, ViltOptions())
        )

    def why_whole(self):
        model = self.model
        if record.disabled():
            return record.DISABLED
        if wrapper_of(model, "infer") is not None:
            return f"something is wrapped around the infer of {type(model).__name__}"
        return _refusal(model) or _why_not_known(model)

    def text(self, ids):
        found = _tables(self.model)
        return embedding.text_of(found, torch.arange(len(ids), device=ids.device), ids=ids)

    def image(self, pixels, mask):
        channels = self.model.transformer.patch_embed.proj.in_channels
        if pixels.shape[1] != channels:
            raise InputError(f"image must have {channels} channels, [1, {channels}, H, W], got {list(pixels.shape)}.")
        none = torch.zeros(1, 0, dtype=torch.long, device=self.device)
        swapped = features.in_raster_order(self._swapped)
        swapped.options = dataclasses.replace(swapped.options, generator=torch.Generator().manual_seed(0))
        return swapped._embed(none, none, _masked(pixels, mask), None, None, 1)[0]

    def pooled(self, texts, images):
        model = self.model
        places = packing([len(t) for t in texts], [len(i) for i in images], self.device)
        rows = torch.cat([rows for pair in zip(texts, images, strict=True) for rows in pair])
        norm, pooler = model.transformer.norm, model.pooler
        few = not (engine.why_norm_padded(norm) or engine.why_pooler_padded(pooler, True))
        describe = functools.partial(_block, masks=places.key_mask())
        wanted = places.pooled if few else None
        encoded = self._swapped.encode(model.transformer.blocks, describe, rows, places, wanted=wanted)
        rows, apart = engine.final_norm(norm, encoded.rows, places), self.device.type == "cpu"
        return engine.pool(pooler, rows, places, selected=few, apart=apart)

    def whole(self, ids, pixels, mask):
        ids = ids[None]
        batch = {"text_ids": ids, "text_masks": torch.ones_like(ids), "text_labels": ids}
        feats = self.model.infer(batch | {"image": [_masked(pixels, mask)]})["cls_feats"]
        return getattr(self.model, self.head)(feats)

    def logits(self, pooled):
        weights = engine.in_force(self._swapped.weights, self.model) if self.answers else None
        return run_head(getattr(self.model, self.head), pooled, weights)


def _masked(pixels, mask):
    """Zero beside the image, by which the original knows where it ends."""
    return pixels if mask is None else pixels * (mask[:, None] != 0).to(pixels.dtype)
