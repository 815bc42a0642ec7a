"""Whole models on a GPU: HuggingFace's, what a user can make of it, and ours; inference and a training step.

Times are the user's, from call to finished result; errors are those of the pooled output against HuggingFace's model in
float64. torch.compile's first call is in the notes, not in the times. Every provider at every batch is an item, timed
in turn with HuggingFace's eager float32, and a row as soon as it is there: the strongest peer first, then ours.
"""

import copy
import json
import time
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

import vilt_fast

from .. import cases as shapes
from .. import counts
from . import timing, variants


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


BASE = "hf_eager"  #: every ratio is against it


def providers(context):
    """{name: Provider} that can run here, in the order of their worth."""
    half, graphs, fp8 = torch.bfloat16, {"cuda_graphs": True}, {"quantize": "fp8"}
    found = {
        "sdpa_compile_bf16": Provider("bfloat16", True, 2, partial(_sdpa_compiled, context, half)),
        "ours_graphs_bfloat16": Provider("bfloat16", False, 2, partial(_ours, half, graphs)),
        "hf_bf16": Provider("bfloat16", True, 2, partial(_hf, half)),
        "ours_bfloat16": Provider("bfloat16", False, 2, partial(_ours, half, {})),
        BASE: Provider("float32", True, 4, partial(_hf, torch.float32)),
        "ours_float32": Provider("float32", False, 4, partial(_ours, torch.float32, {})),
    }
    if context.dry or torch.cuda.get_device_capability() >= (8, 9):
        found["ours_graphs_float8"] = Provider("float8", False, 1, partial(_ours, half, fp8 | graphs))
        found["ours_float8"] = Provider("float8", False, 1, partial(_ours, half, fp8))
    else:
        context.note("no fp8: it needs compute capability 8.9")
    return found


def models(context):
    """Every provider at every batch, the batches of a service first."""
    run = providers(context)
    for batch in context.batches[:1] if context.dry else (8, 1, 64, 256):
        for name in run:
            if batch == 256 and name == "sdpa_compile_bf16":
                continue  # a minute of compiling for what the smaller ones have shown
            _item(context, "models", run, name, batch)
        context.kept.pop(("truth", batch), None)
        context.free()


def compiled(context):
    """The whole model under torch.compile, beside ours."""
    run = providers(context)
    run["hf_compile_bf16"] = Provider("bfloat16", True, 2, partial(_compiled, context, torch.bfloat16))
    for batch in context.batches[:1] if context.dry else (8, 1, 64):
        for name in ("hf_compile_bf16", "ours_graphs_bfloat16"):
            _item(context, "models_compiled", run, name, batch)


def winners(context):
    """Ours once more, as it ships and with the variants that won among the kernels: winners.json."""
    won = variants.winners(context.out)
    (context.out / "winners.json").write_text(json.dumps(won, indent=1) + "\n", encoding="utf-8")
    context.note(f"variants that won: {won or 'none'}")
    run = {name: provider for name, provider in providers(context).items() if name.startswith("ours_")}
    for name in ("ours_graphs_bfloat16", "ours_bfloat16"):
        run[f"{name}_winners"] = run[name]._replace(build=partial(_with_winners, won, run[name].build))
    run[BASE] = providers(context)[BASE]
    for batch in context.batches[:1] if context.dry else (8, 1, 64):
        for name in ("ours_graphs_bfloat16_winners", "ours_graphs_bfloat16", "ours_bfloat16_winners", "ours_bfloat16"):
            if won or not name.endswith("winners"):
                _item(context, "models_winners", run, name, batch)


def launches(context):
    """Ours in graphs with what only a whole forward shows, beside what ships: `variants.WHOLE`."""
    run, name = providers(context), variants.FORWARD
    for batch in context.batches[:1] if context.dry else (1, 8, 64):
        _item(context, "models_launches", run, name, batch)
        for variant, whole in variants.WHOLE.items():
            if context.dry or batch in whole.batches:
                run[f"{name}_{variant}"] = run[name]._replace(build=partial(_with_rows, variant, run[name].build))
                _item(context, "models_launches", run, f"{name}_{variant}", batch)


def _with_rows(variant, build, model):
    return variants.within(variant, build(model))


def _with_winners(won, build, model):
    return variants.chosen(won, build(model))


def _item(context, subject, run, name, batch):
    seconds = 30.0 if "compile" in name else 3.0
    context.item(f"{name}, batch {batch}", partial(_time, context, subject, run, name, batch), seconds, 150.0)


def _call(context, run, name, batch):
    """A provider's call, built once; what is compiled, for each batch anew, as somebody would who cares."""
    if "compile" in name:
        torch._dynamo.reset()
        return run[name].build(_base(context))
    return context.once(("built", name), lambda: run[name].build(_base(context)))


def _base(context):
    return context.once("model", context.model)


def _truth(context, inputs):
    with torch.inference_mode():
        return copy.deepcopy(_base(context)).double()(**inputs).pooler_output


def _time(context, subject, run, name, batch):
    if context.warm and name.startswith("hf") and "compile" not in name:
        return
    case = context.case(batch)
    inputs = context.inputs(case)
    call, start = _call(context, run, name, batch), time.perf_counter()
    call(inputs)
    context.sync()
    if "compile" in name:
        context.note(f"first call {time.perf_counter() - start:.1f} s")
    calls = {name: partial(call, inputs)}
    if name != BASE and not context.warm:
        calls = {BASE: partial(_call(context, run, BASE, batch), inputs)} | calls
    dtypes = {each: run[each].dtype for each in calls}
    work = {each: work_of(context, case, run[each].padded, run[each].size) for each in calls}
    truth = partial(context.once, ("truth", batch), partial(_truth, context, inputs))
    timing.group(
        context, subject, case.name, case.shape, dtypes, calls, truth, work, whole=True,
        only=(name, BASE) if subject != "models" else (name,),
    )  # fmt: skip


def work_of(context, case, padded, size):
    """Of one forward as a provider computes it: every sample padded to the longest, or only what is real."""
    lengths, patches = shapes.work(case, context.config, padded)
    moved = shapes.traffic(lengths, context.config, size, max(size, 2))
    return counts.Work(shapes.flops(lengths, patches, context.config), 0, moved)


# --- training ---------------------------------------------------------------------------------------------------------


def training(context):
    """A step of question answering: forward and backward under bfloat16 autocast, fused AdamW; and its peak memory."""
    for batch in context.batches[1:3][::-1]:
        context.item(f"batch {batch}", partial(_training, context, batch), 8.0)
        context.free()


def _training(context, batch):
    case = context.case(batch)
    inputs, work, calls = context.inputs(case), {}, {}
    for name, prepare in (("hf_autocast", None), ("ours_autocast", vilt_fast.accelerate)):
        model = context.model("ViltForQuestionAnswering").train()
        if prepare:
            prepare(model)
        calls[name] = _step(context, model, inputs)
        forward = work_of(context, case, prepare is None, 4)
        work[name] = forward._replace(products=3 * forward.products, bytes=3 * forward.bytes)
    timing.group(context, "training", case.name, case.shape, "bfloat16", calls, None, work, whole=True)


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
