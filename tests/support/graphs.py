"""CUDA graphs without a GPU: a recording is a plain call that writes to the same memory, so that all around it is the
same: what is not written before a replay, or is read where it no longer is, shows as wrong numbers."""

import torch

from vilt_fast import functional, record
from vilt_fast.engine import graphs, native


class Again:
    """A recording on the CPU."""

    made = 0

    def __init__(self, function, device, pool):
        type(self).made += 1
        self.function, self.result = function, function()

    def replay(self):
        with record.unheard():
            for kept, new in zip(self.result, self.function(), strict=True):
                kept.copy_(new)


def played(monkeypatch) -> None:
    """Play a GPU for the rest of a test."""
    monkeypatch.setattr(Again, "made", 0)
    monkeypatch.setattr(graphs, "Recording", Again)
    monkeypatch.setattr(graphs, "why_not_usable", lambda device: "")
    monkeypatch.setattr(native, "unavailable", lambda rows: "as on a GPU")
    attention = functional.attention

    def as_on_a_gpu(q, k, v, cu_seqlens_q, cu_seqlens_k, *rest, **options):
        """Rows of no sample are not computed: what their memory held before is anything."""
        m, n = int(cu_seqlens_q[-1]), int(cu_seqlens_k[-1])
        out = attention(q[:m], k[:n], v[:n], cu_seqlens_q, cu_seqlens_k, *rest, **options)
        return torch.cat([out, out.new_full((len(q) - m, *out.shape[1:]), float("nan"))])

    monkeypatch.setattr(functional, "attention", as_on_a_gpu)
