"""Several processes, each with its part of the tiles: `torch.distributed`, by whatever backend it was started with."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from ..errors import InputError
from .journal import InMemory
from .tiling import Tile, Tiling

_PIECE = 1 << 26  # bytes sent at a time


def here() -> tuple[int, int]:
    """(rank, ranks) of this process: (0, 1) where torch.distributed is not initialised."""
    if not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


@contextlib.contextmanager
def started(device: str) -> Iterator[tuple[int, int]]:
    """`here`, in a process that torchrun has started as one of several: they meet, and part again at the end.

    Raises:
        InputError: `device` is one GPU, by its number, for all of them.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) < 2 or distributed.is_initialized()
    if not alone:
        if device.startswith("cuda:"):
            raise InputError(f"score: {device} is one GPU, and each of several processes has its own: say cuda.")
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield here()
    finally:
        if not alone:
            distributed.destroy_process_group()


def tiles_of(tiling: Tiling, rank: int, world: int) -> Iterator[Tile]:
    """The tiles of one rank: those of its images, so that no two ranks read one; of fewer images, of all of them."""
    by_group = tiling.groups >= world
    return (tile for tile in tiling if (tile.group if by_group else tile.number) % world == rank)


def in_a_row(tiles) -> Iterator[tuple[Tile, np.ndarray]]:
    """(tile, its cells in the array of its rank, which holds no others)."""
    start = 0
    for tile in tiles:
        yield tile, np.arange(start, start + len(tile.cells))
        start += len(tile.cells)


def path_of(out, rank: int, world: int) -> Path:
    """Where a rank keeps its part of `out`."""
    path = Path(out)
    return path.with_name(f"{path.stem}.{rank}-of-{world}{path.suffix}")


def together(mine, errors, tiling: Tiling, shape, dtype, width, out, device):
    """(the whole array, all errors) of every rank's part, on every rank; rank 0 also writes `out`."""
    rank, world = here()
    on = device if distributed.get_backend() == "nccl" else torch.device("cpu")
    everything, gathered = InMemory(shape, dtype, width), [None] * world
    # NCCL sends from and to the current GPU, whichever the tensors are on.
    with torch.cuda.device(on) if on.type == "cuda" else contextlib.nullcontext():
        for sender in range(world):
            sizes = np.array([len(tile.cells) for tile in tiles_of(tiling, sender, world)], np.int64)
            data = np.zeros((int(sizes.sum()), width), dtype) if sender != rank else np.array(mine).reshape(-1, width)
            flat = data.reshape(-1).view(np.uint8)
            for start in range(0, len(flat), _PIECE):
                piece = torch.from_numpy(flat[start : start + _PIECE]).to(on)
                distributed.broadcast(piece, sender)
                flat[start : start + _PIECE] = piece.cpu().numpy()
            start = 0
            for tile in tiles_of(tiling, sender, world):
                everything.put(tile.number, tile.cells, data[start : start + len(tile.cells)], {})
                start += len(tile.cells)
        distributed.all_gather_object(gathered, errors)
        array = everything.array()
        if out is not None:
            if rank == 0:
                temporary = Path(f"{out}.part")
                with open(temporary, "wb") as file:
                    np.save(file, array)
                temporary.replace(out)
            distributed.barrier()
    return array, {image: why for part in gathered for image, why in part.items()}
