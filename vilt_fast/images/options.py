"""What one call of the processor wants; or that only the reference can say what it wants."""

from __future__ import annotations

from typing import NamedTuple

from .reference import CONVERTS, Reference

_STEPS = ("do_resize", "do_rescale", "do_normalize", "do_pad")
_VALUES = ("size", "size_divisor", "resample", "rescale_factor", "image_mean", "image_std")
_DECODE = ("exact", "fast")
_FILTERS = 5  #: the largest number of a Pillow filter that all releases of it have


class Options(NamedTuple):
    """The steps of a call; None where one is not wanted."""

    shorter: int | None  #: the shorter side after resizing
    divisor: int
    resample: int
    rescale_factor: float | None
    mean_and_std: tuple | None
    pad: bool
    convert: bool  #: to RGB, from whatever Pillow converts
    tensors: str | None  #: "pt", "np", or None for lists of arrays
    fast: bool


def checked(decode: str) -> str:
    if decode not in _DECODE:
        raise ValueError(f'decode must be "exact" or "fast", got {decode!r}.')
    return decode


def understood(processor: Reference, decode: str, kwargs: dict) -> Options | None:
    """The options of a call, its `kwargs` before the processor's own; None for all but plain ones.

    What releases differ in or refuse (None in place of an option, integers for floats, other sizes than
    `shortest_edge`) is left to the reference.
    """
    if not {*kwargs} <= {*_STEPS, *_VALUES, "return_tensors", *(("do_convert_rgb",) if CONVERTS else ())}:
        return None
    if any(kwargs.get(name, False) is None for name in (*_STEPS, *_VALUES)):
        return None
    given = {name: kwargs.get(name, getattr(processor, name, None)) for name in (*_STEPS, *_VALUES)}
    convert = kwargs.get("do_convert_rgb", getattr(processor, "do_convert_rgb", None)) if CONVERTS else None
    tensors = getattr(kwargs.get("return_tensors"), "value", kwargs.get("return_tensors"))
    shorter, divisor, resample = _shortest_edge(given["size"]), given["size_divisor"], given["resample"]
    plain = (
        all(type(given[name]) is bool for name in _STEPS)
        and convert in (None, False, True)
        and tensors in (None, "pt", "np")
        and getattr(processor, "input_data_format", None) is None
        and all(_whole(value) for value in (shorter, divisor, resample))
        and shorter > 0
        and divisor > 0
        and 0 <= resample <= _FILTERS
        and type(given["rescale_factor"]) is float
        and all(_a_channel(given[name]) for name in ("image_mean", "image_std"))
    )
    if not plain:
        return None
    return Options(
        shorter if given["do_resize"] else None,
        divisor,
        resample,
        given["rescale_factor"] if given["do_rescale"] else None,
        (given["image_mean"], given["image_std"]) if given["do_normalize"] else None,
        given["do_pad"],
        bool(convert),
        tensors,
        decode == "fast",
    )


def has_own_steps(processor: Reference, ours: type) -> bool:
    """Whether a subclass or an instance has a method of its own in place of one of the reference's."""
    kinds = type(processor).__mro__
    methods = {name for kind in kinds[: kinds.index(ours)] for name, value in vars(kind).items() if callable(value)}
    methods |= {name for name, value in vars(processor).items() if callable(value)}
    return any(hasattr(Reference, name) for name in methods if name != "preprocess" and not name.startswith("__"))


def _shortest_edge(size):
    """The value of `{"shortest_edge": value}` where that is all that a size says, else None."""
    if not isinstance(size, dict) and not hasattr(size, "shortest_edge"):
        return None
    said = {key: value for key, value in dict(size).items() if value is not None}
    return said["shortest_edge"] if said.keys() == {"shortest_edge"} else None


def _whole(value):
    return isinstance(value, int) and type(value) is not bool


def _a_channel(value):
    """A float, or one a channel."""
    if isinstance(value, list | tuple):
        return len(value) == 3 and all(type(one) is float for one in value)
    return type(value) is float
