"""What the tests of Triton kernels share: the error budget over outputs and gradients, ahead-of-time compilation."""

import os
import subprocess
import sys

import numpy as np
import torch

from vilt_fast.testing import assert_within_budget

_COMPILE = """
import importlib, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

module = importlib.import_module("vilt_fast.kernels." + sys.argv[1])
wanted, done = eval(sys.argv[2]), set()
for case in module.aot_cases():
    kernel = case["kernel"]
    if sys.argv[3] not in case["name"]:
        continue
    for arch in case["arches"]:
        if arch not in wanted or (arch, kernel) in done:
            continue
        done.add((arch, kernel))
        target = GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)
        signature = {name: case["signature"].get(name, "constexpr") for name in kernel.arg_names}
        options = dict(num_warps=case["num_warps"], num_stages=case["num_stages"], enable_fp_fusion=True)
        triton.compile(ASTSource(kernel, signature, case["constexprs"]), target=target, options=options)
print(len(done))
"""


def compiles_ahead_of_time(module, arches=("gfx942",), named=""):
    """Number of (kernel, arch) of `module` compiled, in a process without the interpreter.

    One configuration each, the first whose name contains `named`. On sm_90 tests/benchmarks/test_aot_report.py compiles
    one of every kernel.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _COMPILE, module, repr(tuple(arches)), named]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout)


def names_every_argument(case):
    """Whether the signature and constexprs of an ahead-of-time case are the kernel's arguments, each once."""
    named = [*case["signature"], *case["constexprs"]]
    return sorted(named) == sorted(case["kernel"].arg_names)


def results(function, inputs, cotangents, dtype=None):
    """Outputs of `function` and the gradients of its floating inputs, after a cast of both to `dtype`."""

    def cast(tensor):
        return tensor if tensor is None or dtype is None or not tensor.is_floating_point() else tensor.to(dtype)

    inputs = [None if t is None else cast(t).detach().clone() for t in inputs]
    given = [t.requires_grad_() for t in inputs if t is not None and t.is_floating_point()]
    outputs = function(*inputs)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    pairs = [(o, cast(c).to(o.dtype)) for o, c in zip(outputs, cotangents, strict=True) if c is not None]
    gradients = torch.autograd.grad([o for o, _ in pairs], given, [c for _, c in pairs], allow_unused=True)
    return outputs, gradients


def assert_all_within_budget(actual, plain, exact, inputs, cotangents):
    """Outputs and gradients of `actual` against `plain` in the same dtype and `exact` in float64."""
    got, want, truth = (
        results(function, inputs, cotangents, dtype)
        for function, dtype in ((actual, None), (plain, None), (exact, torch.float64))
    )
    for kind, *three in zip(("output", "gradient"), got, want, truth, strict=True):
        for place, (a, p, e) in enumerate(zip(*three, strict=True)):
            assert (a is None) == (p is None), f"{kind} {place}"
            if a is not None:
                assert a.dtype == p.dtype and a.shape == p.shape, f"{kind} {place}"
                assert_within_budget(a, p, e, what=f"{kind} {place}")


def round_as_torch(monkeypatch):
    """Let Triton's interpreter round to e4m3 as GPUs and torch do: its own halves numbers whose mantissa is carried."""
    from triton.runtime import interpreter

    own = interpreter._convert_float

    def convert(values, given, wanted, rounding):
        if str(wanted) != "fp8e4nv" or str(given) != "fp32":
            return own(values, given, wanted, rounding)
        rounded = torch.from_numpy(np.array(values)).to(torch.float8_e4m3fn)
        return rounded.view(torch.uint8).numpy().reshape(values.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
