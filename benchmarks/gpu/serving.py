"""What a service asks: every text against every image, the energy of a pair, and where a forward's time goes."""

import time
from functools import partial

import torch

from vilt_fast import accelerate

from .. import cases as shapes
from . import models, timing

ENERGY = (
    "provider",
    "case",
    "dtype",
    "pairs",
    "joules",
    "joules_a_pair",
    "watts",
    "pairs_a_second",
    "device",
    "commit",
)
PROFILE = ("provider", "case", "kernel", "calls", "total_us", "share")


def retrieval(context):
    """A slice of a retrieval evaluation: so many texts times so many images, in batches, the scores of all pairs."""
    context.item("all pairs", partial(_retrieval, context), 8.0)


def _retrieval(context):
    texts, images, size = (2, 2, 2) if context.dry else (16, 16, 64)
    given = _pairs(context, texts, images, size)
    names = {"hf_eager": torch.float32, "hf_bf16": torch.bfloat16, "ours_bfloat16": torch.bfloat16}
    calls, dtypes, work = {}, {}, {}
    case = _pairs_case(context, texts, images)
    for name, dtype in names.items():
        model = context.model("ViltForImageAndTextRetrieval").to(dtype)
        ours = name.startswith("ours")
        calls[name] = _scorer(accelerate(model) if ours else model, given)
        dtypes[name] = str(dtype).removeprefix("torch.")
        work[name] = models.work_of(context, case, not ours, dtype.itemsize)
    truth = _scorer(context.model("ViltForImageAndTextRetrieval").double(), given)
    shape = f"{texts} texts x {images} images"
    rows = timing.group(context, "retrieval", shape, case.shape, dtypes, calls, truth, work, whole=True)
    for row in rows:
        context.note(f"{row['provider']}: {texts * images / row['p50_ms'] * 1e3:.0f} pairs a second")


def _pairs_case(context, texts, images):
    """Every text with every image, as a case whose work can be counted."""
    mixed = context.case(2 if context.dry else 8)
    words = [mixed.texts[i % mixed.batch] for i in range(texts) for _ in range(images)]
    sizes = [mixed.sizes[j % mixed.batch] for _ in range(texts) for j in range(images)]
    return shapes.Case("pairs", tuple(sizes), tuple(words))


def _pairs(context, texts, images, size):
    """The same pairs as batches of inputs; every image is stored once for all texts before it is repeated."""
    case = _pairs_case(context, texts, images)
    batches = []
    for first in range(0, case.batch, size):
        part = shapes.Case("part", case.sizes[first : first + size], case.texts[first : first + size])
        batches.append(context.inputs(part))
    return batches


def _scorer(model, batches):
    def score():
        with torch.inference_mode():
            return torch.cat([model(**inputs).logits.flatten() for inputs in batches])

    return score


def energy(context):
    """Joules a pair: some seconds of nothing but forwards, by the card's own counter."""
    batch = context.batches[min(2, len(context.batches) - 1)]
    for name in ("hf_bf16", "ours_graphs_bfloat16", "ours_bfloat16", "ours_graphs_float8"):
        context.item(name, partial(_energy, context, name, batch), 5.0)


def _energy(context, name, batch):
    case, run = context.case(batch), models.providers(context)
    if name not in run:
        return
    inputs, call = context.inputs(case), run[name].build(context.once("model", context.model))
    for _ in range(1 if context.dry else 5):
        call(inputs)
    context.sync()
    before, start, pairs = timing.joules(), time.perf_counter(), 0
    while pairs == 0 or time.perf_counter() - start < (0.05 if context.dry else 3.0):
        call(inputs)
        context.sync()
        pairs += batch
    seconds, after = time.perf_counter() - start, timing.joules()
    used = None if before is None or after is None else after - before
    if used is None:
        context.note("no energy counter (nvidia-ml-py is missing, or the card has none): throughput only")
    row = {
        "provider": name,
        "case": case.name,
        "dtype": run[name].dtype,
        "pairs": pairs,
        "joules": used,
        "joules_a_pair": None if used is None else used / pairs,
        "watts": None if used is None else used / seconds,
        "pairs_a_second": pairs / seconds,
        "device": context.common["device"],
        "commit": context.common["commit"],
    }
    context.emit("energy", [row], ENERGY, key=("provider", "case", "device"))


def profile(context):
    """A profiler's table of one forward, HuggingFace's and ours: profile.csv, and the whole tables in profile.txt."""
    # The interpreter takes no bfloat16: a dry run that is to see our kernels looks at float32.
    for name in ("hf_eager", "ours_float32") if context.dry else ("hf_bf16", "ours_bfloat16"):
        context.item(name, partial(_profile, context, name), 4.0)


def _profile(context, name):
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    cuda = context.device.type == "cuda"
    case = context.case(context.batches[min(2, len(context.batches) - 1)])
    inputs, call = context.inputs(case), models.providers(context)[name].build(context.once("model", context.model))
    call(inputs)
    context.sync()
    with profiler(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as taken:
        call(inputs)
        context.sync()
    averages = taken.key_averages()
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    with open(context.out / "profile.txt", "a", encoding="utf-8") as file:
        file.write(f"{name}, {case.shape}\n{averages.table(sort_by=key, row_limit=40)}\n")
    # On a GPU an operator carries the time of its kernels too: count the kernels alone.
    alone = [e for e in averages if not cuda or e.device_type != torch.autograd.DeviceType.CPU]
    events = sorted(((getattr(e, key), e) for e in alone), key=lambda pair: -pair[0])
    total = sum(value for value, _ in events) or 1.0
    rows = [
        {"provider": name, "case": case.name, "kernel": e.key, "calls": e.count, "total_us": float(value),
         "share": value / total}
        for value, e in events[:40] if value > 0
    ]  # fmt: skip
    context.emit("profile", rows, PROFILE, key=("provider", "case", "kernel"))
