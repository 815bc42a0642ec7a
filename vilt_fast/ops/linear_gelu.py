"""linear_gelu: validation, choice of backend, torch.ops.vilt_fast.linear_gelu and its gradient.

Facts for `supports`: dtype, requires_grad.
"""

import torch

from . import _check, registry
from .linear import products

torch.library.define(
    "vilt_fast::linear_gelu",
    "(Tensor x, Tensor weight, Tensor? bias, str backend, bool save=False) -> (Tensor, Tensor)",
)
torch.library.define(
    "vilt_fast::linear_gelu_bwd", "(Tensor grad, Tensor pre, bool with_bias, str backend) -> (Tensor, Tensor)"
)


@torch.library.impl("vilt_fast::linear_gelu", "CompositeExplicitAutograd")
def _run(x, weight, bias, backend, save=False):
    launch = registry.launcher("linear_gelu", backend)
    result = launch(x, weight, bias, save) if save else launch(x, weight, bias)
    if isinstance(result, torch.Tensor):  # a backend without a backward keeps nothing
        return result, x.new_empty(0)
    (out,), (pre,) = result
    return out, pre


@torch.library.register_fake("vilt_fast::linear_gelu")
def _fake(x, weight, bias, backend, save=False):
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if save else 0)


@torch.library.impl("vilt_fast::linear_gelu_bwd", "CompositeExplicitAutograd")
def _run_backward(grad, pre, with_bias, backend):
    return registry.launcher("linear_gelu_bwd", backend)(grad, pre, with_bias)


@torch.library.register_fake("vilt_fast::linear_gelu_bwd")
def _fake_backward(grad, pre, with_bias, backend):
    return pre.new_empty(pre.shape), pre.new_empty(pre.shape[-1] if with_bias else 0, dtype=torch.float32)


def _keep(ctx, inputs, output):
    x, weight, _, ctx.backend, ctx.save = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _differentiate(ctx, grad, _):
    if grad is None:
        return (None,) * 5
    if not ctx.save:
        raise RuntimeError("linear_gelu: called with save=False, so there is nothing to differentiate with.")
    x, weight, pre = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dpre, dbias = torch.ops.vilt_fast.linear_gelu_bwd(grad, pre, needs[2], ctx.backend)
    dbias = dbias.to(x.dtype) if needs[2] else None
    return *products(dpre, x, weight, *needs[:2]), dbias, None, None


torch.library.register_autograd("vilt_fast::linear_gelu", _differentiate, setup_context=_keep)


def linear_gelu(x, weight, bias, backend):
    x, weight, bias = _check.autocast(x, weight, bias)
    _check.shapes("linear_gelu", x=(x, "... K"), weight=(weight, "N K"), bias=(bias, "N"))
    _check.dtypes("linear_gelu", _check.FLOATS, x=x)
    _check.same_dtype("linear_gelu", x=x, weight=weight, bias=bias)
    _check.same_device("linear_gelu", x=x, weight=weight, bias=bias)
    grad = _check.needs_grad(x, weight, bias)
    name = registry.resolve("linear_gelu", backend, x.device.type, dtype=x.dtype, requires_grad=grad)
    if name in registry.PLAIN:
        return registry.launcher("linear_gelu", name)(x, weight, bias)
    return torch.ops.vilt_fast.linear_gelu(x, weight, bias, name, grad)[0]
