"""`vilt-fast check`: is it right for a checkpoint? The error of every output against float64."""

import sys

from . import checkpoint as checkpoints
from .arguments import add_threads, positive, set_threads


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
    parser.add_argument("--batch", type=positive, default=4, help="photographs in the batch (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the patch order the reference draws (default: 0)")
    add_threads(parser)
    parser.set_defaults(run=_run)


def _run(arguments, rest):
    from rich.console import Console

    from . import report, samples

    set_threads(arguments.threads)
    console = Console()
    model = checkpoints.load(arguments.model, arguments.task)
    precisions = []
    for precision in report.PRECISIONS:
        reason = report.unavailable(precision)
        if arguments.dtype is None and reason:
            console.print(f"{precision} is left out: {reason}", markup=False)
        elif precision in (arguments.dtype or report.PRECISIONS):
            if reason:
                print(f"vilt-fast check: --dtype {precision}: {reason}", file=sys.stderr)
                return 2
            precisions.append(precision)
    several = type(model).__name__ == checkpoints.TASKS["nlvr2"]
    images = model.config.num_images if several else 1
    inputs = samples.model_inputs(model.config, samples.scenes(arguments.batch * images), arguments.model)
    if several:
        inputs = samples.group_images(inputs, images)
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
