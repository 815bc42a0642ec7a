"""linear_cross_entropy: validation, choice of backend, torch.ops.vilt_fast.linear_cross_entropy and its gradient.

The registered op gives a loss a row; the reduction is ordinary PyTorch. Facts for `supports`: dtype, requires_grad,
reduction.
"""

import torch

from . import _check, registry

OP = "linear_cross_entropy"

torch.library.define(
    "vilt_fast::linear_cross_entropy",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor labels, int ignore_index, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "vilt_fast::linear_cross_entropy_bwd",
    "(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor labels, Tensor lse, Tensor kept, Tensor count, "
    "bool needs_x, bool needs_weight, bool needs_bias, str backend) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("vilt_fast::linear_cross_entropy", "CompositeExplicitAutograd")
def _run(x, weight, bias, labels, ignore_index, backend):
    outputs, kept = registry.launcher(OP, backend)(x, weight, bias, labels, ignore_index)
    return (*outputs, *kept)


@torch.library.register_fake("vilt_fast::linear_cross_entropy")
def _fake(x, weight, bias, labels, ignore_index, backend):
    losses, lse = (x.new_empty(x.shape[:1], dtype=torch.float32) for _ in range(2))
    return losses, lse, x.new_empty(x.shape[:1], dtype=torch.int32), x.new_empty(1, dtype=torch.int32)


@torch.library.impl("vilt_fast::linear_cross_entropy_bwd", "CompositeExplicitAutograd")
def _run_backward(*arguments):
    *arguments, backend = arguments
    return registry.launcher("linear_cross_entropy_bwd", backend)(*arguments)


@torch.library.register_fake("vilt_fast::linear_cross_entropy_bwd")
def _fake_backward(grad, x, weight, bias, labels, lse, kept, count, needs_x, needs_weight, needs_bias, backend):
    return (
        x.new_empty(x.shape if needs_x else [0]),
        weight.new_empty(weight.shape if needs_weight else [0]),
        weight.new_empty(weight.shape[:1] if needs_bias else [0]),
    )


def _keep(ctx, inputs, output):
    x, weight, bias, labels, _, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weight, bias, labels, *output[1:])


def _differentiate(ctx, grad, *_):
    needs = ctx.needs_input_grad[:3]
    gradients = torch.ops.vilt_fast.linear_cross_entropy_bwd(grad, *ctx.saved_tensors, *needs, ctx.backend)
    return *(g if needed else None for g, needed in zip(gradients, needs, strict=True)), None, None, None


torch.library.register_autograd("vilt_fast::linear_cross_entropy", _differentiate, setup_context=_keep)


def linear_cross_entropy(x, weight, bias, labels, ignore_index, reduction, backend):
    x, weight, bias = _check.autocast(x, weight, bias)
    sizes = _check.shapes(OP, x=(x, "R D"), weight=(weight, "V D"), bias=(bias, "V"), labels=(labels, "R"))
    _check.dtypes(OP, _check.FLOATS, x=x, weight=weight, bias=bias)
    _check.same_dtype(OP, x=x, weight=weight, bias=bias)
    _check.dtypes(OP, (torch.int64,), labels=labels)
    _check.same_device(OP, x=x, weight=weight, bias=bias, labels=labels)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{OP}: reduction is {reduction!r}, expected 'mean', 'sum' or 'none'.")
    if _check.readable(labels):
        bad = (labels != ignore_index) & ((labels < 0) | (labels >= sizes["V"]))
        if bad.any():
            raise IndexError(
                f"{OP}: label {labels[bad][0].item()} is outside 0..{sizes['V'] - 1} and is not ignore_index "
                f"{ignore_index}."
            )
    grad = _check.needs_grad(x, weight, bias)
    name = registry.resolve(OP, backend, x.device.type, dtype=x.dtype, requires_grad=grad, reduction=reduction)
    if name in registry.PLAIN:
        return registry.launcher(OP, name)(x, weight, bias, labels, ignore_index=ignore_index, reduction=reduction)
    losses, _, _, count = torch.ops.vilt_fast.linear_cross_entropy(x, weight, bias, labels, ignore_index, name)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / count.squeeze(0)
