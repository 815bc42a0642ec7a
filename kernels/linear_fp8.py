"""Linear layer on e4m3 for Triton (inference): out = act(x^ W^^T + b), x^ and W^ rounded to 8 bits, one scale a row.

Shapes: x [M, K] float32, float16 or bfloat16; weight [N, K] float8_e4m3fn with weight_scale [N] float32 from
``quantize_fp8``; bias [N] or None; out [M, N] in the dtype of x. NVIDIA from sm_89 on.

Two kernels: a pass over x that finds max|row| and writes row / scale, scale = max|row| / 448, the largest e4m3; then
the product of kernels/linear.py, whose epilogue multiplies the float32 sums by both scales before bias and GELU. A row
of zeros has scale 1. A NaN or an infinity makes its own row NaN and no other.

Rows that the kernel before has quantised need no such pass: x is e4m3 then, with a scale a row from the norm
(kernels/add_layer_norm.py), or one a row and group of 128 columns from the product with GELU, whose tiles are as wide:
there the largest of a row is in no program's hands, that of a group is. The next product multiplies the sum of each
group by its scale in float32, where Hopper's sums have to be moved to anyway.
"""

import torch
import triton
import triton.language as tl

from . import _aot, _device, _tiles, linear
from ._e4m3 import GROUP, grown, scaled, step_of

_ROWS, _COLUMNS = 4, 1024


@triton.jit(do_not_specialize=["M"])
def _quantize_fp8_kernel(
    x, q, scale, M, K, stride_x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """q = x / scale as e4m3, scale = max|x| / 448 of each row; WHOLE: a row is one block, read once."""
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    wide, valid = rows.to(tl.int64)[:, None], (rows < M)[:, None]
    most = tl.zeros((ROWS,), tl.float32)
    v = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, K, COLUMNS):
        v = tl.load(x + wide * stride_x + k + cols[None, :], mask=valid & (k + cols < K)[None, :], other=0.0)
        v = v.to(tl.float32)
        most = grown(most, v)
    step = step_of(most)
    tl.store(scale + rows, step, mask=rows < M)
    for k in range(0, K, COLUMNS):
        inside = valid & (k + cols < K)[None, :]
        if not WHOLE:
            v = tl.load(x + wide * stride_x + k + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(q + wide * K + k + cols[None, :], scaled(v, step).to(q.dtype.element_ty), mask=inside)


def supports(*, device=None, dtype=None):
    """ "" when Triton can run this, else why not."""
    reason = _device.problem(device, x=dtype)
    if not reason and not _device.interpreted() and not _device.has_e4m3(device):
        reason = "e4m3 needs an NVIDIA GPU of compute capability 8.9 or newer."
    return reason


def _quantize_config(K):
    columns = min(_tiles.power_of_two(K), _COLUMNS)
    return dict(ROWS=_ROWS, COLUMNS=columns, WHOLE=columns >= K, num_warps=4)


def quantize_fp8_fwd(*, x, keep):
    return quantize(x), ()


def quantize(x):
    """(q [..., K] float8_e4m3fn, scale [...] float32)."""
    (rows,) = _tiles.rows(x)
    M, K = rows.shape
    q = x.new_empty(M, K, dtype=torch.float8_e4m3fn)
    scale = x.new_empty(M, dtype=torch.float32)
    if q.numel():
        with _device.on(x):
            _quantize_fp8_kernel[(_tiles.cdiv(M, _ROWS),)](rows, q, scale, M, K, rows.stride(0), **_quantize_config(K))
    return q.view(x.shape), scale.view(x.shape[:-1])


def linear_fp8_fwd(*, x, weight, weight_scale, bias, gelu, x_scale, dtype, keep):
    q, *scales = _rows(x, x_scale)
    out, _ = linear.launch(
        q, weight, bias, None, gelu=gelu, save=False, out_dtype=x.dtype if dtype is None else dtype,
        scales=(scales[0], weight_scale.contiguous(), scales[1], None),
    )  # fmt: skip
    return (out,), ()


def linear_gelu_fp8_fwd(*, x, weight, weight_scale, bias, x_scale, keep):
    """Scales lie a group after the other, [groups, rows], as the next product reads them."""
    q, *scales = _rows(x, x_scale)
    scale = x.new_empty(_tiles.cdiv(len(weight), GROUP.value), *x.shape[:-1], dtype=torch.float32)
    out, _ = linear.launch(
        q, weight, bias, None, gelu=True, save=False, out_dtype=torch.float8_e4m3fn,
        scales=(scales[0], weight_scale.contiguous(), scales[1], scale),
    )  # fmt: skip
    return (out, scale.movedim(0, -1)), ()


def _rows(x, x_scale):
    """(rows as e4m3, their scales [M] or None, those of their groups of columns [groups, M] or None)."""
    if x_scale is None:
        q, scale = quantize(x)
        return q, scale.view(-1), None
    if x_scale.dim() < x.dim():
        return x, x_scale.reshape(-1), None
    return x, None, x_scale.movedim(-1, 0).contiguous().view(x_scale.shape[-1], -1)


def aot_cases():
    for gelu, shapes in ((False, ((2304, 768), (768, 768), (768, 3072))), (True, ((3072, 768),))):
        yield from linear.aot_variants("linear_fp8", shapes, gelu=gelu, fp8=True)
    yield from linear.aot_variants("linear_fp8", ((768, 3072),), gelu=False, fp8=True, groups="x")
    yield from linear.aot_variants("linear_gelu_fp8", ((3072, 768),), gelu=True, fp8=True, groups="out")
    for K in (768, 3072):
        yield _aot.case(
            _quantize_fp8_kernel, f"quantize_fp8 K={K}", "bf16", _quantize_config(K), targets=_aot.FP8_TARGETS,
            q="*fp8e4nv",
        )  # fmt: skip
