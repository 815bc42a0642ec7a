"""The command `vilt-fast`, a file a subcommand: info, demo, train-demo, check, align, score, serve, bench.

Exit status: 0 fine; 1 an error budget is broken; 2 bad arguments, or a checkpoint, file or setting that cannot be used.
"""

import argparse
import os
import sys

from .. import __version__
from . import align, bench, check, demo, info, score, serve, train_demo
from .checkpoint import BadCheckpoint

COMMANDS = (info, demo, train_demo, check, align, score, serve, bench)
_NAMES = [command.__name__.rpartition(".")[2].replace("_", "-") for command in COMMANDS]


def main(argv=None):
    """Run one subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="vilt-fast", description="Fast ViLT with the same answers.")
    parser.add_argument("--version", action="version", version=f"vilt-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar=" | ".join(_NAMES))
    for command in COMMANDS:
        command.add(commands)
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        _look_at_the_setting()
        return arguments.run(arguments, rest)
    except BrokenPipeError:  # whoever read the output has seen enough, as with `| head`
        sys.stdout = open(os.devnull, "w")
        return 1
    except (BadCheckpoint, BadSetting) as error:
        print(f"vilt-fast {arguments.command}: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("rich", "matplotlib", "transformers", "PIL"):
            raise
        print(f'vilt-fast {arguments.command}: {error}; run: pip install "vilt_fast[demo]"', file=sys.stderr)
        return 2


class BadSetting(Exception):
    """A variable of the environment that the native part cannot follow; the message names the values it knows."""


def _look_at_the_setting():
    """BadSetting for a VILT_FAST_CPU_ISA that is not there: before minutes of work, not after."""
    try:
        from .. import _C
    except ImportError:
        return
    try:
        _C.cpu_features()
    except ValueError as error:
        raise BadSetting(error) from None
