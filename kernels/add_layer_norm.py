"""Residual add and LayerNorm for Triton, one pass over memory each way.

    s = dropout(x) + residual;  y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias

Shapes: x, residual [N, D] of floating dtypes that may differ (a float32 residual stream under bfloat16 layers); s
[N, D] in the wider of the two, y [N, D] in that of x; mean and rstd [N] float32 are kept for the backward. For layers
on 8 bits y, rounded to the dtype of x, is handed on as e4m3 with a scale a row, [N] float32 (kernels/_e4m3.py).

Forward: a tile of whole rows a program, in registers, mean first and then the centred squares: x and residual are read
once, s and y written once. The statistics are those of s as it is rounded, as in the reference.

Backward, with xhat = (s - mean) rstd and g = dy weight:
    d = ds + rstd (g - mean_D(g) - xhat mean_D(g xhat));  dresidual = d;  dx = dropout'(d)
    dweight = sum_rows dy xhat;  dbias = sum_rows dy
A program takes a run of rows and leaves its share of both sums in [2, programs, D] float32; adding the shares is a
second, small pass in a fixed order. No atomics: equal runs give equal bits.
"""

import torch
import triton
import triton.language as tl

from . import _aot, _dependent, _device, _tiles
from ._e4m3 import grown, scaled, step_of

MAX_WIDTH = 8192
_GROUPS = 256


@triton.jit(do_not_specialize=["N"])
def _add_layer_norm_fwd_kernel(
    x, residual, weight, bias, seed, s_out, y_out, scale, mean_out, rstd_out, N, D, stride_x, stride_r, eps,
    dropout_p, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    _dependent.begin(PDL)
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    real = (cols < D)[None, :]
    inside = (rows < N)[:, None] & real
    wide = rows.to(tl.int64)[:, None]
    s = tl.load(x + wide * stride_x + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    if seed is not None:
        s = _tiles.dropout(s, seed, rows, 0, dropout_p)
    s += tl.load(residual + wide * stride_r + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    rounded = s.to(s_out.dtype.element_ty)
    tl.store(s_out + wide * D + cols[None, :], rounded, mask=inside)
    s = rounded.to(tl.float32)
    mean = tl.sum(s, 1) / D
    centred = tl.where(real, s - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
    y = centred * rstd[:, None]
    if weight is not None:
        y *= tl.load(weight + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        y += tl.load(bias + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    if scale is not None:
        y = y.to(x.dtype.element_ty).to(tl.float32)  # as it would lie in memory
        step = step_of(grown(tl.zeros((ROWS,), tl.float32), y))
        tl.store(scale + rows, step, mask=rows < N)
        y = scaled(y, step)
    tl.store(y_out + wide * D + cols[None, :], y.to(y_out.dtype.element_ty), mask=inside)
    if mean_out is not None:
        tl.store(mean_out + rows, mean, mask=rows < N)
        tl.store(rstd_out + rows, rstd, mask=rows < N)


@triton.jit(do_not_specialize=["N", "rows_each"])
def _add_layer_norm_bwd_kernel(
    ds, dy, s, mean, rstd, weight, seed, dresidual, dx, sums, N, D, rows_each, dropout_p,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    cols = tl.arange(0, BLOCK_D)
    dweight = tl.zeros((ROWS, BLOCK_D), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK_D), tl.float32)
    if weight is not None:
        scale = tl.load(weight + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    for first in range(group * rows_each, tl.minimum(N, (group + 1) * rows_each), ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < N)[:, None] & (cols < D)[None, :]
        at = rows.to(tl.int64)[:, None] * D + cols[None, :]
        if ds is not None:
            d = tl.load(ds + at, mask=inside, other=0.0).to(tl.float32)
        else:
            d = tl.zeros((ROWS, BLOCK_D), tl.float32)
        if dy is not None:
            g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
            spread = tl.load(rstd + rows, mask=rows < N, other=0.0)[:, None]
            centre = tl.load(mean + rows, mask=rows < N, other=0.0)[:, None]
            values = tl.load(s + at, mask=inside, other=0.0).to(tl.float32)
            xhat = tl.where(inside, (values - centre) * spread, 0.0)
            dbias += g
            dweight += g * xhat
            if weight is not None:
                g *= scale
            shift = tl.sum(g, 1)[:, None] / D
            tilt = tl.sum(g * xhat, 1)[:, None] / D
            d += spread * (g - shift - xhat * tilt)
        if dresidual is not None:
            tl.store(dresidual + at, d.to(dresidual.dtype.element_ty), mask=inside)
        if seed is not None:
            d = _tiles.dropout(d, seed, rows, 0, dropout_p)
        if dx is not None:
            tl.store(dx + at, d.to(dx.dtype.element_ty), mask=inside)
    if sums is not None:
        share = sums + group.to(tl.int64) * D + cols
        step = tl.num_programs(0).to(tl.int64) * D
        tl.store(share, tl.sum(dweight, 0), mask=cols < D)
        tl.store(share + step, tl.sum(dbias, 0), mask=cols < D)


def supports(*, device=None, dtype=None, residual_dtype=None, width=1, requires_grad=False, dropout=False):
    """ "" when Triton can run this, else why not."""
    if width > MAX_WIDTH:
        return f"rows are {width} wide, at most {MAX_WIDTH} fit in registers."
    return _device.problem(device, x=dtype, residual=residual_dtype)


def _config(N, D):
    """Rows a tile, padded width, warps: one row a program where rows are few, else about 4096 elements."""
    block = max(16, _tiles.power_of_two(D))
    rows = 1 if N <= 2048 else max(1, 4096 // block)
    rows = min(rows, 8)
    return dict(ROWS=rows, BLOCK_D=block, num_warps=min(16, max(1, rows * block // (256 if rows == 1 else 512))))


def fwd_config(N, D, dtype, arch):
    """Of the forward: what was measured in 16 bits on rows as wide as ViLT's, where something was."""
    found = _config(N, D)
    like = dtype.itemsize == 2 and found["BLOCK_D"] <= 1024
    return found | _device.configuration("add_layer_norm", arch, N) if like else found


def add_layer_norm_fwd(*, x, residual, weight, bias, eps, dropout_p, seed, keep):
    s = x.new_empty(*x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    y = x.new_empty(*x.shape)
    mean = rstd = None
    if keep:
        mean, rstd = (x.new_empty(*x.shape[:-1], dtype=torch.float32) for _ in range(2))
    if s.numel():
        config = fwd_config(s.numel() // x.shape[-1], x.shape[-1], x.dtype, _device.arch(x))
        seed = seed if dropout_p > 0 else None
        launch(x, residual, weight, bias, seed, s, y, None, mean, rstd, eps, dropout_p, config)
    return (s, y), (mean, rstd) if keep else ()


def launch(x, residual, weight, bias, seed, s, y, scale, mean, rstd, eps, dropout_p, config):
    """Write s, y and the statistics, unless these are None, dense; with `scale`, y is e4m3."""
    x, residual = _tiles.rows(x, residual)
    N, D = x.shape
    config = _dependent.options(config, _device.arch(x))
    with _device.on(x):
        _add_layer_norm_fwd_kernel[(_tiles.cdiv(N, config["ROWS"]),)](
            x, residual, *_tiles.dense(weight, bias), seed, s, y, scale, mean, rstd, N, D, x.stride(0),
            residual.stride(0), eps, dropout_p, **config,
        )  # fmt: skip


def add_layer_norm_bwd(
    *, needs, grad_s, grad_y, s, mean, rstd, weight, bias, dropout_p, seed, x_dtype, residual_dtype
):  # fmt: skip
    """The gradient of x is None where it is that of the residual: equal dtypes and no dropout."""
    D = s.shape[-1]
    dropped = dropout_p > 0
    dresidual = s.new_empty(s.shape, dtype=residual_dtype)
    dx = s.new_empty(s.shape, dtype=x_dtype) if dropped or x_dtype != residual_dtype else None
    sums = s.new_zeros(2, 1, D, dtype=torch.float32) if any(needs[2:]) else None
    if s.numel():
        N = s.numel() // D
        config = _config(N, D)
        rows_each = _tiles.cdiv(_tiles.cdiv(N, config["ROWS"]), _GROUPS) * config["ROWS"]
        groups = _tiles.cdiv(N, rows_each)
        if sums is not None:
            sums = s.new_empty(2, groups, D, dtype=torch.float32)
        with _device.on(s):
            _add_layer_norm_bwd_kernel[(groups,)](
                *_tiles.dense(grad_s, grad_y, s), mean, rstd, *_tiles.dense(weight), seed if dropped else None,
                dresidual, dx, sums, N, D, rows_each, dropout_p, **config,
            )  # fmt: skip
    parameters = [None, None]
    if sums is not None:  # copies: outputs of an op must not share memory
        totals = zip(sums.sum(1), (weight, bias), strict=True)
        parameters = [None if p is None else total.to(p.dtype, copy=True) for total, p in totals]
    return (dx, dresidual, *parameters), ()


def aot_cases():
    """ViLT's width; bfloat16 layers on a bfloat16 and on a float32 stream, and float32 throughout."""
    for N in (185, 13880):
        config = _config(N, 768)
        for x, stream in (("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32")):
            for dropout in (False, True):
                name = f"N={N} x {x} stream {stream}" + " dropout" * dropout
                types = dict.fromkeys(("residual", "s", "s_out", "ds", "dresidual"), f"*{stream}") | {"scale": None}
                if not dropout:
                    types["seed"] = None
                for targets, options in _dependent.ways()[: 1 if x == "fp32" else 2]:
                    yield _aot.case(
                        _add_layer_norm_fwd_kernel, f"add_layer_norm {name}" + " dependent" * options["PDL"], x,
                        config | options, targets=targets, **types,
                    )  # fmt: skip
                if not dropout and x == "bf16":
                    quantized = types | dict(scale="*fp32", y_out="*fp8e4nv", mean_out=None, rstd_out=None)
                    yield _aot.case(
                        _add_layer_norm_fwd_kernel, f"add_layer_norm_fp8 {name}", x, config | {"PDL": False},
                        targets=_aot.FP8_TARGETS, **quantized,
                    )  # fmt: skip
                if not dropout and x == stream:
                    types["dx"] = None
                yield _aot.case(_add_layer_norm_bwd_kernel, f"add_layer_norm backward {name}", x, config, **types)
