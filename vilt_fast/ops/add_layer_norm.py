"""add_layer_norm: validation and choice of backend. Facts for `supports`: dtype, requires_grad."""

from .. import registry
from . import _check


def add_layer_norm(x, residual, weight, bias, eps, backend):
    _check.shapes(
        "add_layer_norm", x=(x, "... D"), residual=(residual, "... D"), weight=(weight, "D"), bias=(bias, "D")
    )
    if x.shape != residual.shape:
        raise ValueError(
            f"add_layer_norm: residual has shape {list(residual.shape)}, expected that of x, {list(x.shape)}."
        )
    _check.dtypes("add_layer_norm", _check.FLOATS, x=x, residual=residual, weight=weight, bias=bias)
    _check.same_device("add_layer_norm", x=x, residual=residual, weight=weight, bias=bias)
    grad = _check.needs_grad(x, residual, weight, bias)
    name = registry.resolve("add_layer_norm", backend, x.device.type, dtype=x.dtype, requires_grad=grad)
    return registry.launcher("add_layer_norm", name)(x, residual, weight, bias, eps)
