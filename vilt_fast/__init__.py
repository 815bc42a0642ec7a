"""vilt_fast: custom kernels that make ViLT (Vision-and-Language Transformer) fast without changing what it computes.

import vilt_fast
vilt_fast.accelerate(model)  # in place; same parameters, same state_dict, same outputs
vilt_fast.restore(model)     # exactly as it was
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for type checkers and editors, which do not run __getattr__
    from . import functional
    from .alignment.align import Alignment, align
    from .checkpoints.original import load_original, save_original
    from .errors import InputError
    from .explanation import Explanation, explain
    from .images.processor import ImageProcessor
    from .models.vilt.plan import SequencePlan
    from .scoring.cross_encoder import CrossEncoder
    from .scoring.matrix import Recall, ScoreMatrix, recall
    from .scoring.score import score
    from .swap import accelerate, refresh, restore, restored, sequence_plan

__version__ = "0.1.0"  #: the only place of it; pyproject.toml reads it here

_PUBLIC = {
    "accelerate": "swap",
    "restore": "swap",
    "restored": "swap",
    "refresh": "swap",
    "sequence_plan": "swap",
    "explain": "explanation",
    "Explanation": "explanation",
    "load_original": "checkpoints.original",
    "save_original": "checkpoints.original",
    "align": "alignment.align",
    "Alignment": "alignment.align",
    "ImageProcessor": "images.processor",
    "SequencePlan": "models.vilt.plan",
    "InputError": "errors",
    "score": "scoring.score",
    "ScoreMatrix": "scoring.matrix",
    "recall": "scoring.matrix",
    "Recall": "scoring.matrix",
    "CrossEncoder": "scoring.cross_encoder",
}

__all__ = [
    "Alignment", "CrossEncoder", "Explanation", "ImageProcessor", "InputError", "Recall", "ScoreMatrix",
    "SequencePlan", "accelerate", "align", "explain", "functional", "load_original", "recall", "refresh", "restore",
    "restored", "save_original", "score", "sequence_plan",
]  # fmt: skip


def __getattr__(name):
    """Public names are imported when they are first used: importing vilt_fast imports nothing else."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    if name == "functional":
        return importlib.import_module(".functional", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
