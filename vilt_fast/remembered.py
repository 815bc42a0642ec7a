"""What was found out about tensors, kept for as long as they are what they were: where to look takes longer than a
small kernel, and a stack of blocks has two hundred of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor


class Known(list):
    """Tensors, and in `found` what was found out by looking at their types, dtypes, shapes, strides and places.

    Values are no matter of it, and `found` holds no tensor. Whoever makes a list with the `found` of another one says
    that in all these its tensors are as those of that one were.
    """

    __slots__ = ("found",)

    def __init__(self, tensors: Sequence[Tensor], found: dict):
        super().__init__(tensors)
        self.found = found

    def part(self, name: str, places: Sequence[int]) -> Known:
        """Those at `places`, which are the same for everyone who says `name`."""
        return Known([self[place] for place in places], self.found.setdefault(name, {}))

    def replaced(self, name: str, others: dict[int, Tensor]) -> Known:
        """The same with `others` at their places: tensors of forms that follow from the forms of these."""
        tensors = list(self)
        for place, tensor in others.items():
            tensors[place] = tensor
        addresses = [tensor.data_ptr() for tensor in others.values()]
        were, found = self.found.get(name, (None, None))
        if were != addresses:
            _, found = self.found[name] = addresses, {}
        return Known(tensors, found)


class Memory:
    """What was found out about tensors whose types, dtypes, shapes and strides somebody else knows to be unchanged."""

    __slots__ = ("_kept",)

    def __init__(self):
        self._kept = None, {}

    def of(self, tensors: Sequence[Tensor]) -> Known:
        """`tensors`, with what is known of them if they lie where they lay at the last call."""
        addresses = [tensor.data_ptr() for tensor in tensors]
        were, found = self._kept
        if were != addresses:
            _, found = self._kept = addresses, {}
        return Known(tensors, found)


def once(tensors: Sequence[Tensor], what: str | tuple, make: Callable):
    """`make()`, or what it was for these tensors, where they are `Known`; what it returns must hold no tensor."""
    found = getattr(tensors, "found", None)
    if found is None:
        return make()
    if what not in found:
        found[what] = make()
    return found[what]
