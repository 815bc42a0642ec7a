"""What modules were when something was found out about them: while they are that still, it need not be found anew.

A forward at batch 1 takes 50 ms, and asking of twelve blocks how each has to be computed takes 2. So what was found is
kept with a `Snapshot`, which is compared at every call (0.04 ms natively, 0.2 in Python: `unchanged.py`). It sees all
that can be seen of a module by looking: its class, the methods and whatever else that has, and what these use of their
library; every attribute; who listens; what lies inside; type, dtype, shape and strides of every parameter and, for what
reads these where they lie, the place.
It holds no tensor: values are no matter of it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import nn

from . import listeners
from . import unchanged as compared
from .genuine import found_of, own_methods

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None

_TENSORS = ("_parameters", "_buffers")


class Snapshot:
    """Modules, and all within them, as they were when this was taken."""

    __slots__ = (
        "_attributes", "_classes", "_empty", "_entries", "_forms", "_found", "_guards", "_held", "_inside", "_kinds",
        "_methods", "_names", "_noted", "_owners", "_places", "_roots", "_were",
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
        owns = [module.__dict__ for module in taken._inside]
        for own in owns:
            # A tensor beside the parameters (replicas of nn.DataParallel have such) may change and stay the same.
            if (own["_buffers"] and not placed) or any(isinstance(value, torch.Tensor) for value in own.values()):
                return None
        # Most attributes are dictionaries of hooks, and empty: of the same object, whether it still is says all.
        taken._empty = [value for own in owns for value in own.values() if isinstance(value, dict) and not value]
        taken._were = [{name: _kept(name, value) for name, value in own.items()} for own in owns]
        taken._entries = list(map(compared.entries_of, taken._were))
        taken._owners = [(taken._inside[i], name) for i, own in enumerate(owns) for name in _TENSORS if own[name]]
        taken._held = [module.__dict__[name] for module, name in taken._owners]
        taken._names = list(map(compared.names_of, taken._held))
        tensors = compared.tensors_of(taken._owners, taken._held, taken._names)
        if tensors is None:  # another thread is at work
            return None
        taken._forms, taken._guards = _forms_of(tensors), None
        taken._places = compared.places_of(tensors) if placed else None
        kinds = set(taken._kinds)
        taken._methods = [(kind, own_methods(kind)) for kind in kinds]
        taken._found = found_of(kinds)
        taken._classes = list({base for kind in kinds for base in kind.__mro__ if base is not object})
        taken._attributes = [dict(vars(base)) for base in taken._classes]
        taken._noted = None
        return taken if taken.holds(modules) else None

    def holds(self, modules: Sequence[nn.Module | None]) -> bool:
        """Whether `modules` are those, nothing of them has changed, and nobody listens to all modules."""
        if list(modules) != self._roots or listeners.all_are_hooked():
            return False
        ask = compared.asked()
        if not ask.untouched(self._inside, self._kinds, self._noted):
            noted = ask.noted(self._inside, self._classes)  # before anything is compared: that may run anything
            were = self._were, self._entries, self._empty, self._classes, self._attributes
            try:
                if not ask.unchanged(self._inside, self._kinds, *were):
                    return False
            except (RuntimeError, ValueError):  # tensors, or arrays, that cannot say whether they are equal
                return False
            self._noted = noted
        tensors = ask.tensors_of(self._owners, self._held, self._names)
        if tensors is None or not self._are_of_their_forms(tensors):
            return False
        if self._places is not None:
            asked_of_places = ask if compared.PLACE_OF else compared
            if not asked_of_places.lie_at(tensors, self._places, compared.PLACE_OF):
                return False
        return ask.in_place(self._found, None) or all(own_methods(kind) == own for kind, own in self._methods)

    def _are_of_their_forms(self, tensors):
        """torch's own guard of them all says so ten times as fast; where it does not, for it looks at more (autocast,
        inference mode), they are compared."""
        try:
            if self._guards is not None and self._guards.check(*tensors):
                return True
            if _forms_of(tensors) != self._forms:
                return False
        except (AttributeError, TypeError):  # something that is no tensor
            return False
        self._guards = _guards_of(tensors)
        return True


def _forms_of(tensors):
    """Type, dtype, shape and strides, a property of all at a time."""
    return list(map(type, tensors)), list(map(_FORM, tensors)), list(map(torch.Tensor.stride, tensors))


def _guards_of(tensors):
    """What torch.compile looks with, of types, dtypes, shapes and strides at least; None where torch has no such."""
    try:
        found = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        return found if found.check(*tensors) else None
    except (TypeError, RuntimeError):
        return None


_FORM = operator.attrgetter("dtype", "shape")


def _kept(name, value):
    """An attribute to compare with: of dictionaries a copy, but for empty ones and those of tensors, which cannot be
    compared."""
    return dict(value) if isinstance(value, dict) and value and name not in _TENSORS else value
