"""What was really called: what has computed a part of a model says so here, while somebody records.

`explain` and the log are made of this and of nothing else, so that no second copy of a decision is asked. Where nobody
records, saying something costs a look at a context variable.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

LOGGER = logging.getLogger("vilt_fast")


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """How one part of a model was computed."""

    part: str  #: "text embedding", "block 3", "final norm", "pooler", "head", ...
    module: str  #: where it is in the model, as `named_modules` has it
    way: str  #: "native", "native int8", "packed", "packed fp8", "CUDA graph", "padded", "own", or "not called"
    why: str = ""  #: not a faster one; "" where there is none
    ops: Mapping[str, str] = dataclasses.field(default_factory=dict)  #: the backend of each op that it called
    why_ops: Mapping[str, str] = dataclasses.field(default_factory=dict)  #: not the backends that come before

    def __str__(self):
        ops = ", ".join(f"{op}: {backend}" for op, backend in self.ops.items())
        return f"{self.way} ({ops})" if ops else self.way


class Recording:
    """What was said while this was the one to listen."""

    def __init__(self):
        self._said: list[tuple] = []
        self._ops: dict[str, tuple[str, str]] = {}  # since something was said last

    def rows(self, model: nn.Module) -> list[Row]:
        """All of it, with the names that the modules have in `model`."""
        names = {id(module): name for name, module in model.named_modules()}
        return [
            Row(part, names.get(id(module), type(module).__name__), way, why or _why_of(reasons), ops, reasons)
            for part, module, way, why, ops, reasons in self._said
        ]

    def say(self, way, why, parts):
        backends = {op: backend for op, (backend, _) in self._ops.items()}
        reasons = {op: reason for op, (_, reason) in self._ops.items() if reason}
        self._said += [(part, module, way, why.rstrip("."), backends, reasons) for part, module in parts]
        self._ops = {}

    def say_op(self, op, backend, reasons):
        known, _ = self._ops.get(op, (backend, ""))
        both = known if backend in known.split(" and ") else f"{known} and {backend}"
        self._ops[op] = both, " ".join(reasons)


def _why_of(reasons):
    return "; ".join(f"{op} is not by {reason.rstrip('.')}" for op, reason in reasons.items())


_recording: contextvars.ContextVar[Recording | None] = contextvars.ContextVar("vilt_fast_recording", default=None)


@contextlib.contextmanager
def recorded() -> Iterator[Recording]:
    """What is said within, by this thread."""
    recording = Recording()
    with _heard_by(recording):
        yield recording


def unheard() -> contextlib.AbstractContextManager:
    """Within, nobody is told: for what is done once and is no part of a call."""
    return _heard_by(None)


@contextlib.contextmanager
def _heard_by(recording):
    token = _recording.set(recording)
    try:
        yield
    finally:
        _recording.reset(token)


def listened() -> bool:
    """Whether somebody records."""
    return not torch.compiler.is_compiling() and _recording.get() is not None


def say(way: str, why: str, *parts: tuple[str, nn.Module]) -> None:
    """(name, module) of each of `parts` was computed this `way`, by the ops that were called since something was said
    last; `why` not a faster way, or ""."""
    if listened():
        _recording.get().say(way, why, parts)


def say_op(op: str, backend: str, reasons: Sequence[str]) -> None:
    """`op` is computed by `backend`; `reasons` why not by each that comes before it."""
    if listened():
        _recording.get().say_op(op, backend, reasons)


def logs() -> bool:
    """Whether the log wants to know what is called, and nobody records it already."""
    return not torch.compiler.is_compiling() and LOGGER.isEnabledFor(logging.DEBUG) and _recording.get() is None


@torch.compiler.assume_constant_result
def disabled() -> bool:
    """Whether VILT_FAST_DISABLE=1 turns accelerated models off."""
    return os.environ.get("VILT_FAST_DISABLE") == "1"


DISABLED = "VILT_FAST_DISABLE=1 is set"


@functools.cache
def say_disabled() -> None:
    """Log, once, that nothing is accelerated."""
    LOGGER.warning("%s: accelerated models compute as their own classes define, no faster.", DISABLED)


# --- as text ----------------------------------------------------------------------------------------------------------


def in_short(rows: Sequence[Row]) -> list[Row]:
    """Rows with those of blocks in a row that went the same way as one: "blocks 0-11"."""
    short, first = [], None  # the row that `short` ends in stands for all from `first` on
    for row in rows:
        if short and _alike(first, row):
            start, end = first.part.rpartition(" ")[2], row.part.rpartition(" ")[2]
            module = f"{first.module}-{end}" if first.module.rpartition(".")[2] == start else first.module
            short[-1] = dataclasses.replace(first, part=f"blocks {start}-{end}", module=module)
        else:
            first = row
            short.append(row)
    return short


def _alike(a, b):
    ours = a.part.startswith("block ") and b.part.startswith("block ")
    return ours and (a.way, a.why, a.ops, a.why_ops) == (b.way, b.why, b.ops, b.why_ops)
