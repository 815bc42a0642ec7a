"""`python -m benchmarks.run model | linear | attention | block | transport`: medians, ratios, errors, floors, to CSV.

A speed-up is a ratio of medians of interleaved runs in one process, against HuggingFace's eager float32 on the same
input. The floor is what the counted FLOPs and bytes need at the matmul peak and the copy bandwidth measured in the same
run.
"""

import argparse
import csv
import os
import sys
from datetime import date
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from vilt_fast.commands import report

from . import cases as shapes
from . import measure, ops, providers, transport

FIELDS = (
    "subject",
    "provider",
    "case",
    "shape",
    "dtype",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "ratio",
    "error",
    "flops",
    "bytes",
    "peak_gflops",
    "copy_gbs",
    "floor_ms",
    "peak_mib",
    "forward_mib",
    "repeats",
    "load",
    "device",
    "versions",
    "commit",
    "date",
)
RESULTS = measure.ROOT / "benchmarks" / "results"


def main(argv=None):
    """Run one benchmark; returns the exit status."""
    arguments = _arguments(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.what == "memory":
        model = _trunk()
        inputs = shapes.inputs(shapes.CASES[arguments.cases[0]], model.config)
        call = {**providers.PROVIDERS, **providers.PEERS}[arguments.provider].build(model)
        del model
        print(*measure.forward_memory(lambda: call(inputs)))
        return 0
    common = {
        "load": os.getloadavg()[0],
        "device": measure.device(),
        "versions": measure.versions(),
        "commit": measure.commit(),
        "date": date.today().isoformat(),
        "repeats": arguments.repeats,
    }
    if common["load"] > 0.5:
        print(f"The load average is {common['load']:.1f}: other programs share the cores.", file=sys.stderr)
    dtypes = sorted({"float32", *arguments.dtypes})
    with report.progress() as bar:
        step = _stepper(bar)
        before = measure.machine(dtypes, step)
        if arguments.what == "model":
            rows = model_rows(_trunk(), arguments, step)
        elif arguments.what == "transport":
            rows = transport.rows(arguments.repeats, step)
        else:
            rows = ops.rows(arguments.what, arguments.dtypes, arguments.repeats, step)
        # What else ran meanwhile cannot make a machine faster: the better of two measurements is the nearer one.
        after = measure.machine(dtypes, step)
    best = {what: max(before[what] or 0, after[what] or 0) for what in before}
    rows = [finish(row, best, common) for row in rows]
    write(arguments.out or RESULTS / f"{arguments.what}.csv", rows)
    show(f"{arguments.what}: {common['device']}", rows)
    return 0


def _arguments(argv):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.split("\n")[0])
    parser.add_argument(
        "what", choices=("model", *ops.SUBJECTS, "transport", "memory"), help="what to time (memory: used internally)"
    )
    parser.add_argument("--dtypes", nargs="+", default=list(report.PRECISIONS), choices=report.PRECISIONS)
    parser.add_argument("--cases", nargs="+", default=list(shapes.CASES), choices=list(shapes.CASES))
    parser.add_argument(
        "--repeats", type=int, default=9, help="timed rounds, one run of each provider a round (default: 9)"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", action="store_true", help="also torch.compile, and OpenVINO where it is installed")
    parser.add_argument(
        "--memory", action="store_true", help="also peak memory of one forward, each in its own process"
    )
    parser.add_argument("--out", type=Path, help="CSV to write (default: benchmarks/results/<what>.csv)")
    parser.add_argument("--provider", default="hf_eager", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.repeats < 1 or arguments.threads < 1:
        parser.error("--repeats and --threads must be at least 1")
    return arguments


def _stepper(bar):
    """Counts steps on a bar whose length nobody knows before it is over."""
    task = bar.add_task("", total=None)
    return lambda what: bar.update(task, description=what, advance=1)


def _trunk():
    from vilt_fast.commands.checkpoint import random_vqa

    return random_vqa().vilt


def model_rows(model, arguments, step=lambda what: None):
    """Rows of the whole model, without the machine's columns; `model` is a HuggingFace ViltModel in float32."""
    run = providers.chosen(arguments.dtypes, arguments.peers)
    rows = []
    built = {}
    for provider in run:
        step(f"building {provider.name}")
        built[provider.name] = provider.build(model)
    for name in arguments.cases:
        case = shapes.CASES[name]
        inputs = shapes.inputs(case, model.config)
        step(f"{name}: float64")
        truth = _truth(model, inputs)
        errors = {key: report.relative_error(call(inputs).double(), truth) for key, call in built.items()}
        calls = {key: lambda call=call, inputs=inputs: call(inputs) for key, call in built.items()}
        times = report.interleave(calls, arguments.repeats, step=lambda what, name=name: step(f"{name}: {what}"))
        base = report.quantiles(times["hf_eager"])[1]
        for provider in run:
            p20, p50, p80 = report.quantiles(times[provider.name])
            lengths, patches = shapes.work(case, model.config, provider.padded)
            row = {
                "subject": "model",
                "provider": provider.name,
                "case": name,
                "shape": case.shape,
                "dtype": provider.dtype,
                "p20_ms": p20 * 1e3,
                "p50_ms": p50 * 1e3,
                "p80_ms": p80 * 1e3,
                "ratio": base / p50,
                "error": errors[provider.name],
                "flops": shapes.flops(lengths, patches, model.config),
                "bytes": shapes.traffic(lengths, model.config, provider.weight_bytes, provider.activation_bytes),
            }
            if arguments.memory:
                step(f"{name}: memory of {provider.name}")
                peak, above = measure.memory_in_subprocess(provider.name, name)
                row["peak_mib"], row["forward_mib"] = (None if v is None else v / 2**20 for v in (peak, above))
            rows.append(row)
    return rows


@torch.inference_mode()
def _truth(model, inputs):
    """The pooled output of HuggingFace's own model in float64."""
    import copy

    return copy.deepcopy(model).double()(**inputs).pooler_output


def finish(row, machine, common):
    """A row with the floor on this machine (see `measure.machine`) and what says where and when it was measured."""
    peak, bandwidth = machine[row["dtype"]], machine["copy"]
    floor = measure.floor_seconds(row["flops"], row["bytes"], peak, bandwidth) * 1e3
    extra = {"peak_gflops": peak / 1e9 if peak else None, "copy_gbs": bandwidth / 1e9, "floor_ms": floor}
    return {field: {**row, **extra, **common}.get(field) for field in FIELDS}


def write(path, rows, fields=FIELDS, *, append=False):
    """Write rows to a CSV, or append them to one; figures with five significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    append = append and path.is_file()
    with open(path, "a" if append else "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, fields)
        if not append:
            table.writeheader()
        for row in rows:
            table.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})


def show(title, rows):
    """Print the rows as a table."""
    from rich.console import Console

    header = ("case", "provider", "dtype", "median ms", "p20 - p80", "ratio", "of floor", "error", "peak MiB")
    cells = []
    for row in rows:
        cells.append(
            (
                row["case"],
                row["provider"],
                row["dtype"],
                f"{row['p50_ms']:.4g}",
                f"{row['p20_ms']:.4g} - {row['p80_ms']:.4g}",
                f"{row['ratio']:.2f}",
                f"{row['floor_ms'] / row['p50_ms']:.0%}",
                "-" if row["error"] is None else f"{row['error']:.1e}",
                "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
            )
        )
    Console(width=None if sys.stdout.isatty() else 120).print(report.rich_table(title, header, cells, text_columns=3))


if __name__ == "__main__":
    sys.exit(main())
