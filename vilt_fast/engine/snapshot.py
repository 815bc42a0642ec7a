"""What modules were when something was found out about them: while they are that still, it need not be found anew.

A forward at batch 1 takes 50 ms, and asking of twelve blocks how each has to be computed takes 2. So what was found is
kept with a `Snapshot`, which is compared at every call (0.3 ms). It sees all that can be seen of a module by looking:
its class, the methods and whatever else that has, and what these use of their library; every attribute; who listens;
what lies inside; type, dtype, shape and strides of every parameter. It holds no tensor: values are no matter of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from operator import is_

import torch
from torch import nn

from . import listeners
from .genuine import own_methods

_TENSORS = ("_parameters", "_buffers")


class Snapshot:
    """Modules that nobody listens to, and all within them, as they were when this was taken."""

    __slots__ = ("_classes", "_kinds", "_parameters", "_roots", "_seen")

    @classmethod
    def of(cls, modules: Sequence[nn.Module]) -> Snapshot | None:
        """Of `modules` as they are now; None where looking does not tell all that matters of them."""
        taken = cls()
        taken._roots, taken._seen, taken._parameters = list(modules), [], []
        kinds = set()
        for module in listeners.inside(modules):
            own = module.__dict__
            # A tensor beside the parameters (replicas of nn.DataParallel have such) may change and stay the same.
            if own["_buffers"] or any(isinstance(value, torch.Tensor) for value in own.values()):
                return None
            kinds.add(type(module))
            taken._seen.append((module, type(module), dict(own), dict(own["_modules"]), tuple(own["_parameters"])))
            taken._parameters += map(_form, own["_parameters"].values())
        taken._kinds = [(kind, own_methods(kind)) for kind in kinds]
        classes = {base for kind in kinds for base in kind.__mro__ if base is not object}
        taken._classes = [(base, dict(vars(base))) for base in classes]
        return taken if taken.holds(modules) else None

    def holds(self, modules: Sequence[nn.Module]) -> bool:
        """Whether `modules` are those, nothing of them has changed, and nobody listens."""
        if list(modules) != self._roots or listeners.all_are_hooked():
            return False
        parameters = []
        try:
            for module, kind, attributes, children, names in self._seen:
                own = module.__dict__
                # What an attribute that is a dictionary holds is compared by itself: the one that was kept is the same.
                if type(module) is not kind or own != attributes or own["_modules"] != children:
                    return False
                if own["_forward_hooks"] or own["_forward_pre_hooks"]:
                    return False
                if own["_backward_hooks"] or own["_backward_pre_hooks"]:
                    return False
                given = own["_parameters"]
                if given or names:
                    if tuple(given) != names:
                        return False
                    parameters += given.values()
            for base, attributes in self._classes:
                if vars(base) != attributes:
                    return False
        except (RuntimeError, ValueError):  # tensors, or arrays, that cannot say whether they are equal
            return False
        for parameter, form in zip(parameters, self._parameters, strict=True):
            if _form(parameter) != form:
                return False
        for kind, methods in self._kinds:
            if own_methods(kind) != methods:
                return False
        return True


def _form(parameter):
    if parameter is None:
        return None
    return type(parameter), parameter.dtype, parameter.shape, parameter.stride()


class Anchored:
    """Modules and all within them, attribute by attribute, and where their parameters and buffers lie, for what reads
    these where they are."""

    def __init__(self, modules: Iterable[nn.Module | None]):
        self._roots = list(modules)
        inside = list(listeners.inside(self._roots))
        self._own = [module.__dict__ for module in inside]
        # Tensors are told by what they are, not by what is in them, and so their dictionaries are not copied here.
        self._were = [
            {k: dict(v) if isinstance(v, dict) and not (k in _TENSORS and v) else v for k, v in own.items()}
            for own in self._own
        ]
        self._holders = [own[name] for own in self._own for name in _TENSORS if own[name]]
        self._tensors = self._held()
        self._places = self._where()
        self._kinds = list({type(module) for module in inside})
        self._known = self._as_written()

    def holds(self, modules: Sequence[nn.Module | None]) -> bool:
        """Whether nothing has changed since."""
        if listeners.all_are_hooked() or len(modules) != len(self._roots) or not all(map(is_, modules, self._roots)):
            return False
        held = self._held()
        if len(held) != len(self._tensors) or not all(map(is_, held, self._tensors)):
            return False
        try:
            same = self._own == self._were
        except RuntimeError:  # a tensor that is an attribute has been replaced
            return False
        return same and self._where() == self._places and self._as_written() == self._known

    def _as_written(self):
        return [bool(own_methods(kind)) for kind in self._kinds]

    def _held(self):
        return list(chain.from_iterable(map(dict.values, self._holders)))

    def _where(self):
        return [(t.data_ptr(), t.dtype, t.stride()) for t in self._tensors if t is not None]
