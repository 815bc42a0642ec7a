"""linear_cross_entropy: validation and choice of backend. Facts for `supports`: dtype, requires_grad, reduction."""

import torch

from .. import registry
from . import _check


def linear_cross_entropy(x, weight, bias, labels, ignore_index, reduction, backend):
    op = "linear_cross_entropy"
    sizes = _check.shapes(op, x=(x, "R D"), weight=(weight, "V D"), bias=(bias, "V"), labels=(labels, "R"))
    _check.dtypes(op, _check.FLOATS, x=x, weight=weight, bias=bias)
    if not torch.is_autocast_enabled(x.device.type):
        _check.same_dtype(op, x=x, weight=weight, bias=bias)
    _check.dtypes(op, (torch.int64,), labels=labels)
    _check.same_device(op, x=x, weight=weight, bias=bias, labels=labels)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction is {reduction!r}, expected 'mean', 'sum' or 'none'.")
    if _check.readable(labels):
        bad = (labels != ignore_index) & ((labels < 0) | (labels >= sizes["V"]))
        if bad.any():
            raise IndexError(
                f"{op}: label {labels[bad][0].item()} is outside 0..{sizes['V'] - 1} and is not ignore_index "
                f"{ignore_index}."
            )
    grad = _check.needs_grad(x, weight, bias)
    name = registry.resolve(op, backend, x.device.type, dtype=x.dtype, requires_grad=grad, reduction=reduction)
    return registry.launcher(op, name)(x, weight, bias, labels, ignore_index=ignore_index, reduction=reduction)
