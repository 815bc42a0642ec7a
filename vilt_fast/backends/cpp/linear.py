"""linear on the CPU, and what linear_gelu shares with it: csrc/cpu/linear.cpp, linear_bwd.cpp.

Weights may be float32 under bfloat16 rows: they are rounded as they are read, and so are never copied.
"""

import torch

from . import _native


def supports(*, device=None, dtype=None, weight_dtype=None, residual_dtype=None, requires_grad=False):
    if residual_dtype is not None:
        return "it adds no residual."
    return _native.problem(device, dtype=dtype, weight=weight_dtype)


def forward(x, weight, bias, *, gelu, keep):
    """(result, what goes into the GELU if that is to be kept)."""
    from vilt_fast import _C

    rows = _native.dense_rows(x.reshape(-1, x.shape[-1]))
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    pre = torch.empty_like(out) if gelu and keep else None
    name, weights = _native.NAMES[x.dtype], _native.NAMES[weight.dtype]
    if out.numel():
        _C.linear(
            rows.data_ptr(), name, weight.data_ptr(), weights, _native.address(bias),
            weights if bias is None else _native.NAMES[bias.dtype], out.data_ptr(), name,
            rows.shape[0], *weight.shape, rows.stride(0), weight.shape[0], gelu, name, torch.get_num_threads(),
            _native.address(pre),
        )  # fmt: skip
    return out, pre


def backward(needs, grad, x, weight, bias, pre=None):
    """Gradients of x, weight and bias, None where not needed, from that of the result."""
    from vilt_fast import _C

    dtypes = (x.dtype, weight.dtype, weight.dtype)
    made = [
        t.new_empty(t.shape, dtype=dtype) if need else None
        for t, dtype, need in zip((x, weight, bias), dtypes, needs, strict=True)
    ]
    if grad.numel() and x.numel():
        grad, rows, pre = (
            None if t is None else _native.dense_rows(t.reshape(-1, t.shape[-1])) for t in (grad, x, pre)
        )
        weight = weight.contiguous()
        _C.linear_bwd(
            grad.data_ptr(), rows.data_ptr(), _native.address(pre), _native.NAMES[x.dtype], weight.data_ptr(),
            _native.NAMES[weight.dtype], *map(_native.address, made), rows.shape[0], *weight.shape, grad.stride(0),
            rows.stride(0), 0 if pre is None else pre.stride(0), torch.get_num_threads(),
        )  # fmt: skip
    else:
        made = [None if t is None else t.zero_() for t in made]
    if made[2] is not None:
        made[2] = made[2].to(bias.dtype)
    return made


def linear_fwd(*, x, weight, bias, residual, keep):
    return forward(x, weight, bias, gelu=False, keep=keep)[:1], ()


def linear_bwd(*, needs, grad_out, x, weight, bias, residual):
    return (*backward(needs[:3], grad_out, x, weight, bias), None), ()
