"""text_embed: validation and choice of backend. Facts for `supports`: dtype, requires_grad, dropout, embeds (bool)."""

from .. import registry
from . import _check


def _check_range(name, ids, table):
    # Only where looking is free: ids on an accelerator would have to be copied to the host.
    if ids is None or not ids.numel() or not _check.readable(ids):
        return
    low, high = (bound.item() for bound in ids.aminmax())
    if low < 0 or high >= table.shape[0]:
        raise IndexError(f"text_embed: {name} holds {low if low < 0 else high}, expected 0 <= id < {table.shape[0]}.")


def text_embed(
    input_ids, inputs_embeds, position_ids, token_type_ids, word, position, token_type, ln_weight, ln_bias, modality,
    eps, padding_idx, dropout_p, backend,
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
        requires_grad=_check.needs_grad(*floats.values()), dropout=dropout_p > 0, embeds=inputs_embeds is not None,
    )  # fmt: skip
    return registry.launcher("text_embed", name)(
        input_ids, inputs_embeds, position_ids, token_type_ids, word, position, token_type, ln_weight, ln_bias,
        modality, eps=eps, padding_idx=padding_idx, dropout_p=dropout_p,
    )  # fmt: skip
