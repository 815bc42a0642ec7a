"""All that later parts will launch, compiled ahead of time: the parts themselves, dealt out over processes, once each.

What is compiled is what is launched, from its real arguments, so nothing is left to compile later: Triton's kernels,
their variants, and what torch.compile makes. Nothing is checked, timed or written but the cache. What fails here fails
again in its own part, which says so.
"""

import os
import threading
import time
from pathlib import Path

from . import process

PARTS = ("checks:correctness", "models:models", "models:compiled", "kernels:kernels", "models:launches",
         "models:training", "transport:transport")  # fmt: skip
MOST = 12  # processes: each takes some gigabytes of the GPU


def compilation(context):
    """One item: all processes."""
    context.item("all", lambda: _all(context), most=max(context.left(), 1) + 5)


def _all(context):
    cache = Path(os.environ["TRITON_CACHE_DIR"]).parent
    count = 1 if context.dry else min(MOST, os.cpu_count() or 1)
    parts = PARTS[:1] if context.dry else PARTS
    end, before = time.monotonic() + max(context.left() - 5, 5), _compiled(cache)
    failed, threads, workers = {}, [], {}

    def one(k):
        """Every n-th item of each part, from the k-th on."""

        def start():
            workers[k] = process.Worker(context.out, cache, context.dry, within=True)
            return workers[k]

        def heard(line):
            if line.get("status") in ("failed", "cut"):
                failed[line["end"]] = " ".join(line["notes"][-1:])

        worker, share = None, (k, count * (16 if context.dry else 1))
        for part in parts:
            worker, _ = process.through(
                start, worker, f"benchmarks.gpu.{part}", max(end - time.monotonic(), 1), heard, share=share
            )

    for k in range(count):
        threads.append(threading.Thread(target=one, args=(k,), daemon=True))
        threads[-1].start()
    try:
        for thread in threads:
            thread.join(max(end - time.monotonic(), 0.1))
    finally:
        late = sum(thread.is_alive() for thread in threads)
        for worker in workers.values():
            worker.kill()
    if late:
        context.note(f"{late} of {count} processes had not finished", incomplete=True)
    context.note(f"{_compiled(cache) - before} kernels compiled by {count} processes")
    for name, why in list(failed.items())[:20]:
        context.note(f"{name}: {why}", incomplete=True)


def _compiled(cache):
    return len(list(cache.glob("triton/*/*.cubin")))
