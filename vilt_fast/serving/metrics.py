"""What Prometheus is told: requests, pairs, batches, the queue, the process."""

from __future__ import annotations

from collections.abc import Callable

import prometheus_client as prometheus

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_PAIRS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counts of one service, in a registry of their own."""

    def __init__(self):
        self._registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=self._registry)
        own = dict(registry=self._registry)
        self.requests = prometheus.Counter(
            "vilt_fast_requests", "Answered requests", ("path", "status"), **own
        )  # fmt: skip
        self.seconds = prometheus.Histogram(
            "vilt_fast_request_seconds", "From the first byte of a request's head to its answer", ("path",),
            buckets=_SECONDS, **own,
        )  # fmt: skip
        self._pairs = prometheus.Counter("vilt_fast_pairs", "Pairs that were computed", **own)
        self._rows = prometheus.Counter("vilt_fast_rows", "Packed rows of these", **own)
        self._batch = prometheus.Histogram("vilt_fast_batch_pairs", "Pairs of a batch", buckets=_PAIRS, **own)
        self._busy = prometheus.Counter("vilt_fast_batch_seconds", "Seconds of batches, of all threads", **own)
        self._queue = prometheus.Gauge("vilt_fast_queue_pairs", "Pairs that were taken and are not done", **own)
        self._bodies = prometheus.Gauge("vilt_fast_body_bytes", "Bytes of requests that are read or wait", **own)

    def seen(self, pairs: int, rows: int, seconds: float) -> None:
        """A batch."""
        self._pairs.inc(pairs)
        self._rows.inc(rows)
        self._batch.observe(pairs)
        self._busy.inc(seconds)

    def watch(self, queue: Callable[[], int], bodies: Callable[[], int]) -> None:
        """Where the gauges look when somebody asks."""
        self._queue.set_function(queue)
        self._bodies.set_function(bodies)

    def text(self) -> bytes:
        return prometheus.generate_latest(self._registry)


CONTENT_TYPE = prometheus.CONTENT_TYPE_LATEST  #: of `Metrics.text`
