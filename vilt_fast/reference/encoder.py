"""A stack of pre-norm transformer blocks over packed rows: x += O(attention(QKV(LN1 x))); x += FC2(gelu(FC1(LN2 x))).

Shapes: x [N, D]; parameters: those of a `LayerParameters` a layer, end to end; eps: 2 floats a layer. Returns the
residual stream [N, D] after the last block (before the final norm), its `wanted` rows, or that after every block
[layers, N, D].

`compute` says how the operands of the matrix products are represented; everything else (sums, norms, softmax, the
residual stream) stays in the dtype of x:

    float32    as they are
    bfloat16   rounded to bfloat16
    int8       linear layers: weights to 8 bits per output channel, symmetric, scale max|w|/127;
               inputs to 8 bits per row, asymmetric, over [min(x, 0), max(x, 0)]; attention operands as bfloat16

Source: Dosovitskiy et al. 2021, eq. 2-3; per-row activations as in ZeroQuant (Yao et al. 2022), sec. 4.1.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import attention


class LayerParameters(NamedTuple):
    """The tensors of one block, in the order that `encoder` takes them (and csrc/cpu's `Layer` has them)."""

    norm1_weight: Tensor  #: [D]
    norm1_bias: Tensor
    query_weight: Tensor  #: [D, D], [out, in] like all weights; a missing bias is an empty tensor
    query_bias: Tensor
    key_weight: Tensor
    key_bias: Tensor
    value_weight: Tensor
    value_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    fc1_weight: Tensor  #: [inner, D]
    fc1_bias: Tensor
    fc2_weight: Tensor  #: [D, inner]
    fc2_bias: Tensor

    @classmethod
    def layers(cls, parameters):
        """Those of each layer, from all of them end to end."""
        size = len(cls._fields)
        return [cls(*parameters[i : i + size]) for i in range(0, len(parameters), size)]


#: What has a weight matrix and a bias: `<name>_weight`, `<name>_bias`.
MATRICES = ("query", "key", "value", "out", "fc1", "fc2")


def _bfloat16(t):
    return t.to(torch.bfloat16).to(t.dtype)


def quantized_rows(x):
    """x [..., K] rounded to 256 levels a row; zero is a level."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).tiny)
    zero = (-low / scale).round()
    return ((x / scale).round().add(zero).clamp(0, 255) - zero) * scale


def quantized_channels(weight):
    """weight [N, K] rounded to -127..127 times one scale an output channel."""
    scale = (weight.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight / scale).round() * scale


def _same(t):
    return t


_ROUNDING = {  # compute: (inputs of a linear layer, its weight, q/k/v)
    "float32": (_same, _same, _same),
    "bfloat16": (_bfloat16, _bfloat16, _bfloat16),
    "int8": (quantized_rows, quantized_channels, _bfloat16),
}


def supports(
    *, device=None, dtype=None, compute="float32", head_dim=64, blobs=False, parameter_dtypes=(), requires_grad=False
):  # fmt: skip
    """Takes the float weights, and emulates int8 from them; the blobs of `quantize_linear` are opaque."""
    return "it takes float weights; blobs of quantize_linear belong to the cpp backend." if blobs else ""


def encoder(
    x, parameters, cu_seqlens, seqused_k, max_seqlen, *, num_heads, eps, compute="float32", return_hidden=False,
    wanted=None, cu_wanted=None,
):  # fmt: skip
    rows_like, weight_like, operand_like = _ROUNDING[compute]
    parameters = [p.to(x.dtype) for p in parameters]

    def linear(x, weight, bias):
        return F.linear(rows_like(x), weight_like(weight), bias if bias.numel() else None)

    hidden = []
    for layer, p in enumerate(LayerParameters.layers(parameters)):
        y = F.layer_norm(x, x.shape[-1:], p.norm1_weight, p.norm1_bias, eps[2 * layer])
        weights = ((p.query_weight, p.query_bias), (p.key_weight, p.key_bias), (p.value_weight, p.value_bias))
        q, k, v = (operand_like(linear(y, w, b)).unflatten(-1, (num_heads, -1)) for w, b in weights)
        y = attention(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, seqused_k=seqused_k).flatten(1)
        x = x + linear(y, p.out_weight, p.out_bias)
        y = F.layer_norm(x, x.shape[-1:], p.norm2_weight, p.norm2_bias, eps[2 * layer + 1])
        x = x + linear(F.gelu(linear(y, p.fc1_weight, p.fc1_bias)), p.fc2_weight, p.fc2_bias)
        hidden.append(x)
    if return_hidden:
        return torch.stack(hidden)
    return x if wanted is None else x[wanted]
