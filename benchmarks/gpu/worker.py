"""The process in which the parts of `benchmarks.gpu.campaign` run, and what they share: sizes, rows, the clock, items.

Requests come as lines of JSON on standard input: {"function": "module:function", "seconds": 60, "skip": [items],
"share": [k, n]}. Each is answered with a line for each item that begins, {"begin": item, "seconds": at most}, one for
each that is over, {"end": item, "status": "ok" | "incomplete" | "failed", "seconds", "notes"} or {"left": item}, and a
last one, {"status": "ok" | "failed" | "broken", "notes"}. What else is printed goes to the log.

Nothing here imports torch before a part asks for it.
"""

import argparse
import contextlib
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

from .. import table

#: What rows say besides the columns of all benchmarks: the host's time until a call returns, the GPU's, and how p20_ms
#: to p80_ms were taken ("graph": a replay; "sleep": the call, queued while the GPU was held up; "wall": to its result).
FIELDS = (*table.FIELDS, "host_us", "gpu_ms", "timed")
KEY = ("subject", "provider", "case", "dtype", "device")


class Broken(Exception):
    """The device takes no more work from this process."""


class Context:
    """Where a part runs, how big, how long it may take, and where its rows go."""

    def __init__(self, out, dry, say=lambda what: None):
        self.out, self.dry, self.say = Path(out), dry, say
        self.deadline, self.notes, self.incomplete = float("inf"), [], False
        self.skip, self.share, self.items = (), None, 0
        self.compiler = "eager" if dry else "inductor"
        self.batches = (1, 2) if dry else (1, 8, 64, 256)
        self.tiny = dry  #: whether ops are checked at the smallest sizes
        self.seconds = 0.5  # of timing, for each call of a group
        self.kept = {}  #: what is made once a process

    # --- items --------------------------------------------------------------------------------------------------------

    @property
    def warm(self):
        """Whether this is only to compile what a part will launch: nothing is checked, timed or written."""
        return self.share is not None

    def item(self, name, function, seconds=2.0, most=120.0):
        """Call `function()`, which is an item of this part; whatever it raises ends nothing but itself.

        An item that is done already is left out, and so is one for which fewer than `seconds` seconds remain. After
        `most` seconds the process is ended. Raises Broken if the device is of no use afterwards.
        """
        if self.warm:
            self.items += 1
            if self.items % self.share[1] != self.share[0]:
                return
        if name in self.skip:
            return
        if not self.dry and self.left() < seconds:
            self.say({"left": name})
            return
        before, self.notes, self.incomplete = (self.notes, self.incomplete), [], False
        self.say({"begin": name, "seconds": most})
        start, status = time.monotonic(), ""
        try:
            function()
            self.sync()
        except Exception as error:
            traceback.print_exc()
            self.note(f"{type(error).__name__}: {error}")
            status = "failed"
        status = status or ("incomplete" if self.incomplete else "ok")
        self.say({"end": name, "status": status, "seconds": round(time.monotonic() - start, 2), "notes": self.notes})
        self.notes, self.incomplete = before
        if status == "failed":
            try:
                self.sync()
            except Exception as error:
                raise Broken(f"{type(error).__name__}: {error}") from None

    def left(self):
        """Seconds before this part should stop."""
        return self.deadline - time.monotonic()

    def note(self, text, incomplete=False):
        """Record something that a reader of the results should know."""
        self.notes.append(text[:400])
        self.incomplete = self.incomplete or incomplete

    def once(self, name, make):
        """`make()`, the first time that it is asked for by this name."""
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]

    # --- the device ---------------------------------------------------------------------------------------------------

    @cached_property
    def device(self):
        import torch

        if self.dry:
            take_the_way_of_a_gpu()
        return torch.device("cpu" if self.dry else "cuda")

    @cached_property
    def dtype(self):
        """What a GPU computes in. The interpreter gets bfloat16 wrong, so a dry run takes float32."""
        import torch

        return torch.float32 if self.dry else torch.bfloat16

    def sync(self):
        """Wait for the device, if anything was asked of it."""
        if not self.dry and "torch" in sys.modules:
            sys.modules["torch"].cuda.synchronize()

    def free(self):
        """Give memory back before the next model."""
        gc.collect()
        if not self.dry and "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()

    # --- what is computed ---------------------------------------------------------------------------------------------

    @property
    def iterations(self):
        """Of IPOT."""
        from .. import counts

        return 2 if self.tiny else counts.ITERATIONS

    def case(self, batch):
        """A batch of mixed sizes."""
        from .. import counts
        from ..cases import Case

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
        import torch
        import transformers

        torch.manual_seed(0)
        return getattr(transformers, kind)(copy.deepcopy(self.config)).eval().to(self.device)

    def inputs(self, case):
        """Keyword arguments of a forward, on the device."""
        from ..cases import inputs

        return {name: value.to(self.device) for name, value in inputs(case, self.config).items()}

    # --- rows ---------------------------------------------------------------------------------------------------------

    @cached_property
    def common(self):
        """The columns that say where and when."""
        import torch
        import triton

        from .. import measure

        return {
            "device": "CPU, dry run" if self.dry else torch.cuda.get_device_name(),
            "versions": f"{measure.versions()}, triton {triton.__version__}",
            "commit": measure.commit(),
            "date": date.today().isoformat(),
            "load": os.getloadavg()[0],
        }

    @property
    def ceilings(self):
        """What the part `ceilings` measured on this device: FLOP/s by dtype, "copy" in bytes a second, and seconds of a
        launch; or {}."""
        path = self.out / "ceilings.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        return known.get(self.common["device"], {})

    def emit(self, name, rows, fields=FIELDS, key=()):
        """Merge rows into `name`.csv; those of benchmarks/table.py get their floor and their origin first."""
        if fields is FIELDS:
            from .. import run

            known, key = {"copy": 0.0} | self.ceilings, KEY
            rows = [
                {field: row.get(field) for field in FIELDS}
                | run.finish(row, known | {row["dtype"]: known.get(row["dtype"])}, self.common)
                for row in rows
            ]
        table.merge(self.out / f"{name}.csv", rows, fields, key)


def take_the_way_of_a_gpu():
    """Choose backends for CPU tensors as for those of a GPU: Triton first, and no native encoder."""
    from vilt_fast.ops import registry

    registry._GPUS.add("cpu")
    registry.why_unavailable("encoder", "cpp")
    registry._SLOTS["encoder", "cpp"].supports = lambda **facts: "a dry run takes the way of a GPU."


def answer(context, function, seconds, skip=(), share=None):
    """Run one part; what became of it but for its items."""
    context.deadline, context.notes, context.incomplete = time.monotonic() + seconds, [], False
    context.skip, context.share, context.items = frozenset(skip), share, 0
    module, _, name = function.partition(":")
    try:
        getattr(importlib.import_module(module), name)(context)
        context.sync()
    except Broken as error:
        context.note(str(error))
        return {"status": "broken", "notes": context.notes}
    except Exception as error:
        traceback.print_exc()
        context.note(f"{type(error).__name__}: {error}")
        return {"status": "failed", "notes": context.notes}
    finally:
        with contextlib.suppress(Exception):
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

    def say(what):
        print(json.dumps(what), file=answers, flush=True)

    context = Context(arguments.out, arguments.dry_run, say)
    for line in sys.stdin:
        say(answer(context, **json.loads(line)))


if __name__ == "__main__":
    main()
