"""What the arguments of several commands share."""

import argparse
import os


def positive(text):
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return value


def above_zero(text):
    """A finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def add_model(parser):
    """--model, for commands that run without one too."""
    default = os.environ.get("MODEL") or None
    parser.add_argument("--model", default=default, help="folder or hub id (default: random weights)")


def add_threads(parser):
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's choice)")


def set_threads(threads):
    """As asked for by --threads."""
    if threads:
        import torch

        torch.set_num_threads(threads)
