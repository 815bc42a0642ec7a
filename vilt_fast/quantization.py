"""Quantised copies of weights, made again whenever a weight has changed.

The only derived weights in the project: float32 and bfloat16 kernels read the parameters as they are. A copy is kept
with a fingerprint of its source (storage address, version counter, dtype, shape and a sample of the bits), which is
compared at every call.
"""

from __future__ import annotations

import torch

from . import functional

#: Places of the six matrices among the 16 tensors of a block (see `functional.encoder`).
_MATRICES = (2, 4, 6, 8, 12, 14)
_PER_BLOCK = 16


class WeightCache:
    """int8 copies of the weight matrices of a model's blocks.

    An optimizer step, `load_state_dict`, a `.data` assignment and a `.data` edit of whole tensors or rows are seen at
    the next call. An edit through `.data` bumps no version counter, so that one is found by sampling elements, one or
    more of every row: after editing a few single elements through `.data`, call `vilt_fast.refresh(model)`.
    """

    def __init__(self):
        self._copies: dict[int, tuple[tuple, torch.Tensor]] = {}

    def quantized(self, parameters: list[torch.Tensor], first_block: int = 0) -> list[torch.Tensor]:
        """`parameters` of whole blocks, the first of them `first_block`, with each matrix replaced by its int8 copy."""
        result = list(parameters)
        for start in range(0, len(parameters), _PER_BLOCK):
            for place in _MATRICES:
                at = start + place
                result[at] = self._copy(first_block * _PER_BLOCK + at, parameters[at])
        return result

    def clear(self) -> None:
        """Forget all copies; the next call makes them anew."""
        self._copies.clear()

    def _copy(self, place: int, weight: torch.Tensor) -> torch.Tensor:
        fingerprint = _fingerprint(weight)
        kept = self._copies.get(place)
        if kept is None or kept[0] != fingerprint:
            kept = self._copies[place] = (fingerprint, functional.quantize_linear(weight.detach()))
        return kept[1]

    def __getstate__(self):
        return {}

    def __setstate__(self, state):
        self._copies = {}


def _fingerprint(weight: torch.Tensor) -> tuple:
    # No further apart than a row is long, so that no row goes unseen, and not by its length: the columns take turns.
    step = max(1, min(1021, weight.shape[1] - 1))
    bits = torch.int16 if weight.element_size() == 2 else torch.int32
    sample = weight.detach().view(-1)[::step].view(bits)
    version = None if weight.is_inference() else weight._version
    return weight.data_ptr(), version, weight.dtype, tuple(weight.shape), hash(sample.numpy().tobytes())
