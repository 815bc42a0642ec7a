"""Whether modules, classes, what code finds by name and tensors are what they were: what a `Snapshot` asks.

That is a look at several thousand objects a call, nearly all of them the very ones that were there before. So
`vilt_fast._C` looks (csrc/unchanged.cpp), first of all at whether anything was written at all, and, where that is not
built, the functions here, which say the same.
"""

from __future__ import annotations

import functools
import itertools
import operator
import sys
from collections.abc import Sequence

import torch

from ..backends.cpp import _native

try:
    from torch._C._dynamo.guards import _torchinductor_pyobject_tensor_data_ptr as PLACE_OF
except ImportError:
    PLACE_OF = 0  #: the address of `void* (PyObject*)` of torch, that compiled code finds tensors with; 0: has none


@functools.cache
def asked():
    """What has the functions below: the library, or this module."""
    if _native.missing():
        return sys.modules[__name__]
    from .. import _C

    return _C


def noted(modules: list, classes: list) -> tuple[list, bytes] | None:
    """The dictionary of each module, those in them and those of the classes, and what tells later whether any was
    written to; None, as here, where nothing does."""
    return None


def untouched(modules: list, kinds: list, was: tuple[list, bytes] | None) -> bool:
    """Whether each module is of its kind and has that very dictionary, and none was written to since `noted` gave
    `was`; where not, nothing need have changed."""
    return False


def unchanged(
    modules: list, kinds: list, were: list, entries: list, empty: list, classes: list, attributes: list
) -> bool:
    """Whether each module is of its kind with the attributes it had, each class too, and empty dictionaries are.

    `entries` says for the library what `were` says: `entries_of` each. Raises what `==` raises of attributes that
    cannot say whether they are equal.
    """
    return (
        not any(empty)
        and list(map(type, modules)) == kinds
        and list(map(_OWN, modules)) == were
        and list(map(vars, classes)) == attributes
    )


def entries_of(attributes: dict) -> tuple:
    """(name, value, name, ...)."""
    return tuple(itertools.chain.from_iterable(attributes.items()))


def in_place(found: tuple, kind: type | None) -> bool:
    """Of (where, name, value): whether each `getattr(where, name, None) is value`; of `kind` where that is None."""
    for where, name, value in found:
        if getattr(kind if where is None else where, name, None) is not value:
            return False
    return True


def tensors_of(owners: list, held: list, names: list) -> tuple | None:
    """What the dictionaries `held` have that is not None.

    None where one is not the one that its owner (a module, the name of an attribute) has, or where their names, or
    which of them are None (name, whether it is, name, ...), are others.
    """
    found = []
    for (module, name), values, were in zip(owners, held, names, strict=True):
        if module.__dict__.get(name) is not values:
            return None
        if names_of(values) != were:
            return None
        found += [value for value in values.values() if value is not None]
    return tuple(found)


def names_of(values: dict) -> tuple:
    """(name, whether it is None, name, ...) of a dictionary of tensors."""
    return tuple(part for name, value in values.items() for part in (name, value is None))


def lie_at(tensors: Sequence[torch.Tensor], places: list, place_of: int) -> bool:
    """Whether each tensor begins at its place. `place_of` is for the library."""
    return places_of(tensors) == places


def places_of(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Where each begins."""
    return list(map(torch.Tensor.data_ptr, tensors))


_OWN = operator.attrgetter("__dict__")
