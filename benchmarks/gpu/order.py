"""`python -m benchmarks.gpu.order results.zip [--update]`: which backend of an op won, for the registry to read.

From kernels.csv and alignment.csv of a campaign: of each op the backends that were timed in one group, the fastest at
the largest batch first. Without --update the rows are printed; with it they take the place, in vilt_fast/ops/order.csv,
of what that says of the same device and op.
"""

import argparse
import sys
import tempfile
import zipfile
from pathlib import Path

from vilt_fast.ops import order, registry

from .. import table

BACKENDS = {"ours": "triton", "eager": "reference", "reference": "reference", "triton": "triton", "cuda": "cuda"}
OPS = {
    "linear qkv": "linear_qkv", "linear out": "linear", "linear fc2": "linear",
    "linear_cross_entropy_bwd": "linear_cross_entropy", "distance": "word_patch_distance",
}  # fmt: skip
FLOATS = ("bfloat16", "float16", "float32")  #: whose times decide, the first that was timed


def rows(results, device):
    """Rows of the table: backends that were not timed stay behind those that were, in the order that they had."""
    times = {}
    for row in (*table.read(results / "kernels.csv"), *table.read(results / "alignment.csv")):
        name, _, case = row["case"].rpartition(" ")
        op, backend = OPS.get(name, name), BACKENDS.get(row["provider"])
        if backend in registry.backends(op):
            size = int(case[1:]) if case[1:].isdigit() else case
            times.setdefault((op, FLOATS.index(row["dtype"])), {}).setdefault(size, []).append((backend, row))
    found, known = [], set()
    for (op, _), cases in sorted(times.items()):
        largest = cases[max(cases, key=str if any(isinstance(case, str) for case in cases) else int)]
        total = {}
        for backend, row in largest:
            total[backend] = total.get(backend, 0.0) + float(row["p50_ms"])
        if op in known or len(total) < 2:
            continue
        known.add(op)
        fastest = sorted(total, key=total.get)
        usual = [backend for backend in _usual(device, op) if backend not in total]
        row = largest[0][1]
        by = f"measured on {row['device']}, commit {row['commit']}, {row['date']}"
        found.append({"device": device, "op": op, "backends": " ".join([*fastest, *usual]), "by": by})
    return found


def _usual(device, op):
    """What `order.entry` would say on a device that need not be here."""
    known = order.table()
    rows = (known.get(key) for key in ((device, op), (device, "any"), ("any", op), ("any", "any")))
    return next(row.backends for row in rows if row)


def main(argv=None):
    """Read, show, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.order", description=__doc__.split("\n")[0])
    parser.add_argument("archive", type=Path, help="results.zip of a campaign")
    parser.add_argument("--device", default=order.capability(), help="sm_90, ... (default: that of this machine)")
    parser.add_argument("--update", action="store_true", help="write vilt_fast/ops/order.csv")
    arguments = parser.parse_args(argv)
    if not arguments.device.startswith("sm_"):
        parser.error("which device? There is none here: --device sm_90")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(arguments.archive) as archive:
        archive.extractall(folder)
        found = rows(Path(folder), arguments.device)
    for row in found:
        print(f"{row['op']}: {row['backends']} ({row['by']})")
    if arguments.update and found:
        table.merge(order.TABLE, found, order.FIELDS, key=("device", "op"))
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
