"""Linear layer on 8-bit floats: y = act(x^ W^^T + b), x^ = q(x) s_x, W^ = q(W) s_W; q rounds to e4m3, a scale a row.

    s = max|row| / 448 (1 for a row of zeros), q = round(row / s)

Shapes: x [..., K]; weight [N, K] float8_e4m3fn; weight_scale [N] float32; bias [N] or None; y [..., N] in the dtype
of x. Scales and rounding are float32 whatever the dtype of x; products are summed in at least float32. Rows that are
e4m3 already come with their scales, [...], or [..., ceil(K / 128)], one for each 128 columns; y is in `dtype` then.
Source: Micikevicius et al. 2022, FP8 Formats for Deep Learning.
"""

import torch
import torch.nn.functional as F

LARGEST = 448.0  # of e4m3
GROUP = 128  # columns that share a scale where a row has several


def quantize_fp8(x):
    x = x.float()
    most = x.abs().amax(-1)
    scale = torch.where(most > 0, most / LARGEST, 1.0)
    return (x / scale.unsqueeze(-1)).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def linear_fp8(x, weight, weight_scale, bias, gelu=False, x_scale=None, dtype=None):
    if x_scale is None:
        (q, scale), dtype = quantize_fp8(x), x.dtype
    else:
        q, scale = x, x_scale
    wide = torch.promote_types(dtype, torch.float32)
    if scale.dim() == q.dim():
        q = q.to(wide) * scale.repeat_interleave(GROUP, -1)[..., : q.shape[-1]]
        y = F.linear(q, weight.to(wide)) * weight_scale
    else:
        y = F.linear(q.to(wide), weight.to(wide)) * scale.unsqueeze(-1) * weight_scale
    if bias is not None:
        y = y + bias
    return (F.gelu(y) if gelu else y).to(dtype)
