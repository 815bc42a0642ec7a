"""The packed forward: blocks -> final norm -> pool, over the rows of a `SequencePlan`.

Each block runs in the first of three ways that is right for it:

1. *native*: runs of plain blocks in one call of the fused encoder (inference on a CPU);
2. *packed*: the block's steps on packed rows, one fused op each where its modules are the plain ones and else the
   module itself (training, other devices, wrapped linears);
3. *padded*: the block module itself, called on the padded tensor (hooks, replaced parts: whatever it does, it does).

Nothing here knows a model class: adapters describe a transformer as `Block`s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from .. import functional
from ..models.vilt import embedding
from ..models.vilt.plan import SequencePlan
from ..ops import registry
from . import graphs
from .blocks import Block, any_hooked, is_plain, parameters, stamp
from .quantization import WeightCache


@dataclasses.dataclass(slots=True)
class Encoded:
    """What the trunk gives back, still packed."""

    rows: torch.Tensor  #: [N, D] the residual stream after the last block
    hidden_states: list[torch.Tensor]  #: packed [N, D] before the first block and after each, if asked for
    attentions: list[torch.Tensor]  #: padded [B, H, L, L] of each block, if asked for


def encode(
    modules: Sequence[nn.Module],
    describe: Callable[[nn.Module], Block],
    rows: torch.Tensor,
    plan: SequencePlan,
    *,
    weights: WeightCache | None = None,
    captured: graphs.EncoderGraphs | None = None,
    want_hidden: bool = False,
    want_attention: bool = False,
) -> Encoded:
    """Run transformer blocks over packed rows [N, D].

    Args:
        modules: the blocks; `describe` says what each is made of.
        weights: quantised copies to compute with where no gradient is needed; None computes with the parameters.
        captured: CUDA graphs to run plain blocks with, where no gradient is needed.
    """
    if torch.is_grad_enabled():
        weights = captured = None
    if weights is not None and weights.kind == "int8" and rows.is_cuda:
        raise RuntimeError("quantize='int8' computes on CPUs; on a GPU, accelerate with quantize='fp8' or without.")
    if captured is not None and not (want_hidden or want_attention) and graphs.usable(rows):
        replayed = _replayed(modules, describe, rows, plan, weights, captured)
        if replayed is not None:
            return Encoded(replayed, [], [])
    blocks = list(map(describe, modules))
    result = Encoded(rows, [rows] if want_hidden else [], [])
    spans = graphs.Spans.of(plan)
    branch = None  # of the last block, not added to the stream yet: the next norm does that in the same pass
    i = 0
    while i < len(blocks):
        run = [] if want_attention or branch is not None else _native_run(blocks, i, result.rows, weights)
        if run:
            _encode_native(run, result, plan, want_hidden)
            i += len(run)
            continue
        block = blocks[i]
        if block.packable:
            step = _packed_block(block, i, spans, weights, plan if want_attention else None)
            if block.checkpoint is None:
                result.rows, branch, probabilities = step(_as_parameters(result.rows, block), branch)
            else:
                step = _checkpointed(block.checkpoint, step)
                result.rows, probabilities = step(_as_parameters(_added(result.rows, branch), block))
                branch = None
        else:
            padded = plan.unpack(_as_parameters(_added(result.rows, branch), block), query_rows=True)
            padded, probabilities = block.call_padded(padded, plan, want_attention)
            probabilities = of_real_queries(probabilities, plan)
            result.rows, branch = plan.pack(padded), None
        if want_hidden:
            result.rows, branch = _added(result.rows, branch), None
            result.hidden_states.append(result.rows)
        if want_attention:
            result.attentions.append(probabilities)
        i += 1
    result.rows = _added(result.rows, branch)
    return result


def of_real_queries(probabilities: torch.Tensor | None, plan: SequencePlan) -> torch.Tensor | None:
    """Attention probabilities [B, H, L, L] with zeros where a padded position asks."""
    if probabilities is None or plan.dense:
        return probabilities
    return probabilities.masked_fill(~plan.key_mask()[:, None, :, None], 0)


def final_norm(norm: nn.Module, rows: torch.Tensor, plan: SequencePlan) -> torch.Tensor:
    """The trunk's last LayerNorm on packed rows; a float32 stream is normalised before it is rounded to bfloat16."""
    if any_hooked(norm) or type(norm) is not nn.LayerNorm:
        return plan.pack(norm(plan.unpack(rows, query_rows=True)))
    dtype = norm.weight.dtype
    if rows.dtype == dtype:
        return norm(rows)
    bias = None if norm.bias is None else norm.bias.to(rows.dtype)
    return F.layer_norm(rows, norm.normalized_shape, norm.weight.to(rows.dtype), bias, norm.eps).to(dtype)


def pool(pooler: nn.Module, rows: torch.Tensor, plan: SequencePlan, *, first_only: bool = True) -> torch.Tensor:
    """The pooler's [B, D]; one that reads but the first token of a sample (`first_only`) is given just that."""
    if any_hooked(pooler) or not first_only:
        return pooler(plan.unpack(rows, query_rows=True))
    return pooler(rows.index_select(0, plan.pool_rows)[:, None])


def _as_parameters(rows, block):
    """Rows in the dtype that the block's own modules work in (the native encoder hands over a float32 stream)."""
    weight = getattr(block.norm1, "weight", None)
    if weight is None or weight.dtype == rows.dtype or weight.dtype == torch.float32:
        return rows
    return rows.to(weight.dtype)


# --- packed -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class _Branch:
    """What a block adds to the residual stream, before its dropout."""

    rows: torch.Tensor  #: [N, D]
    dropout_p: float


def _added(stream, branch: _Branch | None):
    return stream if branch is None else F.dropout(branch.rows, branch.dropout_p) + stream


def _norm(norm: nn.LayerNorm, stream, branch: _Branch | None):
    """(the stream with the branch added, its norm)."""
    if branch is None or type(norm) is not nn.LayerNorm or norm.normalized_shape != stream.shape[-1:]:
        stream = _added(stream, branch)
        return stream, norm(stream)
    return functional.add_layer_norm(branch.rows, stream, norm.weight, norm.bias, norm.eps, dropout_p=branch.dropout_p)


def _packed_block(
    block: Block, number: int, spans: graphs.Spans, weights: WeightCache | None, plan: SequencePlan | None = None
):
    """The step of one block; with a plan, attention's probabilities are wanted."""
    linears = (*block.qkv, block.out, block.fc1, block.fc2)
    fp8 = weights is not None and weights.kind == "fp8" and all(type(linear) is nn.Linear for linear in linears)

    def multiply(name, x, *modules, gelu=False):
        if fp8:
            return functional.linear_fp8(x, *weights.fp8((number, name), modules), gelu=gelu)
        if gelu:
            return functional.linear_gelu(x, modules[0].weight, modules[0].bias)
        return modules[0](x)

    def step(x, branch):
        """(stream, branch of the block before) -> (stream, branch of this block, probabilities or None)."""
        x, normed = _norm(block.norm1, x, branch)
        if fp8 or len(block.qkv) == 1:
            projected = multiply("qkv", normed, *block.qkv).chunk(3, dim=-1)
        else:
            projected = [linear(normed) for linear in block.qkv]
        query, key, value = (t.unflatten(-1, (block.num_heads, -1)) for t in projected)
        dropout_p = embedding.live(block.attention_dropout)
        probabilities = None
        if plan is not None:
            # The reference adds a mask, if any, in the dtype of its stream: under autocast that is not the scores'.
            dtype = query.dtype if plan.dense else torch.promote_types(query.dtype, x.dtype)
            context, probabilities = _attention_with_probabilities(
                query, key, value, plan, block.scale, dropout_p, dtype
            )
        else:
            context = functional.attention(
                query,
                key,
                value,
                spans.cu_seqlens,
                spans.cu_seqlens,
                spans.max_seqlen,
                spans.max_seqlen,
                seqused_k=spans.seqused_k,
                dropout_p=dropout_p,
                scale=block.scale,
            )
        branch = _Branch(multiply("out", context.flatten(-2), block.out), embedding.live(block.out_dropout))
        x, normed = _norm(block.norm2, x, branch)
        if type(block.fc1) is nn.Linear and block.exact_gelu:
            inner = multiply("fc1", normed, block.fc1, gelu=True)
        else:
            inner = block.activation(block.fc1(normed))
        if block.activation_dropout is not None:
            inner = block.activation_dropout(inner)
        return x, _Branch(multiply("fc2", inner, block.fc2), embedding.live(block.fc2_dropout)), probabilities

    return step


def _checkpointed(checkpoint, step):
    def whole(x):
        x, branch, probabilities = step(x, None)
        return _added(x, branch), probabilities

    def recomputed(x):
        return checkpoint(whole, x)

    return recomputed


def _replayed(modules, describe, rows, plan, weights, captured):
    """The blocks as one CUDA graph; None where they are not plain."""
    identity = stamp(modules)
    if identity is None:
        return None
    if weights is not None:  # the copies must be there before a capture, and up to date before a replay
        blocks = list(map(describe, modules))
        if not all(map(is_plain, blocks)):
            return None
        copies = (
            weights.fp8((i, name), linears)
            for i, block in enumerate(blocks)
            for name, linears in _side_by_side(block).items()
        )
        identity += tuple(0 if t is None else t.data_ptr() for copy in copies for t in copy)

    def prepare():
        blocks = list(map(describe, modules))
        if not all(map(is_plain, blocks)):
            return None

        def encode(x, spans):
            x, branch = _as_parameters(x, blocks[0]), None
            for i, block in enumerate(blocks):
                x, branch, _ = _packed_block(block, i, spans, weights)(x, branch)
            return _added(x, branch)

        return encode

    return captured.run(prepare, rows, plan, identity)


def _side_by_side(block):
    return {"qkv": block.qkv, "out": (block.out,), "fc1": (block.fc1,), "fc2": (block.fc2,)}


def _attention_with_probabilities(query, key, value, plan, scale, dropout_p, dtype):
    """Attention that also returns its probabilities, padded [B, H, L, L] with zeros."""
    width = plan.text_length + plan.image_length
    heads = query.shape[1]
    probabilities = query.new_zeros(plan.batch, heads, width, width, dtype=dtype)
    context, start, shown = [], 0, 0
    for b, (rows, keys) in enumerate(zip(plan.lengths, plan.key_lengths, strict=True)):
        q, k, v = (t[start : start + n].transpose(0, 1) for t, n in ((query, rows), (key, keys), (value, keys)))
        scores = (q @ k.transpose(1, 2) * scale).to(dtype)
        weights = F.dropout(torch.softmax(scores, dim=-1), dropout_p)
        context.append((weights @ v).transpose(0, 1))
        places = plan.padded_places[shown : shown + keys] - b * width
        probabilities[b, :, places[:, None], places] = weights[:, :keys]
        start, shown = start + rows, shown + keys
    return torch.cat(context), probabilities


# --- native -----------------------------------------------------------------------------------------------------------


def _encode_native(run, result: Encoded, plan: SequencePlan, want_hidden: bool) -> None:
    parameters, eps, compute, num_heads = run.parameters, run.eps, run.compute, run.num_heads
    stream = functional.encoder(
        result.rows.float(),
        parameters,
        plan.cu_seqlens,
        plan.seqused_k,
        plan.max_seqlen,
        num_heads=num_heads,
        eps=eps,
        compute=compute,
        return_hidden=want_hidden,
    )
    if want_hidden:
        result.hidden_states.extend(stream.unbind(0))
        stream = stream[-1]
    result.rows = stream


@dataclasses.dataclass(slots=True)
class _Run:
    """Consecutive blocks that one native call computes."""

    parameters: list[torch.Tensor]
    eps: list[float]
    compute: str
    num_heads: int
    blocks: int = 0

    def __len__(self):
        return self.blocks


def _native_run(blocks: Sequence[Block], first: int, rows: torch.Tensor, weights: WeightCache | None):
    """The longest run of blocks from `first` on that the native encoder can take, or an empty one."""
    run = _Run([], [], "", 0)
    if weights is not None and weights.kind != "int8":
        return run
    if torch.is_grad_enabled() or rows.device.type != "cpu" or registry.why_unavailable("encoder", "cpp"):
        return run
    for block in blocks[first:]:
        if not is_plain(block):
            break
        compute = _compute_type(block)
        if compute is None or (len(run) and (compute, block.num_heads) != (run.compute, run.num_heads)):
            break
        run.compute, run.num_heads = compute, block.num_heads
        run.parameters += parameters(block)
        run.eps += [block.norm1.eps, block.norm2.eps]
        run.blocks += 1
    if len(run) and weights is not None:
        run.parameters, run.compute = weights.quantized(run.parameters, first), "int8"
    return run


_NATIVE = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def _compute_type(block: Block) -> str | None:
    """What the native encoder computes this block in, or None where torch is to do it."""
    tensors = parameters(block)
    if any(type(t) not in (nn.Parameter, torch.Tensor) or not t.is_contiguous() for t in tensors):
        return None
    if any(t.dtype not in _NATIVE for t in tensors):
        return None
    dtypes = {t.dtype for t in tensors if t.dim() == 2}
    if torch.is_autocast_enabled("cpu"):
        dtypes = {torch.get_autocast_dtype("cpu")}
    return _NATIVE.get(dtypes.pop()) if len(dtypes) == 1 else None
