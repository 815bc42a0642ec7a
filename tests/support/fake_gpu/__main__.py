"""`python -m support.fake_gpu '[{...}, ...]'`: compile, check; prints what was found, fails if it is wrong.

{"what": "ops", "op": "attention", "dtypes": ["bfloat16", ...], "first": false}   calls of an op, or only the first
{"what": "models", "run": "forward", "dtype": "bfloat16", ...}                    `models.<run>(dtype, ...)`
"""

import importlib
import itertools
import json
import sys

import torch
import triton

from . import driver


def ops(op, dtypes, first=False):
    """What is wrong. With every dtype, all that ships for the GPU has to have been compiled."""
    from vilt_fast import order

    from .ops import CALLS

    order.table()["any", op, "any"] = order.Entry(("triton",), "a test")  # also where a library call is the usual way
    home = set()
    for dtype in dtypes:
        for at_home, call in itertools.islice(CALLS[op](getattr(torch, dtype)), 1 if first else None):
            before = len(driver.COMPILED)
            call()
            if at_home:
                home |= set(range(before, len(driver.COMPILED)))
    wrong = driver.problems([driver.COMPILED[i] for i in sorted(home)])
    if len(dtypes) == 3 and not first:
        wrong += [f"{name}: ships, and no call has compiled it" for name in _not_compiled(op)]
    return wrong


def _not_compiled(op):
    """Names of what `aot_cases()` says ships for this GPU, and no call has launched."""
    from vilt_fast.ops import registry

    modules = {where.partition(":")[0] for (name, backend), where in registry._ROWS.items()
               if backend == "triton" and name in (op, f"{op}_bwd")}  # fmt: skip
    for module in sorted(modules):
        for case in importlib.import_module(module).aot_cases():
            if driver.H100.arch in case["arches"] and not any(_is(made, case) for made in driver.COMPILED):
                yield case["name"]


def _is(made, case):
    """Whether a kernel was compiled with the tiles of an ahead-of-time case."""
    if made.kernel != case["kernel"].__name__ or made.num_warps != case["num_warps"]:
        return False
    return all(made.constants.get(name) == value for name, value in case["constexprs"].items() if value is not None)


def models(run, dtype, **options):
    """What is wrong."""
    from . import models

    found = getattr(models, run)(getattr(torch, dtype), **options)
    return driver.problems(driver.COMPILED) + [f"compiled again and again: {made}" for made in found or ()]


def main():
    driver.install()
    wrong = []
    for options in json.loads(sys.argv[1]):
        wrong += {"ops": ops, "models": models}[options.pop("what")](**options)
    if wrong:
        sys.exit("\n".join(wrong))
    counts = {"launched": len(driver.LAUNCHED), "compiled": len(driver.COMPILED)}
    print(json.dumps(counts | {"triton": triton.__version__}))


if __name__ == "__main__":
    main()
