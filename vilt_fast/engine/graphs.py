"""CUDA graphs: one launch for a whole forward, or for all blocks of one, captured per bucket of sizes and replayed.

At batch 1 a forward is some hundred kernels of a few microseconds each, and launching them takes longer than running
them. A graph has fixed shapes, so a batch is put into the next larger bucket: rows that belong to no sample are
computed and thrown away, samples that are not there are empty. What a call brings (rows, ids, pixels, where rows lie)
is written into buffers before each replay; parameters are read where they are, so that updating one in place needs no
new capture. What else a graph holds fixed of its model is compared at every call by who runs it.

All graphs of a device share one pool of memory and, for their largest inputs, one buffer; the least recently used goes
where there are too many. A capture takes as long as a few forwards: batches that never repeat a bucket are not captured
on and on, but run as they are.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Sequence

import torch

from .. import record
from .asked import Asked
from .packing import Packing, Selection, Spans
from .snapshot import Snapshot

MAX_GRAPHS = 64  #: kept at a time, the least recently used goes first
MOST_ROWS = 1 << 14  #: of a bucket; beyond, the GPU takes longer for a forward than the host for its launches
FREE, PAID_BY = 32, 16  #: captures that need not pay, and replays that pay for one more


@dataclasses.dataclass(frozen=True, slots=True)
class Bucket:
    """Sizes that a graph of blocks is captured for."""

    rows: int
    samples: int
    max_seqlen: int
    wanted: tuple[int, int] | None  #: rows that are wanted of the last block, and most of a sample

    @classmethod
    def of(cls, packing: Packing, wanted: Selection | None = None) -> Bucket:
        """The smallest that holds a packing."""
        longest, samples, some = length_of(packing.max_seqlen), power_of_two(packing.batch), None
        if wanted is not None:
            one = wanted.max_seqlen == 1  # as a pooler wants them: a size of its own
            some = (samples, 1) if one else (rows_of(len(wanted.rows)), longest)
        return cls(rows_of(packing.total_rows), samples, longest, some)


def rows_of(n: int, least: int = 64) -> int:
    """Rows of the bucket for n: at most an eighth more, or less than `least` more."""
    return multiple(n, max(least, power_of_two(n) // 8))


def length_of(n: int) -> int:
    """Longest sample of the bucket for one of n rows.

    The limits of attention's configurations are multiples of 32: a bucket takes the one that its batches would take.
    """
    return multiple(n, 32)


def multiple(n: int, step: int) -> int:
    """The next multiple of a step."""
    return -(-n // step) * step


def power_of_two(n: int) -> int:
    """The next one."""
    return 1 << (n - 1).bit_length()


@dataclasses.dataclass(frozen=True, slots=True)
class Given:
    """A static input of a graph."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    shared: bool = False  #: in memory that all graphs of the device share: written anew before every replay


class Graphs(Asked):
    """The graphs of one model. Calls from several threads and streams take turns."""

    def __init__(self, insists: bool = True):
        super().__init__("cuda_graphs", insists)
        self.failed = ""  #: why nothing is captured any more
        self._graphs: dict[tuple, _Graph] = {}
        self._lock = threading.Lock()
        self._turns = {}  #: {device: (memory pool of all graphs, event after what was launched last)}
        self._buffers = {}  #: {(device, dtype): what large inputs share}
        self._captured = self._replayed = 0
        self._standing = {}  #: {kind of graph: (snapshot, what was found out about it)}

    def __len__(self):
        return len(self._graphs)

    # --- what graphs hold fixed ---------------------------------------------------------------------------------------

    def standing(self, kind: str, modules: Sequence, look: Callable):
        """What `look()` finds out about these modules, asked anew only where something about them has changed since.

        Then all graphs of this kind, which hold that fixed, are dropped. None where that cannot be told by looking.
        """
        with self._lock:
            snapshot, found = self._standing.get(kind, (None, None))
            if snapshot is None or not snapshot.holds(modules):
                self._drop(lambda key: key[0] == kind)
                snapshot = Snapshot.of(modules, placed=True)
                found = None if snapshot is None else look()
                self._standing[kind] = snapshot, found
            return found

    def _drop(self, stale):
        for key in [key for key in self._graphs if stale(key)]:
            del self._graphs[key]

    # --- runs ---------------------------------------------------------------------------------------------------------

    def run(
        self, key: tuple, device: torch.device, write: Callable, prepare: Callable, identity: tuple = ()
    ) -> tuple[torch.Tensor, ...] | None:
        """What the function that `prepare` makes gives, a tuple of tensors: captured the first time, then replayed.

        The tensors are of the bucket's sizes. None where there is no such graph and none is made: capturing has failed,
        or has been done too often for what it brought.

        Args:
            key: (kind, bucket, ...): all that the graph and the sizes and dtypes of its inputs depend on, but for the
                device.
            write: `write({name: buffer}, before)` writes what a call brings. What it returns is `before` the next time
                that this graph's buffers are written: what they still hold. None: nothing, as far as is known.
            prepare: makes ({name: Given}, the function of {name: buffer} that is captured), which must not wait for the
                device; or None.
            identity: as `standing` drops graphs, those of the kind with another identity are dropped.
        """
        key = (*key, device, _numerics(device.type), identity)
        with self._lock, _Turn(self._turns, device) as pool:
            graph = self._graphs.get(key)
            if graph is None:
                graph = self._capture(key, device, write, prepare, identity, pool)
                if graph is None:
                    return None
            else:
                graph.fill(write)
            self._replayed += 1
            graph.last = self._replayed
            graph.recording.replay()
            # Copies: the next replay writes over them. Within the turn, so that it waits for them.
            return tuple([t.clone() for t in graph.recording.result])

    def _capture(self, key, device, write, prepare, identity, pool):
        """A new graph, whose buffers are filled."""
        affordable = self.insists or self._captured < FREE + self._replayed // PAID_BY
        prepared = prepare() if affordable and not self.failed else None
        if prepared is None:
            return None
        self._drop(lambda known: known[0] == key[0] and known[-1] != identity)
        while len(self._graphs) >= MAX_GRAPHS:
            del self._graphs[min(self._graphs, key=lambda known: self._graphs[known].last)]
        try:
            with record.unheard():
                graph = _Graph(*prepared, write, self._buffers, device, pool)
        except RuntimeError as error:  # out of memory, too; what is wrong with a call, the call itself will say
            self.failed = f"a capture has failed ({str(error).splitlines()[0][:200]})"
            self._graphs.clear()
            self._buffers.clear()
            self.say_failed(self.failed)
            return None
        self._captured += 1
        self._graphs[key] = graph
        return graph

    def blocks(
        self,
        prepare: Callable,
        rows: torch.Tensor,
        packing: Packing,
        identity: tuple,
        wanted: Selection | None = None,
    ) -> torch.Tensor | None:
        """`prepare()(rows, spans, wanted)`, a function [N, D] -> [N or W, D], as a graph; None where there is none.

        Args:
            identity: what a captured graph holds fixed besides what `standing` compares: addresses of 8-bit copies.
        """
        bucket = Bucket.of(packing, wanted)
        if bucket.rows > MOST_ROWS:
            return None

        def write(at, _):
            at["rows"][: len(rows)].copy_(rows)
            put(at["cu"], packing.cu_seqlens, len(rows))
            put(at["used"], packing.seqused_k, 0)
            if wanted is not None:  # beyond, rows of earlier calls, which nobody reads
                at["wanted"][: len(wanted.rows)].copy_(wanted.rows)
                put(at["cu_wanted"], wanted.cu_seqlens, len(wanted.rows))

        def prepared():
            encode, ends = prepare(), bucket.samples + 1
            given = {
                "rows": Given((bucket.rows, rows.shape[1]), rows.dtype),
                "cu": Given((ends,), torch.int32),
                "used": Given((bucket.samples,), torch.int32),
            }
            if wanted is not None:
                given["wanted"] = Given((bucket.wanted[0],), torch.int64)
                given["cu_wanted"] = Given((ends,), torch.int32)

            def function(at):
                some = None if wanted is None else Selection(at["wanted"], at["cu_wanted"], bucket.wanted[1])
                return (encode(at["rows"], Spans(at["cu"], at["used"], bucket.max_seqlen), some),)

            return given, function

        key = "blocks", bucket, rows.shape[1], rows.dtype
        result = self.run(key, rows.device, write, prepared, identity)
        return None if result is None else result[0][: len(rows) if wanted is None else len(wanted.rows)]

    def __getstate__(self):
        return {"insists": self.insists}

    def __setstate__(self, state):
        self.__init__(state["insists"])


def put(to: torch.Tensor, values: torch.Tensor, rest: int) -> None:
    """Write values and, behind them, a number."""
    to[: len(values)].copy_(values)
    if len(values) < len(to):
        to[len(values) :].fill_(rest)


def _numerics(kind):
    """What decides how a captured product is rounded."""
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    own = torch.backends.cuda.matmul
    return (
        autocast, own.allow_tf32, own.allow_fp16_reduced_precision_reduction, own.allow_bf16_reduced_precision_reduction
    )  # fmt: skip


class _Turn:
    """Buffers and pool are the current stream's own within: no two graphs of a device run at the same time."""

    def __init__(self, turns, device):
        self._turns, self._device, self._on = turns, device, None

    def __enter__(self):
        if self._device.type != "cuda":
            return None
        self._on = torch.cuda.device(self._device)
        self._on.__enter__()
        try:
            if self._device not in self._turns:
                self._turns[self._device] = torch.cuda.graph_pool_handle(), torch.cuda.Event()
            pool, self._done = self._turns[self._device]
            self._done.wait()  # for nothing, the first time
        except BaseException as error:
            self._on.__exit__(type(error), error, None)
            raise
        return pool

    def __exit__(self, *raised):
        if self._on is not None:
            self._done.record()
            self._on.__exit__(*raised)


class _Graph:
    last = 0  #: replay of all graphs that was of this one

    def __init__(self, given, function, write, buffers, device, pool):
        self._holds = None
        with torch.inference_mode(False), torch.no_grad():  # tensors that a call in either mode may write to
            self._at = {name: _buffer(one, buffers, device) for name, one in given.items()}
            self.fill(write)
            self.recording = Recording(lambda: function(self._at), device, pool)

    def fill(self, write):
        before, self._holds = self._holds, None  # who fails half way leaves nothing that is known
        self._holds = write(self._at, before)


def _buffer(one: Given, buffers, device):
    if not one.shared:
        return torch.zeros(one.shape, dtype=one.dtype, device=device)
    size, known = math.prod(one.shape), buffers.get((device, one.dtype))
    if known is None or len(known) < size:  # graphs that were captured before go on with the smaller one
        known = buffers[device, one.dtype] = torch.zeros(power_of_two(size), dtype=one.dtype, device=device)
    return known[:size].view(one.shape)


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


def why_not_usable(device: torch.device) -> str:
    """Why no graph can be captured or replayed here and now, or ""."""
    if device.type != "cuda":
        return f"CUDA graphs are for GPUs, and the tensors are on {device}"
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return "the forward is itself being compiled, or captured as a graph"
    return ""
