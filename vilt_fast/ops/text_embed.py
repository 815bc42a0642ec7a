"""text_embed: validation, choice of backend, torch.ops.vilt_fast.text_embed and its gradient.

Facts for `supports`: dtype, dtypes (a set: of all tables and given embeddings), width (D), requires_grad,
dropout, embeds (bool).

The dropout mask is a function of `seed`, which is an input of the op: so the op is pure, nothing else has to be kept
for the backward, and a recomputed forward drops the same elements.
"""

import functools

import torch

from . import _check, registry

_INPUTS = (
    "Tensor? input_ids, Tensor? inputs_embeds, Tensor position_ids, Tensor? token_type_ids, Tensor word, "
    "Tensor position, Tensor token_type, Tensor ln_weight, Tensor ln_bias, Tensor modality"
)
_OPTIONS = "float eps, int? padding_idx, float dropout_p, bool deterministic, str backend, Tensor? seed=None"
_FLOATS = (1, 4, 5, 6, 7, 8, 9)  # which of the inputs are differentiable

torch.library.define("vilt_fast::text_embed", f"({_INPUTS}, ScalarType out_dtype, {_OPTIONS}) -> Tensor")
torch.library.define("vilt_fast::text_embed_bwd", f"(Tensor grad, bool[] needs, {_INPUTS}, {_OPTIONS}) -> Tensor[]")


def _options(eps, padding_idx, dropout_p, deterministic, seed=None):
    return dict(eps=eps, padding_idx=padding_idx, dropout_p=dropout_p, deterministic=deterministic, seed=seed)


@torch.library.impl("vilt_fast::text_embed", "CompositeExplicitAutograd")
def _run(*arguments):
    inputs, (out_dtype, *numbers, backend) = arguments[:10], arguments[10:16]
    launch = registry.launcher("text_embed", backend)
    return launch(*inputs, out_dtype=out_dtype, **_options(*numbers, *arguments[16:]))


@torch.library.register_fake("vilt_fast::text_embed")
def _fake(input_ids, inputs_embeds, position_ids, token_type_ids, word, position, *arguments):
    return position.new_empty(position_ids.shape[0], position.shape[1], dtype=arguments[4])


@torch.library.impl("vilt_fast::text_embed_bwd", "CompositeExplicitAutograd")
def _run_bwd(*arguments):
    inputs, (*numbers, backend) = arguments[:12], arguments[12:17]
    launch = registry.launcher("text_embed_bwd", backend)
    gradients = launch(*inputs, **_options(*numbers, *arguments[17:]))
    return [g for g, need in zip(gradients, arguments[1], strict=True) if need]


@torch.library.register_fake("vilt_fast::text_embed_bwd")
def _fake_bwd(grad, needs, *arguments):
    given = zip((arguments[place] for place in _FLOATS), needs, strict=True)
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t, need in given if need]


def _setup(ctx, inputs, output):
    *ctx.numbers, ctx.backend, seed = inputs[11:]
    ctx.save_for_backward(*inputs[:10], seed)


def _backward(ctx, grad):
    *inputs, seed = ctx.saved_tensors
    needs = [ctx.needs_input_grad[place] for place in _FLOATS]
    needs[1] = needs[1] and inputs[1] is None  # given embeddings take the place of the word table
    gradients = iter(torch.ops.vilt_fast.text_embed_bwd(grad, needs, *inputs, *ctx.numbers, ctx.backend, seed))
    result = [None] * len(ctx.needs_input_grad)
    for place, need in zip(_FLOATS, needs, strict=True):
        result[place] = next(gradients) if need else None
    return tuple(result)


torch.library.register_autograd("vilt_fast::text_embed", _backward, setup_context=_setup)


def _check_range(name, ids, table):
    # Only where looking is free: ids on an accelerator would have to be copied to the host.
    if ids is None or not ids.numel() or not _check.readable(ids):
        return
    low, high = (bound.item() for bound in ids.aminmax())
    if low < 0 or high >= table.shape[0]:
        raise IndexError(f"text_embed: {name} holds {low if low < 0 else high}, expected 0 <= id < {table.shape[0]}.")


def text_embed(
    input_ids, inputs_embeds, position_ids, token_type_ids, word, position, token_type, ln_weight, ln_bias, modality,
    eps, padding_idx, dropout_p, deterministic, backend,
):  # fmt: skip
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("text_embed: give input_ids or inputs_embeds, one of them and not both.")
    _check.shapes(
        "text_embed",
        position=(position, "L D"), word=(word, "V D"), token_type=(token_type, "S D"), ln_weight=(ln_weight, "D"),
        ln_bias=(ln_bias, "D"), modality=(modality, "M D"), input_ids=(input_ids, "n"),
        inputs_embeds=(inputs_embeds, "n D"), position_ids=(position_ids, "n"), token_type_ids=(token_type_ids, "n"),
    )  # fmt: skip
    floats = dict(
        inputs_embeds=inputs_embeds, word=word, position=position, token_type=token_type, ln_weight=ln_weight,
        ln_bias=ln_bias, modality=modality,
    )  # fmt: skip
    indices = dict(input_ids=input_ids, position_ids=position_ids, token_type_ids=token_type_ids)
    _check.dtypes("text_embed", _check.FLOATS, **floats)
    _check.dtypes("text_embed", _check.INDICES, **indices)
    _check.same_device("text_embed", **floats, **indices)
    _check.probability("text_embed", dropout_p)
    for name, table in (("input_ids", word), ("position_ids", position), ("token_type_ids", token_type)):
        _check_range(name, indices[name], table)
    name = registry.resolve(
        "text_embed", backend, position.device.type, dtype=position.dtype,
        dtypes={t.dtype for t in floats.values() if t is not None}, width=position.shape[1],
        requires_grad=_check.needs_grad(*floats.values()), dropout=dropout_p > 0, embeds=inputs_embeds is not None,
    )  # fmt: skip
    inputs = (
        input_ids, inputs_embeds, position_ids, token_type_ids, word, position, token_type, ln_weight, ln_bias, modality
    )  # fmt: skip
    if name in registry.PLAIN:
        return registry.launcher("text_embed", name)(*inputs, eps=eps, padding_idx=padding_idx, dropout_p=dropout_p)
    rows = word if inputs_embeds is None else inputs_embeds
    out_dtype = functools.reduce(torch.promote_types, (t.dtype for t in (rows, position, token_type, modality)))
    seed = None
    if dropout_p > 0:
        seed = torch.randint(2**62, (1,), device=position.device)
    return torch.ops.vilt_fast.text_embed(*inputs, out_dtype, eps, padding_idx, dropout_p, deterministic, name, seed)
