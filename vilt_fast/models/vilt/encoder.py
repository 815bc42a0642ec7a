"""HuggingFace's `ViltEncoder` by itself: the blocks of a trunk whose own `forward` is not HuggingFace's.

What such a trunk reads of the result is not known, so no row is left out: padded positions are computed as rows that
look at others and that nobody looks at. That saves no rows, only the time that a row takes.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from transformers.modeling_outputs import BaseModelOutput

from ...engine.packing import Packing
from ..base import SwappedTrunk
from . import release
from .options import ViltOptions
from .trunk import _block

_ARGUMENTS = frozenset("hidden_states attention_mask output_attentions output_hidden_states return_dict".split())


class EncoderForward(SwappedTrunk):
    """`ViltEncoder.forward`, padded in and padded out."""

    options_type = ViltOptions
    part = "blocks"

    def compute(self, *args, **kwargs):
        given = release.understood(self.module, _ARGUMENTS, args, kwargs)
        why = release.NOT_UNDERSTOOD if given is None else self.why_transformed(given)
        hidden_states, attention_mask = (given or {}).get("hidden_states"), (given or {}).get("attention_mask")
        keys = None if why or hidden_states is None else _keys(hidden_states, attention_mask)
        if not why and given.get("output_attentions"):
            why = "attentions are wanted"
        if why or keys is None or not keys.any(1).all():
            self.say_own(why or "its mask says more than who is looked at")
            return self.own(*args, **kwargs)
        packing = _packing(keys).to(hidden_states.device)
        encoded = self.encode(
            self.module.layer,
            functools.partial(_with_mask, attention_mask, self.module),
            packing.pack(hidden_states),
            packing,
            want_hidden=given.get("output_hidden_states", False),
        )
        dtype = hidden_states.dtype
        result = packing.unpack(encoded.rows.to(dtype))
        hidden = tuple(h.to(dtype) for h in encoded.hidden_states) or None
        if not given.get("return_dict", True):
            return (result,) if hidden is None else (result, hidden)
        return BaseModelOutput(last_hidden_state=result, hidden_states=hidden)

    def foretell_parts(self):
        self.foretell_blocks(self.module.layer, functools.partial(_block, encoder=self.module))

    def features(self, inputs, device):
        raise TypeError(
            "the trunk has a forward of its own, around HuggingFace's encoder: which of its tokens are words and which "
            "patches is not known. Pass a model whose trunk keeps the forward of ViltModel."
        )


@torch.compiler.disable  # reads the mask on the host
def _keys(hidden, mask) -> torch.Tensor | None:
    """bool [B, L] of an additive mask [B, 1, L, L]: who is looked at; None where it says more than that."""
    batch, length = hidden.shape[:2]
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool)
    if mask.shape not in ((batch, 1, 1, length), (batch, 1, length, length)) or not mask.is_floating_point():
        return None
    if not (mask == mask[:, :, :1]).all() or not ((mask == 0) | (mask <= torch.finfo(mask.dtype).min)).all():
        return None
    return (mask[:, 0, 0] == 0).cpu()


@torch.compiler.disable
def _packing(keys: torch.Tensor) -> Packing:
    """All positions of each sample as rows, those that are looked at first."""
    batch, width = keys.shape
    order = torch.argsort(~keys, dim=1, stable=True)
    starts = torch.arange(batch) * width
    counts = keys.sum(1)
    return Packing(
        width=width,
        lengths=(width,) * batch,
        key_lengths=tuple(counts.tolist()),
        cu_seqlens=torch.arange(batch + 1, dtype=torch.int32) * width,
        seqused_k=counts.int(),
        pool_rows=starts + order.argsort(1)[:, 0],
        padded_rows=torch.arange(batch * width),
        padded_places=(starts[:, None] + order).flatten(),
        dense=bool(keys.all()),
    )


def _with_mask(mask, encoder, layer):
    def call_padded(hidden, packing, want_attention):
        return release.call_layer(layer, encoder, hidden, mask, False)

    return dataclasses.replace(_block(layer, encoder), call_padded=call_padded)
