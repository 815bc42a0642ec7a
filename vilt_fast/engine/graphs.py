"""CUDA graphs of the packed encoder: one launch for all blocks, captured per bucket of sizes and replayed.

At batch 1 a forward is some hundred kernels of a few microseconds each, and launching them takes longer than running
them. A graph has fixed shapes, so a batch is put into the next larger bucket: rows that belong to no sample are
computed and thrown away, samples that are not there are empty. What attention reads about lengths lies in buffers that
are written before each replay; parameters are read where they are, so that updating one in place needs no new capture.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable

import torch

from .. import record
from .asked import Asked
from .packing import Packing, Selection, Spans

MAX_GRAPHS = 32  #: kept at a time, the least recently used goes first


@dataclasses.dataclass(frozen=True, slots=True)
class Bucket:
    """Sizes that a graph is captured for."""

    rows: int
    samples: int
    max_seqlen: int
    wanted: tuple[int, int] | None  #: rows that are wanted of the last block, and most of a sample

    @classmethod
    def of(cls, packing: Packing, wanted: Selection | None = None) -> Bucket:
        """The smallest that holds a packing: at most an eighth more rows, or 63, than are real."""
        rows, longest = packing.total_rows, packing.max_seqlen
        step = max(64, _power_of_two(rows) // 8)
        samples = _power_of_two(packing.batch)
        longest, some = _multiple(longest, 64), None
        if wanted is not None:
            one = wanted.max_seqlen == 1  # as a pooler wants them: a size of its own
            some = (samples, 1) if one else (_multiple(len(wanted.rows), step), longest)
        return cls(_multiple(rows, step), samples, longest, some)


def _multiple(n, step):
    return -(-n // step) * step


def _power_of_two(n):
    return 1 << (n - 1).bit_length()


class EncoderGraphs(Asked):
    """The graphs of one model. Calls from several threads and streams take turns."""

    def __init__(self):
        super().__init__("cuda_graphs")
        self._graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self._lock = threading.Lock()
        self._shared = {}  #: {device: (memory pool of all graphs, event after what was launched last)}

    def __len__(self):
        return len(self._graphs)

    def run(
        self,
        prepare: Callable,
        rows: torch.Tensor,
        packing: Packing,
        identity: tuple,
        wanted: Selection | None = None,
    ) -> torch.Tensor | None:
        """`prepare()(rows, spans, wanted)`, captured the first time and replayed from then on; None where that is None.

        Args:
            prepare: makes the function [N, D] -> [N or W, D] that is captured; that one must not wait for the device.
            identity: everything that a captured graph holds fixed of its model: addresses of parameters, eps. Graphs
                of another identity are dropped.
        """
        kind = rows.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = (Bucket.of(packing, wanted), rows.dtype, rows.device, autocast, identity)
        with self._lock, self._turn(rows.device) as pool:
            graph = self._graphs.get(key)
            if graph is None:
                encode = prepare()
                if encode is None:
                    return None
                for stale in [k for k in self._graphs if k[-1] != identity]:
                    del self._graphs[stale]
                while len(self._graphs) >= MAX_GRAPHS:
                    self._graphs.popitem(last=False)
                with record.unheard():
                    graph = self._graphs[key] = _Graph(encode, rows, packing, wanted, key[0], pool)
            self._graphs.move_to_end(key)
            return graph(rows, packing, wanted)

    @contextlib.contextmanager
    def _turn(self, device):
        """Buffers and pool are the current stream's own within: no two graphs run at the same time."""
        if device.type != "cuda":
            yield None
            return
        with torch.cuda.device(device):
            if device not in self._shared:
                self._shared[device] = torch.cuda.graph_pool_handle(), torch.cuda.Event()
            pool, done = self._shared[device]
            done.wait()  # for nothing, the first time
            try:
                yield pool
            finally:
                done.record()

    def __getstate__(self):
        return {}

    def __setstate__(self, state):
        self.__init__()


class _Graph:
    def __init__(self, encode, rows, packing, wanted, bucket, pool):
        with torch.inference_mode(False), torch.no_grad():  # tensors that a call in either mode may write to
            self.rows = torch.zeros(bucket.rows, rows.shape[1], dtype=rows.dtype, device=rows.device)
            self.cu_seqlens = torch.zeros(bucket.samples + 1, dtype=torch.int32, device=rows.device)
            self.seqused_k = torch.zeros(bucket.samples, dtype=torch.int32, device=rows.device)
            self.wanted = None
            if bucket.wanted is not None:
                count, most = bucket.wanted
                chosen = torch.zeros(count, dtype=torch.int64, device=rows.device)
                self.wanted = Selection(chosen, torch.zeros_like(self.cu_seqlens), most)
            self._fill(rows, packing, wanted)
            spans = Spans(self.cu_seqlens, self.seqused_k, bucket.max_seqlen)
            self.recording = Recording(lambda: encode(self.rows, spans, self.wanted), rows.device, pool)

    def __call__(self, rows, packing, wanted):
        self._fill(rows, packing, wanted)
        self.recording.replay()
        count = len(rows) if wanted is None else len(wanted.rows)
        return self.recording.result[:count].clone()  # the next replay writes over it

    def _fill(self, rows, packing, wanted):
        self.rows[: len(rows)].copy_(rows)
        self.cu_seqlens[: packing.batch + 1].copy_(packing.cu_seqlens)
        self.cu_seqlens[packing.batch + 1 :].fill_(len(rows))
        self.seqused_k[: packing.batch].copy_(packing.seqused_k)
        self.seqused_k[packing.batch :].zero_()
        if wanted is not None:
            count = len(wanted.rows)
            self.wanted.rows[:count].copy_(wanted.rows)  # beyond, rows of earlier calls, which nobody reads
            self.wanted.cu_seqlens[: packing.batch + 1].copy_(wanted.cu_seqlens)
            self.wanted.cu_seqlens[packing.batch + 1 :].fill_(count)


class Recording:
    """What a function launches, to be launched again as one: `result` is what it returned, and keeps its place.

    Warmed up and captured on one stream of the device that is named. torch's own capture stream is one a process, on
    the device that was current first: what another device launches meanwhile is not in the graph.
    """

    def __init__(self, function: Callable, device: torch.device, pool):
        kind = device.type
        with (
            _recording,
            torch.cuda.device(device),
            # A weight that autocast has cast and cached would be read where it no longer is.
            torch.autocast(
                kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
            ),
        ):
            side, current = _capture_stream(device), torch.cuda.current_stream(device)
            side.wait_stream(current)
            with torch.cuda.stream(side):  # compilation, workspaces: what must not happen while capturing
                for _ in range(2):
                    function()
            current.wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                self.result = function()
        self.replay = self._graph.replay


_recording = threading.Lock()  # a stream captures one graph at a time


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def why_not_usable(rows: torch.Tensor) -> str:
    """Why no graph can be captured or replayed here and now, or ""."""
    if not rows.is_cuda:
        return f"CUDA graphs are for GPUs, and the tensors are on {rows.device}"
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return "the forward is itself being compiled, or captured as a graph"
    return ""
