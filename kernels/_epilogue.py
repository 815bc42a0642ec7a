"""What becomes of a tile of float32 sums of products: scales, bias, GELU, residual, and how it is written.

The output is dense, [M, N], behind a tensor descriptor (TMA) or a pointer. `scales`: of x [M], of weight [N], of x by
groups of columns, of out by groups of columns; None where there are none.
"""

import triton
import triton.language as tl

from . import _tiles
from ._e4m3 import GROUP, LARGEST, LEAST
from ._gelu import gelu as _gelu


@triton.jit
def store(out, acc, m0, n0, M, N, TMA: tl.constexpr):
    """Write acc at (m0, n0) of the dense [M, N] matrix behind ``out``, a descriptor or a pointer."""
    if TMA:
        out.store([m0, n0], acc.to(out.dtype))
    else:
        rows = m0 + tl.arange(0, acc.shape[0])[:, None]
        cols = n0 + tl.arange(0, acc.shape[1])[None, :]
        tl.store(out + rows.to(tl.int64) * N + cols, acc.to(out.dtype.element_ty), mask=(rows < M) & (cols < N))


@triton.jit
def _biased(acc, m0, n0, scales, bias, M, N):
    cols = n0 + tl.arange(0, acc.shape[1])
    if scales[0] is not None:
        lines = m0 + tl.arange(0, acc.shape[0])
        acc *= tl.load(scales[0] + lines, mask=lines < M, other=0.0)[:, None]
    if scales[1] is not None:
        acc *= tl.load(scales[1] + cols, mask=cols < N, other=0.0)[None, :]
    if bias is not None:
        acc += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def finish(acc, m0, n0, scales, bias, residual, pre, out, M, N, stride_rm, GELU: tl.constexpr, TMA: tl.constexpr):
    cols = n0 + tl.arange(0, acc.shape[1])
    acc = _biased(acc, m0, n0, scales, bias, M, N)
    if pre is not None:
        store(pre, acc, m0, n0, M, N, TMA)
    if GELU is not None:
        acc = _gelu(acc, GELU)
    if residual is not None:
        rows = m0 + tl.arange(0, acc.shape[0])[:, None]
        at = residual + rows.to(tl.int64) * stride_rm + cols[None, :]
        acc += tl.load(at, mask=(rows < M) & (cols[None, :] < N), other=0.0).to(tl.float32)
    store(out, acc, m0, n0, M, N, TMA)


@triton.jit
def finish_halves(
    acc, m0, n0, scales, bias, residual, pre, out, M, N, stride_rm, GELU: tl.constexpr, TMA: tl.constexpr
):  # fmt: skip
    left, right = _tiles.halves(acc)
    finish(left, m0, n0, scales, bias, residual, pre, out, M, N, stride_rm, GELU, TMA)
    finish(right, m0, n0 + acc.shape[1] // 2, scales, bias, residual, pre, out, M, N, stride_rm, GELU, TMA)


@triton.jit
def _ready(acc, m0, n0, scales, bias, M, N, GELU: tl.constexpr, TMA: tl.constexpr):
    """(what is to be rounded to e4m3, the largest of each row) of a part of a tile."""
    acc = _gelu(_biased(acc, m0, n0, scales, bias, M, N), GELU)
    if not TMA:  # columns past the end have read the first one, descriptors read zeros
        acc = tl.where((n0 + tl.arange(0, acc.shape[1]) < N)[None, :], acc, 0.0)
    return acc, tl.max(tl.abs(acc), 1)


@triton.jit
def _step_of(most):
    """The scale of a group; NaN if all of it is, as of a row of x that is not finite."""
    return tl.maximum(most / LARGEST, LEAST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def finish_quantized(
    acc, m0, n0, scales, bias, out, M, N, GELU: tl.constexpr, TMA: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Write the tile as e4m3, its columns one group of scales. An infinity is in the scale, a NaN in out."""
    lines = m0 + tl.arange(0, acc.shape[0])
    steps = scales[3] + n0 // GROUP * M.to(tl.int64) + lines
    if PARTS == 4:
        quarter: tl.constexpr = acc.shape[1] // 4
        left, right = _tiles.halves(acc)
        a, b = _tiles.halves(left)
        c, d = _tiles.halves(right)
        a, most = _ready(a, m0, n0, scales, bias, M, N, GELU, TMA)
        b, other = _ready(b, m0, n0 + quarter, scales, bias, M, N, GELU, TMA)
        most = tl.maximum(most, other)
        c, other = _ready(c, m0, n0 + 2 * quarter, scales, bias, M, N, GELU, TMA)
        most = tl.maximum(most, other)
        d, other = _ready(d, m0, n0 + 3 * quarter, scales, bias, M, N, GELU, TMA)
        step = _step_of(tl.maximum(most, other))
        tl.store(steps, step, mask=lines < M)
        units = (1.0 / step)[:, None]
        store(out, a * units, m0, n0, M, N, TMA)
        store(out, b * units, m0, n0 + quarter, M, N, TMA)
        store(out, c * units, m0, n0 + 2 * quarter, M, N, TMA)
        store(out, d * units, m0, n0 + 3 * quarter, M, N, TMA)
    else:
        acc, most = _ready(acc, m0, n0, scales, bias, M, N, GELU, TMA)
        step = _step_of(most)
        tl.store(steps, step, mask=lines < M)
        store(out, acc * (1.0 / step)[:, None], m0, n0, M, N, TMA)
