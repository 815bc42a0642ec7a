"""ipot: validation and choice of backend. Facts for `supports`: dtype, rows (M), columns (N), inner."""

import torch

from .. import registry
from . import _check


def check_costs(op, cost, text_pad, image_pad):
    """Shapes and dtypes of a masked transport problem; on the CPU also that real costs are finite. Returns sizes."""
    sizes = _check.shapes(op, cost=(cost, "B M N"), text_pad=(text_pad, "B M"), image_pad=(image_pad, "B N"))
    if sizes["B"] < 1:
        raise ValueError(f"{op}: cost has shape {list(cost.shape)}: no sample; expected B >= 1.")
    _check.dtypes(op, _check.FLOATS, cost=cost)
    _check.dtypes(op, (torch.bool,), text_pad=text_pad, image_pad=image_pad)
    _check.same_device(op, cost=cost, text_pad=text_pad, image_pad=image_pad)
    if _check.readable(cost):
        bad = (~cost.isfinite() & ~(text_pad.unsqueeze(2) | image_pad.unsqueeze(1))).flatten(1).any(1)
        if bad.any():
            samples = bad.nonzero().flatten().tolist()
            raise ValueError(f"{op}: cost is NaN or infinite on real entries of samples {samples}; expected finite.")
    return sizes


def ipot(cost, text_pad, image_pad, beta, iterations, inner, backend):
    sizes = check_costs("ipot", cost, text_pad, image_pad)
    _check.positive("ipot", beta=beta)
    _check.counts("ipot", iterations=iterations, inner=inner)
    name = registry.resolve(
        "ipot", backend, cost.device.type, dtype=cost.dtype, rows=sizes["M"], columns=sizes["N"], inner=inner
    )
    return registry.launcher("ipot", name)(cost, text_pad, image_pad, beta=beta, iterations=iterations, inner=inner)
