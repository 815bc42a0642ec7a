"""linear_gelu on the CPU: csrc/cpu/linear.cpp, linear_bwd.cpp."""

from . import _native, linear


def supports(*, device=None, dtype=None, weight_dtype=None, requires_grad=False):
    return _native.problem(device, dtype=dtype, weight=weight_dtype)


def linear_gelu_fwd(*, x, weight, bias, keep):
    out, pre = linear.forward(x, weight, bias, gelu=True, keep=keep)
    return (out,), (pre,) if keep else ()


def linear_gelu_bwd(*, needs, grad_out, x, weight, bias, pre):
    return tuple(linear.backward(needs, grad_out, x, weight, bias, pre)), ()
