"""Residual add and LayerNorm, whose rows are handed on as 8-bit floats: s, y = add_layer_norm(...), q, scale = q(y).

Shapes: x, residual [..., D]; weight, bias [D] or None; s [..., D] in the wider dtype of the two; q [..., D]
float8_e4m3fn and scale [...] float32 of y, which is rounded to the dtype of x first. Source: pre-norm block,
Dosovitskiy et al. 2021, eq. 2-3; Micikevicius et al. 2022, FP8 Formats for Deep Learning.
"""

from .add_layer_norm import add_layer_norm
from .linear_fp8 import quantize_fp8


def add_layer_norm_fp8(x, residual, weight, bias, eps):
    s, y = add_layer_norm(x, residual, weight, bias, eps)
    return s, *quantize_fp8(y)
