"""linear_gelu on the CPU: csrc/cpu/linear.cpp."""

import torch

from . import _native


def supports(*, device=None, dtype=None, requires_grad=False):
    return _native.problem(device, requires_grad=requires_grad, dtype=dtype)


def linear_gelu_fwd(*, x, weight, bias, keep):
    from vilt_fast import _C

    rows = _native.dense_rows(x.reshape(-1, x.shape[-1]))
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    name = _native.NAMES[x.dtype]
    if out.numel():
        _C.linear(
            rows.data_ptr(), name, weight.data_ptr(), name, _native.address(bias), name, out.data_ptr(), name,
            rows.shape[0], *weight.shape, rows.stride(0), weight.shape[0], True, name, torch.get_num_threads(),
        )  # fmt: skip
    return (out,), ()
