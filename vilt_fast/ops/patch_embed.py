"""patch_embed: validation, choice of backend, torch.ops.vilt_fast.patch_embed and its gradient.

Facts for `supports`: dtype (of weight), pixel_dtype, text_dtype, out_dtype,
table_dtypes (a set: cls_token, position, modality), dropout (bool), square (bool: ph == pw), requires_grad.

The dropout mask is a function of `seed`, which is an input of the op: so the op is pure, nothing else has to be kept
for the backward, and a recomputed forward drops the same elements.
"""

import torch

from . import _check, registry

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


def _extras(pixel_scale=None, pixel_shift=None, seed=None):
    """What backends without normalisation or dropout need not know of."""
    extras = dict(pixel_scale=pixel_scale, pixel_shift=pixel_shift, seed=seed)
    return {name: tensor for name, tensor in extras.items() if tensor is not None}


@torch.library.impl("vilt_fast::patch_embed", "CompositeExplicitAutograd")
def _run(*arguments):
    *inputs, dropout_p, out_dtype, backend = arguments[:19]
    launch = registry.launcher("patch_embed", backend)
    return launch(*inputs, dropout_p=dropout_p, out_dtype=out_dtype, **_extras(*arguments[19:]))


@torch.library.register_fake("vilt_fast::patch_embed")
def _fake(pixels, weight, *arguments):
    total_rows, _, out_dtype = arguments[13:16]
    return weight.new_empty(total_rows, weight.shape[0], dtype=out_dtype)


@torch.library.impl("vilt_fast::patch_embed_bwd", "CompositeExplicitAutograd")
def _run_bwd(*arguments):
    *inputs, dropout_p, backend = arguments[:19]
    launch = registry.launcher("patch_embed_bwd", backend)
    gradients = launch(*inputs, dropout_p=dropout_p, **_extras(*arguments[19:]))
    return [g for g, need in zip(gradients, arguments[1], strict=True) if need]


@torch.library.register_fake("vilt_fast::patch_embed_bwd")
def _fake_bwd(grad, needs, *arguments):
    given = zip(arguments, needs, strict=False)
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t, need in given if need]


def _setup(ctx, inputs, output):
    *tensors, _, ctx.dropout_p, _, ctx.backend, pixel_scale, pixel_shift, seed = inputs
    ctx.save_for_backward(*tensors, pixel_scale, pixel_shift, seed)


def _backward(ctx, grad):
    *tensors, pixel_scale, pixel_shift, seed = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:_FLOATS])
    gradients = torch.ops.vilt_fast.patch_embed_bwd(
        grad, needs, *tensors, ctx.dropout_p, ctx.backend, pixel_scale, pixel_shift, seed
    )
    gradients = iter(gradients)
    return *(next(gradients) if need else None for need in needs), *[None] * (len(ctx.needs_input_grad) - _FLOATS)


torch.library.register_autograd("vilt_fast::patch_embed", _backward, setup_context=_setup)


def patch_embed(
    pixels, weight, bias, cls_token, position, modality, text, text_rows, patch_source, patch_rows, patch_sample,
    pos_index, pos_weight, cls_rows, modality_index, total_rows, dropout_p, out_dtype, pixel_scale, pixel_shift,
    backend,
):  # fmt: skip
    sizes = _check.shapes(
        "patch_embed",
        weight=(weight, "D C ph pw"), pixels=(pixels, "B C height width"), bias=(bias, "D"),
        cls_token=(cls_token, "D"), position=(position, "G+1 D"), modality=(modality, "M D"), text=(text, "n_text D"),
        text_rows=(text_rows, "n_text"), patch_source=(patch_source, "n"), patch_rows=(patch_rows, "n"),
        patch_sample=(patch_sample, "n"), pos_index=(pos_index, "n 4"), pos_weight=(pos_weight, "n 4"),
        cls_rows=(cls_rows, "B"), modality_index=(modality_index, "B"), pixel_scale=(pixel_scale, "C"),
        pixel_shift=(pixel_shift, "C"),
    )  # fmt: skip
    if sizes["n_text"] + sizes["n"] + sizes["B"] > total_rows:
        raise ValueError(
            f"patch_embed: total_rows is {total_rows}, but {sizes['n_text']} text, {sizes['n']} patch and {sizes['B']} "
            "CLS rows are listed; each row is written once."
        )
    floats = dict(weight=weight, bias=bias, cls_token=cls_token, position=position, modality=modality, text=text)
    normalized = pixel_scale is not None and pixel_shift is not None
    if (pixels.dtype == torch.uint8) != normalized or (pixel_scale is None) != (pixel_shift is None):
        raise ValueError(
            f"patch_embed: pixels are {pixels.dtype}; pixel_scale and pixel_shift belong to uint8 pixels, both of "
            "them, and to no others."
        )
    _check.dtypes("patch_embed", (*_check.FLOATS, torch.uint8), pixels=pixels)
    _check.dtypes("patch_embed", _check.FLOATS, pixel_scale=pixel_scale, pixel_shift=pixel_shift, **floats)
    _check.same_dtype("patch_embed", weight=weight, bias=bias)
    _check.dtypes("patch_embed", _check.FLOATS, pos_weight=pos_weight)
    indices = dict(
        text_rows=text_rows, patch_source=patch_source, patch_rows=patch_rows, patch_sample=patch_sample,
        pos_index=pos_index, cls_rows=cls_rows, modality_index=modality_index,
    )  # fmt: skip
    _check.dtypes("patch_embed", (torch.int64,), **indices)
    _check.same_device(
        "patch_embed", pixels=pixels, **floats, **indices, pos_weight=pos_weight, pixel_scale=pixel_scale,
        pixel_shift=pixel_shift,
    )  # fmt: skip
    _check.probability("patch_embed", dropout_p)
    out_dtype = weight.dtype if out_dtype is None else out_dtype
    name = registry.resolve(
        "patch_embed", backend, pixels.device.type, dtype=weight.dtype, pixel_dtype=pixels.dtype, text_dtype=text.dtype,
        out_dtype=out_dtype, table_dtypes={t.dtype for t in (cls_token, position, modality)}, dropout=dropout_p > 0,
        square=sizes["ph"] == sizes["pw"], requires_grad=_check.needs_grad(pixels, *floats.values()),
    )  # fmt: skip
    arguments = (
        pixels, weight, bias, cls_token, position, modality, text, text_rows, patch_source, patch_rows, patch_sample,
        pos_index, pos_weight, cls_rows, modality_index, total_rows,
    )  # fmt: skip
    if name in registry.PLAIN:
        return registry.launcher("patch_embed", name)(
            *arguments, dropout_p=dropout_p, out_dtype=out_dtype, pixel_scale=pixel_scale, pixel_shift=pixel_shift
        )
    seed = None
    if dropout_p > 0:
        seed = torch.randint(2**62, (1,), device=pixels.device)
    return torch.ops.vilt_fast.patch_embed(*arguments, dropout_p, out_dtype, name, pixel_scale, pixel_shift, seed)
