"""linear_int8: a linear layer on 8-bit weights and rows, for heads. No gradient."""

import torch
from torch import Tensor

from . import _check, registry
from ._define import Op

Facts = registry.Facts


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, gelu: bool):
    return (x.new_empty(*x.shape[:-1], out_features),), ()


def _validate(x, weight, bias, out_features):
    _check.shapes("linear_int8", x=(x, "... K"), weight=(weight, "bytes"), bias=(bias, str(out_features)))
    _check.dtypes("linear_int8", (torch.float32, torch.bfloat16), x=x, bias=bias)
    _check.dtypes("linear_int8", (torch.uint8,), weight=weight)
    _check.same_device("linear_int8", x=x, weight=weight, bias=bias)


_OP = Op("linear_int8", _fake, outputs=("out",), validate=_validate)


def linear_int8(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_features: int,
    *,
    gelu: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``x W^T + b`` on 8-bit integers, then the exact GELU if wanted; no gradient.

    Args:
        x: [..., K] float32 or bfloat16, rounded here to 256 levels a row.
        weight: a blob of :func:`quantize_linear`, of a weight [N, K]. bias: [N], float32 or bfloat16, or None.
        out_features: N, which the blob keeps to itself.

    Returns:
        [..., N] in the dtype of x, summed in int32. On a CPU with the native library (RuntimeError elsewhere).

    Source: as :func:`encoder` with ``compute="int8"``.
    """
    _validate(x, weight, bias, out_features)
    if _check.needs_grad(x, bias):
        raise RuntimeError("linear_int8: has no gradient; call it under torch.no_grad(), or use functional.linear.")
    name = _OP.resolve(backend, Facts(device=x.device.type, dtype=x.dtype))
    return _OP(name, x=x, weight=weight, bias=bias, out_features=out_features, gelu=gelu)[0]
