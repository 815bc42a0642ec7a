"""What a family offers for scoring pairs: a text and an image are embedded on their own, then put together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from ..engine.packing import Packing


class Pairs:
    """A task on pairs of a text and an image, in steps. Families derive from it.

    What `text` and `image` give depends on nothing else, so that it can be kept and put together with any other.
    """

    head: str  #: what gives a pair its logits: its name in the model
    answers = False  #: whether a pair has a logit an answer, and not one score
    names: dict[int, str] = {}  #: what answers are called, where the model knows
    positions: int  #: tokens of the longest text
    vocabulary: int  #: ids are below it

    def __init__(self, model: torch.nn.Module):
        self.model = model
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    def why_whole(self) -> str:
        """Why texts and images cannot be embedded on their own and the model is to be given whole pairs, or ""."""
        raise NotImplementedError

    def text(self, ids: torch.Tensor) -> torch.Tensor:
        """Embedded rows [t, D] of token ids [t]."""
        raise NotImplementedError

    def image(self, pixels: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Embedded rows [1 + P, D] of an image [1, C, H, W] whose real pixels are `mask` [1, H, W], or all."""
        raise NotImplementedError

    def pooled(self, texts: Sequence[torch.Tensor], images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Pooled rows [B, D] of pairs of embedded texts and images."""
        raise NotImplementedError

    def whole(self, ids: torch.Tensor, pixels: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Logits [1, classes] of one pair, by the model's own forward."""
        raise NotImplementedError

    def logits(self, pooled: torch.Tensor) -> torch.Tensor:
        """Logits [B, classes] of pooled rows [B, D]."""
        raise NotImplementedError

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """One score [B] a pair, the better the higher.

        Of two classes, as of image-text matching (no match, match), the log-odds of the second, which is where
        the ranking of the original begins: it has the same order as the probability of a match.
        """
        return logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]


def packing(texts: Sequence[int], images: Sequence[int], device: torch.device) -> Packing:
    """Where the rows of pairs go: those of the text (so many each), then those of the image; all of them are keys.

    Padded, texts begin at 0 and images where the longest text ends, as the reference lays them.
    """
    width = max(texts) + max(images)
    lengths = tuple(t + i for t, i in zip(texts, images, strict=True))
    starts = np.array([0, *itertools.accumulate(lengths)])
    places = [
        b * width + np.concatenate([np.arange(t), max(texts) + np.arange(i)])
        for b, (t, i) in enumerate(zip(texts, images, strict=True))
    ]
    with torch.inference_mode(False):
        made = Packing(
            width=width,
            lengths=lengths,
            key_lengths=lengths,
            cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
            seqused_k=torch.tensor(lengths, dtype=torch.int32),
            pool_rows=torch.from_numpy(starts[:-1].astype(np.int64)),
            padded_rows=torch.arange(int(starts[-1])),
            padded_places=torch.from_numpy(np.concatenate(places)),
            dense=len(set(texts)) == len(set(images)) == 1,
        )
        return made.to(device)
