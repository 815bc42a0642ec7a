"""What pairs of both kinds of ViLT share: a text and an image embedded on their own, then put together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from ... import record
from ...engine import encode as engine
from ...engine.head import run_head
from ...engine.packing import Packing
from ..base import SwappedTrunk, swap_of
from ..pairs import Pairs, packing
from . import embedding, features
from .options import ViltOptions


class ViltPairs(Pairs):
    """Pairs of a model whose `trunk` is swapped by `swap`; what a kind of ViLT keeps elsewhere, its subclass says."""

    def __init__(self, model: nn.Module, head: str, trunk: nn.Module, swap: type[SwappedTrunk], text: nn.Module):
        super().__init__(model)
        self.head = head
        self.positions = text.position_embeddings.num_embeddings
        self.vocabulary = text.word_embeddings.num_embeddings
        swapped = swap_of(trunk)
        self._swapped = features.in_raster_order(swapped if isinstance(swapped, swap) else swap(trunk, ViltOptions()))

    def why_whole(self) -> str:
        return record.DISABLED if record.disabled() else self._why_own()

    def text(self, ids):
        return embedding.text_of(self._tables(), torch.arange(len(ids), device=ids.device), ids=ids)

    def pooled(self, texts: Sequence[torch.Tensor], images: Sequence[torch.Tensor]):
        places = packing([len(t) for t in texts], [len(i) for i in images], self.device)
        rows = torch.cat([rows for pair in zip(texts, images, strict=True) for rows in pair])
        return self._pooled(rows, places, apart=self.device.type == "cpu")

    def logits(self, pooled):
        return run_head(getattr(self.model, self.head), pooled, self._weights() if self.answers else None)

    def _why_own(self) -> str:
        """Why code of the model's own is between its parts, or ""."""
        raise NotImplementedError

    def _tables(self) -> embedding.Tables:
        raise NotImplementedError

    def _pooled(self, rows: torch.Tensor, places: Packing, *, apart: bool) -> torch.Tensor:
        """Pooled rows [B, D] of packed ones [N, D]; `apart` is that of `engine.pool`."""
        raise NotImplementedError

    def _image_options(self) -> ViltOptions:
        """Each image has the draws of one that comes first, so that none depends on those before it."""
        return dataclasses.replace(self._swapped.options, generator=torch.Generator().manual_seed(0))

    def _weights(self):
        return engine.in_force(self._swapped.weights, self._swapped.module)

    def _no_text(self):
        return torch.zeros(1, 0, dtype=torch.long, device=self.device)
