"""What modules were when something was found out about them: while they are that still, it need not be found anew.

A forward at batch 1 takes 50 ms, and asking of twelve blocks how each has to be computed takes 2. So what was found is
kept with a `Snapshot`, which is compared at every call (0.3 ms). It sees all that can be seen of a module by looking:
its class, the methods and whatever else that has, and what these use of their library; every attribute; who listens;
what lies inside; type, dtype, shape and strides of every parameter and, for what reads these where they lie, the place.
It holds no tensor: values are no matter of it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import nn

from . import listeners
from .genuine import own_methods

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None

_TENSORS = ("_parameters", "_buffers")


class Snapshot:
    """Modules, and all within them, as they were when this was taken."""

    __slots__ = (
        "_classes", "_empty", "_forms", "_guards", "_held", "_inside", "_kinds", "_methods", "_names", "_owners",
        "_places", "_roots", "_were",
    )  # fmt: skip

    @classmethod
    def of(cls, modules: Sequence[nn.Module | None], placed: bool = False) -> Snapshot | None:
        """Of `modules` as they are now; None where looking does not tell all that matters of them.

        With `placed`, parameters and buffers have to stay where they lie; without it there may be no buffers.
        """
        taken = cls()
        taken._roots = list(modules)
        taken._inside = list(listeners.inside(modules))
        taken._kinds = list(map(type, taken._inside))
        owns = list(map(_OWN, taken._inside))
        for own in owns:
            # A tensor beside the parameters (replicas of nn.DataParallel have such) may change and stay the same.
            if (own["_buffers"] and not placed) or any(isinstance(value, torch.Tensor) for value in own.values()):
                return None
        # Most attributes are dictionaries of hooks, and empty: of the same object, whether it still is says all.
        taken._empty = [value for own in owns for value in own.values() if isinstance(value, dict) and not value]
        taken._were = [{name: _kept(name, value) for name, value in own.items()} for own in owns]
        taken._owners = [(i, name) for i, own in enumerate(owns) for name in _TENSORS if own[name]]
        taken._held = [owns[i][name] for i, name in taken._owners]
        taken._names, tensors = taken._look()
        taken._forms, taken._guards = _forms_of(tensors), None
        taken._places = _places_of(tensors) if placed else None
        kinds = set(taken._kinds)
        taken._methods = [(kind, own_methods(kind)) for kind in kinds]
        classes = {base for kind in kinds for base in kind.__mro__ if base is not object}
        taken._classes = [(base, dict(vars(base))) for base in classes]
        return taken if taken.holds(modules) else None

    def holds(self, modules: Sequence[nn.Module | None]) -> bool:
        """Whether `modules` are those, nothing of them has changed, and nobody listens to all modules."""
        if list(modules) != self._roots or listeners.all_are_hooked() or any(self._empty):
            return False
        owns = list(map(_OWN, self._inside))
        try:
            if owns != self._were or any(vars(base) != attributes for base, attributes in self._classes):
                return False
        except (RuntimeError, ValueError):  # tensors, or arrays, that cannot say whether they are equal
            return False
        if any(owns[i][name] is not held for (i, name), held in zip(self._owners, self._held, strict=True)):
            return False
        if list(map(type, self._inside)) != self._kinds:
            return False
        names, tensors = self._look()
        if names != self._names or (self._places is not None and _places_of(tensors) != self._places):
            return False
        return self._are_of_their_forms(tensors) and all(own_methods(kind) == own for kind, own in self._methods)

    def _look(self):
        """Names of parameters and buffers, and which are None; those that are not."""
        tensors = [t for held in self._held for t in held.values()]
        names = list(map(tuple, self._held)), [t is None for t in tensors]
        return names, [t for t in tensors if t is not None]

    def _are_of_their_forms(self, tensors):
        """torch's own guard of them all says so ten times as fast; where it does not, for it looks at more (autocast,
        inference mode), they are compared."""
        if self._guards is not None and self._guards.check(*tensors):
            return True
        if _forms_of(tensors) != self._forms:
            return False
        self._guards = _guards_of(tensors)
        return True


def _forms_of(tensors):
    """Type, dtype, shape and strides, a property of all at a time."""
    return list(map(type, tensors)), list(map(_FORM, tensors)), list(map(torch.Tensor.stride, tensors))


def _places_of(tensors):
    return list(map(torch.Tensor.data_ptr, tensors))


def _guards_of(tensors):
    """What torch.compile looks with, of types, dtypes, shapes and strides at least; None where torch has no such."""
    try:
        found = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        return found if found.check(*tensors) else None
    except (TypeError, RuntimeError):
        return None


_OWN, _FORM = operator.attrgetter("__dict__"), operator.attrgetter("dtype", "shape")


def _kept(name, value):
    """An attribute to compare with: of dictionaries a copy, but for empty ones and those of tensors, which cannot be
    compared."""
    return dict(value) if isinstance(value, dict) and value and name not in _TENSORS else value
