"""What has to be known before any time is believed: where this runs, and whether every op is right there.

Each op's outputs and gradients, in float32, float16 and bfloat16, on every backend that this machine has, are held to
the error budget of `vilt_fast.testing` against the reference in float64: correctness.csv. Then the tests that are
marked for a GPU, in a process of their own with a time limit.
"""

import json
import os
import platform
import re
import subprocess
import sys
from functools import partial

import torch

from vilt_fast import functional, testing
from vilt_fast.ops import registry
from vilt_fast.testing import assert_within_budget

from .. import measure
from . import timing

CHECKS = ("op", "backend", "dtype", "quantity", "error", "reference_error", "within", "device", "commit")


def environment(context):
    """environment.json: machine, driver, versions, commit, clocks."""
    found = context.common | {"python": platform.python_version(), "cpu": measure.device(), "cores": os.cpu_count()}
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
    (context.out / "environment.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    context.note(f"{found['device']}; {found['versions']}; commit {found['commit'] or 'none'}")


def correctness(context):
    """Every op against float64; then pytest. Raises if anything is wrong, once all is written."""
    wrong = []
    dtypes = (torch.float32, torch.float16) if context.dry else (torch.bfloat16, torch.float16, torch.float32)
    backends = {op: [b for b in registry.backends(op) if b in ("triton", "cuda")] for op in OPS}
    for dtype in dtypes:
        for op, backend in ((op, backend) for op, some in backends.items() for backend in some):
            if context.enough(f"{op}, {backend}, {dtype}", 1.0):
                wrong += check(context, op, backend, dtype)
    context.free()
    if context.enough("pytest -m gpu", 15):
        wrong += _pytest(context)
    if wrong:
        raise AssertionError("; ".join(wrong))


def check(context, op, backend, dtype):
    """Write rows for one op, backend and dtype; what is out of budget, a line each."""
    name = str(dtype).removeprefix("torch.")
    plans = op in ("ipot", "sinkhorn")
    gradients = not plans and op != "linear_fp8"
    if (plans and dtype != torch.float32) or (backend == "cuda" and context.device.type != "cuda"):
        return []
    facts = {"device": context.device.type, "dtype": dtype}
    if op in ("patch_embed", "text_embed"):
        facts["dtypes"] = (dtype,)
    if reason := registry.why_unavailable(op, backend, **facts):
        context.note(f"{op}, {backend}, {name}: {reason}", incomplete=backend == "triton")
        return []
    torch.manual_seed(0)
    inputs, call = OPS[op](context)
    differentiable = gradients and backend != "cuda"
    given = [_cast(t, dtype, differentiable) for t in inputs]
    names, got = _results(partial(call, backend), given, differentiable)
    _, plain = _results(partial(call, "reference"), given, differentiable)
    wide = [_cast(t, torch.float64, differentiable) for t in given]
    _, exact = _results(partial(call, "reference"), wide, differentiable)
    rows, wrong = [], []
    for quantity, mine, other, truth in zip(names, got, plain, exact, strict=True):
        within = ""
        try:
            assert_within_budget(mine, other, truth, what=f"{op} {backend} {name} {quantity}")
        except AssertionError as error:
            within = str(error)
            wrong.append(within.splitlines()[0])
        measured = [
            torch.linalg.vector_norm(t.double() - truth).item() / max(torch.linalg.vector_norm(truth).item(), 1e-300)
            for t in (mine, other)
        ]
        values = (
            op,
            backend,
            name,
            quantity,
            *measured,
            not within,
            context.common["device"],
            context.common["commit"],
        )
        rows.append(dict(zip(CHECKS, values, strict=True)))
    context.emit("correctness", rows, CHECKS)
    return wrong


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


def _random(context, *shape, scale=1.0):
    """Values that float16 and bfloat16 hold exactly enough to start from the same numbers everywhere."""
    return (torch.randn(shape) * scale).to(torch.bfloat16).float().to(context.device)


# --- the ops: inputs, and call(backend, *inputs) ----------------------------------------------------------------------


def _size(context, small, large):
    return small if context.dry else large


def _attention(context):
    lengths = _size(context, [5, 9], [185, 281, 17, 64])
    rows, heads = sum(lengths), _size(context, 1, 12)
    offsets, longest = testing.offsets(lengths).to(context.device), max(lengths)
    used = torch.tensor([n - 1 for n in lengths], dtype=torch.int32, device=context.device)

    def call(backend, q, k, v):
        return functional.attention(q, k, v, offsets, offsets, longest, longest, seqused_k=used, backend=backend)

    return [_random(context, rows, heads, 64) for _ in range(3)], call


def _add_layer_norm(context):
    rows, width = _size(context, (5, 64), (1001, 768))
    inputs = [
        _random(context, rows, width),
        _random(context, rows, width),
        *(_random(context, width) for _ in range(2)),
    ]
    return inputs, lambda backend, *given: functional.add_layer_norm(*given, 1e-6, backend=backend)


def _linear(context):
    rows, inputs, outputs = _size(context, (5, 32, 16), (1001, 768, 2304))
    given = _random(context, rows, inputs), _random(context, outputs, inputs, scale=inputs**-0.5)
    given = [*given, _random(context, outputs), _random(context, rows, outputs)]
    return given, lambda backend, *tensors: functional.linear(*tensors, backend=backend)


def _linear_gelu(context):
    rows, inputs, outputs = _size(context, (5, 32, 16), (1001, 768, 3072))
    given = (
        _random(context, rows, inputs),
        _random(context, outputs, inputs, scale=inputs**-0.5),
        _random(context, outputs),
    )
    return list(given), lambda backend, *tensors: functional.linear_gelu(*tensors, backend=backend)


def _linear_fp8(context):
    rows, inputs, outputs = _size(context, (5, 32, 16), (1001, 768, 3072))
    x = torch.randint(-14, 15, (rows, inputs)).to(context.device, torch.float32)
    x[:, 0] = 14  # rows that e4m3 holds exactly: how it rounds is a test's business, and the interpreter gets it wrong
    weight = functional.quantize_fp8(_random(context, outputs, inputs), backend="reference")
    given = [x, _random(context, outputs)]
    return given, lambda backend, x, bias: functional.linear_fp8(x, *weight, bias, gelu=True, backend=backend)


def _linear_cross_entropy(context):
    rows, width, vocabulary = _size(context, (5, 32, 50), (640, 768, 30522))
    labels = torch.randint(vocabulary, (rows,))
    labels[::3] = -100
    given = [
        _random(context, rows, width),
        _random(context, vocabulary, width, scale=0.05),
        _random(context, vocabulary),
    ]
    labels = labels.to(context.device)
    return given, lambda backend, *x: functional.linear_cross_entropy(*x, labels, backend=backend)


def _text_embed(context):
    rows, width, vocabulary = _size(context, (6, 32, 20), (1500, 768, 30522))
    ids = torch.randint(vocabulary, (rows,)).to(context.device)
    places, kinds = (torch.arange(rows) % 40).to(context.device), (torch.arange(rows) % 2).to(context.device)
    tables = [
        _random(context, *shape)
        for shape in ((vocabulary, width), (40, width), (2, width), (width,), (width,), (2, width))
    ]

    def call(backend, *tables):
        return functional.text_embed(ids, None, places, kinds, *tables, eps=1e-12, padding_idx=0, backend=backend)

    return tables, call


def _patch_embed(context):
    grids, texts, patch, width = _size(
        context, ([(2, 2), (1, 2)], [2, 1], 8, 32), ([(12, 20), (20, 12), (12, 12)], [40, 8, 22], 32, 768)
    )
    canvas = tuple(max(side) for side in zip(*grids, strict=True))
    indices = testing.packing_indices(texts, grids, canvas=canvas, table=(12, 12))
    indices = {name: value.to(context.device) if torch.is_tensor(value) else value for name, value in indices.items()}
    shapes = (
        (len(grids), 3, canvas[0] * patch, canvas[1] * patch), (width, 3, patch, patch), (width,), (width,),
        (145, width), (3, width), (sum(texts), width),
    )  # fmt: skip
    names = ("pixels", "weight", "bias", "cls_token", "position", "modality", "text")
    inputs = [_random(context, *shape, scale=0.02 if i == 1 else 1.0) for i, shape in enumerate(shapes)]

    def call(backend, *tensors):
        return functional.patch_embed(**dict(zip(names, tensors, strict=True)), **indices, backend=backend)

    return inputs, call


def _pairs(context):
    words, patches = _size(context, ([10, 6], [20, 30]), ([40, 12, 1, 0] * 4, [240, 144, 7, 30] * 4))
    pads = [testing.padding_masks(sizes).to(context.device) for sizes in (words, patches)]
    return words, patches, pads


def _word_patch_distance(context):
    words, patches, pads = _pairs(context)
    width = _size(context, 32, 768)
    states = [_random(context, len(sizes), max(sizes), width) for sizes in (words, patches)]
    # Iterations magnify how costs were rounded, which the interpreter's products do by shape and a GPU's do not.
    options = {"iterations": context.iterations}
    return states, lambda backend, *given: functional.word_patch_distance(*given, *pads, **options, backend=backend)


def _ipot(context):
    words, patches, pads = _pairs(context)
    cost = [_random(context, len(words), max(words), max(patches)).sigmoid()]
    return cost, lambda backend, given: functional.ipot(given.detach(), *pads, backend=backend)


def _sinkhorn(context):
    words, patches, pads = _pairs(context)
    cost = [_random(context, len(words), max(words), max(patches)).sigmoid()]
    return cost, lambda backend, given: functional.sinkhorn(given.detach(), *pads, backend=backend).plan


OPS = {
    "attention": _attention,
    "patch_embed": _patch_embed,
    "text_embed": _text_embed,
    "add_layer_norm": _add_layer_norm,
    "linear": _linear,
    "linear_gelu": _linear_gelu,
    "linear_fp8": _linear_fp8,
    "linear_cross_entropy": _linear_cross_entropy,
    "word_patch_distance": _word_patch_distance,
    "ipot": _ipot,
    "sinkhorn": _sinkhorn,
}


# --- pytest -----------------------------------------------------------------------------------------------------------


def _pytest(context):
    """The tests marked `gpu`, as long as this part lasts; their whole output is in pytest.txt."""
    files = ["tests/kernels/test_attention_triton.py"] if context.dry else ["tests", "--continue-on-collection-errors"]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *files]
    limit = 120.0 if context.dry else max(context.left() - 2, 1)
    with open(context.out / "pytest.txt", "w", encoding="utf-8") as file:
        try:
            status = subprocess.run(command, cwd=measure.ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=limit)
            status = status.returncode
        except subprocess.TimeoutExpired:
            context.note(f"pytest -m gpu was stopped after {limit:.0f} s", incomplete=True)
            return []
    said = (context.out / "pytest.txt").read_text(encoding="utf-8").strip().splitlines()[-1:] or [""]
    context.note(f"pytest -m gpu: {re.sub('=+', '', said[0]).strip()}")
    return [] if status == 0 else [f"pytest -m gpu ended with status {status}"]
