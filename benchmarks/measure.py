"""What the machine can do, measured in the run that uses it: matmul peaks, copy bandwidth, memory; and what it is."""

import contextlib
import ctypes
import gc
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def best_of(call, seconds=0.4):
    """The shortest time of `call` in about `seconds` seconds, at least three runs, after one warm-up."""
    call()
    shortest, end, runs = float("inf"), time.perf_counter() + seconds, 0
    while runs < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        shortest, runs = min(shortest, time.perf_counter() - start), runs + 1
    return shortest


def quantized_linear(weight, rows):
    """A call that multiplies `rows` random uint8 rows by an int8 copy of `weight` [out, in] through oneDNN."""
    scale = weight.abs().amax(1).clamp_min(1e-8) / 127
    quantized = (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(quantized.contiguous(), [rows, weight.shape[1]])
    x = torch.randint(0, 256, (rows, weight.shape[1]), dtype=torch.uint8)
    zeros = torch.zeros(weight.shape[0], dtype=torch.long)
    return lambda: torch.ops.onednn.qlinear_pointwise(
        x, 0.02, 128, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def prepacked_linear(x, weight, bias=None):
    """A call that computes x W^T + b with a weight oneDNN has reordered once."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
    return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


@torch.inference_mode()
def matmul_peak(dtype, rows=1792, width=768, features=3072):
    """The most FLOP/s a matrix product reaches here: the better of torch's and oneDNN's prepacked, at a ViLT shape.

    `dtype` is "float32", "bfloat16" or "int8" (operations count as FLOPs). None if this machine cannot do it.
    """
    weight = torch.randn(features, width)
    calls = []
    if dtype == "int8":
        builders = [lambda: quantized_linear(weight, rows)]
    else:
        kind = getattr(torch, dtype)
        x, w = torch.randn(rows, width, dtype=kind), weight.to(kind)
        builders = [lambda: prepacked_linear(x, w), lambda: lambda: torch.nn.functional.linear(x, w)]
    for build in builders:
        with contextlib.suppress(RuntimeError, AttributeError, NotImplementedError, TypeError):
            calls.append(best_of(build()))
    return 2 * rows * width * features / min(calls) if calls else None


def copy_bandwidth(mebibytes=256):
    """Bytes a second that a plain copy moves, reads and writes counted; larger than any cache."""
    source = torch.ones(mebibytes * 2**18)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / best_of(lambda: target.copy_(source))


def machine(dtypes, step=lambda what: None):
    """`{dtype: FLOP/s or None, "copy": bytes/s}`."""
    found = {}
    for dtype in dtypes:
        step(f"matmul peak, {dtype}")
        found[dtype] = matmul_peak(dtype)
    step("copy bandwidth")
    return {**found, "copy": copy_bandwidth()}


def floor_seconds(flops, traffic, peak, bandwidth):
    """No forward is faster than its FLOPs at the matmul peak, or its bytes at copy bandwidth."""
    return max(flops / peak if peak else 0.0, traffic / bandwidth if bandwidth else 0.0)


def device():
    """The CPU's own name, and the threads used."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name}, {torch.get_num_threads()} threads"


def versions():
    """`torch 2.13.0, transformers 5.17.0, vilt_fast 0.1.0`."""
    from importlib import metadata

    found = []
    for name in ("torch", "transformers", "vilt_fast"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return ", ".join(found)


def commit():
    """The short commit, `+` appended when the tree has changes; empty outside a git checkout."""

    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)

    with contextlib.suppress(OSError):
        head = git("rev-parse", "--short", "HEAD")
        if head.returncode == 0:
            changed = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
            return head.stdout.strip() + ("+" if changed else "")
    return ""


def native_missing():
    """Why the native part cannot compute here, or ""."""
    from vilt_fast.ops import registry

    try:
        return registry.why_unavailable("encoder", "cpp")
    except ImportError as error:
        return f"{error}."


def backends(call):
    """The backends that the registry chooses during one `call`, by name, in a line; "" if it is not asked."""
    from vilt_fast.ops import registry

    found, resolve = set(), registry.resolve

    def watched(*arguments):
        name = resolve(*arguments)
        found.add(name)
        return name

    registry.resolve = watched
    try:
        call()
    finally:
        registry.resolve = resolve
    return " ".join(sorted(found))


def _status(field):
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def forward_memory(call):
    """(peak bytes of the process over two calls, the part above what it held before). Linux; in its own process.

    The second figure holds what the first call sets up for good: quantised weights, kernels compiled for a shape.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    call()
    call()
    peak = _status("VmHWM")
    return peak, peak - before


def memory_in_subprocess(provider, options):
    """`forward_memory` of one provider in a process of its own, which gets `options` (a case, a model); (None, None)
    where it cannot be measured, and why on stderr."""
    arguments = ["-m", "benchmarks.run", "memory", "--provider", provider, *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    threads = ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(
        [sys.executable, *arguments, *threads], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        why = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        print(f"The memory of {provider} cannot be measured: {why}", file=sys.stderr)
        return None, None
    peak, above = done.stdout.split()[-2:]
    return int(peak), int(above)
