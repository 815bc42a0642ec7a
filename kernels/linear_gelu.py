"""Linear layer with exact GELU for Triton: h = x W^T + b; y = h/2 * (1 + erf(h / sqrt 2)).

Shapes: x [..., K]; weight [N, K]; bias [N] or None; y [..., N].

Forward: the matrix product of kernels/linear.py with GELU in its epilogue. When a gradient is wanted, h is written too,
rounded to the dtype of x, rather than multiplied again in the backward: for a batch of 64 that is one more write of
85 MB against a product of 65 GFLOP, which on paper (data-sheet bandwidth and matmul peak) takes three times as long.
The backward reads h either way, and plain PyTorch keeps it too. Gradient checkpointing trades the memory back.

Backward: dh = dy * (Phi(h) + h phi(h)) in one elementwise pass that also leaves the column sums of dh, for db, per
group of rows; summing the groups is a second, small pass in a fixed order, so equal runs give equal bits. dx = dh W and
dW = dh^T x are library products.
"""

import torch
import triton
import triton.language as tl

from . import _aot, _device, linear
from ._gelu import SQRT_HALF
from ._tiles import cdiv

INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
_BACKWARD, _GROUPS = dict(BLOCK_M=8, BLOCK_N=256, num_warps=4), 128


@triton.jit(do_not_specialize=["M", "rows_each"])
def _linear_gelu_bwd_kernel(grad, pre, dpre, sums, M, N, rows_each, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dpre = grad * gelu'(pre) for ``rows_each`` rows of BLOCK_N columns; their column sums go to sums[group]."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(1)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(group * rows_each, tl.minimum(M, (group + 1) * rows_each), BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        inside = (rows < M)[:, None] & (cols < N)[None, :]
        at = rows.to(tl.int64)[:, None] * N + cols[None, :]
        h = tl.load(pre + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        slope = 0.5 * (1.0 + tl.erf(h * SQRT_HALF)) + h * (INV_SQRT_2PI * tl.exp(-0.5 * h * h))
        g *= slope
        tl.store(dpre + at, g.to(dpre.dtype.element_ty), mask=inside)
        total += g
    if sums is not None:
        tl.store(sums + group.to(tl.int64) * N + cols, tl.sum(total, 0), mask=cols < N)


def supports(*, device=None, dtype=None, weight_dtype=None, requires_grad=False):
    """ "" when Triton can run this, else why not."""
    return linear.supports(device=device, dtype=dtype, weight_dtype=weight_dtype)


def linear_gelu_fwd(*, x, weight, bias, keep):
    """Kept is the pre-activation h in the dtype of x."""
    out, pre = linear.launch(x, weight, bias, None, gelu=True, save=keep, out_dtype=x.dtype)
    return (out,), (pre,) if keep else ()


def through_gelu(grad, pre, with_sums):
    """(dh, its column sums in float32 or None) from dy and h."""
    dpre = torch.empty_like(pre, memory_format=torch.contiguous_format)
    N = pre.shape[-1]
    grad, flat = grad.contiguous(), pre.contiguous().view(-1, N)
    M = flat.shape[0]
    rows_each = max(cdiv(cdiv(M, _BACKWARD["BLOCK_M"]), _GROUPS), 1) * _BACKWARD["BLOCK_M"]
    groups = cdiv(M, rows_each)
    sums = pre.new_empty(groups, N, dtype=torch.float32) if with_sums else None
    if dpre.numel():
        with _device.on(pre):
            _linear_gelu_bwd_kernel[(cdiv(N, _BACKWARD["BLOCK_N"]), groups)](
                grad, flat, dpre, sums, M, N, rows_each, **_BACKWARD
            )
    return dpre, sums.sum(0) if with_sums else None


def linear_gelu_bwd(*, needs, grad_out, x, weight, bias, pre):
    need_x, need_weight, need_bias = needs
    dpre, sums = through_gelu(grad_out, pre, need_bias)
    dbias = sums.to(bias.dtype) if need_bias else None
    return (*linear.products(dpre, x, weight, need_x, need_weight), dbias), ()


def aot_cases():
    yield from linear.aot_variants("linear_gelu", ((3072, 768),), gelu=True, pre=(False, True))
    for dtype in ("bf16", "fp32"):
        yield _aot.case(_linear_gelu_bwd_kernel, f"linear_gelu backward {dtype}", dtype, _BACKWARD)
