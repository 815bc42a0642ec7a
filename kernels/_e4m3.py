"""Rounding to e4m3, shared by the kernels that write it: q = v / scale, scale = max|v| / 448 of what shares one.

448 is the largest e4m3. What is all zeros has scale 1. A NaN or an infinity makes all that shares its scale NaN.
"""

import triton
import triton.language as tl

LARGEST = tl.constexpr(448.0)
GROUP = tl.constexpr(128)  #: columns that share a scale where a row has several
LEAST = tl.constexpr(2.0**-126)  #: scale of such: 1 / LEAST is finite


@triton.jit
def grown(most, v):
    """The larger of `most` and max|row| of float32 v [R, C]; NaN once anything is not finite."""
    return tl.maximum(most, tl.max(tl.abs(v), 1)) + tl.sum(v * 0.0, 1)


@triton.jit
def step_of(most):
    """The scales [R] of rows whose largest are `most`."""
    return tl.where(most == 0.0, 1.0, most / LARGEST)


@triton.jit
def scaled(v, step):
    """v [R, C] in units of its scales [R], within what e4m3 holds; a NaN passes through."""
    r = v / step[:, None]
    return tl.where(r > LARGEST, LARGEST, tl.where(r < -LARGEST, -LARGEST, r))
