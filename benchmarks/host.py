"""`python -m benchmarks.host [--update]`: microseconds that an op or a forward takes on the host, whatever computes it.

Each op is called with a launcher that only makes its outputs, on inputs of ViLT's shapes at batch 1, without gradients
and, as on a GPU, without a look at values:

    direct    validation, choice of backend, launcher: what eager inference pays
    library   the same behind torch.ops.vilt_fast, as with gradients, torch.compile or a transform
    launcher  the launcher alone: what is subtracted in `overhead`

`forward` is a `ViltForQuestionAnswering` of 12 layers and a width of 32, batch 1, on the CPU: processor time of its one
thread, also where others compete for that. `overhead` is without what the native library takes.

`replayed` is a forward of ViLT-B/32 that replays a CUDA graph, with a recording in place of a graph that launches
nothing: all that the host does but for the launch itself, with a plan that is given. It is of CPU tensors of one patch,
so that their copies, which a GPU would do, take no time; as on a GPU, nobody looks at their values.
"""

import argparse
import contextlib
import os
import sys
import time
from datetime import date
from functools import partial
from unittest import mock

import torch
from transformers import ViltConfig, ViltForQuestionAnswering

import vilt_fast
from vilt_fast import functional, testing
from vilt_fast.commands import report
from vilt_fast.commands.arguments import whole
from vilt_fast.engine import graphs, native
from vilt_fast.models.vilt import inputs as checked_inputs
from vilt_fast.ops import _check, _define, registry

from . import destination, measure

FIELDS = ("op", "way", "p20_us", "p50_us", "p80_us", "overhead_us", "load", "device", "versions", "commit", "date")
BATCH = 200  # calls in a timed sample


def calls():
    """{op: call(backend)} at ViLT-B/32's shapes, batch 1, 384 x 384."""
    tokens, width, inner, heads = 185, 768, 3072, 12
    x, table = torch.randn(tokens, width), torch.randn(145, width)
    q, k, v = (x.unflatten(1, (heads, -1)).contiguous() for _ in range(3))
    offsets = testing.offsets([tokens])
    weight, bias, norm = torch.randn(inner, width), torch.randn(inner), torch.ones(width)
    ids = torch.zeros(40, dtype=torch.int64)
    places = testing.packing_indices([40], [(12, 12)], canvas=(12, 12), table=(12, 12))
    pixels, projection = torch.randn(1, 3, 384, 384), torch.randn(width, 3, 32, 32)
    return {
        "add_layer_norm": partial(functional.add_layer_norm, x, x, norm, norm, 1e-12),
        "attention": partial(functional.attention, q, k, v, offsets, offsets, tokens, tokens),
        "linear_gelu": partial(functional.linear_gelu, x, weight, bias),
        "text_embed": partial(
            functional.text_embed, ids, None, ids, ids, table, table, table, norm, norm, table, eps=1e-12
        ),
        "patch_embed": partial(
            functional.patch_embed, pixels, projection, norm, norm, table, table, torch.randn(40, width), **places
        ),
    }


@torch.no_grad()
def replayed(repeats):
    """The row of a replayed forward."""

    class Nothing:
        def __init__(self, function, device, pool):
            self.result = function()

        def replay(self):
            pass

    model = vilt_fast.accelerate(ViltForQuestionAnswering(ViltConfig(num_labels=8)).eval(), cuda_graphs=True)
    inputs = {"input_ids": torch.zeros(1, 4, dtype=torch.int64), "pixel_values": torch.zeros(1, 3, 32, 32)}
    plan = vilt_fast.sequence_plan(model, **inputs)
    with contextlib.ExitStack() as stack:
        for where, name, other in (
            (graphs, "Recording", Nothing), (graphs, "why_not_usable", lambda device: ""),
            (native, "unavailable", lambda rows: "as on a GPU"), (_check, "offsets", lambda *_: None),
            (_check, "readable", lambda _: False), (checked_inputs, "readable", lambda _: False),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(where, name, other))
        call = partial(model, **inputs, sequence_plan=plan)
        call()
        if not len(model.vilt.forward.graphs):
            raise RuntimeError("nothing was captured: this would time something else")
        times = report.interleave({"replay": partial(_many, call)}, repeats, warmup=1)["replay"]
    p20, p50, p80 = (t / BATCH * 1e6 for t in sorted(report.quantiles(times)))
    return dict(op="whole forward", way="replay", p20_us=p20, p50_us=p50, p80_us=p80, overhead_us=p50)


@torch.no_grad()
@mock.patch.object(_check, "readable", lambda _: False)
def rows(repeats):
    """Rows without the columns of the machine."""
    found = []
    for name, call in calls().items():
        op = _define.OPS[name]
        slot = registry._SLOTS[name, "nothing"] = registry._Slot("")
        result = []

        def launch(*, keep, op=op, result=result, **arguments):
            if not result:
                result.append(op._fake(**arguments)[0])
            return result[0], ()

        given = {}

        def noted(given=given, launch=launch, **arguments):
            given.update(arguments)
            return launch(**arguments)

        slot.launcher = noted
        call(backend="nothing")  # the first call is checked against the contract
        slot.launcher = launch
        direct = partial(call, backend="nothing")
        ways = {
            "direct": direct,
            "library": partial(_through_library, direct),
            "launcher": partial(launch, **given | {"keep": False}),
        }
        times = report.interleave({way: partial(_many, f) for way, f in ways.items()}, repeats, warmup=1)
        times = {way: [t / BATCH * 1e6 for t in sorted(report.quantiles(v))] for way, v in times.items()}
        alone = times["launcher"][1]
        for way, (p20, p50, p80) in times.items():
            found.append(dict(op=name, way=way, p20_us=p20, p50_us=p50, p80_us=p80, overhead_us=p50 - alone))
        del registry._SLOTS[name, "nothing"]
    return found


NATIVE = ("encoder", "patch_embed", "linear", "fingerprint")  #: what a forward calls of the native library


@torch.no_grad()
def forwards(repeats):
    """Rows of a whole forward, without the columns of the machine."""
    from vilt_fast import _C

    config = ViltConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=2, num_labels=30, max_image_length=-1
    )  # fmt: skip
    inputs = dict(
        input_ids=torch.randint(1000, 2000, (1, 40)), attention_mask=torch.ones(1, 40, dtype=torch.long),
        token_type_ids=torch.zeros(1, 40, dtype=torch.long), pixel_values=torch.randn(1, 3, 384, 384),
        pixel_mask=torch.ones(1, 384, 384, dtype=torch.long),
    )  # fmt: skip
    found, inside, own = [], [0.0], {name: getattr(_C, name) for name in NATIVE}

    def timed(function, *arguments):
        start = time.thread_time()
        result = function(*arguments)
        inside[0] += time.thread_time() - start
        return result

    for name, function in own.items():
        setattr(_C, name, partial(timed, function))
    try:
        for quantize in (None, "int8"):
            model = vilt_fast.accelerate(ViltForQuestionAnswering(config).eval(), quantize=quantize)
            model(**inputs)
            whole, python = [], []
            for _ in range(repeats * 10):
                inside[0], start = 0.0, time.thread_time()
                model(**inputs)
                whole.append(time.thread_time() - start)
                python.append(whole[-1] - inside[0])
            (p20, p50, p80), (_, overhead, _) = (sorted(t * 1e6 for t in report.quantiles(v)) for v in (whole, python))
            found.append(
                dict(op="forward", way=quantize or "float32", p20_us=p20, p50_us=p50, p80_us=p80, overhead_us=overhead)
            )
    finally:
        for name, function in own.items():
            setattr(_C, name, function)
    return found


def _through_library(call):
    known, _define._KNOWN = _define._KNOWN, False
    call()
    _define._KNOWN = known


def _many(call):
    for _ in range(BATCH):
        call()


def main(argv=None):
    """Time, write, show."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=whole(1, 10_000), default=15, help="default: 15")
    destination.add(parser, "host")
    arguments = parser.parse_args(argv)
    out = destination.chosen(parser, arguments, "host")
    torch.set_num_threads(1)
    common = {
        "load": os.getloadavg()[0], "device": measure.device(), "versions": measure.versions(),
        "commit": measure.commit(), "date": date.today().isoformat(),
    }  # fmt: skip
    repeats = arguments.repeats
    found = [row | common for row in (*rows(repeats), *forwards(repeats), replayed(repeats))]
    from rich.console import Console

    lines = [(r["op"], r["way"], f"{r['p50_us']:.1f}", f"{r['overhead_us']:.1f}") for r in found]
    table = report.rich_table(
        "Host time of an op, and of a forward, microseconds", ("op", "way", "median", "overhead"), lines, 2
    )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return destination.put(out, found, FIELDS, ("op", "way"))


if __name__ == "__main__":
    sys.exit(main())
