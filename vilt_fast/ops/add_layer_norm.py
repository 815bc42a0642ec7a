"""add_layer_norm: a residual stream grows by a branch, and its LayerNorm."""

import dataclasses

import torch
from torch import Tensor

from . import _check, registry
from ._define import Op

_NAME = "add_layer_norm"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts(registry.Facts):
    residual_dtype: torch.dtype
    width: int
    requires_grad: bool = False
    dropout: bool = False


def _fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dropout_p: float,
    seed: Tensor | None,
):  # fmt: skip
    s = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return (s, x.new_empty(x.shape)), (mean, rstd)


def _fake_backward(
    needs: list[bool], grad_s: Tensor | None, grad_y: Tensor | None, s: Tensor, mean: Tensor, rstd: Tensor,
    weight: Tensor | None, bias: Tensor | None, dropout_p: float, seed: Tensor | None, x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
):  # fmt: skip
    apart = dropout_p > 0 or x_dtype != residual_dtype
    return (
        s.new_empty(s.shape, dtype=x_dtype) if apart else None,
        s.new_empty(s.shape, dtype=residual_dtype),
        *(None if p is None else p.new_empty(p.shape) for p in (weight, bias)),
    ), ()


def validated(op, x, residual, weight, bias):
    """Raise for what no backend of `op` could be given."""
    tensors = dict(x=x, residual=residual, weight=weight, bias=bias)
    _check.shapes(op, x=(x, "... D"), residual=(residual, "... D"), weight=(weight, "D"), bias=(bias, "D"))
    if x.shape != residual.shape:
        raise ValueError(f"{op}: residual has shape {list(residual.shape)}, expected that of x, {list(x.shape)}.")
    _check.dtypes(op, _check.FLOATS, **tensors)
    _check.same_device(op, **tensors)


def _validate(x, residual, weight, bias, dropout_p):
    validated(_NAME, x, residual, weight, bias)
    _check.probability(_NAME, dropout_p)


def _validate_backward(grad_s, grad_y, s, mean, rstd, weight, bias, dropout_p, seed, x_dtype):
    op = f"{_NAME}_bwd"
    _check.shapes(op, s=(s, "... D"), weight=(weight, "D"), bias=(bias, "D"))
    _check.like(op, s.shape, s.dtype, grad_s=grad_s)
    _check.like(op, s.shape, x_dtype, grad_y=grad_y)
    _check.like(op, s.shape[:-1], torch.float32, mean=mean, rstd=rstd)
    if dropout_p > 0 and (seed is None or seed.shape != (1,)):
        raise ValueError(f"{op}: dropout takes the seed of the forward, int64 [1].")


def _facts(x, residual, dropout_p, requires_grad):
    return Facts(
        device=x.device.type, dtype=x.dtype, residual_dtype=residual.dtype, width=x.shape[-1],
        requires_grad=requires_grad, dropout=dropout_p > 0, size=registry.size_of(x),
    )  # fmt: skip


_known = _check.both(_validate, _facts)


def _again(s, x_dtype, residual_dtype, **_):
    """x and residual are not kept, but their sum is: it and nothing have the same gradients."""
    if s.dtype == x_dtype:
        return {"x": s, "residual": torch.zeros_like(s, dtype=residual_dtype)}
    return {"x": torch.zeros_like(s, dtype=x_dtype), "residual": s}


_OP = Op(
    _NAME, _fake, _fake_backward,
    outputs=("s", "y"), kept=("mean", "rstd"), differentiable=("x", "residual", "weight", "bias"),
    equal={"x": "residual"}, validate=_validate, facts=_facts, again=_again,
    validate_backward=_validate_backward,
)  # fmt: skip


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``s = dropout(x) + residual`` and ``LayerNorm(s)``, both.

    Args:
        x, residual: [..., D], of one shape; the residual may be of a wider dtype (a float32 stream, bfloat16 layers).
        weight, bias: [D] or None. eps: added to the variance.
        dropout_p: probability that an element of ``x`` counts as 0.

    Returns:
        s [..., D] in the wider dtype of x and residual, and the normalised y [..., D] in the dtype of x. Differentiable
        in all tensors; the sums over rows are deterministic.

    Source: Dosovitskiy et al. 2021, eq. 2-3.
    """
    tensors = dict(x=x, residual=residual, weight=weight, bias=bias)
    needs_grad = _check.needs_grad(*tensors.values())
    facts = _check.of_forms(_known, **tensors, dropout_p=dropout_p, requires_grad=needs_grad)
    name = _OP.resolve(backend, facts)
    if name in registry.PLAIN:
        return _OP.plain(name, **tensors, eps=eps, dropout_p=dropout_p)
    return _OP(name, **tensors, eps=eps, dropout_p=dropout_p, seed=_check.seed(x.device, dropout_p))
