"""sinkhorn: entropic transport plans in the log domain, masked and batched."""

import dataclasses

import torch
from torch import Tensor

from ..reference.sinkhorn import SinkhornResult
from . import _check, registry
from ._define import Op
from .ipot import check_costs, check_finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts(registry.Facts):
    rows: int  #: M
    columns: int  #: N
    unrolled: bool = False  #: a gradient through the iterations is wanted


def _fake(
    cost: Tensor, text_pad: Tensor, image_pad: Tensor, epsilon: float, iterations: int, tolerance: float | None,
    text_marginal: Tensor | None, image_marginal: Tensor | None,
):  # fmt: skip
    plan = torch.empty(cost.shape, dtype=torch.float32, device=cost.device)
    value, error = (plan.new_empty(len(cost)) for _ in range(2))
    return (plan, value, value.new_empty(len(cost), dtype=torch.int64), error), ()


def _envelope(needs, grad_value, plan, cost):
    """d value / d cost is the plan."""
    return ((plan * grad_value[:, None, None]).to(cost.dtype),)


def _validate(cost, text_pad, image_pad, epsilon, iterations, tolerance, text_marginal, image_marginal):
    check_costs("sinkhorn", cost, text_pad, image_pad)
    _check.shapes(
        "sinkhorn", cost=(cost, "B M N"), text_marginal=(text_marginal, "B M"), image_marginal=(image_marginal, "B N")
    )
    _check.dtypes("sinkhorn", _check.FLOATS, text_marginal=text_marginal, image_marginal=image_marginal)
    _check.same_device("sinkhorn", cost=cost, text_marginal=text_marginal, image_marginal=image_marginal)
    _check.positive("sinkhorn", epsilon=epsilon)
    _check.counts("sinkhorn", iterations=iterations)
    if tolerance is not None:
        _check.positive("sinkhorn", tolerance=tolerance)
    for name, marginal, pad in (("text", text_marginal, text_pad), ("image", image_marginal, image_pad)):
        if marginal is not None and _check.readable(marginal):
            real = marginal.detach().masked_fill(pad, 0)
            if not bool((real.isfinite() & (real >= 0)).all()):
                raise ValueError(f"sinkhorn: {name}_marginal is negative, NaN or infinite on real entries.")


def _facts(cost, unrolled=False):
    _, rows, columns = cost.shape
    return Facts(device=cost.device.type, dtype=cost.dtype, rows=rows, columns=columns, unrolled=unrolled)


_OP = Op(
    "sinkhorn", _fake,
    outputs=("plan", "value", "iterations", "marginal_error"), differentiable=("cost",),
    differentiable_outputs=("value",), backward=_envelope, validate=_validate, facts=_facts,
)  # fmt: skip


def sinkhorn(
    cost: Tensor,
    text_pad: Tensor,
    image_pad: Tensor,
    *,
    epsilon: float = 0.1,
    iterations: int = 100,
    tolerance: float | None = None,
    text_marginal: Tensor | None = None,
    image_marginal: Tensor | None = None,
    gradient: str = "envelope",
    backend: str | None = None,
) -> SinkhornResult:
    """Entropic transport plan in the log domain: minimises ``<C, T> + epsilon KL(T || mu nu^t)``.

    Args:
        cost, text_pad, image_pad: as in :func:`ipot`.
        epsilon: in units of the cost, > 0. iterations: at most so many.
        tolerance: a sample stops changing once its marginal error is at most this.
        text_marginal: [B, M], image_marginal: [B, N], weights >= 0, normalised per sample over the real entries;
            uniform by default.
        gradient: "envelope" (d value / d cost = plan, plan constant) or "unrolled" (through the iterations, for plan
            and value).

    Returns:
        ``SinkhornResult(plan [B, M, N], value [B], iterations [B] int64, marginal_error [B])``; marginal_error is the
        L1 error of the text marginals, the image marginals are exact.

    Source: Cuturi 2013; Peyre and Cuturi 2019.
    """
    _validate(cost, text_pad, image_pad, epsilon, iterations, tolerance, text_marginal, image_marginal)
    if gradient not in ("envelope", "unrolled"):
        raise ValueError(f"sinkhorn: gradient is {gradient!r}, expected 'envelope' or 'unrolled'.")
    unrolled = gradient == "unrolled" and _check.needs_grad(cost, text_marginal, image_marginal)
    backend = _OP.resolve(backend, _facts(cost, unrolled))
    weightless = [
        pad if marginal is None else pad | (marginal == 0)  # an entry of weight 0 counts as padded
        for pad, marginal in ((text_pad, text_marginal), (image_pad, image_marginal))
    ]
    check_finite("sinkhorn", backend, cost, *weightless)
    arguments = dict(
        cost=cost, text_pad=text_pad, image_pad=image_pad, epsilon=epsilon, iterations=iterations, tolerance=tolerance,
        text_marginal=text_marginal, image_marginal=image_marginal,
    )  # fmt: skip
    if backend in registry.PLAIN:
        return _OP.plain(backend, **arguments, gradient=gradient)
    return SinkhornResult(*_OP(backend, **arguments))
