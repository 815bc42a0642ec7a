"""The families of models, a folder each: where they keep their parameters, what inputs and outputs look like."""

from __future__ import annotations

import sys

from torch import nn

from .base import Part
from .pairs import Pairs
from .vilt import original, original_pairs


def why_nothing(model: nn.Module) -> str:
    """What to say of a model in which `find` finds nothing."""
    return (
        f"{type(model).__name__} contains no ViLT model: accelerate takes transformers' Vilt* classes and the original "
        "ViLTransformerSS, or a module around one of them."
    )


def find(model: nn.Module) -> list[Part]:
    """Every part of `model` that is known here, also those that have to stay as they are; imports no model library."""
    parts = original.find(model)
    if "transformers.models.vilt.modeling_vilt" in sys.modules:  # else nobody can have made such a model
        from .vilt import tasks  # imports transformers

        parts += tasks.find(model)
    return parts


def find_pairs(model: nn.Module) -> Pairs | None:
    """`model` as a task on pairs of a text and an image; None where it is none that is known here."""
    found = original_pairs.find(model)
    if found is None and "transformers.models.vilt.modeling_vilt" in sys.modules:
        from .vilt import task_pairs  # imports transformers

        found = task_pairs.find(model)
    return found
