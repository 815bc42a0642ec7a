"""Quantised copies of weights, made again whenever a weight has changed.

The only derived weights in the project: all other kernels read the parameters as they are. A copy is kept with a
fingerprint of its source (storage, version counter, dtype, shape and, on the CPU, a sample of the bits), which is
compared at every call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from .. import functional, record
from ..ops import registry
from ..reference.encoder import MATRICES, LayerParameters
from .asked import Asked

#: Places of the six matrices among the tensors of a layer.
_PLACES = [LayerParameters._fields.index(f"{name}_weight") for name in MATRICES]
KINDS = ("int8", "fp8")


class WeightCache(Asked):
    """Copies of the weight matrices of a model's blocks: int8 for the native encoder, e4m3 for `linear_fp8`.

    An optimizer step, `load_state_dict`, a `.data` assignment and, on the CPU, a `.data` edit of whole tensors or rows
    are seen at the next call. An edit through `.data` bumps no version counter, so that one is found by sampling
    elements, one or more of every row; sampling would wait for a GPU, so there it is not found at all. After editing a
    few single elements through `.data`, or any on a GPU, call `vilt_fast.refresh(model)`.
    """

    def __init__(self, kind: str):
        super().__init__(kind)
        self.kind = kind
        self._copies: dict[tuple, tuple] = {}

    def quantized(self, parameters: list[torch.Tensor], first_block: int = 0) -> list[torch.Tensor]:
        """`parameters` of whole blocks, the first of them `first_block`, with each matrix replaced by its int8 copy."""
        result = list(parameters)
        size = len(LayerParameters._fields)
        for start in range(0, len(parameters), size):
            for place in _PLACES:
                at = start + place
                result[at] = self._copy(first_block * size + at, (parameters[at],), functional.quantize_linear)
        return result

    def fp8(self, place: tuple, linears: Sequence[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(weight, weight_scale, bias) of `linear_fp8` for linears side by side; `place` names them in the model."""
        sources = [t for linear in linears for t in (linear.weight, linear.bias) if t is not None]
        return self._copy(place, sources, lambda *_: _side_by_side(linears))

    def clear(self) -> None:
        """Forget all copies; the next call makes them anew."""
        self._copies.clear()

    def _copy(self, place, sources, make):
        fingerprint = [_fingerprint(source) for source in sources]
        kept = self._copies.get(place)
        if kept is None or kept[0] != fingerprint:
            with record.unheard():
                kept = self._copies[place] = (fingerprint, make(*sources))
        return kept[1]

    def __getstate__(self):
        return {"kind": self.kind}

    def __setstate__(self, state):
        self.__init__(state["kind"])


def why_emulated(rows: torch.Tensor) -> str:
    """Why no kernel computes fp8 on rows like these, or ""."""
    if not rows.is_cuda:
        return f"the tensors are on {rows.device}"
    return registry.why_unavailable("linear_fp8", "triton", device="cuda", dtype=rows.dtype).rstrip(".")


def _side_by_side(linears):
    weight, scale = functional.quantize_fp8(torch.cat([linear.weight.detach() for linear in linears]))
    if all(linear.bias is None for linear in linears):
        return weight, scale, None
    biases = [linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias for linear in linears]
    return weight, scale, torch.cat([bias.detach() for bias in biases])


def _fingerprint(tensor: torch.Tensor) -> tuple:
    # A weak reference knows a storage from a later one at the same address, and keeps no memory alive.
    storage = StorageWeakRef(tensor.untyped_storage())
    version = None if tensor.is_inference() else tensor._version
    return storage, tensor.storage_offset(), version, tensor.dtype, tuple(tensor.shape), _sample(tensor)


def _sample(tensor):
    """A hash of some of the bits."""
    if tensor.device.type != "cpu":
        return None
    # No further apart than a row is long, so that no row goes unseen, and not by its length: the columns take turns.
    step = max(1, min(1021, tensor.shape[-1] - 1))
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    sample = tensor.detach().reshape(-1)[::step].contiguous().view(bits)
    return hash(sample.numpy().tobytes())
