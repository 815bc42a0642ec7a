"""What has to be known before any time is believed: where this runs, and whether every op is right there.

Each op's outputs and gradients, in float32, float16 and bfloat16, on every backend that this machine has, are held to
the error budget of `vilt_fast.testing` against the reference in float64 (correctness.csv), and so are whole models in
CUDA graphs. Then the tests that run on a GPU, in a process of their own with a time limit.
"""

import copy
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from functools import partial

import numpy
import torch

import vilt_fast
from vilt_fast.ops import registry
from vilt_fast.testing import assert_within_budget

from .. import measure
from . import timing
from .cases import OPS

CHECKS = ("op", "backend", "dtype", "quantity", "error", "reference_error", "within", "device", "commit")

#: Tests that take the GPU where there is one, and files in which some are marked for it. Those of other kernels run in
#: Triton's interpreter alone. Those of the CUDA kernels come after the native library, without which they cannot start.
ON_A_GPU = (
    "tests/engine/test_gpu_path.py",
    "tests/engine/test_graphs.py",
    "tests/engine/test_whole_forwards.py",
    "tests/kernels/test_attention_triton.py",
    "tests/kernels/test_patch_embed_triton.py",
    "tests/kernels/test_text_embed_triton.py",
)
SOME_MARKED = (
    "tests/alignment/test_align.py",
    "tests/kernels/test_transport_triton.py",
    "tests/models/vilt/test_bad_input.py",
    "tests/ops/test_linear_fp8.py",
)
OF_THE_LIBRARY = ("tests/csrc/test_transport_cuda.py",)


def environment(context):
    """environment.json: machine, driver, versions, commit, clocks, of each device that a call ran on."""
    found = context.common | {"python": platform.python_version(), "cpu": measure.device(), "cores": os.cpu_count()}
    found["numpy"] = numpy.__version__
    if context.device.type == "cuda":
        properties = torch.cuda.get_device_properties()
        found |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": properties.total_memory / 2**30,
            "l2_mib": properties.L2_cache_size / 2**20,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "clocks": timing.clocks(),
        }
        if found["clocks"] is None:
            context.note("no clocks: nvidia-ml-py is missing or says nothing")
    path = context.out / "environment.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(known | {found["device"]: found}, indent=1) + "\n", encoding="utf-8")
    context.note(f"{found['device']}; {found['versions']}; commit {found['commit'] or 'none'}")


def correctness(context):
    """Every op and dtype, then whole models in graphs, each an item; one that is out of budget has failed."""
    dtypes = (torch.float32, torch.float16) if context.dry else (torch.bfloat16, torch.float16, torch.float32)
    for dtype in dtypes:
        for op in OPS:
            if applies(op, dtype):
                context.item(_named(op, "triton", dtype), partial(check, context, op, "triton", dtype), 1.0, 60.0)
    for dtype in dtypes[:1] if context.dry else dtypes:
        context.item(_named("graphs", "model", dtype), partial(_graphs, context, dtype), 3.0, 60.0)


def _named(op, backend, dtype):
    return f"{op}, {backend}, {str(dtype).removeprefix('torch.')}"


def applies(op, dtype):
    """Whether an op is checked in this dtype: transport plans are float32."""
    return dtype == torch.float32 or op not in ("ipot", "sinkhorn")


def check(context, op, backend, dtype):
    """Write rows for one op, backend and dtype. AssertionError, once all is written, if it is out of budget."""
    facts = {"device": context.device.type, "dtype": dtype}
    if op in ("patch_embed", "text_embed"):
        facts["dtypes"] = (dtype,)
    if reason := registry.why_unavailable(op, backend, **facts):
        context.note(f"{_named(op, backend, dtype)}: {reason}", incomplete=backend == "triton")
        return
    given, call, differentiable = _given(context, op, backend, dtype)
    names, got = _results(partial(call, backend), given, differentiable)
    if context.warm:
        return
    _, plain = _results(partial(call, "reference"), given, differentiable)
    wide = [_cast(t, torch.float64, differentiable) for t in given]
    _, exact = _results(partial(call, "reference"), wide, differentiable)
    _compare(context, op, backend, dtype, names, got, plain, exact)


def run_once(context, op, dtype):
    """Launch an op's Triton kernels, forward and backward, and no more."""
    given, call, differentiable = _given(context, op, "triton", dtype)
    _results(partial(call, "triton"), given, differentiable)
    context.sync()


def _given(context, op, backend, dtype):
    """(inputs, call(backend, *inputs), whether it has gradients)."""
    torch.manual_seed(0)
    inputs, call = OPS[op](context)
    differentiable = op not in ("ipot", "sinkhorn") and not op.endswith("_fp8") and backend != "cuda"
    return [_cast(t, dtype, differentiable) for t in inputs], call, differentiable


def _compare(context, op, backend, dtype, names, *results):
    rows, wrong, dtype = [], [], str(dtype).removeprefix("torch.")
    for quantity, mine, other, truth in zip(names, *results, strict=True):
        within = ""
        try:
            assert_within_budget(mine, other, truth, what=f"{op} {backend} {dtype} {quantity}")
        except AssertionError as error:
            within = str(error)
            wrong.append(within.splitlines()[0])
        measured = [
            torch.linalg.vector_norm(t.double() - truth).item() / max(torch.linalg.vector_norm(truth).item(), 1e-300)
            for t in (mine, other)
        ]
        where = context.common["device"], context.common["commit"]
        values = (op, backend, dtype, quantity, *measured, not within, *where)
        rows.append(dict(zip(CHECKS, values, strict=True)))
    context.emit("correctness", rows, CHECKS, key=("op", "backend", "dtype", "quantity", "device"))
    if wrong:
        raise AssertionError("; ".join(wrong))


@torch.no_grad()
def _graphs(context, dtype):
    """The model in CUDA graphs, batches in turn so that graphs are replayed after others, pooled output."""
    batches = context.batches[:2]
    inputs = {batch: context.inputs(context.case(batch)) for batch in batches}
    model = context.once("model", context.model)
    ours = vilt_fast.accelerate(copy.deepcopy(model).to(dtype), cuda_graphs=True)
    got = {}
    for batch in (*batches, *batches):
        got[batch] = ours(**inputs[batch]).pooler_output
    if context.warm:
        return
    plain, exact = copy.deepcopy(model).to(dtype), copy.deepcopy(model).double()
    results = [[m(**inputs[batch]).pooler_output for batch in batches] for m in (plain, exact)]
    names = [f"pooled output, batch {batch}" for batch in batches]
    _compare(context, "model in graphs", "ours", dtype, names, [got[batch] for batch in batches], *results)


def _cast(value, dtype, differentiable):
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.detach().to(dtype).requires_grad_(differentiable) if floating else value


def _results(call, inputs, differentiable):
    """(names, tensors): outputs, then the gradient of each floating input."""
    with torch.set_grad_enabled(differentiable):
        outputs = call(*inputs)
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    names = [f"output {i}" for i in range(len(outputs))]
    if not differentiable:
        return names, outputs
    leaves = [(i, t) for i, t in enumerate(inputs) if isinstance(t, torch.Tensor) and t.requires_grad]
    draw = torch.Generator().manual_seed(1)
    incoming = [torch.randn(o.shape, generator=draw).half().to(o) for o in outputs]
    gradients = torch.autograd.grad(outputs, [t for _, t in leaves], incoming, allow_unused=True)
    kept = [(i, g) for (i, _), g in zip(leaves, gradients, strict=True) if g is not None]
    return names + [f"gradient {i}" for i, _ in kept], [o.detach() for o in outputs] + [g for _, g in kept]


# --- pytest -----------------------------------------------------------------------------------------------------------


def tests(context):
    """Tests on the GPU, whole files and what is marked in others; their output is in pytest.txt."""
    if context.dry:  # without a GPU all that are marked are skipped, and say so
        context.item("marked", partial(pytest, context, ["-m", "gpu", SOME_MARKED[-1]]))
        return
    context.item("marked", partial(pytest, context, ["-m", "gpu", *SOME_MARKED]), 10, 600)
    context.item("whole files", partial(pytest, context, ON_A_GPU), 15, 600)


def pytest(context, arguments):
    """Run tests side by side, as long as this part lasts. AssertionError if they fail."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail", "30", *arguments]
    if not context.dry and importlib.util.find_spec("xdist"):
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    limit = 120.0 if context.dry else max(context.left() - 2, 1)
    path = context.out / "pytest.txt"
    with open(path, "a", encoding="utf-8") as file:
        before = file.tell()
        try:
            status = subprocess.run(command, cwd=measure.ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=limit)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"pytest was stopped after {limit:.0f} s; pytest.txt says how far it came") from None
    lines = path.read_text(encoding="utf-8")[before:].strip().splitlines() or [""]
    context.note(re.sub("=+", "", lines[-1]).strip())
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if status.returncode:
        raise AssertionError(f"pytest ended with status {status.returncode}: {'; '.join(failed)[:300]}")
