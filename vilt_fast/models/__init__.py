"""Where each kind of ViLT model keeps its parameters, and what its inputs and outputs look like."""

from __future__ import annotations

import sys

from torch import nn


def find(model: nn.Module) -> list[tuple[nn.Module, type]]:
    """(module, `Swapped` type) of every part of `model` that can be accelerated; imports no model library."""
    from .vilt import original

    swaps = original.find(model)
    if "transformers.models.vilt.modeling_vilt" in sys.modules:  # else nobody can have made such a model
        from .vilt import tasks as hf

        swaps += hf.find(model)
    return swaps
