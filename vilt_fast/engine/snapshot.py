"""What modules were when something was found out about them: while they are that still, it need not be found anew.

A forward at batch 1 takes 50 ms, and asking of twelve blocks how each has to be computed takes 2. So what was found is
kept with a `Snapshot`, which is compared at every call (0.3 ms). It sees all that can be seen of a module by looking:
its class, the methods and whatever else that has, and what these use of their library; every attribute; who listens;
what lies inside; type, dtype, shape and strides of every parameter and, for what reads these where they lie, the place.
It holds no tensor: values are no matter of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from . import listeners
from .genuine import own_methods

_TENSORS = ("_parameters", "_buffers")
_IDLE = {
    "_non_persistent_buffers_set", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs", "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
}  # fmt: skip


class Snapshot:
    """Modules, and all within them, as they were when this was taken."""

    __slots__ = ("_classes", "_inside", "_kinds", "_methods", "_placed", "_roots", "_tensors", "_were")

    @classmethod
    def of(cls, modules: Sequence[nn.Module | None], placed: bool = False) -> Snapshot | None:
        """Of `modules` as they are now; None where looking does not tell all that matters of them.

        With `placed`, parameters and buffers have to stay where they lie; without it there may be no buffers.
        """
        taken = cls()
        taken._roots, taken._placed = list(modules), placed
        taken._inside = list(listeners.inside(modules))
        taken._kinds = list(map(type, taken._inside))
        owns = [module.__dict__ for module in taken._inside]
        for own in owns:
            # A tensor beside the parameters (replicas of nn.DataParallel have such) may change and stay the same.
            if (own["_buffers"] and not placed) or any(isinstance(value, torch.Tensor) for value in own.values()):
                return None
        taken._were = [{name: _held(name, value) for name, value in own.items()} for own in owns]
        taken._tensors = taken._forms(owns)
        kinds = set(taken._kinds)
        taken._methods = [(kind, own_methods(kind)) for kind in kinds]
        classes = {base for kind in kinds for base in kind.__mro__ if base is not object}
        taken._classes = [(base, dict(vars(base))) for base in classes]
        return taken if taken.holds(modules) else None

    def holds(self, modules: Sequence[nn.Module | None]) -> bool:
        """Whether `modules` are those, nothing of them has changed, and nobody listens to all modules."""
        if list(modules) != self._roots or listeners.all_are_hooked():
            return False
        owns = [module.__dict__ for module in self._inside]
        try:
            if owns != self._were or any(vars(base) != attributes for base, attributes in self._classes):
                return False
        except (RuntimeError, ValueError):  # tensors, or arrays, that cannot say whether they are equal
            return False
        if list(map(type, self._inside)) != self._kinds or self._forms(owns) != self._tensors:
            return False
        return all(own_methods(kind) == methods for kind, methods in self._methods)

    def _forms(self, owns):
        """What is told of each parameter and buffer."""
        held = [pair for own in owns for name in _TENSORS if own[name] for pair in own[name].items()]
        forms = [(name, t if t is None else (type(t), t.dtype, t.shape, t.stride())) for name, t in held]
        return (forms, [0 if t is None else t.data_ptr() for _, t in held]) if self._placed else forms


def _held(name, value):
    """An attribute to compare with: of dictionaries a copy, but for those of tensors, which cannot be compared, and for
    those that change nothing of a call without hooks (looking into these takes as long as all else)."""
    if name in _IDLE or (name in _TENSORS and value):
        return value
    return dict(value) if isinstance(value, dict) else value
