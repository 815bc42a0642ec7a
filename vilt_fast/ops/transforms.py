"""Who sees every operation of a program: functorch's transforms, tangents of forward-mode AD, tracers.

As far as this torch lets it be asked; where it does not, somebody may.
"""

import torch

_ASKED = (getattr(torch._C, "_are_functorch_transforms_active", None), getattr(torch._C, "_get_tracing_state", None))
KNOWN = None not in _ASKED and hasattr(torch.autograd.forward_ad, "_current_level")


def active() -> bool:
    """Whether somebody does, here and now."""
    if not KNOWN or torch.compiler.is_compiling() or any(ask() for ask in _ASKED):
        return True
    return torch.autograd.forward_ad._current_level >= 0
