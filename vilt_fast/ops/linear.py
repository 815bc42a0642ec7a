"""linear: xW^T + b, and a residual, in one pass."""

import dataclasses

import torch
from torch import Tensor

from .. import order
from . import _check, registry
from ._define import Op


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts(registry.Facts):
    residual_dtype: torch.dtype | None = None
    weight_dtype: torch.dtype | None = None  #: where it is not that of x
    requires_grad: bool = False


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None):
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return (x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype),), ()


def _fake_backward(
    needs: list[bool], grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
):  # fmt: skip
    same = residual is None or residual.dtype == grad_out.dtype
    given = (x, weight, bias, None if same else residual)
    return tuple(None if t is None else t.new_empty(t.shape) for t in given), ()


def _validate(x, weight, bias, residual):
    _check.shapes("linear", x=(x, "... K"), weight=(weight, "N K"), bias=(bias, "N"), residual=(residual, "... N"))
    if residual is not None and residual.shape[:-1] != x.shape[:-1]:
        expected = [*x.shape[:-1], weight.shape[0]]
        raise ValueError(f"linear: residual has shape {list(residual.shape)}, expected {expected}.")
    _check.dtypes("linear", _check.FLOATS, x=x, residual=residual)
    _check.linear_dtypes("linear", x=x, weight=weight, bias=bias)
    _check.same_device("linear", x=x, weight=weight, bias=bias, residual=residual)


def _validate_backward(grad_out, x, weight, bias, residual):
    _validate(x, weight, bias, residual)
    _check.like("linear_bwd", (*x.shape[:-1], weight.shape[0]), None, grad_out=grad_out)


def _facts(x, weight, bias, residual, requires_grad):
    residual_dtype = None if residual is None else residual.dtype
    return Facts(
        device=x.device.type, dtype=x.dtype, weight_dtype=_check.other_dtype(x, weight, bias),
        residual_dtype=residual_dtype, requires_grad=requires_grad, size=registry.size_of(x),
    )  # fmt: skip


_known = _check.both(_validate, _facts)


_OP = Op(
    "linear", _fake, _fake_backward,
    outputs=("out",), differentiable=("x", "weight", "bias", "residual"), equal={"residual": "grad_out"},
    validate=_validate, facts=_facts, validate_backward=_validate_backward,
)  # fmt: skip


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """``x W^T + b + residual``, in one pass over the result.

    Args:
        x: [..., K]; weight: [N, K]; bias: [N] or None; one floating dtype (under autocast: any, cast as it would),
            or float32 parameters under rows of 16 bits, which are rounded to those.
        residual: [..., N] or None, any floating dtype.

    Returns:
        [..., N] in the wider dtype of x and residual. Differentiable in all tensors.

    Source: ``torch.nn.functional.linear``.
    """
    x, weight, bias = _check.autocast_linear(backend, x, weight, bias)
    tensors = dict(x=x, weight=weight, bias=bias, residual=residual)
    needs_grad = _check.needs_grad(*tensors.values())
    name = _OP.resolve(backend, _check.of_forms(_known, **tensors, requires_grad=needs_grad))
    return _OP.plain(name, **tensors) if name in registry.PLAIN else _OP(name, **tensors)[0]


def adds_residual(x: Tensor) -> bool:
    """Whether a linear layer of rows like `x` had better add a residual than leave that to a norm behind it.

    Where order.csv says so (RESIDUAL=True) and asks a backend first that does it in the same pass; in inference.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type not in registry._GPUS:
        return False
    entry = order.entry("linear", registry.size_of(x))
    return entry.backends[0] not in registry.PLAIN and bool(entry.configuration.get("RESIDUAL"))
