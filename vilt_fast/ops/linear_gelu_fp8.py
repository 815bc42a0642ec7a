"""linear_gelu_fp8: a linear layer on 8-bit floats (e4m3) and the exact GELU, handed on as e4m3, too. No gradient."""

import torch
from torch import Tensor

from ..reference.linear_fp8 import GROUP
from . import _check, registry
from ._define import Op
from .linear_fp8 import validated

_NAME = "linear_gelu_fp8"
Facts = registry.Facts


def _fake(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, x_scale: Tensor | None):
    outputs = weight.shape[0]
    scale = x.new_empty((outputs + GROUP - 1) // GROUP, *x.shape[:-1], dtype=torch.float32)
    return (x.new_empty(*x.shape[:-1], outputs, dtype=torch.float8_e4m3fn), scale.movedim(0, -1)), ()


def _validate(x, weight, weight_scale, bias, x_scale):
    validated(_NAME, x, weight, weight_scale, bias, x_scale)


def _facts(x):
    # Of rows that are e4m3 no kernel asks what they were.
    dtype = torch.float32 if x.dtype == torch.float8_e4m3fn else x.dtype
    return Facts(device=x.device.type, dtype=dtype, size=registry.size_of(x))


_OP = Op(_NAME, _fake, outputs=("q", "scale"), validate=_validate, facts=_facts)


def linear_gelu_fp8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    *,
    x_scale: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``gelu(x W^T + b)`` with the exact GELU, on 8-bit floats (e4m3) and rounded to such; no gradient.

    Args:
        x, weight, weight_scale, bias, x_scale: as in :func:`linear_fp8`.

    Returns:
        q [..., N] float8_e4m3fn and scale [..., ceil(N / 128)] float32, max|y| / 448 of each 128 columns of a row:
        what :func:`linear_fp8` takes as x and x_scale.

    Source: Hendrycks and Gimpel 2016, eq. 1; Micikevicius et al. 2022.
    """
    x, bias = _check.autocast(x, bias)
    _validate(x, weight, weight_scale, bias, x_scale)
    if _check.needs_grad(x, bias):
        raise RuntimeError(f"{_NAME}: has no gradient; call it under torch.no_grad(), or use functional.linear_gelu.")
    name = _OP.resolve(backend, _facts(x))
    arguments = dict(x=x, weight=weight, weight_scale=weight_scale, bias=bias, x_scale=x_scale)
    return _OP.plain(name, **arguments) if name in registry.PLAIN else _OP(name, **arguments)
