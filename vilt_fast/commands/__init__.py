"""The command `vilt-fast`, a file a subcommand: info, demo, check, align, bench.

Exit status: 0 fine; 1 an error budget is broken; 2 bad arguments, or a checkpoint or file that cannot be used.
"""

import argparse
import sys

from . import align, bench, check, demo, info
from .checkpoint import BadCheckpoint

COMMANDS = (info, demo, check, align, bench)


def main(argv=None):
    """Run one subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="vilt-fast", description="Fast ViLT with the same answers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="info | demo | check | align | bench")
    for command in COMMANDS:
        command.add(commands)
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return arguments.run(arguments, rest)
    except BadCheckpoint as error:
        print(f"vilt-fast {arguments.command}: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("rich", "matplotlib", "transformers", "PIL"):
            raise
        print(f'vilt-fast {arguments.command}: {error}; run: pip install "vilt_fast[demo]"', file=sys.stderr)
        return 2
