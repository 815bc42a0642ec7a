"""Residual add and LayerNorm: s = dropout(x) + residual; y = (s - mean(s)) / sqrt(var(s) + eps) weight + bias.

Shapes: x, residual [..., D]; weight, bias [D] or None. Returns (s, y), both [..., D]: s in the wider dtype of
the two inputs, y in the dtype of x, so that the residual stream may be float32 while the layers run in bfloat16.
Mean and (biased) variance are over D. Source: pre-norm block, Dosovitskiy et al. 2021, eq. 2-3.
"""

import torch.nn.functional as F


def add_layer_norm(x, residual, weight, bias, eps, *, dropout_p=0.0):
    s = F.dropout(x, dropout_p) + residual
    weight, bias = (None if p is None else p.to(s.dtype) for p in (weight, bias))
    return s, F.layer_norm(s, s.shape[-1:], weight, bias, eps).to(x.dtype)
