"""sinkhorn: validation and choice of backend.

Facts for `supports`: dtype, rows (M), columns (N), marginals (bool), tolerance (bool), gradient ("none" when nothing
requires one, else the mode).
"""

from .. import registry
from . import _check
from .ipot import check_costs


def sinkhorn(
    cost, text_pad, image_pad, epsilon, iterations, tolerance, text_marginal, image_marginal, gradient, backend
):
    sizes = check_costs("sinkhorn", cost, text_pad, image_pad)
    _check.shapes(
        "sinkhorn", cost=(cost, "B M N"), text_marginal=(text_marginal, "B M"), image_marginal=(image_marginal, "B N")
    )
    _check.dtypes("sinkhorn", _check.FLOATS, text_marginal=text_marginal, image_marginal=image_marginal)
    _check.same_device("sinkhorn", cost=cost, text_marginal=text_marginal, image_marginal=image_marginal)
    _check.positive("sinkhorn", epsilon=epsilon)
    _check.counts("sinkhorn", iterations=iterations)
    if tolerance is not None:
        _check.positive("sinkhorn", tolerance=tolerance)
    if gradient not in ("envelope", "unrolled"):
        raise ValueError(f"sinkhorn: gradient is {gradient!r}, expected 'envelope' or 'unrolled'.")
    for name, marginal, pad in (("text", text_marginal, text_pad), ("image", image_marginal, image_pad)):
        if marginal is not None and _check.readable(marginal):
            real = marginal.detach().masked_fill(pad, 0)
            if not bool((real.isfinite() & (real >= 0)).all()):
                raise ValueError(f"sinkhorn: {name}_marginal is negative, NaN or infinite on real entries.")
    grad = _check.needs_grad(cost, text_marginal, image_marginal)
    backend = registry.resolve(
        "sinkhorn", backend, cost.device.type, dtype=cost.dtype, rows=sizes["M"], columns=sizes["N"],
        marginals=text_marginal is not None or image_marginal is not None, tolerance=tolerance is not None,
        gradient=gradient if grad else "none",
    )  # fmt: skip
    return registry.launcher("sinkhorn", backend)(
        cost, text_pad, image_pad, epsilon=epsilon, iterations=iterations, tolerance=tolerance,
        text_marginal=text_marginal, image_marginal=image_marginal, gradient=gradient,
    )  # fmt: skip
