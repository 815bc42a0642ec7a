"""linear_qkv: queries, keys and values, three linear layers of the same rows."""

import dataclasses

from torch import Tensor

from . import _check, registry
from ._define import Op
from .linear import linear


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts(registry.Facts):
    requires_grad: bool = False


def _fake(
    x: Tensor, query_weight: Tensor, key_weight: Tensor, value_weight: Tensor, query_bias: Tensor | None,
    key_bias: Tensor | None, value_bias: Tensor | None,
):  # fmt: skip
    return tuple(x.new_empty(*x.shape[:-1], query_weight.shape[0]) for _ in range(3)), ()


def _fake_backward(
    needs: list[bool], grad_query: Tensor | None, grad_key: Tensor | None, grad_value: Tensor | None, x: Tensor,
    query_weight: Tensor, key_weight: Tensor, value_weight: Tensor, query_bias: Tensor | None,
    key_bias: Tensor | None, value_bias: Tensor | None,
):  # fmt: skip
    given = (x, query_weight, key_weight, value_weight, query_bias, key_bias, value_bias)
    return tuple(None if t is None else t.new_empty(t.shape) for t in given), ()


def _check_shapes(x, query_weight, key_weight, value_weight, query_bias, key_bias, value_bias):
    _check.shapes(
        "linear_qkv", x=(x, "... K"),
        query_weight=(query_weight, "N K"), key_weight=(key_weight, "N K"), value_weight=(value_weight, "N K"),
        query_bias=(query_bias, "N"), key_bias=(key_bias, "N"), value_bias=(value_bias, "N"),
    )  # fmt: skip


def _validate(x, query_weight, key_weight, value_weight, query_bias, key_bias, value_bias):
    _check_shapes(x, query_weight, key_weight, value_weight, query_bias, key_bias, value_bias)
    weights = dict(query_weight=query_weight, key_weight=key_weight, value_weight=value_weight)
    biases = dict(query_bias=query_bias, key_bias=key_bias, value_bias=value_bias)
    _check.dtypes("linear_qkv", _check.FLOATS, x=x)
    _check.same_dtype("linear_qkv", x=x, **weights, **biases)
    _check.same_device("linear_qkv", x=x, **weights, **biases)


def _validate_backward(
    grad_query, grad_key, grad_value, x, query_weight, key_weight, value_weight, query_bias, key_bias, value_bias
):  # fmt: skip
    _validate(x, query_weight, key_weight, value_weight, query_bias, key_bias, value_bias)
    gradients = dict(grad_query=grad_query, grad_key=grad_key, grad_value=grad_value)
    _check.like("linear_qkv_bwd", (*x.shape[:-1], query_weight.shape[0]), x.dtype, **gradients)
    _check.same_device("linear_qkv_bwd", x=x, **gradients)


def _facts(x, requires_grad):
    return Facts(device=x.device.type, dtype=x.dtype, requires_grad=requires_grad, size=registry.size_of(x))


_OP = Op(
    "linear_qkv", _fake, _fake_backward,
    outputs=("query", "key", "value"),
    differentiable=("x", "query_weight", "key_weight", "value_weight", "query_bias", "key_bias", "value_bias"),
    validate=_validate, facts=_facts, validate_backward=_validate_backward,
)  # fmt: skip


def linear_qkv(
    x: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``x W^T + b`` for queries, keys and values, from three weights as they lie.

    Args:
        x: [..., K]; weights: [N, K] each; biases: [N] or None each; one floating dtype (under autocast: any, cast as it
            would).

    Returns:
        Query, key and value, each [..., N], dense. Differentiable in all tensors.

    Source: ``torch.nn.functional.linear``, three times.
    """
    given = (x, query_weight, key_weight, value_weight, query_bias, key_bias, value_bias)
    (x,) = _check.autocast(x)
    facts = _facts(x, _check.needs_grad(*given))
    if backend is None and not _kernels(facts):  # each by what is best for it, which looks at it and casts what it must
        _check_shapes(*given)
        sides = (query_weight, query_bias), (key_weight, key_bias), (value_weight, value_bias)
        return tuple(linear(x, weight, bias) for weight, bias in sides)
    arguments = dict(zip(_OP.arguments, _check.autocast(*given), strict=True))
    _check.of_forms(_validate, **arguments)
    name = _OP.resolve(backend, facts)
    return _OP.plain(name, **arguments) if name in registry.PLAIN else _OP(name, **arguments)


def _kernels(facts):
    """The backends of this device that can take all three together."""
    written = {*registry.backends("linear_qkv")} - {*registry.PLAIN}
    asked = [name for name in registry.asked_in_turn("linear_qkv", facts.device, facts.size) if name in written]
    return [name for name in asked if not registry.why_unavailable("linear_qkv", name, facts)]
