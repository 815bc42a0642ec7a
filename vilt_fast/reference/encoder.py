"""A stack of pre-norm transformer blocks over packed rows: x += O(attention(QKV(LN1 x))); x += FC2(gelu(FC1(LN2 x))).

Shapes: x [N, D]; parameters: 16 tensors a layer, ln1.w ln1.b q.w q.b k.w k.b v.w v.b o.w o.b ln2.w ln2.b fc1.w fc1.b
fc2.w fc2.b (weights [out, in]; a missing bias is an empty tensor); eps: 2 floats a layer. Returns the residual stream
[N, D] after the last block (before the final norm), or after every block [layers, N, D].

`compute` says how the operands of the matrix products are represented; everything else (sums, norms, softmax, the
residual stream) stays in the dtype of x:

    float32    as they are
    bfloat16   rounded to bfloat16
    int8       linear layers: weights to 8 bits per output channel, symmetric, scale max|w|/127;
               inputs to 8 bits per row, asymmetric, over [min(x, 0), max(x, 0)]; attention operands as bfloat16

Source: Dosovitskiy et al. 2021, eq. 2-3; per-row activations as in ZeroQuant (Yao et al. 2022), sec. 4.1.
"""

import torch
import torch.nn.functional as F

from .attention import attention

PER_LAYER = 16
WEIGHTS = (2, 4, 6, 8, 12, 14)  # the linear weights within a layer's 16 parameters


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


def supports(op, weights="float", **facts):
    """Takes the float weights, and emulates int8 from them; the blobs of `quantize_linear` are opaque."""
    return "it takes float weights; blobs of quantize_linear belong to the cpp backend." if weights == "blob" else ""


def encoder(
    x, parameters, cu_seqlens, seqused_k, max_seqlen, *, num_heads, eps, compute="float32", return_hidden=False
):
    rows_like, weight_like, operand_like = _ROUNDING[compute]
    parameters = [p.to(x.dtype) for p in parameters]

    def linear(x, weight, bias):
        return F.linear(rows_like(x), weight_like(weight), bias if bias.numel() else None)

    hidden = []
    for layer, p in enumerate(parameters[i : i + PER_LAYER] for i in range(0, len(parameters), PER_LAYER)):
        ln1_w, ln1_b, q_w, q_b, k_w, k_b, v_w, v_b, o_w, o_b, ln2_w, ln2_b, fc1_w, fc1_b, fc2_w, fc2_b = p
        y = F.layer_norm(x, x.shape[-1:], ln1_w, ln1_b, eps[2 * layer])
        qkv = (linear(y, w, b) for w, b in ((q_w, q_b), (k_w, k_b), (v_w, v_b)))
        q, k, v = (operand_like(t).unflatten(-1, (num_heads, -1)) for t in qkv)
        y = attention(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, seqused_k=seqused_k).flatten(1)
        x = x + linear(y, o_w, o_b)
        y = F.layer_norm(x, x.shape[-1:], ln2_w, ln2_b, eps[2 * layer + 1])
        x = x + linear(F.gelu(linear(y, fc1_w, fc1_b)), fc2_w, fc2_b)
        hidden.append(x)
    return torch.stack(hidden) if return_hidden else x
