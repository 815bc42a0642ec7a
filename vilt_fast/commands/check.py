"""`vilt-fast check`: is it right for a checkpoint? The error of every output against float64."""

import sys

from . import checkpoint as checkpoints
from .arguments import add_threads, set_threads, whole


def add(commands):
    """The subcommand and its arguments."""
    parser = commands.add_parser("check", help="parity report for your checkpoint; exit 1 if an error budget is broken")
    parser.add_argument("model", metavar="MODEL", help="folder or hub id")
    parser.add_argument(
        "--dtype", action="append", choices=("float32", "bfloat16", "int8"), help="repeatable (default: all)"
    )
    parser.add_argument(
        "--task", choices=sorted(checkpoints.TASKS), help="class to load (default: the config's architecture)"
    )
    parser.add_argument("--batch", type=whole(1, 1024), default=4, help="photographs in the batch (default: 4)")
    parser.add_argument(
        "--seed", type=whole(0, 2**63 - 1), default=0, help="seed of the patch order the reference draws (default: 0)"
    )
    parser.add_argument("--json", action="store_true", help="the report as JSON on standard output, for programs")
    add_threads(parser)
    parser.set_defaults(run=_run)


def _run(arguments, rest):
    from . import report, samples

    set_threads(arguments.threads)
    if not arguments.json:
        import rich  # noqa: F401  missing packages are to be named before minutes of work, not after
    wanted = arguments.dtype or report.PRECISIONS
    left_out = {precision: reason for precision in wanted if (reason := report.unavailable(precision))}
    if arguments.dtype and left_out:
        for precision, reason in left_out.items():
            print(f"vilt-fast check: --dtype {precision}: {reason}", file=sys.stderr)
        return 2
    model = checkpoints.load(arguments.model, arguments.task)
    precisions = [precision for precision in report.PRECISIONS if precision in wanted and precision not in left_out]
    several = type(model).__name__ == checkpoints.TASKS["nlvr2"]
    images = model.config.num_images if several else 1
    inputs = samples.model_inputs(model.config, samples.scenes(arguments.batch * images), arguments.model)
    if several:
        inputs = samples.group_images(inputs, images)
    said = _as_json if arguments.json else _on_screen
    return said(arguments, model, inputs, precisions, left_out)


def _as_json(arguments, model, inputs, precisions, left_out):
    """Print one object; "error", "largest", "hf_error", "allowed" are null where there is none or it is not finite."""
    import json
    import math

    from . import report

    def number(value):
        return value if value is not None and math.isfinite(value) else None

    lines = report.parity(model, inputs, precisions, arguments.seed)
    found = {
        "model": arguments.model,
        "class": type(model).__name__,
        "ok": all(line.ok for line in lines),
        "left_out": left_out,
        "outputs": [
            {
                "output": line.output, "dtype": line.precision, "error": number(line.error),
                "largest": number(line.max_error), "hf_error": number(line.reference_error),
                "allowed": number(line.limit), "ok": line.ok,
            }
            for line in lines
        ],
    }  # fmt: skip
    print(json.dumps(found, indent=2, allow_nan=False))
    return 0 if found["ok"] else 1


def _on_screen(arguments, model, inputs, precisions, left_out):
    """Print a table and a verdict."""
    from rich.console import Console

    from . import report

    console = Console()
    for precision, reason in left_out.items():
        console.print(f"{precision} is left out: {reason}", markup=False)
    with report.progress(console) as bar:
        task = bar.add_task("", total=1 + sum(1 if p == "int8" else 2 for p in precisions))
        lines = report.parity(
            model, inputs, precisions, arguments.seed, lambda what: bar.update(task, description=what, advance=1)
        )
    title = f"{type(model).__name__} from {arguments.model}: error against float64"
    console.print(report.rich_table(title, *report.parity_rows(lines)))
    broken = [line for line in lines if not line.ok]
    if broken:
        names = ", ".join(f"{line.output} in {line.precision}" for line in broken)
        console.print(f"[bold red]Over budget:[/] {names}", soft_wrap=True)
        return 1
    console.print("[green]Every error budget holds.[/]")
    return 0
