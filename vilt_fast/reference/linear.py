"""Linear layer with residual: y = x W^T + b + residual.

Shapes: x [..., K]; weight [N, K]; bias [N] or None; residual [..., N] or None; y [..., N] in the wider dtype of x and
residual. Wider parameters are rounded to the dtype of x. Source: torch.nn.functional.linear.
"""

import torch.nn.functional as F


def linear(x, weight, bias, residual=None):
    y = F.linear(x, *(None if p is None else p.to(x.dtype) for p in (weight, bias)))
    return y if residual is None else y + residual
