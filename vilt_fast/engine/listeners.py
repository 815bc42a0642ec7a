"""What an engine asks of modules: who listens to them, whether they compute what they computed before."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules import module as module_internals


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to the calls of `module`, or of all modules."""
    return _has_own_hooks(module.__dict__) or bool(module_internals._has_any_global_hook())


def is_hooked(module: nn.Module) -> bool:
    """Whether calling `module` does more (or other) than its class's `forward`."""
    return has_hooks(module) or "forward" in module.__dict__


def any_hooked(module: nn.Module) -> bool:
    """`is_hooked` of the module or anything inside it."""
    return bool(module_internals._has_any_global_hook()) or any(
        _has_own_hooks(own) or "forward" in own for own in _inside([module])
    )


def live(dropout: nn.Module) -> float:
    """The probability that a dropout module drops with now."""
    return getattr(dropout, "p", 0.0) if dropout.training else 0.0


def stamp(modules: Iterable[nn.Module]) -> tuple | None:
    """What must be equal for `modules` to compute, on parameters in the same places, what they computed before.

    None where that cannot be told by looking: hooks, training, parameters that are no ordinary tensors.
    """
    if module_internals._has_any_global_hook():
        return None
    found = []
    for own in _inside(modules):
        if _has_own_hooks(own) or "forward" in own or own["training"]:
            return None
        found.append(id(own))
        if "eps" in own:
            found.append(own["eps"])
        for parameter in own["_parameters"].values():
            if type(parameter) is nn.Parameter:
                found.append(parameter.data_ptr())
            elif parameter is not None:
                return None
    return tuple(found)


def plain_parameters(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether these are ordinary tensors, which a kernel can read where they lie."""
    return all(type(t) in (nn.Parameter, torch.Tensor) for t in tensors)


def _has_own_hooks(own: dict) -> bool:
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


def _inside(modules):
    """The `__dict__` of each module and of all within it; `Module.modules()` takes five times as long."""
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module is not None:
            own = module.__dict__
            yield own
            waiting.extend(own["_modules"].values())
