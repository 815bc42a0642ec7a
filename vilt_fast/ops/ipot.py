"""ipot: the transport plan of the inexact proximal point method, masked and batched."""

import dataclasses

import torch
from torch import Tensor

from . import _check, registry
from ._define import Op


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts(registry.Facts):
    rows: int  #: M
    columns: int  #: N


def _fake(cost: Tensor, text_pad: Tensor, image_pad: Tensor, beta: float, iterations: int, inner: int):
    return (torch.empty(cost.shape, dtype=torch.float32, device=cost.device),), ()


def check_costs(op, cost, text_pad, image_pad):
    """Shapes, dtypes and devices of a masked transport problem."""
    sizes = _check.shapes(op, cost=(cost, "B M N"), text_pad=(text_pad, "B M"), image_pad=(image_pad, "B N"))
    if sizes["B"] < 1:
        raise ValueError(f"{op}: cost has shape {list(cost.shape)}: no sample; expected B >= 1.")
    _check.dtypes(op, _check.FLOATS, cost=cost)
    _check.padding_masks(op, text_pad=text_pad, image_pad=image_pad)
    _check.same_device(op, cost=cost, text_pad=text_pad, image_pad=image_pad)


def check_finite(op, backend, cost, text_pad, image_pad):
    """Where values may be looked at: ValueError if a real cost is NaN or infinite. cpp looks itself, as it reads."""
    if backend == "cpp" or not _check.readable(cost) or cost.detach().sum(dtype=torch.float64).isfinite():
        return
    bad = (~cost.isfinite() & ~(text_pad.unsqueeze(2) | image_pad.unsqueeze(1))).flatten(1).any(1)
    if samples := bad.nonzero().flatten().tolist():
        raise ValueError(f"{op}: cost is NaN or infinite on real entries of samples {samples}; expected finite.")


def _validate(cost, text_pad, image_pad, beta, iterations, inner):
    check_costs("ipot", cost, text_pad, image_pad)
    _check.positive("ipot", beta=beta)
    _check.counts("ipot", iterations=iterations, inner=inner)


def _facts(cost):
    _, rows, columns = cost.shape
    return Facts(device=cost.device.type, dtype=cost.dtype, rows=rows, columns=columns)


_OP = Op("ipot", _fake, outputs=("plan",), validate=_validate, facts=_facts)


def ipot(
    cost: Tensor,
    text_pad: Tensor,
    image_pad: Tensor,
    *,
    beta: float = 0.5,
    iterations: int = 50,
    inner: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Transport plan of the inexact proximal point method, as ViLT and UNITER run it.

    Args:
        cost: [B, M, N]; finite on real entries (ValueError on the CPU), anything on padding.
        text_pad: [B, M] bool, image_pad: [B, N] bool, True where padded.
        beta: proximal step, > 0.
        iterations: outer steps, part of the definition (50 have not converged). inner: scaling steps in each.

    Returns:
        plan [B, M, N], same orientation as ``cost``, float32 (float64 for float64 costs), zero on padding; all zero for
        a sample without real tokens or patches. No gradient.

    Source: Xie et al. 2020, algorithm 1; the original ``vilt/modules/objectives.py``.
    """
    _validate(cost, text_pad, image_pad, beta, iterations, inner)
    name = _OP.resolve(backend, _facts(cost))
    check_finite("ipot", name, cost, text_pad, image_pad)
    arguments = dict(cost=cost, text_pad=text_pad, image_pad=image_pad, beta=beta, iterations=iterations, inner=inner)
    if name in registry.PLAIN:
        return _OP.plain(name, **arguments)
    return _OP(name, **arguments | {"cost": cost.detach()})[0]
