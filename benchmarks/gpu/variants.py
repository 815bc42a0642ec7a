"""Configurations of our kernels that may win where what ships does not, timed beside it in the same run.

A variant takes the place of what vilt_fast/order.csv has for its op while the launcher runs: the launch is another, and
so is what a CUDA graph records of it; the host's time is not what is compared. What has won is written there
(`benchmarks.gpu.order`). What only a whole forward shows has rows of the table of its own (`WHOLE`).
"""

import contextlib
from functools import partial
from typing import NamedTuple
from unittest import mock

from vilt_fast import order

from .. import table

_LINEAR = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "PARTS", "num_warps", "num_stages", "per_multiprocessor")
_ATTENTION = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "BLOCK_N2", "SINGLE")
#: {op of the CSV: op of the table}, where they differ
OPS = {"linear qkv": "linear_qkv", "linear fc2": "linear"}


def _named(names, *values, **more):
    return dict(zip(names, values, strict=False)) | more


#: {op of the CSV: {variant: configuration}}. Of linear_gelu and linear qkv for bfloat16 through descriptors; fc2 with K
#: dealt out, where rows are few; a norm of one warp a program, where no sum crosses shared memory; attention by blocks
#: of queries whatever the length.
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
    "linear fc2": {
        f"{m}x{n} splits of {depth}": dict(
            BLOCK_M=m, BLOCK_N=n, BLOCK_K=64, num_warps=4, num_stages=stages, DEPTH=depth
        )
        for m, n, stages, depth in ((64, 128, 4, 768), (64, 64, 5, 1024))  # none that K of out, 768, is above
    },
    "add_layer_norm": {
        f"{rows} row{'s' * (rows > 1)} {warps} warp{'s' * (warps > 1)}": dict(ROWS=rows, num_warps=warps)
        for rows, warps in ((4, 4), (1, 1), (2, 1))
    },
    # A pass that quantises what a norm has written; the GELU's rows with a scale a row, by such a pass.
    "add_layer_norm_fp8": {"apart": dict(FUSED=False)},
    "linear_gelu_fp8": {"apart": dict(FUSED=False)},
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


class Whole(NamedTuple):
    """What a forward is tried with: rows of the table."""

    batches: tuple[int, ...]
    added: dict[str, dict] = {}  #: {op: what its configurations have besides}
    few: dict[str, dict] = {}  #: the same where rows are few
    own: bool = False  #: whether linear layers are ours and no library's


FORWARD = "ours_graphs_bfloat16"  #: whose forwards they are

_DEPENDENT = dict.fromkeys(("linear", "linear_qkv", "linear_gelu", "add_layer_norm"), {"PDL": True})
_SPLIT = {"linear": VARIANTS["linear fc2"]["64x128 splits of 768"]}
#: {variant: Whole}: kernels that are set up while the one before still runs, with products of a library between them
#: and without; K of fc2 dealt out; linear layers that add the residual stream.
WHOLE = {
    "dependent": Whole((1, 8), _DEPENDENT),
    "own": Whole((1, 8, 64), own=True),
    "own_dependent": Whole((1, 8, 64), _DEPENDENT, own=True),
    "own_split": Whole((1,), {}, _SPLIT, own=True),
    "own_split_dependent": Whole((1,), _DEPENDENT, _SPLIT, own=True),
    "own_residual": Whole((8, 64), {"linear": {"RESIDUAL": True}}, own=True),
}


def entries(name, device, known=order.of):
    """The rows of the table of a variant of whole forwards, {(device, op, size): entry}, for calls of every size."""
    whole, found = WHOLE[name], {}
    for op in {"linear", *whole.added}:
        for size in (*dict(order.SIZES), "any"):
            own = known(device, op, size)
            more = whole.added.get(op, {}) | (whole.few.get(op, {}) if size == "few" else {})
            backends = own.backends
            if whole.own and op == "linear":
                backends = tuple(dict.fromkeys(("triton", *backends)))
            found[device, op, size] = own._replace(backends=backends, configuration=own.configuration | more)
    return found


def within(name, call):
    """`call` with a variant of whole forwards."""
    return partial(_within, entries(name, order.capability()), call)


def _within(rows, call, *arguments):
    with contextlib.ExitStack() as stack:
        stack.callback(_ask_again)
        stack.enter_context(mock.patch.dict(order.table(), rows))
        _ask_again()
        return call(*arguments)


def _ask_again():
    order.entry.cache_clear()
    order._measured.cache_clear()


def of(context, case, op, call):
    """{"ours <variant>": call} of an op; in a dry run, and where K is dealt out, at the smallest batch only."""
    smallest = case.batch == min(context.batches)
    return {
        f"ours {name}": partial(_under, {op: name}, call)
        for name, configuration in VARIANTS.get(op, {}).items()
        if smallest or not (context.dry or "DEPTH" in configuration)
    }


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


def of_forwards(results):
    """{batch: (the variant of whole forwards that beats what ships by 2 % there, its row)}, of models_launches.csv."""
    groups, found = {}, {}
    for row in table.read(results / "models_launches.csv"):
        case, name = row["case"].removeprefix("b"), row["provider"].removeprefix(FORWARD).removeprefix("_")
        if row["provider"].startswith(FORWARD):
            groups.setdefault(int(case), {})[name] = row
    for batch, rows in groups.items():
        best = min(rows, key=lambda name: float(rows[name]["p50_ms"]))
        if "" in rows and float(rows[best]["p50_ms"]) < 0.98 * float(rows[""]["p50_ms"]):
            found[batch] = best, rows[best]
    return found
