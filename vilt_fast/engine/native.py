"""The native way: runs of plain blocks in one call of the fused encoder, on a CPU.

Where gradients are recorded, in evaluation mode, a run is one node of the graph (`recomputed.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from .. import functional
from ..functional import LayerParameters
from ..ops import registry
from . import listeners, packed
from .blocks import Block, layer_parameters
from .packing import Packing, Selection
from .quantization import WeightCache
from .recomputed import recomputed, why_not_of

_COMPUTE = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@dataclasses.dataclass(slots=True)
class Run:
    """Consecutive blocks that one native call computes."""

    parameters: list[torch.Tensor] = dataclasses.field(default_factory=list)
    eps: list[float] = dataclasses.field(default_factory=list)
    compute: str = ""
    num_heads: int = 0
    blocks: int = 0
    weights: WeightCache | None = None  #: of the 8-bit copies to compute with
    first: int = 0  #: number of the first block

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
        given = (rows, self.parameters, packing.cu_seqlens, packing.seqused_k, packing.max_seqlen)
        options = dict(num_heads=self.num_heads, eps=self.eps, return_hidden=return_hidden)
        options |= dict(wanted=None, cu_wanted=None)
        if wanted is not None:
            options |= dict(wanted=wanted.rows, cu_wanted=wanted.cu_seqlens)
        if self.weights is not None:
            return self.weights.encoder(self.first, *given, **options)
        return functional.encoder(*given, **options, compute=self.compute)

    def _part(self, start, end):
        """Some of the blocks."""
        layer = len(LayerParameters._fields)
        tensors = slice(start * layer, end * layer)
        return dataclasses.replace(
            self, parameters=self.parameters[tensors], eps=self.eps[2 * start : 2 * end], blocks=end - start,
            first=self.first + start,
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
    parameters = layer_parameters(block)
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


def run_from(blocks: Sequence[Block], first: int, weights: WeightCache | None) -> tuple[Run, str]:
    """(the longest run of blocks from `first` on, maybe an empty one, and why it ends there)."""
    run, reason = Run(weights=weights, first=first), ""
    for block in blocks[first:]:
        reason = why_not_now(block)
        if reason:
            break
        parameters = layer_parameters(block)
        attention, feed_forward = block.sublayers
        compute = _compute_type(parameters)
        if run.blocks and (compute, attention.num_heads) != (run.compute, run.num_heads):
            break
        run.compute, run.num_heads = compute, attention.num_heads
        run.parameters += parameters
        run.eps += [attention.norm.eps, feed_forward.norm.eps]
        run.blocks += 1
    return run, reason


def _compute_type(parameters) -> str | None:
    """What the native encoder computes with these; None where their matrices are of several dtypes."""
    dtypes = {t.dtype for t in parameters if t.dim() == 2}
    if torch.is_autocast_enabled("cpu"):
        dtypes = {torch.get_autocast_dtype("cpu")}
    return _COMPUTE.get(dtypes.pop()) if len(dtypes) == 1 else None
