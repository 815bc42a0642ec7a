"""quantize_linear: the int8 form of a linear weight, for the native encoder."""

import torch
from torch import Tensor

from . import _check, registry


def quantize_linear(weight: Tensor, *, backend: str | None = None) -> Tensor:
    """The int8 form of a linear weight [N, K] (float32 or bfloat16) for :func:`encoder`: an opaque uint8 blob [bytes].

    Per output channel, symmetric, scale max|w|/127. The blob holds for the machine and version that made it: keep the
    weight, not the blob. Needs the native library (RuntimeError without it).
    """
    _check.shapes("quantize_linear", weight=(weight, "N K"))
    _check.dtypes("quantize_linear", (torch.float32, torch.bfloat16), weight=weight)
    facts = registry.Facts(device=weight.device.type, dtype=weight.dtype)
    name = registry.resolve("quantize_linear", backend, facts)
    # Not behind torch.library: it runs when weights change, and only there is the size of its result known.
    (blob,), _ = registry.launcher("quantize_linear", name)(weight=weight.detach(), keep=False)
    return blob
