"""What the arguments of several commands share."""

import argparse
import os
from pathlib import Path


def whole(low, high):
    """The type of an argument that is a whole number from `low` to `high`, both allowed."""

    def number(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, got {_short(text)}")
        return value

    return number


def above_zero(text):
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {_short(text)}")
    return value


def _short(text):
    return text if len(text) <= 30 else f"{text[:27]}..."


def add_model(parser, otherwise=", else random weights"):
    """--model; `otherwise` says in the help what a command does without one."""
    default = os.environ.get("VILT_FAST_MODEL") or None
    parser.add_argument("--model", default=default, help=f"folder or hub id (default: $VILT_FAST_MODEL{otherwise})")


def check_picture(path):
    """ValueError where `path` has no suffix of a picture that can be drawn; ImportError without matplotlib."""
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    suffix = Path(path).suffix.lstrip(".").lower()
    if suffix not in known:
        raise ValueError(f"{path}: cannot write {suffix or 'a file without suffix'}; pictures are {', '.join(known)}.")


def add_threads(parser):
    parser.add_argument("--threads", type=whole(1, os.cpu_count() or 1), help="CPU threads (default: torch's choice)")


def set_threads(threads):
    """As asked for by --threads."""
    if threads:
        import torch

        torch.set_num_threads(threads)
