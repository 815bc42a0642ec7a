"""In which order backends are asked on a GPU, and with which tiles: one committed table, order.csv, of a campaign.

A row is (device, op, size, backends, configuration, by whom): the first backend that fits is taken, of this device (its
compute capability, "sm_90") before any, of this op before any, of calls of this size before any. The configuration is
what a Triton kernel takes in place of its own, as `NAME=value` side by side; a kernel that cannot have it for a call
keeps its own. `python -m benchmarks.gpu.order` writes rows from what was measured; until then backends are guesses, and
say so, and configurations are those of the kernels.
"""

from __future__ import annotations

import csv
import functools
from pathlib import Path
from typing import NamedTuple

import torch

TABLE = Path(__file__).with_name("order.csv")
FIELDS = ("device", "op", "size", "backends", "configuration", "by")
SIZES = (("few", 512), ("some", 4096), ("many", float("inf")))  #: of calls, by their most rows: batches of 1, 8 and 64


class Entry(NamedTuple):
    """A row of the table."""

    backends: tuple[str, ...]
    by: str  #: "a guess", or what was measured: device, commit and date
    configuration: dict[str, int | bool | str | None] = {}


@functools.cache
def table() -> dict[tuple[str, str, str], Entry]:
    """{(device, op, size): entry}; "any" stands for all."""
    with open(TABLE, newline="", encoding="utf-8") as file:
        return {
            (r["device"], r["op"], r["size"]): Entry(tuple(r["backends"].split()), r["by"], parsed(r["configuration"]))
            for r in csv.DictReader(file)
        }


def size_of(rows: int) -> str:
    """The size of a call of so many rows; "any" where that is no plain number, as while it is compiled."""
    if type(rows) is not int:
        return "any"
    for name, most in SIZES:  # a loop: at every call of an op
        if rows <= most:
            return name


@functools.cache
def entry(op: str, size: str = "any") -> Entry:
    """Of an op on the GPU of this process that is current when it is first asked."""
    return of(capability(), op, size)


def of(device: str, op: str, size: str = "any") -> Entry:
    """Of an op on a device that need not be here."""
    known = table()
    asked = (device, op, size), (device, op, "any"), (device, "any", "any"), ("any", op, "any"), ("any", "any", "any")
    return next(known[key] for key in asked if key in known)


def configuration(op: str, arch: int, rows: int) -> dict[str, int | bool | str | None]:
    """What takes the place of a kernel's own on NVIDIA's `arch` (90, ...); {} where nothing better was measured."""
    return TRIED[op] if op in TRIED else _measured(op, arch, size_of(rows))


def chosen(op: str, size: str = "any") -> dict[str, int | bool | str | None]:
    """The same of the GPU of this process, for who chooses between ops."""
    return TRIED[op] if op in TRIED else entry(op, size).configuration


TRIED: dict[str, dict] = {}  #: {op: configuration} to have now, whatever the table says: what a campaign compares


@functools.cache
def _measured(op, arch, size):
    known, device = table(), f"sm_{arch}"
    found = known.get((device, op, size)) or known.get((device, op, "any"))
    return found.configuration if found else {}


def forget() -> None:
    """The table has changed."""
    for cached in (table, entry, _measured):
        cached.cache_clear()


def parsed(text: str) -> dict[str, int | bool | str | None]:
    """A configuration as it stands in the table."""
    words = {"True": True, "False": False, "None": None}
    pairs = (pair.partition("=") for pair in text.split())
    return {name: words[v] if v in words else int(v) if v.isdigit() else v for name, _, v in pairs}


def written(configuration: dict) -> str:
    """The same for the table."""
    return " ".join(f"{name}={value}" for name, value in configuration.items())


def capability() -> str:
    """ "sm_90", ...; "any" where there is no NVIDIA GPU."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "any"
    return "sm_{}{}".format(*torch.cuda.get_device_capability())
