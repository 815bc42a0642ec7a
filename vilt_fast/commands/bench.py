"""`vilt-fast bench`: the model benchmark of the source tree."""

import subprocess
import sys
from pathlib import Path


def add(commands):
    """The subcommand; what follows it goes to the benchmark."""
    parser = commands.add_parser(
        "bench", help="the model benchmark, from a source tree; takes benchmarks.run's options"
    )
    parser.set_defaults(run=_run)


def _run(arguments, rest):
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "run.py").is_file():
        print(
            "vilt-fast bench: the benchmarks live in the source tree, not in the installed package; "
            "clone the repository and run: python -m benchmarks.run model",
            file=sys.stderr,
        )
        return 2
    return subprocess.run([sys.executable, "-m", "benchmarks.run", "model", *rest], cwd=root, check=False).returncode
