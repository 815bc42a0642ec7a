"""linear_gelu: validation, choice of backend, torch.ops.vilt_fast.linear_gelu.

Facts for `supports`: dtype, requires_grad.
"""

import torch

from .. import registry
from . import _check

torch.library.define("vilt_fast::linear_gelu", "(Tensor x, Tensor weight, Tensor? bias, str backend) -> Tensor")


@torch.library.impl("vilt_fast::linear_gelu", "CompositeExplicitAutograd")
def _run(x, weight, bias, backend):
    return registry.launcher("linear_gelu", backend)(x, weight, bias)


@torch.library.register_fake("vilt_fast::linear_gelu")
def _fake(x, weight, bias, backend):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def linear_gelu(x, weight, bias, backend):
    x, weight, bias = _check.autocast(x, weight, bias)
    _check.shapes("linear_gelu", x=(x, "... K"), weight=(weight, "N K"), bias=(bias, "N"))
    _check.dtypes("linear_gelu", _check.FLOATS, x=x)
    _check.same_dtype("linear_gelu", x=x, weight=weight, bias=bias)
    _check.same_device("linear_gelu", x=x, weight=weight, bias=bias)
    grad = _check.needs_grad(x, weight, bias)
    name = registry.resolve("linear_gelu", backend, x.device.type, dtype=x.dtype, requires_grad=grad)
    if name in registry.PLAIN:
        return registry.launcher("linear_gelu", name)(x, weight, bias)
    return torch.ops.vilt_fast.linear_gelu(x, weight, bias, name)
