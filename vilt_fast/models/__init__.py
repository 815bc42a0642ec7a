"""The families of models, a folder each: where they keep their parameters, what inputs and outputs look like."""

from __future__ import annotations

import sys

from torch import nn

from .base import Swapped
from .vilt import original


def find(model: nn.Module) -> list[tuple[nn.Module, type[Swapped]]]:
    """(module, `Swapped` type) of every part of `model` that can be accelerated; imports no model library."""
    swaps = original.find(model)
    if "transformers.models.vilt.modeling_vilt" in sys.modules:  # else nobody can have made such a model
        from .vilt import tasks  # imports transformers

        swaps += tasks.find(model)
    return swaps
