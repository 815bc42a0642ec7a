"""Rows of benchmarks as CSV: the columns that all of them have, written anew or merged into what is there."""

import csv
import os

FIELDS = (
    "subject",
    "provider",
    "backend",
    "model",
    "case",
    "shape",
    "dtype",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "ratio",
    "error",
    "flops",
    "bytes",
    "peak_gflops",
    "copy_gbs",
    "floor_ms",
    "peak_mib",
    "forward_mib",
    "repeats",
    "load",
    "device",
    "versions",
    "commit",
    "date",
)


def times(quantiles, base):
    """The columns of how long something took: p20, p50 and p80 in seconds, and the p50 of what it is compared with."""
    p20, p50, p80 = quantiles
    return {"p20_ms": p20 * 1e3, "p50_ms": p50 * 1e3, "p80_ms": p80 * 1e3, "ratio": base / p50}


def read(path):
    """Rows of a CSV, every value a string; none where there is no file."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path, rows, fields=FIELDS):
    """Write rows to a CSV; figures with five significant digits. What was there stays whole until all is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}")
    with open(beside, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, fields)
        table.writeheader()
        for row in rows:
            table.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
    os.replace(beside, path)


def merge(path, rows, fields, key=()):
    """Add rows to a CSV, each in place of those that have the same values in the columns of `key`."""

    def named(row):
        return tuple(str(row[column]) for column in key)

    new = {named(row) for row in rows} if key else ()
    write(path, [row for row in read(path) if named(row) not in new] + rows, fields)
