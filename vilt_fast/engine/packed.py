"""The packed way: a block's steps on packed rows, one fused op each where its modules are the plain ones.

What a sublayer adds to the residual stream is handed on unadded, as a `Branch`: the next norm adds it in the same pass
over memory. Or its last linear layer does (`ops.linear.adds_residual`), and there is no branch.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from torch.nn import functional as F

from .. import functional
from ..functional import LayerParameters
from .blocks import Block, FeedForward, layer_parameters
from .listeners import live
from .packing import Packing, Selection, Spans
from .quantization import E4M3Rows, WeightCache, hands_on
from .recomputed import recomputed


@dataclasses.dataclass(slots=True)
class Branch:
    """What a sublayer adds to the residual stream, before its dropout."""

    rows: torch.Tensor  #: [N, D]
    dropout_p: float


def added(stream: torch.Tensor, branch: Branch | None) -> torch.Tensor:
    """The stream with a branch added."""
    return stream if branch is None else F.dropout(branch.rows, branch.dropout_p) + stream


def as_parameters(rows: torch.Tensor, block: Block) -> torch.Tensor:
    """Rows in the dtype that the block's own modules work in (the native encoder hands over a float32 stream)."""
    norm = block.sublayers[0].norm if block.sublayers else None
    weight = getattr(norm, "weight", None)
    if weight is None or weight.dtype == rows.dtype or weight.dtype == torch.float32:
        return rows
    return rows.to(weight.dtype)


def normed(norm: nn.LayerNorm, stream, branch: Branch | None, e4m3: bool = False):
    """(the stream with the branch added, its norm); `e4m3`: an fp8 layer takes that, so its rows may be such."""
    if branch is None or norm.normalized_shape != stream.shape[-1:]:
        stream = added(stream, branch)
        return stream, norm(stream)
    if e4m3 and not branch.dropout_p and hands_on("add_layer_norm_fp8", branch.rows):
        stream, *rows = functional.add_layer_norm_fp8(branch.rows, stream, norm.weight, norm.bias, norm.eps)
        return stream, E4M3Rows(*rows, branch.rows.dtype)
    return functional.add_layer_norm(branch.rows, stream, norm.weight, norm.bias, norm.eps, dropout_p=branch.dropout_p)


def linear(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a linear layer gives, by the op if it is the plain one."""
    return functional.linear(x, module.weight, module.bias) if type(module) is nn.Linear else module(x)


def step_of(
    block: Block,
    number: int,
    spans: Spans,
    weights: WeightCache | None = None,
    packing: Packing | None = None,
    wanted: Selection | None = None,
    adds: bool = False,
):
    """The step of a block: (stream, branch before) -> (stream, branch, probabilities or None).

    With `weights` (fp8) its linear layers compute with 8-bit copies; with a packing, attention's probabilities are
    wanted. With a selection, only those rows go on; the others are keys and values. With `adds`, linear layers that can
    add to the stream themselves.
    """

    def multiply(name, x, *modules, gelu=False):
        if weights is not None:
            return weights.linear_fp8((number, name), x, modules, gelu)
        if gelu:
            return functional.linear_gelu(x, modules[0].weight, modules[0].bias)
        return linear(modules[0], x)

    def grown(stream, name, x, module, dropout):
        """(stream, branch): the stream grows by what a linear layer gives."""
        p = live(dropout)
        if adds and weights is None and p == 0 and type(module) is nn.Linear and stream.dtype == x.dtype:
            return functional.linear(x, module.weight, module.bias, stream), None
        return stream, Branch(multiply(name, x, module), p)

    def attention(sublayer, x, stream):
        """(stream, branch, probabilities or None)."""
        if weights is not None or len(sublayer.projections) == 1:
            query, key, value = multiply("qkv", x, *sublayer.projections).chunk(3, dim=-1)
            query = chosen(query, wanted)
        elif wanted is None and _side_by_side(sublayer.projections):
            modules = sublayer.projections
            query, key, value = functional.linear_qkv(x, *(m.weight for m in modules), *(m.bias for m in modules))
        else:
            query, key, value = (
                linear(module, t) for module, t in zip(sublayer.projections, (chosen(x, wanted), x, x), strict=True)
            )
        query, key, value = (t.unflatten(-1, (sublayer.num_heads, -1)) for t in (query, key, value))
        dropout_p, probabilities = live(sublayer.dropout), None
        if packing is not None:
            # The reference adds a mask, if any, in the dtype of its stream: under autocast that is not the scores'.
            dtype = query.dtype if packing.dense else torch.promote_types(query.dtype, stream.dtype)
            context, probabilities = _attention_with_probabilities(
                query, key, value, packing, sublayer.scale, dropout_p, dtype
            )
        else:
            context = attend(query, key, value, spans, wanted, dropout_p=dropout_p, scale=sublayer.scale)
        stream = chosen(stream, wanted)
        return *grown(stream, "out", context.flatten(-2), sublayer.out, sublayer.out_dropout), probabilities

    def feed_forward(sublayer, x, stream):
        """(stream, branch)."""
        still = sublayer.activation_dropout is None or not live(sublayer.activation_dropout)
        if not _gelu_in_one(sublayer):
            inner = sublayer.activation(sublayer.fc1(x))
        elif weights is not None and still and hands_on("linear_gelu_fp8", x):
            inner = weights.linear_gelu_fp8((number, "fc1"), x, [sublayer.fc1])
            return grown(stream, "fc2", inner, sublayer.fc2, sublayer.fc2_dropout)
        else:
            inner = multiply("fc1", x, sublayer.fc1, gelu=True)
        if sublayer.activation_dropout is not None:
            inner = sublayer.activation_dropout(inner)
        return grown(stream, "fc2", inner, sublayer.fc2, sublayer.fc2_dropout)

    def step(x, branch):
        probabilities = None
        for sublayer in block.sublayers:
            if block.norm_first:
                e4m3 = weights is not None and (not isinstance(sublayer, FeedForward) or _gelu_in_one(sublayer))
                x, inner = normed(sublayer.norm, x, branch, e4m3)
            else:
                inner = x = added(x, branch)
            if isinstance(sublayer, FeedForward):
                x, branch = feed_forward(sublayer, inner, x)
            else:
                x, branch, seen = attention(sublayer, inner, x)
                probabilities = seen if probabilities is None else probabilities
            if not block.norm_first:
                (_, x), branch = normed(sublayer.norm, x, branch), None
        return x, branch, probabilities

    return step


def of_parameters(rows, parameters, spans: Spans, num_heads: int, eps, wanted: Selection | None = None):
    """The stream after plain blocks, from what `functional.encoder` takes: the same steps, and nobody's modules."""
    weight = parameters[0]
    stream = rows if weight.dtype == torch.float32 else rows.to(weight.dtype)
    branch, eps = None, iter(eps)

    def norm(weight, bias):
        if branch is None:
            return stream, F.layer_norm(stream, stream.shape[-1:], weight, bias, next(eps))
        return functional.add_layer_norm(branch, stream, weight, bias, next(eps))

    layers = LayerParameters.layers([t if t.numel() else None for t in parameters])
    for number, p in enumerate(layers):
        here = wanted if number + 1 == len(layers) else None
        stream, x = norm(p.norm1_weight, p.norm1_bias)
        stream, asking = chosen(stream, here), chosen(x, here)
        weights, biases = (p.query_weight, p.key_weight, p.value_weight), (p.query_bias, p.key_bias, p.value_bias)
        if here is None:
            sides = functional.linear_qkv(x, *weights, *biases)
        else:
            sides = map(functional.linear, (asking, x, x), weights, biases)
        query, key, value = (t.unflatten(-1, (num_heads, -1)) for t in sides)
        context = attend(query, key, value, spans, here)
        branch = functional.linear(context.flatten(-2), p.out_weight, p.out_bias)
        stream, x = norm(p.norm2_weight, p.norm2_bias)
        inner = functional.linear_gelu(x, p.fc1_weight, p.fc1_bias)
        branch = functional.linear(inner, p.fc2_weight, p.fc2_bias)
    return stream + branch


def _gelu_in_one(sublayer: FeedForward) -> bool:
    """Whether its first layer and activation are the plain ones that one op computes."""
    return type(sublayer.fc1) is nn.Linear and sublayer.activation_kind == "gelu"


def _side_by_side(linears) -> bool:
    """Whether linear layers are plain ones that `functional.linear_qkv` takes together."""
    return all(type(m) is nn.Linear and m.weight.shape == linears[0].weight.shape for m in linears)


def chosen(rows: torch.Tensor, wanted: Selection | None) -> torch.Tensor:
    """The rows that are wanted; all without a selection."""
    return rows if wanted is None else rows.index_select(0, wanted.rows)


def attend(query, key, value, spans: Spans, wanted: Selection | None, **options) -> torch.Tensor:
    """`functional.attention` of the wanted rows to all of their sample."""
    asking = spans if wanted is None else wanted
    return functional.attention(
        query, key, value, asking.cu_seqlens, spans.cu_seqlens, asking.max_seqlen, spans.max_seqlen,
        seqused_k=spans.seqused_k, **options,
    )  # fmt: skip


def recomputed_step(block: Block, step, spans: Spans, stream, wanted: Selection | None):
    """The stream after a plain block in evaluation mode: by `step` now, by its parameters if a gradient is wanted."""

    def fast(x):
        x, branch, _ = step(x, None)
        return added(x, branch)

    attention, feed_forward = block.sublayers
    eps = attention.norm.eps, feed_forward.norm.eps

    def exact(x, *parameters):
        return of_parameters(x, parameters, spans, attention.num_heads, eps, wanted)

    return recomputed(fast, exact, stream, layer_parameters(block.sublayers))


def checkpointed(checkpoint, step):
    """The step of a block, recomputed in the backward: stream -> (stream, probabilities)."""

    def whole(x):
        x, branch, probabilities = step(x, None)
        return added(x, branch), *(probabilities if isinstance(probabilities, list) else [probabilities])

    def again(x):
        x, *parts = checkpoint(whole, x)
        return x, parts if len(parts) > 1 else parts[0]

    return again


def side_by_side(block: Block) -> dict[str, tuple[nn.Module, ...]]:
    """The linear layers of a plain block that are computed together, by the name that its copies go by."""
    attention, feed_forward = block.sublayers
    return {
        "qkv": attention.projections, "out": (attention.out,), "fc1": (feed_forward.fc1,), "fc2": (feed_forward.fc2,)
    }  # fmt: skip


def _attention_with_probabilities(query, key, value, packing, scale, dropout_p, dtype):
    """Attention that also returns its probabilities, padded [B, H, L, L] with zeros where nothing is shown, or a list
    of parts of that."""
    width, heads = packing.width, query.shape[1]
    probabilities = query.new_zeros(packing.batch, heads, width, width, dtype=dtype)
    samples, start, shown = [], 0, 0
    for b, (rows, keys) in enumerate(zip(packing.lengths, packing.key_lengths, strict=True)):
        q, k, v = (t[start : start + n].transpose(0, 1) for t, n in ((query, rows), (key, keys), (value, keys)))
        scores = (q @ k.transpose(1, 2) * scale).to(dtype)
        weights = F.dropout(torch.softmax(scores, dim=-1), dropout_p)
        asking = rows if packing.shows_every_row else keys
        places = packing.padded_places[shown : shown + asking] - b * width
        probabilities[b, :, places[:, None], places[:keys]] = weights[:, :asking]
        samples.append((weights, places, v))
        start, shown = start + rows, shown + asking
    if torch.is_grad_enabled():
        probabilities = packing.shown_attentions(probabilities)
    parts = probabilities if isinstance(probabilities, list) else [probabilities]
    of_sample = [sample for part in parts for sample in part] if torch.is_grad_enabled() else None
    context = []
    for b, (weights, places, v) in enumerate(samples):
        if of_sample is not None:  # what is returned is what is multiplied, so that it has a gradient
            again = of_sample[b][:, places[:, None], places[: v.shape[1]]]
            weights = torch.cat([again, weights[:, len(places) :]], 1)
        context.append((weights @ v).transpose(0, 1))
    return torch.cat(context), probabilities
