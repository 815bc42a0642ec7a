"""Batches filled to a number of tokens: packed rows are what a step costs, whatever shapes the images have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from .draws import ORDER, generator


class TokenBudget(Sampler):
    """Batches of keys (epoch, index), samples in an order drawn an epoch, each batch as many as fit into the budget.

    A `batch_sampler` for torch's `DataLoader`. The keys carry the epoch to workers that outlive it.

    Args:
        lengths: [samples], the packed tokens of each: `PairDataset.lengths` tells them.
        budget: tokens of a batch, at most. samples: samples of a batch, at most (None: any number).
        seed: of the order. shuffle: whether there is one, or samples come as they are numbered.
        drop_last: leave out the last batch of an epoch, which is seldom full.
        rank, world: of how many processes this is which: each takes every `world`-th batch, and all take as many; the
            first batches come again where they do not divide.

    Raises:
        ValueError: a sample that is longer than the budget, no samples, or a rank that is not below world.
    """

    def __init__(
        self, lengths: Sequence[int] | np.ndarray, budget: int, *, samples: int | None = None, seed: int = 0,
        shuffle: bool = True, drop_last: bool = False, rank: int = 0, world: int = 1,
    ):  # fmt: skip
        self.lengths = np.asarray(lengths, np.int64)
        if not self.lengths.size:
            raise ValueError("TokenBudget: there are no samples.")
        longest = int(self.lengths.argmax())
        if self.lengths[longest] > budget:
            raise ValueError(
                f"TokenBudget: sample {longest} has {self.lengths[longest]} tokens, more than the budget of {budget}."
            )
        if not 0 <= rank < world:
            raise ValueError(f"TokenBudget: rank {rank} of {world}; expected 0 to {world - 1}.")
        self.budget, self.samples, self.seed, self.shuffle = budget, samples, seed, shuffle
        self.drop_last, self.rank, self.world = drop_last, rank, world
        self.set_epoch(0)

    def set_epoch(self, epoch: int, batch: int = 0) -> None:
        """Which epoch the next iteration is, and the batch it begins with: a run goes on where another one stopped."""
        self.epoch, self.batch = epoch, batch
        order = np.arange(len(self.lengths))
        if self.shuffle:
            order = generator(self.seed, epoch, 0, ORDER).permutation(order)
        batches = list(self._filled(order))
        if self.drop_last and len(batches) > self.world:
            batches.pop()
        every = -(-len(batches) // self.world)
        self._batches = [batches[i % len(batches)] for i in range(self.rank, every * self.world, self.world)]

    def _filled(self, order):
        """Slices of `order`, as long as they fit."""
        ends = self.lengths[order].cumsum()
        begin = 0
        while begin < len(order):
            before = ends[begin - 1] if begin else 0
            end = int(np.searchsorted(ends, before + self.budget, side="right"))
            end = min(end, begin + self.samples) if self.samples else end
            yield order[begin:end]
            begin = end

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self._batches[self.batch :]:
            yield [(self.epoch, int(index)) for index in batch]

    def __len__(self) -> int:
        """Batches of this epoch that are still to come."""
        return len(self._batches) - self.batch
