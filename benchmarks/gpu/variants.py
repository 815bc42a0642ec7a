"""Configurations of our kernels that may win where what ships does not, timed beside it in the same run.

A variant takes the place of what vilt_fast/order.csv has for its op while the launcher runs: the launch is another, and
so is what a CUDA graph records of it; the host's time is not what is compared. What has won is written there
(`benchmarks.gpu.order`).
"""

from functools import partial
from unittest import mock

from vilt_fast import order

from .. import table

_LINEAR = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "PARTS", "num_warps", "num_stages", "per_multiprocessor")
_ATTENTION = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "BLOCK_N2", "SINGLE")
#: {op of the CSV: op of the table}, where they differ
OPS = {"linear qkv": "linear_qkv"}


def _named(names, *values, **more):
    return dict(zip(names, values, strict=False)) | more


#: {op of the CSV: {variant: configuration}}. Of linear_gelu and linear qkv for bfloat16 through descriptors; a norm of
#: one warp a program, where no sum crosses shared memory; attention by blocks of queries whatever the length.
VARIANTS = {
    "linear_gelu": {
        f"{name} {by}": _named(_LINEAR, *tiles, GELU=by)
        for name, tiles in (("128x256", (128, 256, 64, 4, 8, 4, 1)), ("128x128x2", (128, 128, 64, 4, 8, 3, 2)))
        for by in ("erf", "tail")
    },
    "linear qkv": {
        "128x256": _named(_LINEAR, 128, 256, 64, 4, 8, 4),
        "64x128": _named(_LINEAR, 64, 128, 64, 1, 4, 3),
    },
    "add_layer_norm": {
        f"{rows} row{'s' * (rows > 1)} {warps} warp{'s' * (warps > 1)}": dict(ROWS=rows, num_warps=warps)
        for rows, warps in ((4, 4), (1, 1), (2, 1))
    },
    "attention": {
        "single 64x288": _named(_ATTENTION, 64, 256, 4, 2, 32, True),
        "online 64x64": _named(_ATTENTION, 64, 64, 4, 2, 0, False),
        "online 128x64": _named(_ATTENTION, 128, 64, 4, 3, 0, False),
    },
    "attention_bwd": {
        "two kernels": dict(SINGLE=False),
        "whole sample 64x128": _named(_ATTENTION, 64, 128, 8, 1),
        "whole sample 32x64": _named(_ATTENTION, 32, 64, 4, 1),
    },
    "patch_embed": {  # of batches that need no partial sums
        "128x256": dict(BLOCK_N=256, num_stages=3, SPLITS=1),
        "64x256": dict(BLOCK_M=64, BLOCK_N=256, num_stages=3, SPLITS=1),
    },
}


def of(context, case, op, call):
    """{"ours <variant>": call} of an op; in a dry run at the smallest batch only."""
    if context.dry and case.batch > min(context.batches):
        return {}
    return {f"ours {name}": partial(_under, {op: name}, call) for name in VARIANTS.get(op, ())}


def _under(names, call, *arguments):
    """A call with these variants, {op of the CSV: name}."""
    with mock.patch.dict(order.TRIED, {OPS.get(op, op): VARIANTS[op][name] for op, name in names.items()}):
        return call(*arguments)


def by_batch(results):
    """{op: {batch: the variant that beats what ships by 2 % there, or None}}, of kernels.csv."""
    groups = {}
    for row in table.read(results / "kernels.csv"):
        op, _, case = row["case"].rpartition(" ")
        if row["provider"] in ("ours", *(f"ours {name}" for name in VARIANTS.get(op, ()))):
            groups.setdefault(op, {}).setdefault(int(case.removeprefix("b")), {})[row["provider"]] = row
    return {op: {batch: _best(rows) for batch, rows in cases.items()} for op, cases in groups.items()}


def _best(rows):
    best = min(rows.values(), key=lambda row: float(row["p50_ms"]))
    better = "ours" in rows and float(best["p50_ms"]) < 0.98 * float(rows["ours"]["p50_ms"])
    return best["provider"].removeprefix("ours ") if better else None


def winners(results):
    """{op: variant} of those that win at the largest batch."""
    largest = {op: cases[max(cases)] for op, cases in by_batch(results).items()}
    return {op: name for op, name in largest.items() if name}


def chosen(won, call):
    """`call` with the variants that won, {op: variant}."""
    return partial(_under, won, call)
