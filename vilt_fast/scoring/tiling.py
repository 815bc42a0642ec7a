"""Which pairs are computed together: tiles of pairs, and the batches of a tile.

A tile is what the journal knows as done. It follows from the numbers of texts, images and pairs, the lengths of the
texts and the token budget alone, so that it is the same when a run is resumed, before any image is read. Tiles go image
by image: an image is wanted by tiles in a row, and can be forgotten after.

A batch is a part of a tile within the token budget. Batches of a tile have about as many rows each, so many that all
workers have something to do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

_ROWS = 128  #: that the smallest usual pair has (a short text, a square image): only for how many pairs make a tile
_BATCHES = 4  #: in a tile, or more


@dataclasses.dataclass(frozen=True)
class Tile:
    """Pairs that are done together, and where their scores go."""

    number: int
    group: int  #: of the images, which no other group has
    texts: np.ndarray  #: int64 [n]
    images: np.ndarray  #: int64 [n]
    cells: np.ndarray  #: int64 [n] places in the flattened result


class Tiling:
    """All tiles of a grid [N, M], or of a list of pairs."""

    def __init__(self, lengths: Sequence[int], images: int, pairs: np.ndarray | None, token_budget: int):
        self.pairs, self.images = pairs, images
        self._order = np.argsort(-np.asarray(lengths), kind="stable")  # longest first
        self._size = max(8, _BATCHES * token_budget // _ROWS)
        texts = len(lengths)
        if pairs is None:
            self._together = min(images, -(-self._size // texts))
            self._chunk = min(texts, -(-self._size // self._together))
            self.groups = -(-images // self._together)
            self.tiles = self.groups * -(-texts // self._chunk)
            self.count = texts * images
        else:
            rank = np.empty(texts, np.int64)
            rank[self._order] = np.arange(texts)
            self._listed = np.lexsort((rank[pairs[:, 0]], pairs[:, 1]))
            self.groups = self.tiles = -(-len(pairs) // self._size)
            self.count = len(pairs)

    def __iter__(self) -> Iterator[Tile]:
        if self.pairs is not None:
            for number in range(self.tiles):
                cells = self._listed[number * self._size : (number + 1) * self._size]
                yield Tile(number, number, self.pairs[cells, 0], self.pairs[cells, 1], cells)
            return
        number = 0
        for group in range(self.groups):
            images = np.arange(group * self._together, min(self.images, (group + 1) * self._together))
            for start in range(0, len(self._order), self._chunk):
                texts = self._order[start : start + self._chunk]
                text, image = np.repeat(texts, len(images)), np.tile(images, len(texts))
                yield Tile(number, group, text, image, text * self.images + image)
                number += 1


def batches(rows: np.ndarray, token_budget: int, workers: int) -> list[np.ndarray]:
    """The pairs of a tile, whose packed rows are `rows` [n], as batches of their numbers, longest first.

    A batch has at most `token_budget` rows, or one pair; there are as many for each worker, or one pair a batch.
    """
    order = np.argsort(-rows, kind="stable")
    if not len(order):
        return []
    ends, total = np.cumsum(rows[order]), int(rows.sum())
    count = max(1, -(-total // token_budget))
    while True:
        count = min(len(rows), -(-count // workers) * workers)
        goals = total * np.arange(1, count) / count
        # The pair that lies across a goal goes to the side on which more of it lies.
        cuts = np.unique(np.searchsorted(ends - rows[order] / 2, goals))
        made = np.split(order, cuts[(cuts > 0) & (cuts < len(order))])
        if count == len(rows):
            return np.split(order, len(order))
        if all(len(batch) == 1 or rows[batch].sum() <= token_budget for batch in made):
            return made
        count += workers
