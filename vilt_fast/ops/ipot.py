"""ipot: validation, choice of backend, torch.ops.vilt_fast.ipot.

Facts for `supports`: dtype, rows (M), columns (N), inner.
"""

import torch

from . import _check, registry

torch.library.define(
    "vilt_fast::ipot",
    "(Tensor cost, Tensor text_pad, Tensor image_pad, float beta, int iterations, int inner, str backend) -> Tensor",
)


@torch.library.impl("vilt_fast::ipot", "CompositeExplicitAutograd")
def _run(cost, text_pad, image_pad, beta, iterations, inner, backend):
    return registry.launcher("ipot", backend)(cost, text_pad, image_pad, beta=beta, iterations=iterations, inner=inner)


@torch.library.register_fake("vilt_fast::ipot")
def _fake(cost, text_pad, image_pad, beta, iterations, inner, backend):
    return torch.empty(cost.shape, dtype=torch.float32, device=cost.device)


def check_costs(op, cost, text_pad, image_pad):
    """Shapes, dtypes and devices of a masked transport problem. Returns sizes."""
    sizes = _check.shapes(op, cost=(cost, "B M N"), text_pad=(text_pad, "B M"), image_pad=(image_pad, "B N"))
    if sizes["B"] < 1:
        raise ValueError(f"{op}: cost has shape {list(cost.shape)}: no sample; expected B >= 1.")
    _check.dtypes(op, _check.FLOATS, cost=cost)
    _check.dtypes(op, (torch.bool,), text_pad=text_pad, image_pad=image_pad)
    _check.same_device(op, cost=cost, text_pad=text_pad, image_pad=image_pad)
    return sizes


def check_finite(op, backend, cost, text_pad, image_pad):
    """Where values may be looked at: ValueError if a real cost is NaN or infinite. cpp looks itself, as it reads."""
    if backend == "cpp" or not _check.readable(cost) or cost.detach().sum(dtype=torch.float64).isfinite():
        return
    bad = (~cost.isfinite() & ~(text_pad.unsqueeze(2) | image_pad.unsqueeze(1))).flatten(1).any(1)
    if samples := bad.nonzero().flatten().tolist():
        raise ValueError(f"{op}: cost is NaN or infinite on real entries of samples {samples}; expected finite.")


def ipot(cost, text_pad, image_pad, beta, iterations, inner, backend):
    sizes = check_costs("ipot", cost, text_pad, image_pad)
    _check.positive("ipot", beta=beta)
    _check.counts("ipot", iterations=iterations, inner=inner)
    name = registry.resolve(
        "ipot", backend, cost.device.type, dtype=cost.dtype, rows=sizes["M"], columns=sizes["N"], inner=inner
    )
    check_finite("ipot", name, cost, text_pad, image_pad)
    if name in registry.PLAIN:
        return registry.launcher("ipot", name)(cost, text_pad, image_pad, beta=beta, iterations=iterations, inner=inner)
    return torch.ops.vilt_fast.ipot(cost.detach(), text_pad, image_pad, beta, iterations, inner, name)
