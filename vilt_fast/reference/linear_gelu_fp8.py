"""Linear layer on 8-bit floats with exact GELU, its result e4m3 too: y = gelu(x^ W^^T + b), q = round(y / s).

    s = max|y| / 448 of each 128 columns of a row, at least 2^-126

Shapes: x [..., K], or e4m3 with x_scale as in linear_fp8; weight [N, K] float8_e4m3fn; weight_scale [N] float32; bias
[N] or None; q [..., N] float8_e4m3fn; s [..., ceil(N / 128)] float32. y is rounded once, from at least float32.
Source: Micikevicius et al. 2022, FP8 Formats for Deep Learning.
"""

import torch
import torch.nn.functional as F

from .linear_fp8 import GROUP, LARGEST, linear_fp8, quantize_fp8

LEAST = 2.0**-126


def linear_gelu_fp8(x, weight, weight_scale, bias, x_scale=None):
    wide = torch.float32
    if x_scale is None:
        (x, x_scale), wide = quantize_fp8(x), torch.promote_types(x.dtype, wide)
    y = linear_fp8(x, weight, weight_scale, bias, True, x_scale, wide)
    groups = F.pad(y, (0, -y.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    scale = (groups.abs().amax(-1).float() / LARGEST).clamp_min(LEAST)
    q = (groups / scale.unsqueeze(-1)).clamp(-LARGEST, LARGEST).flatten(-2)[..., : y.shape[-1]]
    return q.to(torch.float8_e4m3fn), scale
