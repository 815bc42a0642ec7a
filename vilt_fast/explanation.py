"""`explain`: which way each part of a model is computed, and why not a faster one."""

from __future__ import annotations

import dataclasses
import textwrap

from torch import nn

from . import record
from .models import find, why_nothing
from .models.base import swap_of
from .record import Row

_WIDTH = 118  # of a line of the table


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which way each part of a model is computed; `str` gives a table, in which blocks that went the same way are one.

    The ways, fastest first. "native int8", "native": blocks in one call of the fused encoder. "packed fp8", "packed":
    on the real tokens only, by fused ops, whose backends `Row.ops` has, and by the modules themselves. "padded": the
    module itself, on the padded tensor. "own": the model's own method, as if it were not accelerated there. "not
    called". On a GPU, "CUDA graph": packed blocks that are launched as one.
    """

    rows: tuple[Row, ...]  #: in the order of the computation
    called: bool  #: whether the model was called, and the rows say what it did; else they say what it would do

    def __str__(self):
        rows = record.in_short(self.rows)
        lines = [("part", "module", "way"), *((row.part, row.module or "the model itself", str(row)) for row in rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(2)]
        indent = " " * (widths[0] + 2)
        texts = [f"{part:{widths[0]}}  {module:{widths[1]}}  {way}" for part, module, way in lines]
        for i, row in enumerate(rows, 1):
            if row.why:
                texts[i] += "\n" + textwrap.fill(
                    f"because {row.why}", _WIDTH, initial_indent=indent, subsequent_indent=indent
                )
        if not self.called:
            texts.append(
                "Nothing was run: this is what can be told by looking. explain(model, **inputs) says what is called."
            )
        return "\n".join(texts)

    __repr__ = __str__


def explain(model: nn.Module, *args, **inputs) -> Explanation:
    """Which way each part of a model is computed, and why not a faster one.

    With inputs the model is called once, `model(*args, **inputs)`, under the caller's own grad mode and autocast, and
    what is reported is what was really called. Without, it is what can be told by looking: nothing is run.

    Raises:
        TypeError: `model` is no `torch.nn.Module`.
        What the model raises of these inputs.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain takes a torch.nn.Module, got {type(model).__name__}.")
    swaps = [swapped for module in model.modules() if (swapped := swap_of(module)) is not None]
    called = bool(swaps) and bool(args or inputs)
    with record.recorded() as recording:
        if called:
            model(*args, **inputs)
        else:
            for swapped in reversed(swaps):  # a head comes before its trunk, as modules go
                swapped.foretell()
    rows = recording.rows(model)
    if called and not rows:
        rows = [Row("whole model", "", "not called", _NOT_SEEN)]
    names = {module: name for name, module in model.named_modules()}
    for part in sorted(find(model), key=lambda part: part.kind.part == "head"):
        if part.refusal or swap_of(part.module) is None:
            why = part.refusal or "it is not accelerated: call vilt_fast.accelerate(model)"
            rows.append(Row(part.kind.part, names[part.module], "own", why))
    return Explanation(tuple(rows or [Row("whole model", "", "own", why_nothing(model))]), called)


_NOT_SEEN = (
    "nothing that is accelerated was seen to be called: torch.compile runs what it traced before, DataParallel calls "
    "copies (explain the module that is inside), or the forward of the model does not come past its ViLT"
)
