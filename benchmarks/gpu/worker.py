"""The process in which the parts of `benchmarks.gpu.campaign` run, and what they share: sizes, rows, the clock.

Requests come as lines of JSON on standard input, `{"function": "module:function", "seconds": 60}`; each is answered
with a line `{"status": "ok" | "incomplete" | "failed", "notes": [...]}`. What else is printed goes to the log.
"""

import argparse
import copy
import gc
import importlib
import json
import os
import sys
import time
import traceback
from datetime import date
from functools import cached_property
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from vilt_fast.ops import registry

from .. import counts, destination, measure, run
from ..cases import Case, inputs


class Context:
    """Where a part runs, how big, how long it may take, and where its rows go."""

    def __init__(self, out, dry):
        self.out, self.dry = Path(out), dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.deadline, self.notes, self.incomplete = float("inf"), [], False
        #: What a GPU computes in. The interpreter gets bfloat16 wrong, so a dry run takes float32.
        self.dtype = torch.float32 if dry else torch.bfloat16
        self.compiler = "eager" if dry else "inductor"
        self.batches = (1, 2) if dry else (1, 8, 64, 256)
        self.iterations = 4 if dry else counts.ITERATIONS  # of IPOT
        self.seconds = 0.5  # of timing, for each call of a group

    def left(self):
        """Seconds before this part should stop."""
        return self.deadline - time.monotonic()

    def note(self, text, incomplete=False):
        """Record something that a reader of the results should know."""
        self.notes.append(text[:400])
        self.incomplete = self.incomplete or incomplete

    def enough(self, what, seconds=2.0):
        """Whether there is time for `what`; if not, that is noted."""
        if self.dry or self.left() > seconds:
            return True
        self.note(f"left out for want of time: {what}", incomplete=True)
        return False

    def sync(self):
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def free(self):
        """Give memory back before the next model."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def case(self, batch):
        """A batch of mixed sizes."""
        if not self.dry:
            return counts.batch(batch)
        return Case(f"b{batch}", ((16, 16), (8, 16))[:batch], (6, 3)[:batch])

    @cached_property
    def config(self):
        """ViLT-B/32, or a very small one."""
        from transformers import ViltConfig

        if not self.dry:
            return ViltConfig()
        return ViltConfig(
            hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=128, image_size=16,
            patch_size=8, vocab_size=200,
        )  # fmt: skip

    def model(self, kind="ViltModel"):
        """A HuggingFace model on the device, float32, weights drawn at random, the same for every kind."""
        import transformers

        torch.manual_seed(0)
        return getattr(transformers, kind)(copy.deepcopy(self.config)).eval().to(self.device)

    def inputs(self, case):
        """Keyword arguments of a forward, on the device."""
        return {name: value.to(self.device) for name, value in inputs(case, self.config).items()}

    @cached_property
    def common(self):
        """The columns that say where and when."""
        import triton

        name = "CPU, dry run" if self.dry else torch.cuda.get_device_name()
        return {
            "device": name,
            "versions": f"{measure.versions()}, triton {triton.__version__}",
            "commit": measure.commit(),
            "date": date.today().isoformat(),
            "load": os.getloadavg()[0],
        }

    @property
    def ceilings(self):
        """What the part `ceilings` measured: FLOP/s by dtype, "copy" in bytes a second, "launch" in seconds; or {}."""
        path = self.out / "ceilings.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def emit(self, name, rows, fields=run.FIELDS):
        """Append rows to `name`.csv; those of benchmarks/run.py get their floor and their origin first."""
        if fields is run.FIELDS:
            known = {"copy": 0.0} | self.ceilings
            rows = [run.finish(row, known | {row["dtype"]: known.get(row["dtype"])}, self.common) for row in rows]
        destination.write(self.out / f"{name}.csv", rows, fields, append=True)


def take_the_way_of_a_gpu():
    """Choose backends for CPU tensors as for those of a GPU: Triton first, and no native encoder."""
    registry._ORDER["cpu"] = registry._ORDER["cuda"]
    registry.why_unavailable("encoder", "cpp")
    registry._SLOTS["encoder", "cpp"].supports = lambda **facts: "a dry run takes the way of a GPU."


def answer(context, function, seconds):
    """Run one part; what became of it."""
    context.deadline, context.notes, context.incomplete = time.monotonic() + seconds, [], False
    module, _, name = function.partition(":")
    try:
        getattr(importlib.import_module(module), name)(context)
        context.sync()
    except Exception as error:
        traceback.print_exc()
        context.note(f"{type(error).__name__}: {error}")
        return {"status": "failed", "notes": context.notes}
    finally:
        context.free()
    return {"status": "incomplete" if context.incomplete else "ok", "notes": context.notes}


def main():
    """Answer requests until there are none."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.worker")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if arguments.dry_run:
        take_the_way_of_a_gpu()
    context = Context(arguments.out, arguments.dry_run)
    for line in sys.stdin:
        print(json.dumps(answer(context, **json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
