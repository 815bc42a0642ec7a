"""linear: validation, choice of backend, torch.ops.vilt_fast.linear, and the gradients of a matrix product.

Facts for `supports`: dtype, residual_dtype (or None), requires_grad.
"""

import torch

from . import _check, registry

torch.library.define(
    "vilt_fast::linear", "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str backend) -> Tensor"
)


@torch.library.impl("vilt_fast::linear", "CompositeExplicitAutograd")
def _run(x, weight, bias, residual, backend):
    (out,), _ = registry.launcher("linear", backend)(x, weight, bias, residual)
    return out


@torch.library.register_fake("vilt_fast::linear")
def _fake(x, weight, bias, residual, backend):
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype)


def products(grad, x, weight, needs_x, needs_weight):
    """(dx, dweight) of x W^T, None where not needed; grad [..., N] is rounded to the dtype of x first."""
    grad = grad.to(weight.dtype).reshape(-1, weight.shape[0])
    dx = torch.mm(grad, weight).view(*x.shape) if needs_x else None
    return dx, torch.mm(grad.t(), x.reshape(-1, x.shape[-1])) if needs_weight else None


def _keep(ctx, inputs, output):
    x, weight, bias, residual, _ = inputs
    ctx.dtypes = [None if t is None else t.dtype for t in (bias, residual)]
    ctx.save_for_backward(x, weight)


def _differentiate(ctx, grad):
    needs = ctx.needs_input_grad
    dx, dweight = products(grad, *ctx.saved_tensors, *needs[:2])
    dbias = grad.flatten(0, -2).sum(0).to(ctx.dtypes[0]) if needs[2] else None
    return dx, dweight, dbias, grad.to(ctx.dtypes[1]) if needs[3] else None, None


torch.library.register_autograd("vilt_fast::linear", _differentiate, setup_context=_keep)


def linear(x, weight, bias, residual, backend):
    x, weight, bias = _check.autocast(x, weight, bias)
    _check.shapes("linear", x=(x, "... K"), weight=(weight, "N K"), bias=(bias, "N"), residual=(residual, "... N"))
    if residual is not None and residual.shape[:-1] != x.shape[:-1]:
        expected = [*x.shape[:-1], weight.shape[0]]
        raise ValueError(f"linear: residual has shape {list(residual.shape)}, expected {expected}.")
    _check.dtypes("linear", _check.FLOATS, x=x, residual=residual)
    _check.same_dtype("linear", x=x, weight=weight, bias=bias)
    _check.same_device("linear", x=x, weight=weight, bias=bias, residual=residual)
    name = registry.resolve(
        "linear", backend, x.device.type, dtype=x.dtype, residual_dtype=None if residual is None else residual.dtype,
        requires_grad=_check.needs_grad(x, weight, bias, residual),
    )  # fmt: skip
    if name in registry.PLAIN:
        return registry.launcher("linear", name)(x, weight, bias, residual)
    return torch.ops.vilt_fast.linear(x, weight, bias, residual, name)
