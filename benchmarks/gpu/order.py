"""`python -m benchmarks.gpu.order results.zip [--update]`: which backend of an op won, and with which tiles.

From kernels.csv and alignment.csv of a campaign: of each op the backends that were timed in one group, fastest first,
and the variant of our own kernel that beat what ships; at the largest batch for calls of any size, and for those of a
size that was measured where they came out otherwise. Where whole forwards (models_launches.csv) were faster with the
rows of a variant, those, for calls of that size. Without --update the rows are printed; with it they take the place,
in vilt_fast/order.csv, of all that this says of the same device and op.
"""

import argparse
import sys
import tempfile
import zipfile
from pathlib import Path

from vilt_fast import order
from vilt_fast.ops import registry

from .. import table
from . import variants

BACKENDS = {"ours": "triton", "eager": "reference", "reference": "reference", "triton": "triton", "cuda": "cuda"}
OPS = {
    "linear qkv": "linear_qkv", "linear out": "linear", "linear fc2": "linear",
    "linear_cross_entropy_bwd": "linear_cross_entropy", "distance": "word_patch_distance",
}  # fmt: skip
FLOATS = ("bfloat16", "float16", "float32", "float8")  #: whose times decide, the first that was timed


ROWS = 215  #: of a sample: 185 at batch 1, 13,792 at batch 64


def rows(results, device):
    """Rows of the table: backends that were not timed stay behind those that were, in the order that they had."""
    times, won = {}, variants.by_batch(results)
    for row in (*table.read(results / "kernels.csv"), *table.read(results / "alignment.csv")):
        name, _, case = row["case"].rpartition(" ")
        op, batch = OPS.get(name, name), int(case[1:]) if case[1:].isdigit() else 0
        best = won.get(name, {}).get(batch)
        backend = BACKENDS.get("ours" if best and row["provider"] == f"ours {best}" else row["provider"])
        if best and row["provider"] == "ours":  # the variant stands for it
            continue
        if backend in registry.backends(op):
            times.setdefault((op, FLOATS.index(row["dtype"])), {}).setdefault(batch, []).append((backend, name, row))
    found, known = [], set()
    for (op, _), cases in sorted(times.items()):
        better = any(any(won[name].values()) for timed in cases.values() for _, name, _ in timed if name in won)
        if op in known or not (better or len({backend for backend, _, _ in cases[max(cases)]}) > 1):
            continue
        known.add(op)
        every = _row(device, op, "any", cases[max(cases)], won, max(cases))
        found.append(every)
        for batch in sorted(cases.keys() - {0}):
            own = _row(device, op, order.size_of(ROWS * batch), cases[batch], won, batch)
            if any(own[column] != every[column] for column in ("backends", "configuration")):
                found.append(own)
    return _with_forwards(found, results, device)


def _with_forwards(found, results, device):
    """The rows, and what whole forwards were faster with besides."""
    rows = {(row["device"], row["op"], row["size"]): row for row in found}

    def known(device, op, size):
        row = rows.get((device, op, size)) or rows.get((device, op, "any"))
        if not row:
            return order.of(device, op, size)
        return order.Entry(tuple(row["backends"].split()), row["by"], order.parsed(row["configuration"]))

    for batch, (name, row) in variants.of_forwards(results).items():
        by = f"measured on {row['device']}, commit {row['commit']}, {row['date']}"
        for key, entry in variants.entries(name, device, known).items():
            if key[2] == order.size_of(ROWS * batch):
                values = (*key, " ".join(entry.backends), order.written(entry.configuration), by)
                rows[key] = dict(zip(order.FIELDS, values, strict=True))
    return list(rows.values())


def _row(device, op, size, timed, won, batch):
    total = {}
    for backend, _, row in timed:
        total[backend] = total.get(backend, 0.0) + float(row["p50_ms"])
    usual = order.of(device, op, size).backends
    fastest = sorted(total, key=total.get) if len(total) > 1 else []  # one alone has beaten nobody
    names = {name for _, name, _ in timed}
    row = timed[0][2]
    better = [(name, won[name][batch]) for name in sorted(names) if won.get(name, {}).get(batch)]
    of_16_bits = better and row["dtype"] != "float32"  # whose kernels have no others
    configuration = order.written(variants.VARIANTS[better[0][0]][better[0][1]]) if of_16_bits else ""
    by = f"measured on {row['device']}, commit {row['commit']}, {row['date']}"
    return {
        "device": device, "op": op, "size": size, "backends": " ".join(dict.fromkeys([*fastest, *usual])),
        "configuration": configuration, "by": by,
    }  # fmt: skip


def main(argv=None):
    """Read, show, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.order", description=__doc__.split("\n")[0])
    parser.add_argument("archive", type=Path, help="results.zip of a campaign")
    parser.add_argument("--device", default=order.capability(), help="sm_90, ... (default: that of this machine)")
    parser.add_argument("--update", action="store_true", help="write vilt_fast/order.csv")
    arguments = parser.parse_args(argv)
    if not arguments.device.startswith("sm_"):
        parser.error("which device? There is none here: --device sm_90")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(arguments.archive) as archive:
        archive.extractall(folder)
        found = rows(Path(folder), arguments.device)
    for row in found:
        size = "" if row["size"] == "any" else f", {row['size']} rows"
        tiles = f"; {row['configuration']}" * bool(row["configuration"])
        print(f"{row['op']}{size}: {row['backends']}{tiles} ({row['by']})")
    if arguments.update and found:
        table.merge(order.TABLE, found, order.FIELDS, key=("device", "op"))
        order.forget()
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
