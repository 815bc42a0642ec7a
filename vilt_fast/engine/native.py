"""The native way: runs of plain blocks in one call of the fused encoder, on a CPU.

Where gradients are recorded, in evaluation mode, a run is one node of the graph (`recomputed.py`).
"""

from __future__ import annotations

import dataclasses
import weakref

import torch
from torch import nn

from .. import functional
from ..functional import LayerParameters
from ..ops import registry
from ..remembered import Memory
from . import listeners, packed
from .blocks import Block, Described, layer_parameters
from .packing import Packing, Selection
from .quantization import WeightCache
from .recomputed import recomputed, why_not_of
from .snapshot import Snapshot

_COMPUTE = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@dataclasses.dataclass(slots=True)
class Run:
    """Consecutive blocks that one native call computes."""

    parameters: list[torch.Tensor] = dataclasses.field(default_factory=list)
    eps: list[float] = dataclasses.field(default_factory=list)
    sublayers: list[tuple] = dataclasses.field(default_factory=list)  #: of each block
    compute: str = ""
    num_heads: int = 0
    blocks: int = 0
    weights: WeightCache | None = None  #: of the 8-bit copies to compute with
    first: int = 0  #: number of the first block
    memory: Memory | None = None  #: of the tensors, whose forms a `Snapshot` watches

    def encode(
        self, rows: torch.Tensor, packing: Packing, return_hidden: bool, wanted: Selection | None
    ) -> torch.Tensor:
        """The stream [N, D] float32 after the run, or its wanted rows; after each of its blocks [blocks, N, D]."""
        rows = rows.float()
        if not torch.is_grad_enabled():
            return self._fast(rows, packing, wanted, return_hidden)
        frozen = 0  # blocks in front that no gradient passes
        if not rows.requires_grad:
            layers = enumerate(LayerParameters.layers(self.parameters))
            frozen = next((i for i, p in layers if any(t.requires_grad for t in p)), self.blocks)
        if 0 < frozen < self.blocks:
            rows = self._part(0, frozen)._recomputed(rows, packing, None)
            return self._part(frozen, self.blocks)._recomputed(rows, packing, wanted)
        return self._recomputed(rows, packing, wanted)

    def _recomputed(self, rows, packing, wanted):
        def exact(rows, *parameters):
            return packed.of_parameters(rows, parameters, packing.spans, self.num_heads, self.eps, wanted).float()

        return recomputed(lambda rows: self._fast(rows, packing, wanted), exact, rows, self.parameters)

    def _fast(self, rows, packing, wanted, return_hidden=False):
        parameters = self.parameters if self.memory is None else self.memory.of(self.parameters)
        given = (rows, parameters, packing.cu_seqlens, packing.seqused_k, packing.max_seqlen)
        options = dict(num_heads=self.num_heads, eps=self.eps, return_hidden=return_hidden)
        options |= dict(wanted=None, cu_wanted=None)
        if wanted is not None:
            options |= dict(wanted=wanted.rows, cu_wanted=wanted.cu_seqlens)
        if self.weights is not None:
            return self.weights.encoder(self.first, *given, **options)
        return functional.encoder(*given, **options, compute=self.compute)

    def again(self, weights: WeightCache | None) -> Run:
        """The same blocks with the tensors that they have now."""
        parameters = [t for sublayers in self.sublayers for t in layer_parameters(sublayers)]
        return Run(
            parameters, self.eps, self.sublayers, self.compute, self.num_heads, self.blocks, weights, self.first,
            self.memory,
        )  # fmt: skip

    def _part(self, start, end):
        """Some of the blocks."""
        layer = len(LayerParameters._fields)
        tensors = slice(start * layer, end * layer)
        return dataclasses.replace(
            self, parameters=self.parameters[tensors], eps=self.eps[2 * start : 2 * end],
            sublayers=self.sublayers[start:end], blocks=end - start, first=self.first + start, memory=None,
        )  # fmt: skip


def unavailable(rows: torch.Tensor) -> str:
    """Why no block can be computed natively here and now, or ""."""
    if rows.device.type != "cpu":
        return f"the tensors are on {rows.device}"
    return registry.why_unavailable("encoder", "cpp")


def why_not(block: Block) -> str:
    """Why the native encoder cannot take a block, or ""."""
    if reason := block.why_not_plain():
        return reason
    attention, _ = block.sublayers
    if reason := registry.why_unavailable("encoder", "cpp", head_dim=attention.out.in_features // attention.num_heads):
        return reason.rstrip(".")
    if attention.out.in_features != attention.out.out_features:
        return "its heads are together not as wide as the stream"
    parameters = layer_parameters(block.sublayers)
    if not listeners.plain_parameters(parameters):
        return "its parameters are no ordinary tensors"
    if not all(t.is_contiguous() for t in parameters):
        return "its parameters do not lie dense in memory"
    dtypes = {t.dtype for t in parameters} - set(_COMPUTE)
    if dtypes:
        return f"its parameters are {dtypes.pop()}, not float32 or bfloat16"
    if _compute_type(parameters):
        return ""
    if torch.is_autocast_enabled("cpu"):
        return f"autocast computes in {torch.get_autocast_dtype('cpu')}, not in float32 or bfloat16"
    return "its weights are of two dtypes"


def why_not_now(block: Block) -> str:
    """Why the native encoder cannot take a block in this call, or ""."""
    return why_not_of(block.module) or why_not(block)


def run_from(blocks: Described, first: int, weights: WeightCache | None) -> tuple[Run, str]:
    """(the longest run of blocks from `first` on, maybe an empty one, and why it ends there)."""
    run, reason = Run(weights=weights, first=first), ""
    for place in range(first, len(blocks)):
        block = blocks[place]
        if reason := why_not_now(block):
            break
        parameters = layer_parameters(block.sublayers)
        attention, feed_forward = block.sublayers
        compute = _compute_type(parameters)
        if run.blocks and (compute, attention.num_heads) != (run.compute, run.num_heads):
            break
        run.compute, run.num_heads = compute, attention.num_heads
        run.sublayers.append(block.sublayers)
        run.parameters.extend(parameters)
        run.eps += [attention.norm.eps, feed_forward.norm.eps]
        run.blocks += 1
    return run, reason


class Runs:
    """Runs of blocks as they were found, for as long as a `Snapshot` of their modules holds.

    Kept are those that end with the last block: what a shorter one ends at may change by itself. Of the modules'
    tensors nothing is kept, and of the modules nothing once their model is gone.
    """

    def __init__(self):
        self._kept: dict[tuple, tuple[Snapshot, Run]] = {}
        self._life = None  # calls back when the model is gone

    def run_from(self, blocks: Described, first: int, weights: WeightCache | None) -> tuple[Run, str]:
        """`run_from`, of what is known where that still holds."""
        if torch.compiler.is_compiling():
            return run_from(blocks, first, weights)
        asked = first, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        modules = blocks.modules[first:]
        snapshot, kept = self._kept.get(asked, (None, None))
        if snapshot is not None and snapshot.holds(modules):
            return kept.again(weights), ""
        self._kept.pop(asked, None)
        run, reason = run_from(blocks, first, weights)
        if run.blocks == len(modules) and (snapshot := Snapshot.of(modules)):
            # Once more, of what the snapshot has seen: another thread may have been at work meanwhile.
            run, reason = run_from(blocks.anew(), first, weights)
            if run.blocks == len(modules):
                kept = dataclasses.replace(run, parameters=[], weights=None, memory=Memory())
                self._kept[asked] = snapshot, kept
        return run, reason

    def live_with(self, model: nn.Module) -> None:
        """Forget all when `model` is gone, for whoever holds this longer than that."""
        if self._life is None or self._life() is not model:
            kept = self._kept
            self._life = weakref.ref(model, lambda _: kept.clear())

    def __reduce__(self):
        return Runs, ()


def _compute_type(parameters) -> str | None:
    """What the native encoder computes with these; None where their matrices are of several dtypes."""
    dtypes = {t.dtype for t in parameters if t.dim() == 2}
    if torch.is_autocast_enabled("cpu"):
        dtypes = {torch.get_autocast_dtype("cpu")}
    return _COMPUTE.get(dtypes.pop()) if len(dtypes) == 1 else None
