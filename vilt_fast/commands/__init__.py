"""The command `vilt-fast`: info, demo, check, align, bench.

Exit status: 0 fine; 1 an error budget is broken; 2 bad arguments, or a checkpoint or file that cannot be used.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from . import checkpoint as checkpoints


def main(argv=None):
    """Run one subcommand; returns the exit status."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return arguments.run(arguments, rest)
    except checkpoints.BadCheckpoint as error:
        print(f"vilt-fast {arguments.command}: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("rich", "matplotlib", "transformers", "PIL"):
            raise
        print(f'vilt-fast {arguments.command}: {error}; run: pip install "vilt_fast[demo]"', file=sys.stderr)
        return 2


def _parser():
    parser = argparse.ArgumentParser(prog="vilt-fast", description="Fast ViLT with the same answers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="info | demo | check | align | bench")

    info = commands.add_parser("info", help="versions, backends, CPU features and GPUs of this machine")
    info.set_defaults(run=_info)

    demo = commands.add_parser("demo", help="photographs through HuggingFace's ViLT and the accelerated one")
    demo.add_argument(
        "--model", default=os.environ.get("MODEL") or None, help="folder or hub id (default: random weights)"
    )
    demo.add_argument("--out", default="demo", help="where report.md and report.png go (default: demo)")
    demo.add_argument("--batch", type=_positive, default=8, help="photographs in the batch (default: 8)")
    demo.add_argument("--repeats", type=_positive, default=5, help="timed runs of each model (default: 5)")
    demo.add_argument("--threads", type=_positive, help="CPU threads (default: torch's choice)")
    demo.set_defaults(run=_demo)

    check = commands.add_parser("check", help="parity report for your checkpoint; exit 1 if an error budget is broken")
    check.add_argument("model", metavar="MODEL", help="folder or hub id")
    check.add_argument(
        "--dtype", action="append", choices=("float32", "bfloat16", "int8"), help="repeatable (default: all)"
    )
    check.add_argument(
        "--task", choices=sorted(checkpoints.TASKS), help="class to load (default: the config's architecture)"
    )
    check.add_argument("--batch", type=_positive, default=4, help="photographs in the batch (default: 4)")
    check.add_argument("--seed", type=int, default=0, help="seed of the patch order the reference draws (default: 0)")
    check.add_argument("--threads", type=_positive, help="CPU threads (default: torch's choice)")
    check.set_defaults(run=_check)

    align = commands.add_parser("align", help="which patches of an image each word of a text belongs to: a picture")
    align.add_argument("image", metavar="IMAGE", help="file: JPEG, PNG, ...")
    align.add_argument("text", metavar="TEXT", help="in quotes")
    align.add_argument("-o", "--out", default="alignment.png", help="picture to write: .png, .pdf, .svg, .jpg")
    align.add_argument(
        "--model", default=os.environ.get("MODEL") or None, help="folder or hub id (default: random weights)"
    )
    align.add_argument("--task", choices=sorted(checkpoints.TASKS), help="class to load, as for check")
    align.add_argument("--words", action="store_true", help="a panel a word, not a word piece")
    align.add_argument("--beta", type=_above_zero, default=0.1, help="proximal step of IPOT (default: 0.1)")
    align.add_argument("--iterations", type=_positive, default=1000, help="of IPOT (default: 1000)")
    align.add_argument("--threads", type=_positive, help="CPU threads (default: torch's choice)")
    align.set_defaults(run=_align)

    bench = commands.add_parser("bench", help="the model benchmark, from a source tree; takes benchmarks.run's options")
    bench.set_defaults(run=_bench)
    return parser


def _positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return value


def _above_zero(text):
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def _info(arguments, rest):
    from .info import show

    show()
    return 0


def _demo(arguments, rest):
    from . import demo

    _set_threads(arguments.threads)
    return 0 if demo.run(arguments.model, arguments.out, arguments.batch, arguments.repeats) else 1


def _check(arguments, rest):
    from rich.console import Console

    from . import report, samples

    _set_threads(arguments.threads)
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


def _align(arguments, rest):
    from ..alignment import draw as heatmaps

    _set_threads(arguments.threads)
    try:
        heatmaps.run(
            arguments.image,
            arguments.text,
            arguments.out,
            checkpoint=arguments.model,
            task=arguments.task,
            whole_words=arguments.words,
            beta=arguments.beta,
            iterations=arguments.iterations,
        )
    except (OSError, ValueError) as error:
        print(f"vilt-fast align: {error}", file=sys.stderr)
        return 2
    return 0


def _bench(arguments, rest):
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "run.py").is_file():
        print(
            "vilt-fast bench: the benchmarks live in the source tree, not in the installed package; "
            "clone the repository and run: python -m benchmarks.run model",
            file=sys.stderr,
        )
        return 2
    return subprocess.run([sys.executable, "-m", "benchmarks.run", "model", *rest], cwd=root, check=False).returncode


def _set_threads(threads):
    if threads:
        import torch

        torch.set_num_threads(threads)


if __name__ == "__main__":
    sys.exit(main())
