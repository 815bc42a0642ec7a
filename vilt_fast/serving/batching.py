"""Pairs of all clients, computed together: whoever comes is packed with whoever waits, to a token budget.

Threads take whatever is next. Images are prepared until the pairs that wait for nothing else fill a batch, or until no
image is left; then these pairs are computed, oldest first, and what is idle shares them. So nobody waits for a batch to
fill up while a thread has nothing to do, and under load every batch is full. A pair's result does not depend on its
batch where that of `score` does not.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
import math
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from ..scoring.pictures import Picture
from ..scoring.workers import Engine, Unreadable, rows_of

_REMEMBERED = 32  # batches that the pace is told from


class Full(Exception):
    """No room for so many pairs; `seconds` until there may be, 1 to 60."""

    def __init__(self, seconds: int):
        super().__init__(f"the queue is full; try again in {seconds} s")
        self.seconds = seconds


class _Job:
    """What one client wants: a result for each place."""

    def __init__(self, number: int, size: int):
        self.number, self.size, self.left = number, size, size
        self.results = [None] * size
        self.future = concurrent.futures.Future()


@dataclasses.dataclass(eq=False)
class _Image:
    """One to be prepared, and the (place, ids) of the pairs that wait for it."""

    job: _Job
    picture: Picture
    pairs: list[tuple[int, np.ndarray]]


@dataclasses.dataclass(eq=False)
class _Pair:
    """One whose image is there."""

    job: _Job
    place: int
    ids: np.ndarray
    image: object
    rows: int


@dataclasses.dataclass(eq=False)
class _Call:
    """Something else to be computed on one of the threads."""

    job: _Job
    function: Callable


class Batching:
    """The queue and the threads that empty it."""

    def __init__(
        self, engine: Engine, token_budget: int, most: int, seen: Callable[[int, int, float], None] = lambda *_: None
    ):
        """At most `most` pairs are in hand; `seen(pairs, rows, seconds)` is told of each batch."""
        self._engine, self._budget, self._most, self._seen = engine, token_budget, most, seen
        self._numbers = itertools.count()
        self._images, self._pairs, self._calls = (collections.deque() for _ in range(3))
        self._ready = 0  # rows of all pairs that wait for nothing
        self._taken = self._idle = 0
        self._closing = False
        self._changed = threading.Condition()
        self._pace = collections.deque(maxlen=_REMEMBERED)  # (when, pairs) of the last batches
        if engine.engine is engine.decoders:
            kinds = [(engine.engine, True, True)] * engine.engines
        else:
            kinds = [(engine.engine, True, False)] * engine.engines + [(engine.decoders, False, True)] * engine.readers
        self._threads = [pool.submit(self._loop, computes, reads) for pool, computes, reads in kinds]

    @property
    def taken(self) -> int:
        """Pairs that were taken and are not done."""
        return self._taken

    def room(self, pairs: int = 1) -> None:
        """Raises Full where so many pairs more would be too many."""
        with self._changed:
            if self._taken + pairs > self._most or self._closing:
                raise Full(self._seconds())

    def submit(self, pairs: Sequence[tuple[np.ndarray, int]], pictures: Sequence[Picture]) -> concurrent.futures.Future:
        """Take pairs of token ids and the number of a picture; the future is of their results [1, ...], in order.

        Cancelling it takes what has not begun out of the queue. Raises Full.
        """
        waiting = [[] for _ in pictures]
        for place, (ids, picture) in enumerate(pairs):
            waiting[picture].append((place, ids))
        job = self._take(len(pairs))
        self._add(self._images, [_Image(job, *both) for both in zip(pictures, waiting, strict=True) if both[1]])
        return job.future

    def call(self, function: Callable) -> concurrent.futures.Future:
        """Take a call that counts as one pair; the future is of a list with its result. Raises Full."""
        job = self._take(1)
        self._add(self._calls, [_Call(job, function)])
        return job.future

    def close(self) -> None:
        """Finish what was taken; take no more."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        concurrent.futures.wait(self._threads)

    def _take(self, size):
        with self._changed:
            if self._taken + size > self._most or self._closing:
                raise Full(self._seconds())
            self._taken += size
            job = _Job(next(self._numbers), size)
        job.future.add_done_callback(lambda future: self._over(job))
        return job

    def _add(self, queue, work):
        with self._changed:
            queue.extend(work)
            self._changed.notify_all()

    def _over(self, job):
        """It is done, has failed, or nobody wants it any more."""
        with self._changed:
            self._taken -= job.size
            if job.left:
                for name in ("_images", "_pairs", "_calls"):
                    setattr(self, name, collections.deque(w for w in getattr(self, name) if w.job is not job))
                self._ready = sum(pair.rows for pair in self._pairs)
            self._changed.notify_all()

    def _seconds(self):
        """Until half of the queue is done, by the pace of the last batches."""
        if len(self._pace) < 2:
            return 1
        done, span = sum(pairs for _, pairs in self._pace), self._pace[-1][0] - self._pace[0][0]
        return min(60, max(1, math.ceil(self._taken / 2 * span / done)))

    # --- the threads --------------------------------------------------------------------------------------------------

    def _loop(self, computes, reads):
        while (work := self._next(computes, reads)) is not None:
            jobs = dict.fromkeys(part.job for part in work)
            try:
                if isinstance(work[0], _Image):
                    self._engine.in_mode(self._prepare, work[0])
                elif isinstance(work[0], _Call):
                    _finish(work[0].job, 0, self._engine.in_mode(work[0].function))
                else:
                    self._engine.in_mode(self._compute, work)
            except BaseException as error:  # whatever one request has met, the thread goes on with the next
                for job in jobs:
                    _fail(job, error)

    def _next(self, computes, reads):
        """Work of one kind, waited for; None when all is done and no more will come."""
        with self._changed:
            self._idle += computes
            try:
                while (work := self._pick(computes, reads)) is None:
                    if self._closing and not self._taken:
                        return None
                    self._changed.wait()
                return work
            finally:
                self._idle -= computes

    def _pick(self, computes, reads):
        if computes and self._calls:
            others = [queue[0].job.number for queue in (self._pairs, self._images) if queue]
            if all(self._calls[0].job.number < number for number in others):
                return [self._calls.popleft()]
        if computes and self._pairs and (self._ready >= self._budget or not (reads and self._images)):
            return self._cut()
        return [self._images.popleft()] if reads and self._images else None

    def _cut(self):
        """The oldest pairs, within the budget, or this thread's share of what is there."""
        share, batch, rows = self._ready / self._idle, [], 0
        while self._pairs:
            next_rows = self._pairs[0].rows
            # The pair that lies across the share goes to the side on which more of it lies.
            if batch and (rows + next_rows > self._budget or rows + next_rows / 2 > share):
                break
            batch.append(self._pairs.popleft())
            rows += batch[-1].rows
        self._ready -= rows
        return batch

    def _prepare(self, work):
        try:
            image = self._engine.image(work.picture)
        except Unreadable as error:
            raise Unreadable(f"{work.picture.name}: {error}") from error
        rows = rows_of(image)
        made = [_Pair(work.job, place, ids, image, len(ids) + rows) for place, ids in work.pairs]
        with self._changed:
            if not work.job.future.done():
                self._pairs.extend(made)
                self._ready += sum(pair.rows for pair in made)
                self._changed.notify_all()

    def _compute(self, work):
        start = time.monotonic()
        values = self._engine.batch([self._engine.text(pair.ids) for pair in work], [pair.image for pair in work])
        for n, pair in enumerate(work):
            _finish(pair.job, pair.place, values[n : n + 1])
        end = time.monotonic()
        with self._changed:
            self._pace.append((end, len(work)))
        self._seen(len(work), sum(pair.rows for pair in work), end - start)


_ENDING = threading.Lock()


def _finish(job, place, value):
    job.results[place] = value
    with _ENDING:
        job.left -= 1
        if not job.left and not job.future.done() and job.future.set_running_or_notify_cancel():
            job.future.set_result(job.results)


def _fail(job, error):
    with _ENDING:
        if not job.future.done() and job.future.set_running_or_notify_cancel():
            job.future.set_exception(error)
