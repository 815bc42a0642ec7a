"""NVIDIA's compute-sanitizer over one small case of every op, forward and backward: memory and shared-memory races.

Each op and tool is a process of its own, for the tools slow a process down and end it at will; several run side by
side. `python -m benchmarks.gpu.sanitizer OP` is what runs in them. Whole outputs are in sanitizer.txt.
"""

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from .. import measure
from . import cases, checks
from .worker import Context

TOOLS = ("memcheck", "racecheck")
BESIDE = 8  # processes at a time


def find():
    """Path of compute-sanitizer, or None."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = os.pathsep.join(f"{home}/bin" for home in homes if home)
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=places)


def sanitizer(context):
    """An item for each op and tool; one in which the tool sees anything has failed."""
    if context.dry:
        context.item("add_layer_norm, rehearsed", partial(checks.run_once, context, "add_layer_norm", torch.float32))
        return
    program = find()
    if program is None:
        context.note("compute-sanitizer is not on this machine", incomplete=True)
        return
    wanted = {f"{op}, {tool}": (op, tool) for tool in TOOLS for op in cases.OPS}
    wanted = {name: job for name, job in wanted.items() if name not in context.skip}
    running = []
    with ThreadPoolExecutor(BESIDE) as pool:
        futures = {name: pool.submit(_run, program, *job, context, running) for name, job in wanted.items()}
        try:
            for name, future in futures.items():
                context.item(name, partial(_judge, context, name, future), 3.0, 120.0)
        finally:
            for future in futures.values():
                future.cancel()
            for child in running:
                child.kill()


def _run(program, op, tool, context, running):
    """(exit status, output) of a tool over an op."""
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu.sanitizer", op]
    # Without torch's pool of memory an access past the end of a tensor is one past the end of an allocation.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        command, cwd=measure.ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    running.append(child)
    try:
        output = child.communicate(timeout=max(context.left() - 1, 1))[0]
    except subprocess.TimeoutExpired:
        child.kill()
        raise TimeoutError("the tool took too long") from None
    return child.returncode, output


def _judge(context, name, future):
    status, output = future.result()
    with open(context.out / "sanitizer.txt", "a", encoding="utf-8") as file:
        file.write(f"--- {name}: status {status}\n{output[-20000:]}\n")
    summary = [line.strip("= ") for line in output.splitlines() if "SUMMARY" in line or "not supported" in line]
    context.note("; ".join(summary) or f"status {status}")
    if status or not summary:
        raise AssertionError(f"{name}: {'; '.join(summary) or output[-300:]}")


def main():
    """Launch one op in the dtypes that it is run in, small."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.sanitizer")
    parser.add_argument("op", choices=list(cases.OPS))
    op = parser.parse_args().op
    context = Context(".", dry=False)
    context.tiny = True
    for dtype in (torch.float32, torch.bfloat16):
        if checks.applies(op, dtype):
            checks.run_once(context, op, dtype)


if __name__ == "__main__":
    main()
