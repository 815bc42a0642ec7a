"""Queries, keys and values: three linear layers of the same rows.

Shapes: x [..., K]; weights [N, K]; biases [N] or None; each of the three [..., N]. Source: torch.nn.functional.linear.
"""

import torch.nn.functional as F


def linear_qkv(x, query_weight, key_weight, value_weight, query_bias, key_bias, value_bias):
    sides = (query_weight, query_bias), (key_weight, key_bias), (value_weight, value_bias)
    return tuple(F.linear(x, weight, bias) for weight, bias in sides)
