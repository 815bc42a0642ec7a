"""vilt_fast: custom kernels that make ViLT (Vision-and-Language Transformer) fast without changing what it computes.

import vilt_fast
vilt_fast.accelerate(model)  # in place; same parameters, same state_dict, same outputs
vilt_fast.restore(model)     # exactly as it was
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "accelerate": "swap",
    "restore": "swap",
    "restored": "swap",
    "refresh": "swap",
    "sequence_plan": "swap",
    "explain": "explanation",
    "Explanation": "explanation",
    "align": "alignment.align",
    "Alignment": "alignment.align",
    "SequencePlan": "models.vilt.plan",
    "InputError": "errors",
}

__all__ = [*_PUBLIC, "functional"]


def __getattr__(name):
    """Public names are imported when they are first used: importing vilt_fast imports nothing else."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    if name == "functional":
        return importlib.import_module(".functional", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
