"""linear_fp8, quantize_fp8: linear layers on 8-bit floats (e4m3), a scale a row and a channel. No gradient."""

import torch
from torch import Tensor

from ..reference.linear_fp8 import GROUP
from . import _check, registry
from ._define import Op

Facts = registry.Facts


def _fake(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, gelu: bool, x_scale: Tensor | None,
    dtype: torch.dtype | None,
):  # fmt: skip
    return (x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype or x.dtype),), ()


def _fake_quantize(x: Tensor):
    return (x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[:-1], dtype=torch.float32)), ()


def validated(op, x, weight, weight_scale, bias, x_scale):
    """Raise for what no backend of `op` could be given."""
    _check.shapes(op, x=(x, "... K"), weight=(weight, "N K"), weight_scale=(weight_scale, "N"), bias=(bias, "N"))
    _check.dtypes(op, _check.FLOATS if x_scale is None else (torch.float8_e4m3fn,), x=x)
    _check.dtypes(op, _check.FLOATS, bias=bias)
    _check.dtypes(op, (torch.float8_e4m3fn,), weight=weight)
    _check.dtypes(op, (torch.float32,), weight_scale=weight_scale, x_scale=x_scale)
    _check.same_device(op, x=x, weight=weight, weight_scale=weight_scale, bias=bias, x_scale=x_scale)
    if x_scale is not None:
        of_groups = *x.shape[:-1], (x.shape[-1] + GROUP - 1) // GROUP
        if x_scale.shape not in (x.shape[:-1], of_groups):
            raise ValueError(
                f"{op}: x_scale has shape {list(x_scale.shape)}, expected {list(x.shape[:-1])}, or {list(of_groups)} "
                f"for groups of {GROUP} columns."
            )


def _validate(x, weight, weight_scale, bias, x_scale, dtype):
    validated("linear_fp8", x, weight, weight_scale, bias, x_scale)
    if (dtype is None) != (x_scale is None) or dtype not in (None, *_check.FLOATS):
        raise TypeError(
            f"linear_fp8: dtype is {dtype}, expected a floating dtype where x comes with x_scale, else None: that of x."
        )


def _validate_quantize(x):
    _check.shapes("quantize_fp8", x=(x, "... K"))
    _check.dtypes("quantize_fp8", _check.FLOATS, x=x)


def _facts(x, dtype):
    return Facts(device=x.device.type, dtype=dtype or x.dtype, size=registry.size_of(x))


def _facts_quantize(x):
    return _facts(x, None)


_OP = Op("linear_fp8", _fake, outputs=("out",), validate=_validate, facts=_facts)
_QUANTIZE = Op(
    "quantize_fp8", _fake_quantize, outputs=("q", "scale"), validate=_validate_quantize, facts=_facts_quantize
)


def linear_fp8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    *,
    gelu: bool = False,
    x_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """``x W^T + b`` on 8-bit floats (e4m3), then the exact GELU if wanted; no gradient.

    Args:
        x: [..., K], rounded here to e4m3 with one scale a row, max|row| / 448.
        weight: [N, K] float8_e4m3fn and weight_scale: [N] float32, from :func:`quantize_fp8`. bias: [N] or None.
        x_scale: of an x that is float8_e4m3fn already: [...] float32, or [..., ceil(K / 128)], one for each 128
            columns. dtype: of the result, then.

    Returns:
        [..., N] in the dtype of x, summed in float32. Triton needs an NVIDIA GPU from sm_89 on; elsewhere the reference
        gives the same numbers without the speed.

    Source: Micikevicius et al. 2022.
    """
    x, bias = _check.autocast(x, bias)
    _validate(x, weight, weight_scale, bias, x_scale, dtype)
    if _check.needs_grad(x, bias):
        raise RuntimeError("linear_fp8: has no gradient; call it under torch.no_grad(), or use functional.linear.")
    name = _OP.resolve(backend, _facts(x, dtype))
    arguments = dict(x=x, weight=weight, weight_scale=weight_scale, bias=bias, gelu=gelu, x_scale=x_scale, dtype=dtype)
    return _OP.plain(name, **arguments) if name in registry.PLAIN else _OP(name, **arguments)[0]


def quantize_fp8(x: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Rows [..., K] as e4m3: (q [..., K] float8_e4m3fn, scale [...] float32), x = q * scale; scale 1 for zero rows."""
    _validate_quantize(x)
    name = _QUANTIZE.resolve(backend, _facts_quantize(x))
    return _QUANTIZE.plain(name, x=x.detach()) if name in registry.PLAIN else _QUANTIZE(name, x=x.detach())
