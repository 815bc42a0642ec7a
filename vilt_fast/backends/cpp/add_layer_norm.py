"""add_layer_norm on the CPU: csrc/cpu/add_layer_norm.cpp, add_layer_norm_bwd.cpp."""

import torch

from . import _native


def supports(*, device=None, dtype=None, residual_dtype=None, width=1, requires_grad=False, dropout=False):
    return _native.problem(device, x=dtype, residual=residual_dtype)


def add_layer_norm_fwd(*, x, residual, weight, bias, eps, dropout_p, seed, keep):
    from vilt_fast import _C

    s = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    y = x.new_empty(x.shape)
    stats = tuple(x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2)) if keep else ()
    if s.numel():
        width = x.shape[-1]
        x, residual = (_native.dense_rows(t.reshape(-1, width)) for t in (x, residual))
        weight, bias = map(_native.as_float32, (weight, bias))
        _C.add_layer_norm(
            x.data_ptr(), _native.NAMES[x.dtype], residual.data_ptr(), _native.NAMES[residual.dtype],
            _native.address(weight), _native.address(bias), "f32", s.data_ptr(), _native.NAMES[s.dtype], y.data_ptr(),
            _native.NAMES[y.dtype], *(map(_native.address, stats) if keep else (0, 0)), *x.shape, x.stride(0),
            residual.stride(0), eps, dropout_p, seed.item() if dropout_p > 0 else 0, torch.get_num_threads(),
        )  # fmt: skip
    return (s, y), stats


def add_layer_norm_bwd(
    *, needs, grad_s, grad_y, s, mean, rstd, weight, bias, dropout_p, seed, x_dtype, residual_dtype
):  # fmt: skip
    """The gradient of x is None where it is that of the residual: equal dtypes and no dropout."""
    from vilt_fast import _C

    width = s.shape[-1]
    apart = dropout_p > 0 or x_dtype != residual_dtype
    dx = s.new_empty(s.shape, dtype=x_dtype) if apart else None
    dresidual = s.new_empty(s.shape, dtype=residual_dtype)
    sums = s.new_zeros(2, width, dtype=torch.float32) if any(needs[2:]) else None
    if s.numel():
        grad_s, grad_y, s, mean, rstd = (None if t is None else t.contiguous() for t in (grad_s, grad_y, s, mean, rstd))
        weight_values = _native.as_float32(weight)
        _C.add_layer_norm_bwd(
            _native.address(grad_s), _native.address(grad_y), _native.NAMES[x_dtype], s.data_ptr(),
            _native.NAMES[s.dtype], _native.address(weight_values), "f32", mean.data_ptr(), rstd.data_ptr(),
            _native.address(dx), _native.NAMES[x_dtype], dresidual.data_ptr(), _native.NAMES[residual_dtype],
            _native.address(sums), s.numel() // width, width, dropout_p, seed.item() if dropout_p > 0 else 0,
            torch.get_num_threads(),
        )  # fmt: skip
    parameters = [None, None]
    if sums is not None:  # copies: outputs of an op must not share memory
        parameters = [
            None if p is None else total.to(p.dtype, copy=True) for total, p in zip(sums, (weight, bias), strict=True)
        ]
    return (dx, dresidual, *parameters), ()
