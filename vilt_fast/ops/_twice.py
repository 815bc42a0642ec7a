"""Gradients of gradients: made by autograd of the reference, or an error that names the op."""

import torch
from torch import Tensor

from . import _check

TWICE = (
    "{0}: its gradient cannot be differentiated again where a kernel has drawn dropout or a transport plan counts as a "
    "constant; backend='reference' can."
)


def gradients_of(outputs, given, sources):
    """Of `sources`, as differentiable as the grad mode says; None where there is none."""
    pairs = [(o, g) for o, g in zip(outputs, given, strict=False) if g is not None and o is not None]
    pairs = [(o, g) for o, g in pairs if o.requires_grad]
    if not pairs or not sources:
        return [None] * len(sources)
    outputs, given = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, sources, given, create_graph=torch.is_grad_enabled(), allow_unused=True)


class _Once(torch.autograd.Function):
    """The identity; what it is the gradient of cannot be differentiated again."""

    @staticmethod
    def forward(ctx, op, gradient, *sources):
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(TWICE.format(ctx.op))


def differentiable_once(op, sources, gradients):
    sources = [s for s in sources if isinstance(s, Tensor)]
    if not _check.needs_grad(*sources):
        return gradients
    return tuple(None if g is None else _Once.apply(op, g.detach(), *sources) for g in gradients)
