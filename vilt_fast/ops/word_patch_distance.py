"""word_patch_distance: validation, choice of backend, torch.ops.vilt_fast.word_patch_distance and its gradient.

The op returns (distance, plan, scaling). What the backward has to keep besides its inputs is T, in one of two forms:
the plan itself, which is then asked for, or, for the backends in `_KEEPS_SCALING`, what T can be made from again, as
scaling [B, M + N, 2] (kernels/word_patch_distance.py), so that nothing of the plan's size exists; else empty. A
backend that has a row `word_patch_distance_bwd` gets (grad [B], needs, text, image, text_pad, image_pad, kept) and, if
it keeps scalings, beta and iterations; it returns two gradients, None where not needed:

    dC_ij = g T_ij;   d text_i = -g (I - t^ t^t) sum_j T_ij v^_j / |t_i|,   t^ = t / |t|, no projection below |t| = 1e-5

Facts for `supports`: dtype, rows (M), columns (N), hidden (D), inner, requires_grad, return_plan.
"""

import torch

from . import _check, registry

_KEEPS_SCALING = ("triton",)

torch.library.define(
    "vilt_fast::word_patch_distance",
    "(Tensor text, Tensor image, Tensor text_pad, Tensor image_pad, float beta, int iterations, int inner, "
    "bool return_plan, str backend) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "vilt_fast::word_patch_distance_bwd",
    "(Tensor grad, bool[] needs, Tensor text, Tensor image, Tensor text_pad, Tensor image_pad, Tensor kept, "
    "float beta, int iterations, str backend) -> Tensor[]",
)


@torch.library.impl("vilt_fast::word_patch_distance", "CompositeExplicitAutograd")
def _run(text, image, text_pad, image_pad, beta, iterations, inner, return_plan, backend):
    distance, plan, *scaling = registry.launcher("word_patch_distance", backend)(
        text, image, text_pad, image_pad, beta=beta, iterations=iterations, inner=inner, return_plan=return_plan
    )
    return distance, plan, scaling[0] if scaling else distance.new_empty(0)


@torch.library.register_fake("vilt_fast::word_patch_distance")
def _fake(text, image, text_pad, image_pad, beta, iterations, inner, return_plan, backend):
    distance = text.new_empty(len(text), dtype=torch.float32)
    plan = distance.new_empty((*text.shape[:2], image.shape[1]) if return_plan else (0,))
    tokens = text.shape[1] + image.shape[1]
    return distance, plan, distance.new_empty((len(text), tokens, 2) if backend in _KEEPS_SCALING else (0,))


@torch.library.impl("vilt_fast::word_patch_distance_bwd", "CompositeExplicitAutograd")
def _run_bwd(grad, needs, text, image, text_pad, image_pad, kept, beta, iterations, backend):
    options = dict(beta=beta, iterations=iterations) if backend in _KEEPS_SCALING else {}
    gradients = registry.launcher("word_patch_distance_bwd", backend)(
        grad, needs, text, image, text_pad, image_pad, kept, **options
    )
    return [g for g, need in zip(gradients, needs, strict=True) if need]


@torch.library.register_fake("vilt_fast::word_patch_distance_bwd")
def _fake_bwd(grad, needs, text, image, text_pad, image_pad, kept, beta, iterations, backend):
    wanted = (x for x, need in zip((text, image), needs, strict=True) if need)
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in wanted]


def _keep(ctx, inputs, output):
    *tensors, beta, iterations, _, _, backend = inputs
    ctx.options = beta, iterations, backend
    ctx.save_for_backward(*tensors, output[2 if backend in _KEEPS_SCALING else 1])


def _backward(ctx, grad, *_):
    needs = list(ctx.needs_input_grad[:2])
    found = iter(torch.ops.vilt_fast.word_patch_distance_bwd(grad, needs, *ctx.saved_tensors, *ctx.options))
    return (*(next(found) if need else None for need in needs), *[None] * 7)


torch.library.register_autograd("vilt_fast::word_patch_distance", _backward, setup_context=_keep)


def word_patch_distance(text, image, text_pad, image_pad, beta, iterations, inner, return_plan, backend):
    op = "word_patch_distance"
    sizes = _check.shapes(
        op, text=(text, "B M D"), image=(image, "B N D"), text_pad=(text_pad, "B M"), image_pad=(image_pad, "B N")
    )
    if sizes["B"] < 1:
        raise ValueError(f"{op}: text has shape {list(text.shape)}: no sample; expected B >= 1.")
    _check.dtypes(op, _check.FLOATS, text=text)
    _check.same_dtype(op, text=text, image=image)
    _check.dtypes(op, (torch.bool,), text_pad=text_pad, image_pad=image_pad)
    _check.same_device(op, text=text, image=image, text_pad=text_pad, image_pad=image_pad)
    _check.positive(op, beta=beta)
    _check.counts(op, iterations=iterations, inner=inner)
    requires_grad = _check.needs_grad(text, image)
    name = registry.resolve(
        op, backend, text.device.type, dtype=text.dtype, rows=sizes["M"], columns=sizes["N"], hidden=sizes["D"],
        inner=inner, requires_grad=requires_grad, return_plan=return_plan,
    )  # fmt: skip
    if name in registry.PLAIN:
        return registry.launcher(op, name)(
            text, image, text_pad, image_pad, beta=beta, iterations=iterations, inner=inner, return_plan=return_plan
        )
    keep_plan = requires_grad and name not in _KEEPS_SCALING
    distance, plan, _ = torch.ops.vilt_fast.word_patch_distance(
        text, image, text_pad, image_pad, beta, iterations, inner, return_plan or keep_plan, name
    )
    return (distance, plan.detach()) if return_plan else distance
