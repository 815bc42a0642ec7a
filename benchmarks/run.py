"""`python -m benchmarks.run model | vqa | train | linear | attention | block | transport | images | score | serve`:
medians and ratios, to CSV.

`model` is the trunk, all rows of which are read; `vqa` has the head that answers questions, which reads one row a
sample. A speed-up is a ratio of medians of interleaved runs in one process, against HuggingFace's eager float32 on the
same input. The floor is what the counted FLOPs and bytes need at the matmul peak and the copy bandwidth measured in the
same run.
"""

import argparse
import os
import sys
from datetime import date
from functools import partial

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from vilt_fast.commands import checkpoint, report
from vilt_fast.commands.arguments import whole

from . import cases as shapes
from . import destination, images, measure, ops, providers, score, serve, table, training, transport
from .table import FIELDS

KEYS = ("provider", "case", "dtype")  #: what a row is known by
OPTIONS = {  # which options do something
    "model": ("dtypes", "cases", "shapes", "model", "peers", "memory"),
    "vqa": ("dtypes", "cases", "shapes", "model"),
    "memory": ("cases", "shapes", "model", "provider"),
    "train": ("dtypes", "memory"),
    "block": ("dtypes",),
    "linear": ("dtypes",),
    "attention": ("dtypes",),
    "transport": (),
    "images": (),
    "score": ("dtypes", "cases"),
    "serve": ("cases", "workers"),
}


def main(argv=None):
    """Run one benchmark; returns the exit status."""
    arguments = _arguments(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.what == "memory":
        print(*measure.forward_memory(_measured(arguments)))
        return 0
    common = {
        "load": os.getloadavg()[0],
        "device": measure.device(),
        "versions": measure.versions(),
        "commit": measure.commit(),
        "date": date.today().isoformat(),
        "repeats": serve.QUARTERS if arguments.what == "serve" else arguments.repeats,
    }
    try:
        rows, best = _timed(arguments)
    except (checkpoint.BadCheckpoint, shapes.BadShape) as error:
        print(f"python -m benchmarks.run {arguments.what}: {error}", file=sys.stderr)
        return 2
    rows = [finish(row, best, common) for row in rows]
    if rows:
        show(f"{arguments.what}: {common['device']}", rows)
    status = destination.put(arguments.out, rows, FIELDS, KEYS)
    if unknown := [row["provider"] for row in rows if arguments.memory and row["peak_mib"] is None]:
        print(f"No memory was measured of: {', '.join(unknown)}.", file=sys.stderr)
    return status or int(bool(unknown))


def _measured(arguments):
    """What `memory` calls. A training step has a model and a batch of its own, and no other model in memory."""
    steps = training.steps()
    if arguments.provider in steps:
        return partial(steps[arguments.provider].build(None), None)
    model = _trunk(arguments.model)
    (case,) = _cases(arguments, model.config)
    call = {**providers.PROVIDERS, **providers.PEERS}[arguments.provider].build(model)
    return partial(call, shapes.inputs(case, model.config))


def _timed(arguments):
    """(rows without the machine's columns, what the machine can do)."""
    dtypes = sorted({"float32", *arguments.dtypes})
    model = {"model": _trunk, "vqa": _vqa}.get(arguments.what, lambda name: None)(arguments.model)
    cases = _cases(arguments, model.config) if model else []
    with report.progress() as bar:
        step = _stepper(bar)
        before = measure.machine(dtypes, step)
        if model:
            rows = model_rows(model, cases, arguments, step)
        elif arguments.what == "train":
            rows = training.rows(arguments.dtypes, arguments.repeats, arguments.memory, step)
        elif arguments.what == "transport":
            rows = transport.rows(arguments.repeats, step)
        elif arguments.what == "images":
            rows = images.rows(checkpoint.random_vqa(), arguments.repeats, step)
        elif arguments.what == "score":
            rows = score.rows(arguments.cases or score.CASES[1:], arguments.dtypes, arguments.repeats, step)
        elif arguments.what == "serve":
            rows = serve.rows(arguments.cases or serve.CASES[1:], arguments.workers, step)
        else:
            rows = ops.rows(arguments.what, arguments.dtypes, arguments.repeats, step)
        # What else ran meanwhile cannot make a machine faster: the better of two measurements is the nearer one.
        after = measure.machine(dtypes, step)
    return rows, {what: max(before[what] or 0, after[what] or 0) for what in before}


def _arguments(argv):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=tuple(OPTIONS), help="what to time (memory: used internally)")
    parser.add_argument("--dtypes", nargs="+", choices=report.PRECISIONS, help="default: all")
    named = [*dict.fromkeys([*shapes.CASES, *score.CASES, *serve.CASES])]
    parser.add_argument(
        "--cases", nargs="+", choices=named, help="default: all, or --shapes alone; score: grid, jpegs; serve: load"
    )
    parser.add_argument(
        "--shapes", nargs="+", metavar="HxW+T", help="one batch of your own: height, width, text tokens of each sample"
    )
    parser.add_argument("--model", help="folder or hub id of a checkpoint (default: ViLT-B/32, random weights)")
    parser.add_argument(
        "--repeats",
        type=whole(1, 10_000),
        default=9,
        help="timed rounds, one run of each provider a round (default: 9)",
    )
    parser.add_argument("--threads", type=whole(1, 1024), default=2, help="default: 2")
    parser.add_argument(
        "--peers", action="store_true", default=None,
        help="also torch.compile, and OpenVINO, torchao, ONNX Runtime where they are installed",
    )  # fmt: skip
    parser.add_argument(
        "--memory",
        action="store_true",
        default=None,
        help="also peak memory of one forward or step, each in its own process",
    )
    parser.add_argument("--workers", type=whole(1, 1024), help="of the service (default: one for each thread)")
    destination.add(parser)
    parser.add_argument("--provider", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    for option in dict.fromkeys(option for options in OPTIONS.values() for option in options):
        if getattr(arguments, option) is not None and option not in OPTIONS[arguments.what]:
            has = [what for what, options in OPTIONS.items() if option in options and what != "memory"]
            parser.error(f"--{option} does nothing for {arguments.what}; it is for {', '.join(has)}.")
    known = {"score": score.CASES, "serve": serve.CASES}.get(arguments.what, tuple(shapes.CASES))
    for case in arguments.cases or ():
        if case not in known:
            parser.error(f"--cases {case} is none of {arguments.what}, which has {', '.join(known)}.")
    if arguments.update and (arguments.model or arguments.shapes):
        parser.error("--update is for the committed model and cases: leave --model and --shapes out.")
    if arguments.what != "memory":
        arguments.out = destination.chosen(parser, arguments, arguments.what)
    for dtype in arguments.dtypes or ():
        if reason := report.unavailable(dtype):
            parser.error(f"--dtypes {dtype}: {reason}")
        if dtype == "int8" and arguments.what in ("linear", "attention", "train"):
            parser.error(f"--dtypes int8: {arguments.what} has no int8 rows; block and model have.")
    arguments.dtypes = arguments.dtypes or list(report.PRECISIONS)
    if arguments.peers:
        for peer in providers.PEERS.values():
            if peer.dtype in arguments.dtypes and (absent := providers.lacking(peer)):
                print(f'{peer.name} is left out: no {", ".join(absent)}; pip install -e ".[bench]"', file=sys.stderr)
    return arguments


def _cases(arguments, config):
    """The cases that were asked for: one's own, named ones, or all."""
    own = [shapes.own(arguments.shapes, config)] if arguments.shapes else []
    named = arguments.cases if arguments.cases or own else shapes.CASES
    return [*(shapes.CASES[name] for name in named or ()), *own]


def _stepper(bar):
    """Counts steps on a bar whose length nobody knows before it is over."""
    task = bar.add_task("", total=None)
    return lambda what: bar.update(task, description=what, advance=1)


def _vqa(name=None):
    return checkpoint.load(name, "vqa") if name else checkpoint.random_vqa()


def _trunk(name=None):
    return report.trunk(checkpoint.load(name) if name else checkpoint.random_vqa())


def model_rows(model, cases, arguments, step=lambda what: None):
    """Rows of a model, without the machine's columns; it is HuggingFace's, in float32, with or without a head."""
    run = providers.chosen(arguments.dtypes, arguments.peers)
    rows = []
    built = {}
    for provider in run:
        step(f"building {provider.name}")
        try:
            built[provider.name] = provider.build(model)
            built[provider.name](shapes.inputs(cases[0], model.config))
        except Exception as error:
            if provider.name not in providers.PEERS:
                raise
            # Another project's compiler or exporter: what it cannot do is no row, and no end of the run.
            print(f"{provider.name} is left out: {type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)
            built.pop(provider.name, None)
    run = [provider for provider in run if provider.name in built]
    for case in cases:
        inputs = shapes.inputs(case, model.config)
        step(f"{case.name}: float64")
        truth = _truth(model, inputs)
        errors = {key: report.relative_error(call(inputs).double(), truth) for key, call in built.items()}
        calls = {key: lambda call=call, inputs=inputs: call(inputs) for key, call in built.items()}
        backends = {p.name: p.backend or measure.backends(calls[p.name]) for p in run}
        times = report.interleave(calls, arguments.repeats, step=lambda what, case=case: step(f"{case.name}: {what}"))
        base = report.quantiles(times["hf_eager"])[1]
        for provider in run:
            quantiles = report.quantiles(times[provider.name])
            lengths, patches = shapes.work(case, model.config, provider.padded)
            read = case.batch if arguments.what == "vqa" and not provider.padded else None
            row = {
                "subject": arguments.what,
                "provider": provider.name,
                "backend": backends[provider.name],
                "model": arguments.model or "random weights",
                "case": case.name,
                "shape": case.shape,
                "dtype": provider.dtype,
                **table.times(quantiles, base),
                "error": errors[provider.name],
                "flops": shapes.flops(lengths, patches, model.config, read),
                "bytes": shapes.traffic(lengths, model.config, provider.weight_bytes, provider.activation_bytes),
            }
            if arguments.memory:
                step(f"{case.name}: memory of {provider.name}")
                options = ["--shapes", *arguments.shapes] if case.name == "own" else ["--cases", case.name]
                options += ["--model", arguments.model] if arguments.model else []
                peak, above = measure.memory_in_subprocess(provider.name, options)
                row["peak_mib"], row["forward_mib"] = (None if v is None else v / 2**20 for v in (peak, above))
            rows.append(row)
    return rows


@torch.inference_mode()
def _truth(model, inputs):
    """What HuggingFace's own model gives in float64."""
    import copy

    return providers.output(copy.deepcopy(model).double()(**inputs))


def finish(row, machine, common):
    """A row with the floor on this machine (see `measure.machine`) and what says where and when it was measured."""
    peak, bandwidth = machine[row["dtype"]], machine["copy"]
    floor = measure.floor_seconds(row["flops"], row["bytes"], peak, bandwidth) * 1e3
    extra = {"peak_gflops": peak / 1e9 if peak else None, "copy_gbs": bandwidth / 1e9, "floor_ms": floor}
    return {field: {**row, **extra, **common}.get(field) for field in FIELDS}


def show(title, rows):
    """Print the rows as a table."""
    from rich.console import Console

    header = (
        "case",
        "provider",
        "backend",
        "dtype",
        "median ms",
        "p20 - p80",
        "ratio",
        "of floor",
        "error",
        "peak MiB",
    )
    cells = []
    for row in rows:
        cells.append(
            (
                row["case"],
                row["provider"],
                row["backend"] or "-",
                row["dtype"],
                f"{row['p50_ms']:.4g}",
                f"{row['p20_ms']:.4g} - {row['p80_ms']:.4g}",
                f"{row['ratio']:.2f}",
                f"{row['floor_ms'] / row['p50_ms']:.0%}",
                "-" if row["error"] is None else f"{row['error']:.1e}",
                "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
            )
        )
    Console(width=None if sys.stdout.isatty() else 120).print(report.rich_table(title, header, cells, text_columns=4))


if __name__ == "__main__":
    sys.exit(main())
