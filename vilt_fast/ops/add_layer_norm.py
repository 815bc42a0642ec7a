"""add_layer_norm: validation, choice of backend, torch.ops.vilt_fast.add_layer_norm and its gradient.

Facts for `supports`: dtype, residual_dtype, width (D), requires_grad, dropout (bool).
"""

import torch

from . import _check, registry

OP = "add_layer_norm"

torch.library.define(
    "vilt_fast::add_layer_norm",
    "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor? seed, float eps, float dropout_p, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "vilt_fast::add_layer_norm_bwd",
    "(Tensor? ds, Tensor? dy, Tensor s, Tensor mean, Tensor rstd, Tensor? weight, Tensor? seed, float dropout_p, "
    "ScalarType x_dtype, ScalarType residual_dtype, bool with_sums, str backend) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("vilt_fast::add_layer_norm", "CompositeExplicitAutograd")
def _run(x, residual, weight, bias, seed, eps, dropout_p, backend):
    outputs, kept = registry.launcher(OP, backend)(x, residual, weight, bias, eps, dropout_p, seed)
    return (*outputs, *kept)


@torch.library.register_fake("vilt_fast::add_layer_norm")
def _fake(x, residual, *rest):
    s = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return s, x.new_empty(x.shape), *(x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))


@torch.library.impl("vilt_fast::add_layer_norm_bwd", "CompositeExplicitAutograd")
def _run_backward(ds, dy, s, mean, rstd, weight, seed, dropout_p, x_dtype, residual_dtype, with_sums, backend):
    return registry.launcher("add_layer_norm_bwd", backend)(
        ds, dy, s, mean, rstd, weight, seed=seed, dropout_p=dropout_p, x_dtype=x_dtype, residual_dtype=residual_dtype,
        with_sums=with_sums,
    )  # fmt: skip


@torch.library.register_fake("vilt_fast::add_layer_norm_bwd")
def _fake_backward(ds, dy, s, mean, rstd, weight, seed, dropout_p, x_dtype, residual_dtype, with_sums, backend):
    apart = dropout_p > 0 or x_dtype != residual_dtype
    return (
        s.new_empty(s.shape, dtype=residual_dtype),
        s.new_empty(s.shape if apart else [0], dtype=x_dtype),
        s.new_empty([2, s.shape[-1]] if with_sums else [0], dtype=torch.float32),
    )


def _keep(ctx, inputs, output):
    x, residual, weight, bias, seed, _, ctx.dropout_p, ctx.backend = inputs
    s, _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.x_dtype, ctx.residual_dtype = x.dtype, residual.dtype
    ctx.dtypes = [None if p is None else p.dtype for p in (weight, bias)]
    ctx.save_for_backward(s, mean, rstd, weight, seed)


def _differentiate(ctx, ds, dy, *_):
    if ds is None and dy is None:
        return (None,) * 8
    needs = ctx.needs_input_grad[2:4]
    dresidual, dx, sums = torch.ops.vilt_fast.add_layer_norm_bwd(
        ds, dy, *ctx.saved_tensors, ctx.dropout_p, ctx.x_dtype, ctx.residual_dtype, any(needs), ctx.backend
    )
    apart = ctx.dropout_p > 0 or ctx.x_dtype != ctx.residual_dtype
    parameters = [
        sums[place].to(dtype) if needed else None
        for place, (needed, dtype) in enumerate(zip(needs, ctx.dtypes, strict=True))
    ]
    return dx if apart else dresidual, dresidual, *parameters, None, None, None, None


torch.library.register_autograd("vilt_fast::add_layer_norm", _differentiate, setup_context=_keep)


def add_layer_norm(x, residual, weight, bias, eps, dropout_p, backend):
    tensors = dict(x=x, residual=residual, weight=weight, bias=bias)
    specs = dict.fromkeys(tensors, "D") | {"x": "... D", "residual": "... D"}
    sizes = _check.shapes(OP, **{name: (tensor, specs[name]) for name, tensor in tensors.items()})
    if x.shape != residual.shape:
        raise ValueError(
            f"add_layer_norm: residual has shape {list(residual.shape)}, expected that of x, {list(x.shape)}."
        )
    _check.dtypes(OP, _check.FLOATS, **tensors)
    _check.same_device(OP, **tensors)
    _check.probability(OP, dropout_p)
    name = registry.resolve(
        OP, backend, x.device.type, dtype=x.dtype, residual_dtype=residual.dtype, width=sizes["D"],
        requires_grad=_check.needs_grad(*tensors.values()), dropout=dropout_p > 0,
    )  # fmt: skip
    if name in registry.PLAIN:
        return registry.launcher(OP, name)(x, residual, weight, bias, eps, dropout_p=dropout_p)
    seed = torch.randint(2**62, (1,), device=x.device) if dropout_p > 0 else None
    s, y, _, _ = torch.ops.vilt_fast.add_layer_norm(x, residual, weight, bias, seed, eps, dropout_p, name)
    return s, y
