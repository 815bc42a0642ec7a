"""The packed forward: blocks -> final norm -> pool, over the rows of a `Packing`.

Each block runs in the first of three ways that is right for it:

1. *native*: runs of plain blocks in one call of the fused encoder (inference on a CPU);
2. *packed*: the block's steps on packed rows, one fused op each where its modules are the plain ones and else the
   module itself (training, other devices, wrapped linears);
3. *padded*: the block module itself, called on the padded tensor (hooks, replaced parts: whatever it does, it does).

Nothing here knows a model class: a family describes a transformer as `Block`s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from .. import record
from ..ops import registry
from ..ops._check import transforming
from ..ops.linear import adds_residual
from . import captured, native, packed, recomputed
from .blocks import Block, Described
from .graphs import Graphs
from .listeners import any_hooked, has_hooks, is_plain, why_hooked, why_not_plain
from .packing import Packing, Selection
from .quantization import WeightCache, why_emulated


@dataclasses.dataclass(slots=True)
class Encoded:
    """What the trunk gives back, still packed."""

    rows: torch.Tensor  #: [N, D] the residual stream after the last block, or the wanted rows of it [W, D]
    hidden_states: list[torch.Tensor]  #: padded [B, width, D] before the first block and after each, if asked for
    attentions: list[torch.Tensor]  #: padded [B, H, L, L] of each block, if asked for

    def show(self, packing: Packing) -> None:
        """Add the stream as it is now to the hidden states."""
        padded, self.rows = shown(self.rows, packing)
        self.hidden_states.append(padded)


def shown(rows: torch.Tensor, packing: Packing) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows [N, D] as a caller sees them, padded; the rows to go on with, which are a function of what was shown)."""
    return packing.through_padded(rows) if torch.is_grad_enabled() else (packing.unpack(rows), rows)


def encode(
    modules: Sequence[nn.Module],
    describe: Callable[[nn.Module], Block],
    rows: torch.Tensor,
    packing: Packing,
    *,
    weights: WeightCache | None = None,
    graphs: Graphs | None = None,
    runs: native.Runs | None = None,
    want_hidden: bool = False,
    want_attention: bool = False,
    wanted: Selection | None = None,
) -> Encoded:
    """Run transformer blocks over packed rows [N, D].

    Args:
        modules: the blocks; `describe` says what each is made of. What it says of the sublayers of a plain block may
            depend on nothing but that block.
        weights: quantised copies to compute with in inference; None computes with the parameters. A block that cannot
            have them computes with its parameters, which is said once.
        graphs: CUDA graphs to run plain blocks with, where no gradient is recorded.
        runs: what was found of the blocks at earlier calls; None judges them anew.
        wanted: the rows that anybody reads, of which alone the last block computes more than keys and values; None:
            all, as hidden states and attentions want them.
    """
    asked, at_once = weights, ""  # why every operation has to be seen as it is
    if torch.is_grad_enabled() or transforming():
        if at_once := _why_at_once(want_hidden, want_attention):
            weights = None
    if weights is not None and weights.kind == "int8" and rows.is_cuda:
        raise RuntimeError("quantize='int8' computes on CPUs; on a GPU, accelerate with quantize='fp8' or without.")
    no_graph = ""
    if graphs is not None:
        no_graph = captured.why_not_now(graphs, rows.device, want_hidden, want_attention)
        replayed = None if no_graph else captured.replayed(graphs, modules, describe, rows, packing, weights, wanted)
        if replayed is not None:
            record.say("CUDA graph", "", *((f"block {i}", module) for i, module in enumerate(modules)))
            return Encoded(replayed, [], [])
    blocks = Described(modules, describe)
    if graphs is not None:
        if graphs.insists or record.listened():
            no_graph = no_graph or captured.why_not_these(blocks, packing)
        graphs.say_without("the stack of blocks", no_graph)
    result = Encoded(rows, [], [])
    if want_hidden:
        result.show(packing)
    fp8 = weights if weights is not None and weights.kind == "fp8" else None
    # A native run is the int8 way, and that of the parameters themselves; fp8 is a way of the packed block.
    never = at_once or ("attention probabilities are wanted" if want_attention else native.unavailable(rows))
    go_native = not never and fp8 is None
    run_from = native.run_from if runs is None else runs.run_from
    spans = packing.spans
    branch, adds = None, adds_residual(rows)  # of the last sublayer, not added to the stream yet
    i = 0
    while i < len(blocks):
        reason = never
        here = wanted if i + 1 == len(blocks) else None
        if go_native:
            run, reason = run_from(blocks, i, weights)
            if run.blocks:
                last = i + run.blocks == len(blocks)
                stream = run.encode(packed.added(result.rows, branch), packing, want_hidden, wanted if last else None)
                branch = None
                if want_hidden:
                    result.hidden_states.extend(map(packing.unpack, stream))
                    stream = stream[-1]
                result.rows = stream
                way = "native" if weights is None else "native int8"
                record.say(way, "", *((f"block {n}", blocks.modules[n]) for n in range(i, i + run.blocks)))
                i += run.blocks
                continue
        block = blocks[i]
        if block.packable:
            copies = None if fp8 is None or _why_not_fp8(block) else fp8
            if copies is not None and (emulated := why_emulated(rows)):
                copies.say(f"it is emulated here, with no gain: {emulated}")
            step = packed.step_of(block, i, spans, copies, packing if want_attention else None, here, adds)
            if copies is not None and torch.is_grad_enabled():
                stream = packed.as_parameters(packed.added(result.rows, branch), block)
                result.rows, branch = packed.recomputed_step(block, step, spans, stream, here), None
            elif block.checkpoint is None:
                result.rows, branch, probabilities = step(packed.as_parameters(result.rows, block), branch)
            else:
                step = packed.checkpointed(block.checkpoint, step)
                result.rows, probabilities = step(packed.as_parameters(packed.added(result.rows, branch), block))
                branch = None
        else:
            copies = None
            stream = packed.as_parameters(packed.added(result.rows, branch), block)
            padded, probabilities = block.call_padded(packing.unpack(stream, query_rows=True), packing, want_attention)
            probabilities = of_shown_queries(probabilities, packing)
            result.rows, branch = packed.chosen(packing.pack(padded, block.module), here), None
        if asked is not None and copies is None:
            asked.say_without(f"block {i} ({type(block.module).__name__})", _why_without(asked, block, reason))
        if record.listened():
            record.say(*_way(block, rows, copies, reason, no_graph), (f"block {i}", block.module))
        if want_hidden:
            result.rows, branch = packed.added(result.rows, branch), None
            result.show(packing)
        if want_attention:
            result.attentions.append(probabilities)
        i += 1
    result.rows = packed.added(result.rows, branch) if blocks else packed.chosen(result.rows, wanted)
    return result


def in_force(
    weights: WeightCache | None, module: nn.Module, want_hidden: bool = False, want_attention: bool = False
) -> WeightCache | None:
    """The int8 copies that what lies around the blocks is computed with in this call, if any."""
    if weights is None or weights.kind != "int8":
        return None
    if torch.is_grad_enabled() or transforming():
        if _why_at_once(want_hidden, want_attention) or recomputed.why_not_of(module):
            return None
    return None if registry.why_unavailable("quantize_linear", "cpp") else weights


def _why_at_once(want_hidden, want_attention):
    """Why gradients, which are recorded, cannot be left to a second forward; "" where they can (`recomputed.py`)."""
    if reason := recomputed.why_not():
        return reason
    if want_hidden or want_attention:
        return (
            "gradients are recorded, and hidden states or attentions are to have them: call the model under "
            "torch.no_grad() or torch.inference_mode()"
        )
    return ""


def _why_not_fp8(block):
    """Why a packable block cannot compute with 8-bit copies of its weights, or ""."""
    if reason := block.why_not_linears():
        return reason
    return (block.why_not_plain() or recomputed.why_not_of(block.module)) if torch.is_grad_enabled() else ""


def _why_without(weights, block, reason):
    """Why a block computes with its parameters although 8-bit copies were asked for."""
    if weights.kind == "int8":
        return reason
    return block.why_not_packable() or _why_not_fp8(block) or reason


def _way(block, rows, copies, reason, no_graph):
    """(the way that a block went, why not a faster one): it was not native, and no CUDA graph, for these reasons."""
    if odd := block.why_not_packable():
        return "padded", odd
    if copies is not None:
        emulated = why_emulated(rows)
        return "packed fp8", emulated and f"it is emulated here, with no gain: {emulated}"
    if rows.is_cuda:  # where packed is the fastest way but for a graph
        reason, also = no_graph, block.why_not_plain() if no_graph else ""
    else:
        also = native.why_not(block)
    return "packed", reason if also in reason else f"{reason}; and {also}"


def of_shown_queries(probabilities: torch.Tensor | None, packing: Packing) -> torch.Tensor | None:
    """Attention probabilities [B, H, L, L] with zeros where a position asks that has no row to show."""
    if probabilities is None or packing.dense:
        return probabilities
    return probabilities.masked_fill(~packing.shown_mask()[:, None, :, None], 0)


def final_norm(norm: nn.Module, rows: torch.Tensor, packing: Packing) -> torch.Tensor:
    """The trunk's last LayerNorm on packed rows; a float32 stream is normalised before it is rounded to bfloat16."""
    why = why_norm_padded(norm)
    record.say("padded" if why else "packed", why, ("final norm", norm))
    if why:
        return packing.pack(norm(packing.unpack(rows, query_rows=True)), norm)
    dtype = norm.weight.dtype
    if rows.dtype == dtype:
        return norm(rows)
    bias = None if norm.bias is None else norm.bias.to(rows.dtype)
    return F.layer_norm(rows, norm.normalized_shape, norm.weight.to(rows.dtype), bias, norm.eps).to(dtype)


def pool(
    pooler: nn.Module,
    rows: torch.Tensor,
    packing: Packing,
    *,
    first_only: bool = True,
    selected: bool = False,
    apart: bool = False,
) -> torch.Tensor:
    """The pooler's [B, D]; one that reads but the first token of a sample (`first_only`) is given just that.

    With `selected`, the rows are those already, `packing.pooled`. With `apart`, it is given one after the other: what a
    library's product makes of a row depends on how many there are.
    """
    why = why_pooler_padded(pooler, first_only)
    record.say("padded" if why else "packed", why, ("pooler", pooler))
    if why:
        return pooler(packing.unpack(rows, query_rows=True))
    rows = (rows if selected else rows.index_select(0, packing.pool_rows))[:, None]
    return torch.cat([pooler(row.clone()) for row in rows.split(1)]) if apart else pooler(rows)


def why_norm_padded(norm: nn.Module) -> str:
    """Why the trunk's last norm has to be called on the padded tensor, or ""."""
    if not has_hooks(norm) and is_plain(norm, nn.LayerNorm):
        return ""
    return why_hooked(norm, inside=False) or why_not_plain(norm, nn.LayerNorm)


def why_pooler_padded(pooler: nn.Module, first_only: bool) -> str:
    """Why the pooler has to be called on the padded tensor, or ""."""
    if not any_hooked(pooler) and first_only:
        return ""
    return why_hooked(pooler) or f"which tokens a {type(pooler).__name__} reads is not known"


def foretell(
    modules: Sequence[nn.Module],
    describe: Callable[[nn.Module], Block],
    *,
    weights: WeightCache | None = None,
    graphs: Graphs | None = None,
) -> None:
    """Say which way each block would go, called here and now for no hidden states and attentions."""
    blocks = list(map(describe, modules))
    here = next((p for module in modules for p in module.parameters()), torch.empty(0))
    no_graph = "" if graphs is None else captured.why_not_now(graphs, here.device, False, False)
    if graphs is not None:
        no_graph = no_graph or captured.why_not_captured(blocks)
    at_once = _why_at_once(False, False) if torch.is_grad_enabled() or transforming() else ""
    fp8 = weights if weights is not None and weights.kind == "fp8" and not at_once else None
    for i, block in enumerate(blocks):
        reason = at_once or native.unavailable(here) or native.why_not_now(block)
        if graphs is not None and not no_graph:
            way = "CUDA graph", ""
        elif not reason and fp8 is None:
            way = "native" if weights is None else "native int8", ""
        else:
            way = _way(block, here, None if fp8 is None or _why_not_fp8(block) else fp8, reason, no_graph)
        record.say(*way, (f"block {i}", block.module))
