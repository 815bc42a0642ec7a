"""The pairs of tiles, computed: images are prepared ahead of the batches that want them, in bounded memory.

On a CPU each thread is an engine of its own: it takes whatever is next, an image to decode and embed or a batch of
pairs to encode, and waits for no other. On a GPU decoders also embed; one thread runs the blocks.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import os
import threading
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from ..errors import InputError
from ..models.pairs import Pairs
from . import tiling
from .pictures import Picture

MOST_WORKERS = 8  # threads of an engine
_KEPT_TEXTS = 1 << 26  # bytes of embedded texts; embedding one again takes about as long as copying it


@dataclasses.dataclass(frozen=True)
class Done:
    """A tile, its logits reduced to what is kept, and the images of it that could not be read."""

    tile: tiling.Tile
    values: np.ndarray  #: [n, ...], NaN where an image could not be read
    errors: dict[int, str]


class Unreadable(Exception):
    """An image that is none, or none for this model; the message says why in a line."""


class Engine:
    """Threads that compute pairs, and what they do: prepare an image or a text, compute a batch. A context manager."""

    def __init__(self, pairs: Pairs, most: int, kept):
        """At most `most` threads compute; `kept` makes an array [n, ...] of what to keep of logits [n, classes]."""
        self._pairs, self._kept = pairs, kept
        self.whole = pairs.why_whole()
        self._autocast = autocast()
        threads = torch.get_num_threads()
        if pairs.device.type == "cpu":
            self.engines = self.readers = 1 if self.whole else min(threads, MOST_WORKERS, most)
            self.engine = self.decoders = _pool(self.engines, max(1, threads // self.engines))
        else:
            self.engines, self.readers = 1, min(MOST_WORKERS, os.cpu_count() or 1)
            self.engine, self.decoders = _pool(1, threads), _pool(self.readers, 1)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.close()

    def close(self) -> None:
        """End the threads, when they are done with what they are doing."""
        for pool in dict.fromkeys((self.engine, self.decoders)):
            pool.shutdown(wait=True, cancel_futures=True)

    def in_mode(self, function, *arguments):
        """Threads start with the modes of torch as they come; ours are those of the caller, without gradients."""
        with torch.no_grad(), contextlib.ExitStack() as stack:
            if self._pairs.device.type == "cuda":
                stack.enter_context(torch.cuda.device(self._pairs.device))
            for kind, dtype in self._autocast.items():
                stack.enter_context(torch.autocast(kind, dtype))
            return function(*arguments)

    def image(self, picture: Picture):
        """Embedded rows of an image; its pixels and mask where the model takes whole pairs.

        Raises:
            Unreadable: it is none, or none for this model.
        """
        try:
            pixels, mask = picture.pixels()
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # other people's files, read by other people's code
            raise _unreadable(error) from error
        pixels = pixels.to(self._pairs.device, self._pairs.dtype, non_blocking=True)
        mask = None if mask is None else mask.to(self._pairs.device)
        if self.whole:
            return pixels, mask
        try:
            return self._pairs.image(pixels, mask)
        except InputError as error:
            raise _unreadable(error) from error

    def text(self, ids: np.ndarray) -> torch.Tensor:
        """Embedded rows of token ids; the ids where the model takes whole pairs."""
        placed = torch.from_numpy(ids).to(self._pairs.device)
        return placed if self.whole else self._pairs.text(placed)

    def batch(self, texts: Sequence[torch.Tensor], images: Sequence) -> np.ndarray:
        """What is kept of each pair of a prepared text and a prepared image."""
        if self.whole:
            made = [self._pairs.whole(text, *image) for text, image in zip(texts, images, strict=True)]
        else:
            pooled = self._pairs.pooled(texts, images)
            # A product of a library may depend on how many rows it is given: a CPU gives it one at a time.
            parts = [row.clone() for row in pooled.split(1)] if pooled.device.type == "cpu" else [pooled]
            made = [self._pairs.logits(part) for part in parts]
        return self._kept(torch.cat(made))


class Workers(Engine):
    """Computes tiles, in order. Use as a context manager."""

    def __init__(
        self, pairs: Pairs, ids: Sequence[np.ndarray], pictures: Sequence[Picture], token_budget: int, count: int, kept
    ):
        """`count` pairs in all; `kept` is that of the engine."""
        super().__init__(pairs, count, kept)
        self._ids, self._pictures, self._budget = ids, pictures, token_budget
        self._texts, self._room, self._keeping = {}, _KEPT_TEXTS, threading.Lock()
        first = {}  # images that are the same one are read as the first of them
        self._same = [first.setdefault(picture.key(), place) for place, picture in enumerate(pictures)]

    def run(self, tiles: Iterable[tiling.Tile]) -> Iterator[Done]:
        """Each tile's result, in order; the work of at most three of them is under way."""
        images: dict[int, concurrent.futures.Future] = {}
        waiting, running = collections.deque(), collections.deque()
        for tile in tiles:
            for image in self._wanted(tile):
                if image not in images:
                    images[image] = self.decoders.submit(self.in_mode, self.image, self._pictures[image])
            waiting.append(tile)
            if len(waiting) < 2:
                continue
            running.append(self._start(waiting.popleft(), images))
            if len(running) == 2:
                yield self._finish(*running.popleft())
            needed = {image for kept in [*waiting, *(r[0] for r in running)] for image in self._wanted(kept)}
            images = {image: future for image, future in images.items() if image in needed}
        for tile in waiting:
            running.append(self._start(tile, images))
        for started in running:
            yield self._finish(*started)

    def _wanted(self, tile):
        return dict.fromkeys(self._same[image] for image in tile.images.tolist())

    def _start(self, tile, images):
        """(tile, errors, [(pairs of a batch, future)]) of a tile whose images are being prepared."""
        ready, errors = {}, {}
        for image in self._wanted(tile):
            try:
                ready[image] = images[image].result()
            except Unreadable as error:
                errors[image] = str(error)
        of = [self._same[image] for image in tile.images.tolist()]
        good = np.array([place for place, image in enumerate(of) if image in ready], np.int64)
        rows = np.array([len(self._ids[tile.texts[p]]) + rows_of(ready[of[p]]) for p in good], np.int64)
        batches = []
        for batch in tiling.batches(rows, self._budget, self.engines):
            chosen = good[batch]
            given = [(int(tile.texts[p]), ready[of[p]]) for p in chosen]
            batches.append((chosen, self.engine.submit(self.in_mode, self._batch, given)))
        return tile, {i: errors[s] for i, s in enumerate(self._same) if s in errors} if errors else {}, batches

    def _finish(self, tile, errors, batches):
        empty = self._kept(torch.zeros(0, 2))
        values = np.zeros((len(tile.cells), *empty.shape[1:]), empty.dtype)
        missing(values)
        for chosen, future in batches:
            values[chosen] = future.result()
        return Done(tile, values, errors)

    def _batch(self, given):
        """What is kept of each of some pairs (text, prepared image)."""
        return self.batch([self._text(text) for text, _ in given], [image for _, image in given])

    def _text(self, text):
        rows = self._texts.get(text)
        if rows is None:
            rows = self.text(self._ids[text])
            size = rows.numel() * rows.element_size()
            with self._keeping:
                if text not in self._texts and size <= self._room:
                    self._room -= size
                    self._texts[text] = rows
        return rows


def autocast() -> dict[str, torch.dtype]:
    """{kind of device: dtype} of the autocast that is on in this thread."""
    return {kind: torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)}


def missing(values: np.ndarray) -> None:
    """Fill an array of results, of floats or of (answer, score), with what says that there is none."""
    if values.dtype.names:
        values["answer"], values["score"] = -1, np.nan
    else:
        values.fill(np.nan)


def _unreadable(error: Exception) -> Unreadable:
    return Unreadable(f"{type(error).__name__}: {error}".strip().splitlines()[0])


def rows_of(image) -> int:
    """Rows of an embedded image; for one of pixels anything that grows with it."""
    return image[0][0, 0].numel() >> 10 if isinstance(image, tuple) else len(image)


def _pool(workers: int, threads: int) -> concurrent.futures.ThreadPoolExecutor:
    """`workers` threads, each of which computes with `threads` threads of torch."""
    before, ready = torch.get_num_threads(), threading.Barrier(workers + 1)
    pool = concurrent.futures.ThreadPoolExecutor(workers, "vilt_fast", torch.set_num_threads, (threads,))
    for _ in range(workers):
        pool.submit(ready.wait)
    ready.wait()
    torch.set_num_threads(before)  # what it sets is also what threads that start later have
    return pool
