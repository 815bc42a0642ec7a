"""sinkhorn: validation, choice of backend, torch.ops.vilt_fast.sinkhorn and its envelope gradient.

The op's outputs are (plan, value, iterations, marginal_error); only value has a gradient, the plan times that of the
value, into the costs. A backend that unrolls has to be plain PyTorch.

Facts for `supports`: dtype, rows (M), columns (N), marginals (bool), tolerance (bool), gradient ("none" when nothing
requires one, else the mode).
"""

import torch

from ..reference.sinkhorn import SinkhornResult
from . import _check, registry
from .ipot import check_costs, check_finite

torch.library.define(
    "vilt_fast::sinkhorn",
    "(Tensor cost, Tensor text_pad, Tensor image_pad, float epsilon, int iterations, float? tolerance, "
    "Tensor? text_marginal, Tensor? image_marginal, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("vilt_fast::sinkhorn", "CompositeExplicitAutograd")
def _run(cost, text_pad, image_pad, epsilon, iterations, tolerance, text_marginal, image_marginal, backend):
    return tuple(
        registry.launcher("sinkhorn", backend)(
            cost, text_pad, image_pad, epsilon=epsilon, iterations=iterations, tolerance=tolerance,
            text_marginal=text_marginal, image_marginal=image_marginal,
        )
    )  # fmt: skip


@torch.library.register_fake("vilt_fast::sinkhorn")
def _fake(cost, text_pad, image_pad, epsilon, iterations, tolerance, text_marginal, image_marginal, backend):
    plan = torch.empty(cost.shape, dtype=torch.float32, device=cost.device)
    per_sample = plan.new_empty(len(cost))
    return plan, per_sample, per_sample.new_empty(len(cost), dtype=torch.int64), torch.empty_like(per_sample)


def _keep(ctx, inputs, output):
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[0])


def _backward(ctx, grad_plan, grad_value, *_):
    (plan,) = ctx.saved_tensors
    return ((plan * grad_value[:, None, None]).to(ctx.dtype), *[None] * 8)


torch.library.register_autograd("vilt_fast::sinkhorn", _backward, setup_context=_keep)


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
    weightless = [
        pad if marginal is None else pad | (marginal == 0)  # an entry of weight 0 counts as padded
        for pad, marginal in ((text_pad, text_marginal), (image_pad, image_marginal))
    ]
    check_finite("sinkhorn", backend, cost, *weightless)
    if backend in registry.PLAIN:
        return registry.launcher("sinkhorn", backend)(
            cost, text_pad, image_pad, epsilon=epsilon, iterations=iterations, tolerance=tolerance,
            text_marginal=text_marginal, image_marginal=image_marginal, gradient=gradient,
        )  # fmt: skip
    plan, value, used, error = torch.ops.vilt_fast.sinkhorn(
        cost, text_pad, image_pad, epsilon, iterations, tolerance, text_marginal, image_marginal, backend
    )
    return SinkhornResult(plan.detach(), value, used, error.detach())
