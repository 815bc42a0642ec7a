"""linear_int8 on the CPU: csrc/cpu/linear.cpp."""

import torch

from . import _native, quantize_linear


def supports(*, device=None, dtype=None):
    return _native.problem(device, x=dtype)


def linear_int8_fwd(*, x, weight, bias, out_features, gelu, keep):
    from vilt_fast import _C

    weight, shape = quantize_linear.opened(weight, "linear_int8: weight")
    if shape != (out_features, x.shape[-1]):
        raise ValueError(
            f"linear_int8: weight is a blob of a matrix {list(shape)}, expected [{out_features}, {x.shape[-1]}]."
        )
    rows = _native.dense_rows(x.reshape(-1, x.shape[-1]))
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty(*x.shape[:-1], out_features)
    name = _native.NAMES[x.dtype]
    if out.numel():
        _C.linear(
            rows.data_ptr(), name, weight.data_ptr(), "q8", _native.address(bias),
            "f32" if bias is None else _native.NAMES[bias.dtype], out.data_ptr(), name, rows.shape[0], *shape,
            rows.stride(0), out_features, gelu, "int8", torch.get_num_threads(),
        )  # fmt: skip
    return (out,), ()
