"""CUDA graphs without a GPU: a recording is a plain call that writes to the same memory, so that all around it is the
same: what is not written before a replay, or is read where it no longer is, shows as wrong numbers."""

import copy

import torch

import vilt_fast
from support.models import batch, build, call, leaves
from vilt_fast import functional, record
from vilt_fast.engine import graphs, native

GPU = torch.cuda.is_available()
SMALL = {"hidden_size": 64, "num_hidden_layers": 2}


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


def small(device, kind="trunk", **options):
    """(plain accelerated model, the same with graphs), equal weights."""
    model = build(kind, torch.float32, **SMALL).to(device)
    with_graphs = vilt_fast.accelerate(copy.deepcopy(model), cuda_graphs=True, **options)
    return vilt_fast.accelerate(model, cuda_graphs=False, **options), with_graphs


def inputs_of(device, samples=slice(None), **more):
    found = batch("trunk", torch.float32, **more)
    return {k: v[samples].to(device) for k, v in found.items()}


def cache(model):
    return model.forward.graphs


@torch.no_grad()
def assert_same(model, other, inputs, **more):
    """Bucketed rows go through the same kernels, but matrix products may be tiled otherwise."""
    mine, plain = call(model, inputs, **more), call(other, inputs, **more)
    for (path, a), (_, b) in zip(leaves(mine), leaves(plain), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, path=path: f"{path}: {text}")
    return mine


@torch.no_grad()
def call_quietly(model, inputs):
    return call(model, inputs)


def in_place(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)


def through_data(model):
    for p in model.parameters():
        p.data = p.data * 1.1
