"""In which order backends are asked on a GPU: one committed table, order.csv, which a run of the campaign replaces.

A row is (device, op, backends, by whom): the first that fits is taken, of this device (its compute capability,
"sm_90") before any, of this op before any. `python -m benchmarks.gpu.order` writes rows from what was measured; until
then they are guesses, and say so.
"""

from __future__ import annotations

import csv
import functools
from pathlib import Path
from typing import NamedTuple

import torch

TABLE = Path(__file__).with_name("order.csv")
FIELDS = ("device", "op", "backends", "by")


class Entry(NamedTuple):
    """A row of the table."""

    backends: tuple[str, ...]
    by: str  #: "a guess", or what was measured: device, commit and date


@functools.cache
def table() -> dict[tuple[str, str], Entry]:
    """{(device, op): entry}; "any" stands for all."""
    with open(TABLE, newline="", encoding="utf-8") as file:
        return {(r["device"], r["op"]): Entry(tuple(r["backends"].split()), r["by"]) for r in csv.DictReader(file)}


@functools.cache
def entry(op: str) -> Entry:
    """Of an op on the GPU of this process that is current when it is first asked."""
    known, device = table(), capability()
    return next(known[key] for key in ((device, op), (device, "any"), ("any", op), ("any", "any")) if key in known)


def capability() -> str:
    """ "sm_90", ...; "any" where there is no NVIDIA GPU."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "any"
    return "sm_{}{}".format(*torch.cuda.get_device_capability())
