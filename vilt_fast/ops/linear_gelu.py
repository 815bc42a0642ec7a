"""linear_gelu: a linear layer and the exact GELU, in one pass."""

import dataclasses

from torch import Tensor

from . import _check, registry
from ._define import Op


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts(registry.Facts):
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
    _check.same_dtype("linear_gelu", x=x, weight=weight, bias=bias)
    _check.same_device("linear_gelu", x=x, weight=weight, bias=bias)


def _facts(x, requires_grad):
    return Facts(device=x.device.type, dtype=x.dtype, requires_grad=requires_grad)


_OP = Op(
    "linear_gelu", _fake, _fake_backward,
    outputs=("out",), kept=("pre",), differentiable=("x", "weight", "bias"),
    validate=_validate, facts=_facts,
)  # fmt: skip


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, *, backend: str | None = None) -> Tensor:
    """``gelu(x W^T + b)`` with the exact (erf) GELU.

    Args:
        x: [..., K]; weight: [N, K]; bias: [N] or None; one floating dtype (under autocast: any, cast as it would).

    Returns:
        [..., N].

    Source: Hendrycks and Gimpel 2016, eq. 1.
    """
    x, weight, bias = _check.autocast(x, weight, bias)
    _validate(x, weight, bias)
    name = _OP.resolve(backend, _facts(x, _check.needs_grad(x, weight, bias)))
    if name in registry.PLAIN:
        return _OP.plain(name, x=x, weight=weight, bias=bias)
    return _OP(name, x=x, weight=weight, bias=bias)[0]
