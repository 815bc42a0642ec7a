"""A run that somebody kills, or one of several ranks: a grid of a tiny model, streamed to a file."""

import contextlib
import multiprocessing
import os
import runpy
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

import vilt_fast
from support import scoring
from support.models import build


def model():
    return build("retrieval", torch.float32)


def run(out, folder):
    """The scores of all images in `folder`, in tiles of a few pairs that are synchronised one by one."""
    from vilt_fast.scoring import journal

    tiny, often = model(), journal._EVERY
    paths = sorted(Path(folder).iterdir())
    options = dict(out=out, resume=True) if out else {}
    try:
        journal._EVERY = 0  # seconds
        return vilt_fast.score(
            tiny, scoring.texts(), paths, processor=scoring.processor(tiny), token_budget=32, **options
        )
    finally:
        journal._EVERY = often


def start(*given, target=None):
    """A process that does `work`, or `target`. What they import is imported once, by what they are forked from."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    process = processes.Process(target=target or work, args=given)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # what the first process looks for it in
    try:
        process.start()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    return process


def work(out, folder, address=None, rank=0, world=1):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if address is not None:
        torch.distributed.init_process_group("gloo", f"file://{address}", rank=rank, world_size=world)
    found = run(out, folder)
    if address is not None:
        np.save(f"{address}.{rank}.npy", found.scores)
        torch.distributed.destroy_process_group()


def as_by_torchrun(path, arguments, rank, world, port, folder):
    """A script as torchrun starts it, its output to a file."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in meeting.items()})
    sys.argv = [str(path), *map(str, arguments)]
    with open(folder / f"{rank}.txt", "w") as file, contextlib.redirect_stdout(file):
        runpy.run_path(str(path), run_name="__main__")
