"""Blocks in CUDA graphs: which can be, why others cannot, and what is captured of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..ops._check import transforming
from ..ops.linear import adds_residual
from . import graphs as engine
from . import packed, recomputed
from .blocks import Block
from .graphs import Bucket, Graphs
from .packing import Packing, Selection, Spans
from .quantization import WeightCache


def why_not_now(graphs: Graphs, device: torch.device, want_hidden: bool, want_attention: bool) -> str:
    """Why a call cannot have a CUDA graph, whatever its modules are, or ""."""
    if torch.is_grad_enabled():
        return "gradients are recorded: call the model under torch.no_grad() or torch.inference_mode()"
    if want_hidden or want_attention:
        return "hidden states or attentions are wanted"
    if transforming():
        return recomputed.why_not()
    return engine.why_not_usable(device) or graphs.failed


def why_not_captured(blocks: Sequence[Block]) -> str:
    """Why blocks, as they stand, cannot be one CUDA graph, or ""."""
    if odd := next(filter(None, (block.why_not_plain() for block in blocks)), ""):
        return odd
    training = any(module.training for block in blocks for module in block.module.modules())
    return "it is in training mode" if training else ""


def why_not_these(blocks: Sequence[Block], packing: Packing) -> str:
    """Why blocks have no CUDA graph where the call would allow it."""
    if odd := why_not_captured(blocks):
        return odd
    if Bucket.of(packing).rows > engine.MOST_ROWS:
        return f"{packing.total_rows} rows are more than a graph is captured for ({engine.MOST_ROWS})"
    return "batches of so many sizes are not worth capturing, or what its modules hold does not tell what they compute"


def replayed(
    graphs: Graphs,
    modules: Sequence[nn.Module],
    describe: Callable[[nn.Module], Block],
    rows: torch.Tensor,
    packing: Packing,
    weights: WeightCache | None,
    wanted: Selection | None,
) -> torch.Tensor | None:
    """The blocks alone as one CUDA graph; None where they are not plain, or there is none for them."""
    if not graphs.standing("blocks", modules, lambda: not why_not_captured(list(map(describe, modules)))):
        return None
    identity = () if weights is None else places_of_copies(list(map(describe, modules)), weights)
    return graphs.blocks(lambda: stack(list(map(describe, modules)), weights), rows, packing, identity, wanted)


def places_of_copies(blocks: Sequence[Block], weights: WeightCache) -> tuple[int, ...]:
    """Where the fp8 copies of plain blocks lie, up to date: they must be there before a capture or a replay."""
    copies = (
        weights.fp8((i, name), linears)
        for i, block in enumerate(blocks)
        for name, linears in packed.side_by_side(block).items()
    )
    return tuple(0 if t is None else t.data_ptr() for copy in copies for t in copy)


def stack(blocks: Sequence[Block], weights: WeightCache | None) -> Callable:
    """The function (rows [N, D], spans, wanted) -> [N or W, D] of plain blocks."""

    def run(x: torch.Tensor, spans: Spans, wanted: Selection | None) -> torch.Tensor:
        x, branch, adds = packed.as_parameters(x, blocks[0]), None, adds_residual(x)
        for i, block in enumerate(blocks):
            here = wanted if i + 1 == len(blocks) else None
            x, branch, _ = packed.step_of(block, i, spans, weights, wanted=here, adds=adds)(x, branch)
        return packed.added(x, branch)

    return run
