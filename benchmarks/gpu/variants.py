"""Configurations of our kernels that may win where what ships does not, timed beside it in the same run.

A variant replaces the function that a launcher asks for its configuration while the launcher runs: the launch is
another, and so is what a CUDA graph records of it; the host's time is not what is compared.
"""

import contextlib
from functools import partial
from unittest import mock

from vilt_fast.kernels import add_layer_norm, attention, attention_bwd, linear, linear_qkv, patch_embed

from .. import table


def _tiles(rows, **more_of_it):
    """Other tiles of linear_gelu for bfloat16 through descriptors, whatever the size, and another way of GELU."""

    def config(own, kind, M, N, **more):
        if kind != "tma" or not more.get("gelu"):
            return own(kind, M, N, **more)
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "PARTS", "num_warps", "num_stages", "per_multiprocessor")
        return own(kind, M, N, **more) | dict(zip(names, rows, strict=True)) | more_of_it

    return linear, "_config", config


def _three(*rows):
    """Other tiles of the three products in one launch."""

    def config(own, kind, M, N, **more):
        if kind != "tma":
            return own(kind, M, N, **more)
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "PARTS", "num_warps", "num_stages")
        return own(kind, M, N, **more) | dict(zip(names, rows, strict=True))

    return linear_qkv, "_config", config


def _norm(rows, warps):
    """Other rows and warps of a program. With one warp no sum crosses shared memory; Triton lays more of them along a
    row, however many rows there are."""

    def config(own, N, D):
        return own(N, D) | {"ROWS": rows, "num_warps": warps}

    return add_layer_norm, "_config", config


def _by_block(tiles, **more):
    """A program a block of queries whatever the length, by default online; with dropout and in float32 what ships."""

    def config(own, arch, itemsize, width, longest_q, longest_k, pairs, processors, dropout=False):
        if itemsize != 2 or width > 64 or dropout:
            return own(arch, itemsize, width, longest_q, longest_k, pairs, processors, dropout)
        return attention.options(tiles, **{"BLOCK_N2": 0, "SINGLE": False} | more)

    return attention, "_forward_config", config


def _gradients(tiles):
    """Gradients by two kernels, or by one for a whole sample with other tiles."""

    def config(own, *call, **more):
        found = own(*call, **more)
        return found if found["sample"] is None else found | {"sample": tiles and attention.options(tiles)}

    return attention_bwd, "_config", config


def _patches(**tiles):
    def config(own, n, dtype, little):
        found = own(n, dtype, little)
        return found if dtype.itemsize != 2 or found["SPLITS"] != 1 else found | tiles

    return patch_embed, "fwd_config", config


#: {op of the CSV: {variant: (module, name of its function, function(own, *arguments))}}
VARIANTS = {
    "linear_gelu": {
        f"{name} {by}": _tiles(rows, GELU=by)
        for name, rows in (("128x256", (128, 256, 64, 4, 8, 4, 1)), ("128x128x2", (128, 128, 64, 4, 8, 3, 2)))
        for by in ("erf", "tail")
    },
    "linear qkv": {"128x256": _three(128, 256, 64, 4, 8, 4), "64x128": _three(64, 128, 64, 1, 4, 3)},
    "add_layer_norm": {"4 rows 4 warps": _norm(4, 4), "1 row 1 warp": _norm(1, 1), "2 rows 1 warp": _norm(2, 1)},
    "attention": {
        "single 64x288": _by_block((64, 256, 4, 2), BLOCK_N2=32, SINGLE=True),
        "online 64x64": _by_block((64, 64, 4, 2)),
        "online 128x64": _by_block((128, 64, 4, 3)),
    },
    "attention_bwd": {
        "two kernels": _gradients(None),
        "whole sample 64x128": _gradients((64, 128, 8, 1)),
        "whole sample 32x64": _gradients((32, 64, 4, 1)),
    },
    "patch_embed": {
        "128x256": _patches(BLOCK_N=256, num_stages=3),
        "64x256": _patches(BLOCK_M=64, BLOCK_N=256, num_stages=3),
    },
}


def of(context, case, op, call):
    """{"ours <variant>": call} of an op; in a dry run at the smallest batch only."""
    if context.dry and case.batch > min(context.batches):
        return {}
    return {f"ours {name}": partial(_under, [VARIANTS[op][name]], call) for name in VARIANTS.get(op, ())}


def _under(changes, call, *arguments):
    with contextlib.ExitStack() as stack:
        for module, name, change in changes:
            own = getattr(module, name)
            stack.enter_context(mock.patch.object(module, name, partial(change, own)))
        return call(*arguments)


def winners(results):
    """{op: variant} of those that beat what ships by 2 % at the largest batch that kernels.csv has."""
    groups = {}
    for row in table.read(results / "kernels.csv"):
        op, _, case = row["case"].rpartition(" ")
        if row["provider"] in ("ours", *(f"ours {name}" for name in VARIANTS.get(op, ()))):
            groups.setdefault(op, {}).setdefault(int(case.removeprefix("b")), {})[row["provider"]] = row
    found = {}
    for op, cases in groups.items():
        rows = cases[max(cases)]
        best = min(rows.values(), key=lambda row: float(row["p50_ms"]))
        if "ours" in rows and float(best["p50_ms"]) < 0.98 * float(rows["ours"]["p50_ms"]):
            found[op] = best["provider"].removeprefix("ours ")
    return found


def chosen(won, call):
    """`call` with the variants that won, {op: variant}."""
    return partial(_under, [VARIANTS[op][name] for op, name in won.items()], call)
