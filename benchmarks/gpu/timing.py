"""How things are timed on a GPU: interleaved medians, the cache flushed; the ceilings; clocks and energy.

A kernel's time is the GPU's own: between two CUDA events around a replay of the call in a CUDA graph, or around the
call itself where it cannot be captured. Before the first event the GPU writes over its L2 cache and then sleeps for
longer than the host needs to make the call, so that everything is queued when the event comes: what the host takes is
a column of its own. A model's time is the user's, from call to finished result, with the GPU's share beside it. All
calls of a group take turns, so whatever disturbs the machine disturbs them alike.
"""

import contextlib
import json
import statistics
import time
from functools import partial
from typing import NamedTuple

import torch

from vilt_fast.commands import report
from vilt_fast.engine.graphs import Recording

from .. import table
from .tables import OURS

NAP = 1e-3  #: seconds that the GPU sleeps at least before what is timed
CYCLES = 2e9  #: of a GPU in a second, about


class Times(NamedTuple):
    """Seconds, one a round; how they were taken; the host's until the call returned; the GPU's, median."""

    values: list
    timed: str
    host: float
    gpu: float | None

    def columns(self):
        """What a row says of them besides the quantiles."""
        gpu = None if self.gpu is None else self.gpu * 1e3
        return {"timed": self.timed, "host_us": self.host * 1e6, "gpu_ms": gpu}


def group(context, subject, case, shape, dtype, calls, truth, work, *, whole=False, uncompared=(), only=None):
    """Time calls that compute the same thing, and write a row for each to `subject`.csv.

    Args:
        calls: {provider: function}; the first that works is the base of the ratios. One that raises is noted.
        truth: makes what they should return, float64; or None. The error is that of the first call.
        work: {provider: counts.Work}, or one for all.
        whole: time from call to finished result, rather than the GPU's; and the peak of allocated memory (GPU).
        uncompared: providers that compute something else, less or more, and so have no error.
        only: providers whose rows are written, where others are there to be compared with.
    """
    if context.warm:
        return _warm(context, calls)
    truth = None if truth is None else _flat(truth())
    errors, peaks, good = {}, {}, {}
    for name, call in calls.items():
        before = _reset_memory(context)
        try:
            result = call()
            context.sync()
        except Exception as error:  # one that cannot do it says so and leaves the others alone
            ours = name.startswith(OURS)
            context.note(f"{subject} {case} {name}: {type(error).__name__}: {str(error).strip()}", incomplete=ours)
            context.sync()  # raises where the device is lost
            continue
        good[name], peaks[name] = call, _peak_memory(context, before)
        errors[name] = None if truth is None or name in uncompared else report.relative_error(_flat(result), truth)
        del result
    times, repeats = interleaved(context, good, whole)
    quantiles = {name: report.quantiles(found.values) for name, found in times.items()}
    base = next(iter(quantiles.values()))[1] if times else None
    rows = []
    for name in quantiles:
        if only is not None and name not in only:
            continue
        mine, found = work[name] if isinstance(work, dict) else work, times[name]
        row = {"subject": subject, "provider": name, "case": case, "shape": shape}
        row |= {"dtype": dtype[name] if isinstance(dtype, dict) else dtype}
        row |= table.times(quantiles[name], base)
        row |= {"error": errors[name], "flops": mine.flops, "bytes": mine.bytes, "repeats": repeats}
        row |= found.columns()
        if whole:
            row["peak_mib"], row["forward_mib"] = peaks[name]
        rows.append(row)
    context.emit(subject, rows)
    return rows


def _warm(context, calls):
    """Call once what compiles something: ours, and what torch.compile makes."""
    failed = []
    for name, call in calls.items():
        if name.startswith(OURS) or "compile" in name:
            try:
                call()
                context.sync()
            except Exception as error:
                failed.append(f"{name}: {type(error).__name__}: {str(error).strip()[:200]}")
                context.sync()
    if failed:
        raise RuntimeError("; ".join(failed))
    return []


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
    """({name: Times}, rounds): as many rounds as fit the time of a group, 5 to 200."""
    if not calls:
        return {}, 0
    gpu, rounds = context.device.type == "cuda", 1
    if not context.dry:
        once = min(_all(context, calls) for _ in range(3)) + (0 if whole else 1.2 * NAP * len(calls))
        rounds = max(5, min(200, round(context.seconds * len(calls) / max(once, 1e-6))))
    if whole or not gpu:
        finished, hosts = {}, {name: [] for name in calls}
        for name, call in calls.items():
            finished[name] = partial(_to_result, context, call, hosts[name])
        values = report.interleave(finished, rounds, warmup=0)
        busy = {name: statistics.median(_queued(call, 5)[0]) if gpu else None for name, call in calls.items()}
        times = {n: Times(values[n], "wall", statistics.median(hosts[n]), busy[n]) for n in calls}
        return times, rounds
    return _on_the_gpu(context, calls, rounds), rounds


def _to_result(context, call, hosts):
    start = time.perf_counter()
    call()
    hosts.append(time.perf_counter() - start)
    context.sync()


def _all(context, calls):
    """Seconds for one call of each."""
    start = time.perf_counter()
    for call in calls.values():
        call()
    context.sync()
    return time.perf_counter() - start


def _on_the_gpu(context, calls, rounds):
    replays, hosts, naps = {}, {}, {}
    flush = torch.empty(2 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.int8, device="cuda")
    for name, call in calls.items():
        hosts[name] = statistics.median(_queued(call, 20)[1])
        try:
            replays[name] = Recording(call, torch.device("cuda", torch.cuda.current_device()), None)
        except Exception:  # it waits for the host, or takes memory in a way of its own: it is timed as it is
            context.sync()
        naps[name] = max(NAP, 3 * hosts[name])
    values = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            run = replays[name].replay if name in replays else call
            values[name].append(_between_events(run, naps[name], flush))
        torch.cuda.synchronize()
    times = {}
    for name in calls:
        seconds = [a.elapsed_time(b) / 1e3 for a, b in values[name]]
        how = "graph" if name in replays else "sleep"
        times[name] = Times(seconds, how, hosts[name], statistics.median(seconds))
    return times


def _between_events(run, nap, flush=None):
    """Two events around what `run` launches, behind a sleep in which it is queued."""
    pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    if flush is not None:
        flush.zero_()
    torch.cuda._sleep(int(nap * CYCLES))
    pair[0].record()
    run()
    pair[1].record()
    return pair


def _queued(call, rounds):
    """(GPU seconds, host seconds) of a call made while the GPU sleeps, one each a round."""
    busy, hosts = [], []
    for _ in range(rounds):

        def timed():
            start = time.perf_counter()
            call()
            hosts.append(time.perf_counter() - start)

        pair = _between_events(timed, max(NAP, 3 * max(hosts, default=0)))
        torch.cuda.synchronize()
        busy.append(pair[0].elapsed_time(pair[1]) / 1e3)
    return busy, hosts


# --- ceilings ---------------------------------------------------------------------------------------------------------


def ceilings(context):
    """A large copy, large matrix products, and what a launch costs; ceilings.csv, and ceilings.json for the floors."""
    context.item("all", torch.inference_mode()(partial(_ceilings, context)), 3.0, 60.0)


def _ceilings(context):
    found, rows = {}, []

    def add(name, dtype, call, flops=0, moved=0):
        times, repeats = interleaved(context, {name: call})
        quantiles = report.quantiles(times[name].values)
        row = {"subject": "ceilings", "provider": "torch", "case": name, "shape": "", "dtype": dtype}
        row |= table.times(quantiles, quantiles[1]) | {"flops": flops, "bytes": moved}
        rows.append(row | {"error": None, "repeats": repeats} | times[name].columns())
        return quantiles[1]

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
    found |= _launches(context)
    path = context.out / "ceilings.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(known | {context.common["device"]: found}, indent=1) + "\n", encoding="utf-8")
    context.emit("ceilings", rows)
    context.note(", ".join(f"{name} {value:.4g}" for name, value in found.items()))


def _launches(context):
    """Seconds: "launch", of one among many; "latency", of one alone until its result; on a GPU also "replay", of a
    graph of one until its result, and "node", of one among many within a graph."""
    small, many = torch.zeros(1, device=context.device), 1000

    def enqueue(launches):
        for _ in range(launches):
            small.add_(1)

    def median(call, rounds=20):
        return statistics.median(_seconds(context, call) for _ in range(rounds))

    found = {"launch": median(partial(enqueue, many), 3) / many, "latency": median(partial(enqueue, 1))}
    if context.device.type == "cuda":
        one, all_of_them = (Recording(partial(enqueue, n), small.device, None).replay for n in (1, many))
        found |= {"replay": median(one), "node": median(all_of_them, 3) / many}
    return found


def _seconds(context, call):
    context.sync()
    start = time.perf_counter()
    call()
    context.sync()
    return time.perf_counter() - start


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
