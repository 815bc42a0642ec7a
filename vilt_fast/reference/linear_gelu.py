"""Linear layer with exact GELU: h = x W^T + b; y = h/2 * (1 + erf(h / sqrt(2))).

Shapes: x [..., K]; weight [N, K]; bias [N] or None; y [..., N]. Wider parameters are rounded to the dtype of x.
Source: Hendrycks and Gimpel 2016, eq. 1 (the erf form, which ViLT uses; not the tanh approximation).
"""

import torch.nn.functional as F


def linear_gelu(x, weight, bias):
    weight, bias = (None if p is None else p.to(x.dtype) for p in (weight, bias))
    return F.gelu(F.linear(x, weight, bias), approximate="none")
