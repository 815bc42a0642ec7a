"""linear_cross_entropy: the loss of a masked-language head on its labelled rows, without [rows, vocabulary] logits."""

import dataclasses

import torch
from torch import Tensor

from . import _check, registry
from ._define import Op

_NAME = "linear_cross_entropy"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts(registry.Facts):
    soft: bool = False  #: labels are probabilities
    requires_grad: bool = False


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int):
    """A loss a row (the reduction is ordinary PyTorch) and how many are labelled; kept: lse and the labelled rows."""
    losses, lse = (x.new_empty(x.shape[:1], dtype=torch.float32) for _ in range(2))
    count, rows = (x.new_empty(size, dtype=torch.int32) for size in ((1,), x.shape[:1]))
    return (losses, count), (lse, rows)


def _fake_backward(
    needs: list[bool], grad_losses: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, lse: Tensor,
    rows: Tensor, count: Tensor,
):  # fmt: skip
    return tuple(None if t is None else t.new_empty(t.shape) for t in (x, weight, bias)), ()


def _validate(x, weight, bias, labels, ignore_index):
    sizes = _check_tensors(x, weight, bias, labels)
    if not labels.is_floating_point() and _check.readable(labels):
        _check_labels(labels[labels != ignore_index], sizes["V"], f" and is not ignore_index {ignore_index}")


def _check_tensors(x, weight, bias, labels):
    soft = isinstance(labels, Tensor) and labels.is_floating_point()
    shape = "R V" if soft else "R"
    sizes = _check.shapes(_NAME, x=(x, "R D"), weight=(weight, "V D"), bias=(bias, "V"), labels=(labels, shape))
    _check.dtypes(_NAME, _check.FLOATS, x=x, weight=weight, bias=bias)
    _check.same_dtype(_NAME, x=x, weight=weight, bias=bias)
    _check.dtypes(_NAME, _check.FLOATS if soft else (torch.int64,), labels=labels)
    _check.same_device(_NAME, x=x, weight=weight, bias=bias, labels=labels)
    return sizes


def _check_labels(labels, classes, more=""):
    bad = (labels < 0) | (labels >= classes)
    if bad.any():
        raise IndexError(f"{_NAME}: label {labels[bad][0].item()} is outside 0..{classes - 1}{more}.")


def _validate_backward(grad_losses, x, weight, bias, labels, lse, rows, count):
    op, sizes = f"{_NAME}_bwd", _check_tensors(x, weight, bias, labels)
    _check.like(op, x.shape[:1], torch.float32, grad_losses=grad_losses, lse=lse)
    _check.like(op, x.shape[:1], torch.int32, rows=rows)
    _check.like(op, (1,), torch.int32, count=count)
    _check.same_device(op, x=x, grad_losses=grad_losses, lse=lse, rows=rows, count=count)
    if _check.readable(labels) and not labels.is_floating_point():
        labelled, given = count.item(), x.shape[0]
        listed = rows[: max(labelled, 0)]
        if not 0 <= labelled <= given or ((listed < 0) | (listed >= given)).any():
            raise IndexError(f"{op}: rows and count say that rows {listed.tolist()} of {given} are labelled.")
        _check_labels(labels.index_select(0, listed), sizes["V"])


def _facts(x, labels, requires_grad):
    return Facts(device=x.device.type, dtype=x.dtype, soft=labels.is_floating_point(), requires_grad=requires_grad)


_OP = Op(
    _NAME, _fake, _fake_backward,
    outputs=("losses", "count"), kept=("lse", "rows"), differentiable=("x", "weight", "bias"),
    differentiable_outputs=("losses",), validate=_validate, facts=_facts, validate_backward=_validate_backward,
    again=lambda **_: {"reduction": "none"},
)  # fmt: skip


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """``cross_entropy(x W^T + b, labels)`` without keeping [R, V] logits, on the labelled rows only.

    Args:
        x: [R, D]; weight: [V, D]; bias: [V] or None; one floating dtype.
        labels: [R] int64 in 0..V-1 or ``ignore_index``; or floating [R, V], probabilities that each row is held
            against (the reference alone; no gradient in them).
        reduction: "mean" (over labelled rows; NaN when there is none, as torch), "sum" or "none" ([R], 0 if ignored).

    Returns:
        The loss in float32 (float64 for float64 inputs). Differentiable in x, weight and bias. On a GPU, where labels
        are not looked at, one out of range gives NaN.

    Source: ``torch.nn.functional.cross_entropy``.
    """
    x, weight, bias = _check.autocast(x, weight, bias)
    _validate(x, weight, bias, labels, ignore_index)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{_NAME}: reduction is {reduction!r}, expected 'mean', 'sum' or 'none'.")
    name = _OP.resolve(backend, _facts(x, labels, _check.needs_grad(x, weight, bias)))
    arguments = dict(x=x, weight=weight, bias=bias, labels=labels, ignore_index=ignore_index)
    if name in registry.PLAIN:
        return _OP.plain(name, **arguments, reduction=reduction)
    losses, count = _OP(name, **arguments)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / count.squeeze(0)
