"""add_layer_norm_fp8: add_layer_norm, whose rows are handed on as 8-bit floats (e4m3), a scale a row. No gradient."""

import dataclasses

import torch
from torch import Tensor

from . import _check, registry
from ._define import Op
from .add_layer_norm import validated

_NAME = "add_layer_norm_fp8"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts(registry.Facts):
    residual_dtype: torch.dtype
    width: int


def _fake(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
    s = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    q, scale = x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[:-1], dtype=torch.float32)
    return (s, q, scale), ()


def _validate(x, residual, weight, bias):
    validated(_NAME, x, residual, weight, bias)


def _facts(x, residual):
    return Facts(
        device=x.device.type, dtype=x.dtype, residual_dtype=residual.dtype, width=x.shape[-1],
        size=registry.size_of(x),
    )  # fmt: skip


_OP = Op(_NAME, _fake, outputs=("s", "q", "scale"), validate=_validate, facts=_facts)


def add_layer_norm_fp8(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``s = x + residual`` and ``LayerNorm(s)`` as e4m3, as :func:`quantize_fp8` makes it; no gradient.

    Args:
        x, residual: [..., D], of one shape; the residual may be of a wider dtype (a float32 stream, bfloat16 layers).
        weight, bias: [D] or None. eps: added to the variance.

    Returns:
        s [..., D] in the wider dtype of x and residual; the normalised rows, rounded to the dtype of x and then to q
        [..., D] float8_e4m3fn with scale [...] float32: what :func:`linear_fp8` takes as x and x_scale. Triton's are
        those of its add_layer_norm and quantize_fp8 to the bit.

    Source: Dosovitskiy et al. 2021, eq. 2-3; Micikevicius et al. 2022.
    """
    tensors = dict(x=x, residual=residual, weight=weight, bias=bias)
    _validate(**tensors)
    if _check.needs_grad(*tensors.values()):
        raise RuntimeError(
            f"{_NAME}: has no gradient; call it under torch.no_grad(), or use functional.add_layer_norm."
        )
    name = _OP.resolve(backend, _facts(x, residual))
    return _OP.plain(name, **tensors, eps=eps) if name in registry.PLAIN else _OP(name, **tensors, eps=eps)
