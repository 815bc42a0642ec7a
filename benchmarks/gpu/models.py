"""Whole models on a GPU: HuggingFace's, what a user can make of it, and ours; inference and a training step.

Times are the user's, from call to finished result; errors are those of the pooled output against HuggingFace's model in
float64. torch.compile's first call is in the notes, not in the times.
"""

import copy
import time
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

import vilt_fast

from .. import cases as shapes
from .. import counts
from . import timing


class Provider(NamedTuple):
    """`build(model) -> call(inputs) -> pooled output`; `size`: bytes of a weight."""

    dtype: str
    padded: bool
    size: int
    build: object


def _pooled(model):
    def call(inputs):
        with torch.inference_mode():
            return model(**inputs).pooler_output

    return call


def _hf(dtype, model):
    return _pooled(copy.deepcopy(model).to(dtype))


def _ours(dtype, options, model):
    return _pooled(vilt_fast.accelerate(copy.deepcopy(model).to(dtype), **options))


def _compiled(context, dtype, model):
    return _pooled(torch.compile(copy.deepcopy(model).to(dtype), backend=context.compiler))


def _sdpa_compiled(context, dtype, model):
    """HuggingFace's embeddings; its encoder with SDPA in place of its own attention, compiled."""
    model = copy.deepcopy(model).to(dtype)
    for layer in model.encoder.layer:
        layer.attention.attention.forward = partial(_sdpa, layer.attention.attention)
    model.encoder.forward = torch.compile(model.encoder.forward, backend=context.compiler)
    return _pooled(model)


def _sdpa(own, hidden, attention_mask=None, output_attentions=False):
    """In place of `ViltSelfAttention.forward`."""
    q, k, v = (
        linear(hidden).unflatten(-1, (own.num_attention_heads, -1)).transpose(1, 2)
        for linear in (own.query, own.key, own.value)
    )
    mask = None if attention_mask is None else attention_mask.to(q.dtype)
    return (F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2),)


def providers(context):
    """{name: Provider} that can run here, HuggingFace's eager float32 first: every ratio is against it."""
    half = torch.bfloat16
    found = {
        "hf_eager": Provider("float32", True, 4, partial(_hf, torch.float32)),
        "hf_bf16": Provider("bfloat16", True, 2, partial(_hf, half)),
        "ours_float32": Provider("float32", False, 4, partial(_ours, torch.float32, {})),
        "ours_bfloat16": Provider("bfloat16", False, 2, partial(_ours, half, {})),
    }
    graphs, fp8 = {"cuda_graphs": True}, {"quantize": "fp8"}
    found["ours_graphs_bfloat16"] = Provider("bfloat16", False, 2, partial(_ours, half, graphs))
    if context.dry or torch.cuda.get_device_capability() >= (8, 9):
        found["ours_float8"] = Provider("float8", False, 1, partial(_ours, half, fp8))
        found["ours_graphs_float8"] = Provider("float8", False, 1, partial(_ours, half, fp8 | graphs))
    else:
        context.note("no fp8: it needs compute capability 8.9")
    return found


def compiled_providers(context):
    """The same model after torch.compile, bfloat16."""
    half = torch.bfloat16
    return {
        "hf_compile_bf16": Provider("bfloat16", True, 2, partial(_compiled, context, half)),
        "sdpa_compile_bf16": Provider("bfloat16", True, 2, partial(_sdpa_compiled, context, half)),
    }


def models(context):
    """Every provider at every batch; then those that have to be compiled, which take their time, beside ours."""
    model = context.model()
    run = providers(context)
    built = _built(context, model, run)
    for batch in context.batches:
        if context.enough(f"models at batch {batch}", 4):
            _time(context, "models", model, run, built, batch)
    slow = compiled_providers(context)
    beside = {
        name: p for name, p in run.items() if name in ("hf_eager", "hf_bf16", "ours_bfloat16", "ours_graphs_bfloat16")
    }
    for batch in (8, 1, 64) if not context.dry else context.batches[:1]:
        if context.enough(f"torch.compile at batch {batch}", 45):
            torch._dynamo.reset()  # one set of shapes at a time, as somebody would who cares
            again = {name: built[name] for name in beside if name in built} | _built(context, model, slow)
            _time(context, "models_compiled", model, beside | slow, again, batch)


def _built(context, model, run):
    built = {}
    for name, provider in run.items():
        try:
            built[name] = provider.build(model)
        except Exception as error:  # noted, the others go on
            context.note(f"building {name}: {type(error).__name__}: {error}", incomplete=True)
    return built


def _time(context, subject, model, run, built, batch):
    case = context.case(batch)
    inputs = context.inputs(case)
    with torch.inference_mode():
        truth = copy.deepcopy(model).double()(**inputs).pooler_output
    context.free()
    work = {name: work_of(context, case, run[name].padded, run[name].size) for name in built}
    for name, call in built.items():
        start = time.perf_counter()
        try:
            call(inputs)
            context.sync()
        except Exception as error:
            context.note(f"{name} at batch {batch}: {type(error).__name__}: {error}", incomplete=True)
            del work[name]
            continue
        if "compile" in name:
            context.note(f"{name} at batch {batch}: first call {time.perf_counter() - start:.1f} s")
    calls = {name: partial(built[name], inputs) for name in work}
    dtypes = {name: run[name].dtype for name in work}
    timing.group(context, subject, case.name, case.shape, dtypes, calls, truth, work, whole=True, memory=True)


def work_of(context, case, padded, size):
    """Of one forward as a provider computes it: every sample padded to the longest, or only what is real."""
    lengths, patches = shapes.work(case, context.config, padded)
    moved = shapes.traffic(lengths, context.config, size, max(size, 2))
    return counts.Work(shapes.flops(lengths, patches, context.config), 0, moved)


# --- training ---------------------------------------------------------------------------------------------------------


def training(context):
    """A step of question answering: forward and backward under bfloat16 autocast, fused AdamW; and its peak memory."""
    for batch in context.batches[1:3][::-1]:
        if not context.enough(f"training at batch {batch}", 8):
            continue
        case = context.case(batch)
        inputs = context.inputs(case)
        work = {}
        calls = {}
        for name, prepare in (("hf_autocast", None), ("ours_autocast", vilt_fast.accelerate)):
            model = context.model("ViltForQuestionAnswering").train()
            if prepare:
                prepare(model)
            calls[name] = _step(context, model, inputs)
            forward = work_of(context, case, prepare is None, 4)
            work[name] = forward._replace(products=3 * forward.products, bytes=3 * forward.bytes)
        truth = None  # the loss of the first steps: both start from the same weights
        timing.group(
            context, "training", case.name, case.shape, "bfloat16", calls, truth, work, whole=True, memory=True
        )
        del calls, model
        context.free()


def _step(context, model, inputs):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=context.device.type == "cuda")
    labels = torch.rand(len(inputs["input_ids"]), model.config.num_labels, device=context.device)

    def step():
        with torch.autocast(context.device.type, torch.bfloat16):
            loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step
