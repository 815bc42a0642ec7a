"""A head on the rows that it reads, with 8-bit copies of its weights where they are asked for.

At batch 1 a classifier of 3129 answers reads 24 MB of float32, which are in no cache: that takes a third of the time of
a block.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .. import functional
from .listeners import any_hooked, is_plain
from .quantization import WeightCache
from .recomputed import recomputed

#: Weights of a matrix from which on a copy saves time: smaller ones stay in a core's cache.
_WORTHWHILE = 1 << 18


def run_head(head: nn.Module, rows: torch.Tensor, weights: WeightCache | None) -> torch.Tensor:
    """`head(rows)`; the large linear layers of a plain stack by their copies, if there are `weights`."""
    layers = _stack(head) if weights is not None and rows.device.type == "cpu" else []
    big = [type(layer) is nn.Linear and layer.weight.numel() >= _WORTHWHILE for layer in layers]
    if not any(big) or torch.is_autocast_enabled("cpu"):
        return head(rows)

    def fast(x):
        for place, (layer, copied) in enumerate(zip(layers, big, strict=True)):
            if copied:
                copy = weights.blob(f"head {place}", layer.weight)
                x = functional.linear_int8(x, copy, layer.bias, layer.out_features)
            else:
                x = layer(x)
        return x

    steps = [_step(layer) for layer in layers]

    def exact(x, *parameters):
        given = iter(parameters)
        for own, compute in steps:
            x = compute(x, *(None if p is None else next(given) for p in own))
        return x

    return recomputed(fast, exact, rows, [p for own, _ in steps for p in own if p is not None])


def _stack(head) -> list[nn.Module]:
    """The layers of a head that is a row of linear layers, norms and exact GELUs, and does nothing else; else none."""
    layers = list(head) if is_plain(head, nn.Sequential) else [head]
    if any_hooked(head) or not all(is_plain(layer, nn.Linear, nn.LayerNorm, nn.GELU) for layer in layers):
        return []
    if any(type(layer) is nn.GELU and layer.approximate != "none" for layer in layers):
        return []
    floats = {p.dtype for p in head.parameters()}
    return layers if floats <= {torch.float32} or floats <= {torch.bfloat16} else []


def _step(layer):
    """(parameters, function of x and these): what a layer computes, whatever becomes of the module."""
    if type(layer) is nn.Linear:
        return (layer.weight, layer.bias), F.linear
    if type(layer) is nn.LayerNorm:
        shape, eps = layer.normalized_shape, layer.eps
        return (layer.weight, layer.bias), lambda x, weight, bias: F.layer_norm(x, shape, weight, bias, eps)
    return (), F.gelu
