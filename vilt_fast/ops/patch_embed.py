"""patch_embed: validation, choice of backend, torch.ops.vilt_fast.patch_embed and its gradient.

Facts for `supports`: dtype (of weight), pixel_dtype, text_dtype, out_dtype,
table_dtypes (a set: cls_token, position, modality), dropout (bool), square (bool: ph == pw), requires_grad.

The dropout mask is a function of `seed`, which is an input of the op: so the op is pure, nothing else has to be kept
for the backward, and a recomputed forward drops the same elements.
"""

import torch

from .. import registry
from . import _check

_INPUTS = (
    "Tensor pixels, Tensor weight, Tensor? bias, Tensor cls_token, Tensor position, Tensor modality, Tensor text, "
    "Tensor text_rows, Tensor patch_source, Tensor patch_rows, Tensor patch_sample, Tensor pos_index, "
    "Tensor pos_weight, Tensor cls_rows, Tensor modality_index"
)
_EXTRAS = "Tensor? pixel_scale=None, Tensor? pixel_shift=None, Tensor? seed=None"
_FLOATS = 7  # so many of the inputs, the first ones, are differentiable

torch.library.define(
    "vilt_fast::patch_embed",
    f"({_INPUTS}, SymInt total_rows, float dropout_p, ScalarType out_dtype, str backend, {_EXTRAS}) -> Tensor",
)
torch.library.define(
    "vilt_fast::patch_embed_bwd",
    f"(Tensor grad, bool[] needs, {_INPUTS}, float dropout_p, str backend, {_EXTRAS}) -> Tensor[]",
)


def _given(pixel_scale, pixel_shift, seed):
    extras = dict(pixel_scale=pixel_scale, pixel_shift=pixel_shift, seed=seed)
    return {name: tensor for name, tensor in extras.items() if tensor is not None}


@torch.library.impl("vilt_fast::patch_embed", "CompositeExplicitAutograd")
def _run(*arguments, pixel_scale=None, pixel_shift=None, seed=None):
    *inputs, total_rows, dropout_p, out_dtype, backend = arguments[:19]
    return registry.launcher("patch_embed", backend)(
        *inputs, total_rows, dropout_p=dropout_p, out_dtype=out_dtype, **_given(pixel_scale, pixel_shift, seed)
    )


@torch.library.register_fake("vilt_fast::patch_embed")
def _fake(pixels, weight, *arguments, **extras):
    total_rows, _, out_dtype, _ = arguments[13:17]
    return weight.new_empty(total_rows, weight.shape[0], dtype=out_dtype)


@torch.library.impl("vilt_fast::patch_embed_bwd", "CompositeExplicitAutograd")
def _run_bwd(grad, needs, *arguments, pixel_scale=None, pixel_shift=None, seed=None):
    *inputs, dropout_p, backend = arguments
    gradients = registry.launcher("patch_embed_bwd", backend)(
        grad, needs, *inputs, dropout_p=dropout_p, **_given(pixel_scale, pixel_shift, seed)
    )
    return [g for g, need in zip(gradients, needs, strict=True) if need]


@torch.library.register_fake("vilt_fast::patch_embed_bwd")
def _fake_bwd(grad, needs, *arguments, **extras):
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t, need in zip(arguments, needs, strict=False) if need]


def _keep(ctx, inputs, keyword_only_inputs=None, output=None):
    *arguments, pixel_scale, pixel_shift, seed = inputs
    *tensors, _, ctx.dropout_p, _, ctx.backend = arguments
    ctx.save_for_backward(*tensors, pixel_scale, pixel_shift, seed)


def _backward(ctx, grad):
    *tensors, pixel_scale, pixel_shift, seed = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:_FLOATS])
    gradients = iter(
        torch.ops.vilt_fast.patch_embed_bwd(
            grad, needs, *tensors, ctx.dropout_p, ctx.backend, pixel_scale, pixel_shift, seed
        )
    )
    rest = len(ctx.needs_input_grad) - _FLOATS
    return (*(next(gradients) if need else None for need in needs), *[None] * rest)


torch.library.register_autograd("vilt_fast::patch_embed", _backward, setup_context=_keep)
