"""linear_gelu: a linear layer and the exact GELU, in one pass."""

import dataclasses

import torch
from torch import Tensor

from . import _check, registry
from ._define import Op


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts(registry.Facts):
    weight_dtype: torch.dtype | None = None  #: where it is not that of x
    requires_grad: bool = False


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None):
    """Kept is the pre-activation x W^T + b."""
    shape = (*x.shape[:-1], weight.shape[0])
    return (x.new_empty(shape),), (x.new_empty(shape),)


def _fake_backward(
    needs: list[bool], grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, pre: Tensor
):  # fmt: skip
    return tuple(None if t is None else t.new_empty(t.shape) for t in (x, weight, bias)), ()


def _validate(x, weight, bias):
    _check.shapes("linear_gelu", x=(x, "... K"), weight=(weight, "N K"), bias=(bias, "N"))
    _check.dtypes("linear_gelu", _check.FLOATS, x=x)
    _check.linear_dtypes("linear_gelu", x=x, weight=weight, bias=bias)
    _check.same_device("linear_gelu", x=x, weight=weight, bias=bias)


def _validate_backward(grad_out, x, weight, bias, pre):
    _validate(x, weight, bias)
    _check.like("linear_gelu_bwd", (*x.shape[:-1], weight.shape[0]), x.dtype, grad_out=grad_out, pre=pre)


def _facts(x, weight, bias, requires_grad):
    return Facts(
        device=x.device.type, dtype=x.dtype, weight_dtype=_check.other_dtype(x, weight, bias),
        requires_grad=requires_grad, size=registry.size_of(x),
    )  # fmt: skip


_known = _check.both(_validate, _facts)


_OP = Op(
    "linear_gelu", _fake, _fake_backward,
    outputs=("out",), kept=("pre",), differentiable=("x", "weight", "bias"),
    validate=_validate, facts=_facts, validate_backward=_validate_backward,
)  # fmt: skip


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, *, backend: str | None = None) -> Tensor:
    """``gelu(x W^T + b)`` with the exact (erf) GELU.

    Args:
        x: [..., K]; weight: [N, K]; bias: [N] or None; one floating dtype (under autocast: any, cast as it would),
            or float32 parameters under rows of 16 bits, which are rounded to those.

    Returns:
        [..., N].

    Source: Hendrycks and Gimpel 2016, eq. 1.
    """
    x, weight, bias = _check.autocast_linear(backend, x, weight, bias)
    needs_grad = _check.needs_grad(x, weight, bias)
    facts = _check.of_forms(_known, x=x, weight=weight, bias=bias, requires_grad=needs_grad)
    name = _OP.resolve(backend, facts)
    if name in registry.PLAIN:
        return _OP.plain(name, x=x, weight=weight, bias=bias)
    return _OP(name, x=x, weight=weight, bias=bias)[0]
