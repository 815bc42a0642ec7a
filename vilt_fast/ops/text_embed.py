"""text_embed: word + position + segment -> LayerNorm -> dropout -> + modality row, as packed text rows.

The dropout mask is a function of `seed`, which is an input of the op: so the op is pure, nothing else has to be kept
for the backward, and a recomputed forward drops the same elements.
"""

import dataclasses
import functools

import torch
from torch import Tensor

from . import _check, registry
from ._define import Op

_NAME = "text_embed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts(registry.Facts):
    dtypes: frozenset  #: of all tables and given embeddings
    width: int  #: D
    requires_grad: bool = False
    dropout: bool = False


def _fake(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, position_ids: Tensor, token_type_ids: Tensor | None,
    word: Tensor, position: Tensor, token_type: Tensor, ln_weight: Tensor, ln_bias: Tensor, modality: Tensor | None,
    out_dtype: torch.dtype, eps: float, padding_idx: int | None, dropout_p: float, deterministic: bool,
    seed: Tensor | None,
):  # fmt: skip
    return (position.new_empty(position_ids.shape[0], position.shape[1], dtype=out_dtype),), ()


def _fake_backward(
    needs: list[bool], grad_rows: Tensor, input_ids: Tensor | None, inputs_embeds: Tensor | None, position_ids: Tensor,
    token_type_ids: Tensor | None, word: Tensor, position: Tensor, token_type: Tensor, ln_weight: Tensor,
    ln_bias: Tensor, modality: Tensor | None, eps: float, padding_idx: int | None, dropout_p: float,
    deterministic: bool, seed: Tensor | None,
):  # fmt: skip
    words = word if inputs_embeds is None else None  # given embeddings take the place of the word table
    tables = (inputs_embeds, words, position, token_type, ln_weight, ln_bias, modality)
    return tuple(None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tables), ()


def _check_range(name, ids, table):
    low, high = (ids is not None and _check.limits(ids)) or (0, 0)
    if low < 0 or high >= table.shape[0]:
        raise IndexError(f"text_embed: {name} holds {low if low < 0 else high}, expected 0 <= id < {table.shape[0]}.")


def _validate_forms(
    input_ids, inputs_embeds, position_ids, token_type_ids, word, position, token_type, ln_weight, ln_bias, modality,
    dropout_p,
):  # fmt: skip
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("text_embed: give input_ids or inputs_embeds, one of them and not both.")
    _check.shapes(
        _NAME,
        position=(position, "L D"), word=(word, "V D"), token_type=(token_type, "S D"), ln_weight=(ln_weight, "D"),
        ln_bias=(ln_bias, "D"), modality=(modality, "M D"), input_ids=(input_ids, "n"),
        inputs_embeds=(inputs_embeds, "n D"), position_ids=(position_ids, "n"), token_type_ids=(token_type_ids, "n"),
    )  # fmt: skip
    floats = dict(
        inputs_embeds=inputs_embeds, word=word, position=position, token_type=token_type, ln_weight=ln_weight,
        ln_bias=ln_bias, modality=modality,
    )  # fmt: skip
    indices = dict(input_ids=input_ids, position_ids=position_ids, token_type_ids=token_type_ids)
    _check.dtypes(_NAME, _check.FLOATS, **floats)
    _check.dtypes(_NAME, _check.INDICES, **indices)
    _check.same_device(_NAME, **floats, **indices)
    _check.probability(_NAME, dropout_p)


def _validate(
    input_ids, inputs_embeds, position_ids, token_type_ids, word, position, token_type, ln_weight, ln_bias, modality,
    dropout_p,
):  # fmt: skip
    _validate_forms(
        input_ids, inputs_embeds, position_ids, token_type_ids, word, position, token_type, ln_weight, ln_bias,
        modality, dropout_p,
    )  # fmt: skip
    _validate_values(input_ids, position_ids, token_type_ids, word, position, token_type)


def _validate_values(input_ids, position_ids, token_type_ids, word, position, token_type):
    # Only where looking is free: ids on an accelerator would have to be copied to the host.
    if _check.readable(position_ids):
        _check_range("input_ids", input_ids, word)
        _check_range("position_ids", position_ids, position)
        _check_range("token_type_ids", token_type_ids, token_type)


def _validate_backward(
    grad_rows, input_ids, inputs_embeds, position_ids, token_type_ids, word, position, token_type, ln_weight, ln_bias,
    modality, dropout_p,
):  # fmt: skip
    _validate(
        input_ids, inputs_embeds, position_ids, token_type_ids, word, position, token_type, ln_weight, ln_bias,
        modality, dropout_p,
    )  # fmt: skip
    op = f"{_NAME}_bwd"
    _check.like(op, (position_ids.shape[0], position.shape[1]), None, grad_rows=grad_rows)
    _check.dtypes(op, _check.FLOATS, grad_rows=grad_rows)
    _check.same_device(op, grad_rows=grad_rows, position=position)


def _facts(
    inputs_embeds, word, position, token_type, ln_weight, ln_bias, modality, dropout_p, requires_grad
):  # fmt: skip
    floats = (inputs_embeds, word, position, token_type, ln_weight, ln_bias, modality)
    return Facts(
        device=position.device.type, dtype=position.dtype, dtypes=frozenset(t.dtype for t in floats if t is not None),
        width=position.shape[1], requires_grad=requires_grad, dropout=dropout_p > 0,
    )  # fmt: skip


def _known(
    input_ids, inputs_embeds, position_ids, token_type_ids, word, position, token_type, ln_weight, ln_bias, modality,
    dropout_p, requires_grad,
):  # fmt: skip
    """(facts, dtype of the result) of a call that fits together."""
    floats = (word, position, token_type, ln_weight, ln_bias, modality)
    _validate_forms(input_ids, inputs_embeds, position_ids, token_type_ids, *floats, dropout_p)
    rows = word if inputs_embeds is None else inputs_embeds
    added = (rows, position, token_type) if modality is None else (rows, position, token_type, modality)
    out_dtype = functools.reduce(torch.promote_types, (t.dtype for t in added))
    return _facts(inputs_embeds, *floats, dropout_p, requires_grad), out_dtype


_OP = Op(
    _NAME, _fake, _fake_backward,
    outputs=("rows",), validate=_validate, facts=_facts, validate_backward=_validate_backward,
    differentiable=("inputs_embeds", "word", "position", "token_type", "ln_weight", "ln_bias", "modality"),
)  # fmt: skip


def text_embed(
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    position_ids: Tensor,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    modality: Tensor | None,
    *,
    eps: float,
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
    deterministic: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Text rows: ``dropout(LayerNorm(word + token type + position)) + modality[0]``.

    Args:
        input_ids: [n] int64 or int32, rows of ``word``; or None and
        inputs_embeds: [n, D], used in their place.
        position_ids: [n] integers; token_type_ids: [n] integers, or None for all 0.
        word: [V, D]; position: [L, D]; token_type: [S, D]; ln_weight, ln_bias: [D].
        modality: [M, D], of which row 0 is added last; None adds nothing.
        eps: of the LayerNorm (1e-12 in ViLT).
        padding_idx: row of ``word`` that gets no gradient, as in ``torch.nn.Embedding``.
        deterministic: False lets a backend (triton) add up the gradient of ``word`` in any order, with atomics.

    Returns:
        [n, D], in the widest dtype of the added tables. Raises IndexError for an id outside its table (CPU).

    Source: Devlin et al. 2019; HuggingFace ``TextEmbeddings``.
    """
    floats = dict(
        inputs_embeds=inputs_embeds, word=word, position=position, token_type=token_type, ln_weight=ln_weight,
        ln_bias=ln_bias, modality=modality,
    )  # fmt: skip
    indices = dict(input_ids=input_ids, position_ids=position_ids, token_type_ids=token_type_ids)
    needs_grad = _check.needs_grad(*floats.values())
    facts, out_dtype = _check.of_forms(_known, **indices, **floats, dropout_p=dropout_p, requires_grad=needs_grad)
    _validate_values(input_ids, position_ids, token_type_ids, word, position, token_type)
    name = _OP.resolve(backend, facts)
    arguments = dict(**indices, **floats, eps=eps, padding_idx=padding_idx, dropout_p=dropout_p)
    if name in registry.PLAIN:
        return _OP.plain(name, **arguments)
    seed = _check.seed(position.device, dropout_p)
    return _OP(name, **arguments, out_dtype=out_dtype, deterministic=deterministic, seed=seed)[0]
