"""How things are timed on a GPU: interleaved medians, the cache flushed; the ceilings; clocks and energy.

A kernel's time is that between two CUDA events around it, queued behind a write over the whole L2 cache, which also
gives the host the time to get ahead. A model's time is the user's: from call to finished result. All calls of a group
take turns, so whatever disturbs the machine disturbs them alike.
"""

import contextlib
import json
import time
from functools import partial

import torch

from vilt_fast.commands import report

OURS = ("ours", "triton", "cuda")  #: how names of our own providers begin


def group(context, subject, case, shape, dtype, calls, truth, work, *, whole=False, memory=False, uncompared=()):
    """Time calls that compute the same thing, and write a row for each to `subject`.csv.

    Args:
        calls: {provider: function}; the first that works is the base of the ratios. One that raises is noted.
        truth: what they should return, float64, or None. The error is that of the first call.
        work: {provider: counts.Work}, or one for all.
        whole: time from call to finished result, rather than between events.
        memory: also the peak of allocated memory (GPU).
        uncompared: providers that compute something else, less or more, and so have no error.
    """
    errors, peaks, good = {}, {}, {}
    for name, call in calls.items():
        before = _reset_memory(context)
        try:
            result = call()
            context.sync()
        except Exception as error:  # one that cannot do it says so and leaves the others alone
            ours = name.startswith(OURS)
            context.note(f"{subject} {case} {name}: {type(error).__name__}: {str(error).strip()}", incomplete=ours)
            continue
        good[name], peaks[name] = call, _peak_memory(context, before)
        errors[name] = (
            None if truth is None or name in uncompared else report.relative_error(_flat(result), _flat(truth))
        )
        del result
    times, repeats = interleaved(context, good, whole)
    base = next(iter(times.values()))[1] if times else None
    rows = []
    for name, (p20, p50, p80) in times.items():
        mine = work[name] if isinstance(work, dict) else work
        row = {"subject": subject, "provider": name, "case": case, "shape": shape}
        row |= {"dtype": dtype[name] if isinstance(dtype, dict) else dtype}
        row |= {"p20_ms": p20 * 1e3, "p50_ms": p50 * 1e3, "p80_ms": p80 * 1e3, "ratio": base / p50}
        row |= {"error": errors[name], "flops": mine.flops, "bytes": mine.bytes, "repeats": repeats}
        if memory:
            row["peak_mib"], row["forward_mib"] = peaks[name]
        rows.append(row)
    context.emit(subject, rows)
    return rows


def _flat(result):
    results = result if isinstance(result, list | tuple) else [result]
    return torch.cat([r.detach().double().flatten() for r in results if r is not None])


def _reset_memory(context):
    if context.device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak_memory(context, before):
    """(peak, peak above what was there before) in MiB; nothing on a CPU."""
    if context.device.type != "cuda":
        return None, None
    peak = torch.cuda.max_memory_allocated()
    return peak / 2**20, (peak - before) / 2**20


def interleaved(context, calls, whole=False):
    """({name: (p20, p50, p80) in seconds}, rounds): as many rounds as fit the time of a group, 5 to 200."""
    if not calls:
        return {}, 0
    rounds = 1
    if not context.dry:
        once = min(_all(context, calls) for _ in range(3))
        rounds = max(5, min(200, round(context.seconds * len(calls) / max(once, 1e-6))))
    if context.device.type == "cuda" and not whole:
        times = _between_events(calls, rounds)
    else:
        finished = {name: lambda call=call: (call(), context.sync()) for name, call in calls.items()}
        times = report.interleave(finished, rounds, warmup=0)
    return {name: report.quantiles(values) for name, values in times.items()}, rounds


def _all(context, calls):
    """Seconds for one call of each."""
    start = time.perf_counter()
    for call in calls.values():
        call()
    context.sync()
    return time.perf_counter() - start


def _between_events(calls, rounds):
    flush = torch.empty(2 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.int8, device="cuda")
    marks = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            flush.zero_()
            pair[0].record()
            call()
            pair[1].record()
            marks[name].append(pair)
        torch.cuda.synchronize()
    return {name: [a.elapsed_time(b) / 1e3 for a, b in pairs] for name, pairs in marks.items()}


# --- ceilings ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def ceilings(context):
    """A large copy, large matrix products, and what a launch costs; ceilings.csv, and ceilings.json for the floors."""
    found, rows = {}, []

    def add(name, dtype, call, flops=0, moved=0):
        times, repeats = interleaved(context, {name: call})
        p20, p50, p80 = times[name]
        row = {"subject": "ceilings", "provider": "torch", "case": name, "shape": "", "dtype": dtype, "ratio": 1.0}
        row |= {"p20_ms": p20 * 1e3, "p50_ms": p50 * 1e3, "p80_ms": p80 * 1e3, "flops": flops, "bytes": moved}
        rows.append(row | {"error": None, "repeats": repeats})
        return p50

    source = torch.randn(1 << (12 if context.dry else 28), device=context.device)
    moved = 8 * source.numel()
    found["copy"] = moved / add("copy", "float32", partial(torch.empty_like(source).copy_, source), moved=moved)
    del source
    n = 64 if context.dry else 8192
    for name in ("float32", "float16", "bfloat16"):
        a, b = (torch.randn(n, n, device=context.device).to(getattr(torch, name)) for _ in range(2))
        found[name] = 2 * n**3 / add("matmul", name, partial(torch.matmul, a, b), flops=2 * n**3)
    with contextlib.suppress(RuntimeError, AttributeError, NotImplementedError):  # where there is no fp8, no ceiling
        a, b = (torch.randn(n, n, device=context.device).to(torch.float8_e4m3fn) for _ in range(2))
        one = torch.ones((), device=context.device)
        product = lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)  # noqa: E731
        product()
        found["float8"] = 2 * n**3 / add("matmul", "float8", product, flops=2 * n**3)
    small, launches = torch.zeros(1, device=context.device), 1000

    def enqueue():
        for _ in range(launches):
            small.add_(1)

    enqueue()
    context.sync()
    start = time.perf_counter()
    enqueue()
    context.sync()
    found["launch"] = (time.perf_counter() - start) / launches
    (context.out / "ceilings.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    context.emit("ceilings", rows)
    context.note(", ".join(f"{name} {value:.4g}" for name, value in found.items()))


# --- NVML -------------------------------------------------------------------------------------------------------------


def nvml(question):
    """`question(pynvml, handle)` for the GPU in use, or None where nvidia-ml-py or the answer is missing."""
    try:
        import pynvml
    except ImportError:
        return None
    with contextlib.suppress(pynvml.NVMLError, RuntimeError, AssertionError):
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties().uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        return question(pynvml, handle)
    return None


def joules():
    """Energy the GPU has used since its driver was loaded, or None."""
    millijoules = nvml(lambda library, handle: library.nvmlDeviceGetTotalEnergyConsumption(handle))
    return None if millijoules is None else millijoules / 1e3


def clocks():
    """{"sm_mhz", "memory_mhz", "watts", "celsius", "driver"} of the GPU right now, or None."""

    def ask(library, handle):
        return {
            "sm_mhz": library.nvmlDeviceGetClockInfo(handle, library.NVML_CLOCK_SM),
            "memory_mhz": library.nvmlDeviceGetClockInfo(handle, library.NVML_CLOCK_MEM),
            "watts": library.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "celsius": library.nvmlDeviceGetTemperature(handle, library.NVML_TEMPERATURE_GPU),
            "driver": str(library.nvmlSystemGetDriverVersion()),
        }

    return nvml(ask)
