"""linear_fp8, quantize_fp8: validation, choice of backend, torch.ops.vilt_fast.{linear_fp8, quantize_fp8}. No gradient.

Facts for `supports`: dtype.
"""

import torch

from . import _check, registry

torch.library.define(
    "vilt_fast::linear_fp8",
    "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, bool gelu, str backend) -> Tensor",
)
torch.library.define("vilt_fast::quantize_fp8", "(Tensor x, str backend) -> (Tensor, Tensor)")


@torch.library.impl("vilt_fast::linear_fp8", "CompositeExplicitAutograd")
def _run(x, weight, weight_scale, bias, gelu, backend):
    return registry.launcher("linear_fp8", backend)(x, weight, weight_scale, bias, gelu)


@torch.library.register_fake("vilt_fast::linear_fp8")
def _fake(x, weight, weight_scale, bias, gelu, backend):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.impl("vilt_fast::quantize_fp8", "CompositeExplicitAutograd")
def _run_quantize(x, backend):
    return registry.launcher("quantize_fp8", backend)(x)


@torch.library.register_fake("vilt_fast::quantize_fp8")
def _fake_quantize(x, backend):
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[:-1], dtype=torch.float32)


def linear_fp8(x, weight, weight_scale, bias, gelu, backend):
    op = "linear_fp8"
    x, bias = _check.autocast(x, bias)
    _check.shapes(op, x=(x, "... K"), weight=(weight, "N K"), weight_scale=(weight_scale, "N"), bias=(bias, "N"))
    _check.dtypes(op, _check.FLOATS, x=x, bias=bias)
    _check.dtypes(op, (torch.float8_e4m3fn,), weight=weight)
    _check.dtypes(op, (torch.float32,), weight_scale=weight_scale)
    _check.same_device(op, x=x, weight=weight, weight_scale=weight_scale, bias=bias)
    if _check.needs_grad(x, bias):
        raise RuntimeError("linear_fp8: has no gradient; call it under torch.no_grad(), or use functional.linear.")
    name = registry.resolve(op, backend, x.device.type, dtype=x.dtype)
    if name in registry.PLAIN:
        return registry.launcher(op, name)(x, weight, weight_scale, bias, gelu)
    return torch.ops.vilt_fast.linear_fp8(x, weight, weight_scale, bias, gelu, name)


def quantize_fp8(x, backend):
    op = "quantize_fp8"
    _check.shapes(op, x=(x, "... K"))
    _check.dtypes(op, _check.FLOATS, x=x)
    name = registry.resolve(op, backend, x.device.type, dtype=x.dtype)
    if name in registry.PLAIN:
        return registry.launcher(op, name)(x.detach())
    return torch.ops.vilt_fast.quantize_fp8(x.detach(), name)
