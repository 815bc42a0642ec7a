"""A computation that records nothing, as one node of the autograd graph: what its gradient needs is computed later.

In evaluation mode gradients are recorded by most programs and wanted by few. So there the forward is the fast one, and
whoever does call backward pays one forward more. The node saves its inputs, nothing else; a tensor that is changed in
place meanwhile is found by autograd, as it is anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..ops._check import transforming


def why_not() -> str:
    """Why nothing can be computed again later, here and now, or ""."""
    seen = transforming() or torch.compiler.is_compiling() or torch.jit.is_tracing()
    return "a transform or a tracer sees every operation" if seen else ""


def why_not_of(module: nn.Module) -> str:
    """Why gradients that go through `module`, if they are recorded, should be recorded at once, or ""."""
    training = torch.is_grad_enabled() and module.training
    return "it is in training mode, where a backward follows each forward" if training else ""


def recomputed(
    fast: Callable[[torch.Tensor], torch.Tensor],
    exact: Callable[..., torch.Tensor],
    rows: torch.Tensor,
    parameters: Sequence[torch.Tensor],
) -> torch.Tensor:
    """`fast(rows)`, with the gradient of `exact(rows, *parameters)`: two ways to compute the same.

    `exact` runs in the backward, with the parameters as they were, under the autocast of the forward.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (rows, *parameters)):
        return _Recomputed.apply(fast, exact, rows, *parameters)
    with torch.no_grad():
        return fast(rows)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fast, exact, rows, *parameters):
        ctx.exact, ctx.device = exact, rows.device.type
        ctx.autocast = torch.is_autocast_enabled(ctx.device), torch.get_autocast_dtype(ctx.device)
        ctx.save_for_backward(rows, *parameters)
        return fast(rows)

    @staticmethod
    def backward(ctx, grad):
        again = torch.is_grad_enabled()  # create_graph: the gradient will be differentiated itself
        needs = ctx.needs_input_grad[2:]
        enabled, dtype = ctx.autocast
        with torch.enable_grad(), torch.autocast(ctx.device, dtype, enabled):
            # An alias a place, so that a tensor in two places has a gradient in each.
            inputs = [
                t.view_as(t) if again else t.detach().requires_grad_(n)
                for t, n in zip(ctx.saved_tensors, needs, strict=True)
            ]
            result = ctx.exact(*inputs)
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        found = iter(torch.autograd.grad(result, wanted, grad, create_graph=again, allow_unused=True))
        return None, None, *(next(found) if need else None for need in needs)
