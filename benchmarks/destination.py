"""Where the rows of a benchmark go: to a new file, or over the committed figures when told to on a quiet machine."""

import os
import sys
import time
from pathlib import Path

import vilt_fast

from . import measure, table

RESULTS = measure.ROOT / "benchmarks" / "results"
NEW = measure.ROOT / "bench"  #: ignored by git
QUIET = 0.5  #: the load average above which other programs share the cores


def add(parser, name="<what>"):
    """--out and --update."""
    parser.add_argument("--out", type=Path, help=f"CSV to write, a new file (default: bench/{name}-<date>-<time>.csv)")
    parser.add_argument(
        "--update",
        action="store_true",
        help=f"write benchmarks/results/{name}.csv, which is committed; a quiet machine",
    )


def chosen(parser, arguments, name):
    """The file to write. Exits (2) where nothing worth writing would be measured, or something else would be lost."""
    if missing := measure.native_missing():
        parser.error(
            f"vilt_fast was imported from {Path(vilt_fast.__file__).parent}, without its native part: {missing} What "
            "would be timed is not what is shipped. In the clone, with a C++ compiler, run: pip install -e ."
        )
    load = os.getloadavg()[0]
    if arguments.update:
        if arguments.out:
            parser.error("--update writes the committed file, --out another: pass one of them.")
        if load > QUIET:
            parser.error(
                f"the load average is {load:.1f}: other programs share the cores, so --update is refused (at most "
                f"{QUIET}). Wait, or leave --update out to write a new file."
            )
        return RESULTS / f"{name}.csv"
    if load > QUIET:
        print(f"The load average is {load:.1f}: other programs share the cores.", file=sys.stderr)
    out = arguments.out or _new(name)
    if out.exists():
        what = "holds committed figures: pass --update" if out.resolve().parent == RESULTS else "exists: name another"
        parser.error(f"{out} {what}.")
    return out


def _new(name):
    return NEW / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.csv"


def lost(old, new, keys):
    """What `old` rows tell and `new` rows do not: the values of `keys`, as text."""
    there = {tuple(row[k] for k in keys) for row in new}
    return [" ".join(key) for row in old if (key := tuple(row[k] for k in keys)) not in there]


def put(path, rows, fields, keys):
    """Write the rows and say where to; returns the exit status. An empty table is an error (2). Committed figures are
    not replaced by fewer: the rows go to a new file then (1)."""
    if not rows:
        print("No rows: nothing was measured, and nothing is written.", file=sys.stderr)
        return 2
    gone = lost(table.read(path), rows, keys) if path.parent == RESULTS else []
    if gone:
        told = f"{', '.join(gone[:6])}{', ...' if len(gone) > 6 else ''}"
        print(f"{path} is left as it is: it has rows that this run has not ({told}).", file=sys.stderr)
        path = _new(path.stem)
    table.write(path, rows, fields)
    print(f"Wrote {path}")
    return 1 if gone else 0
