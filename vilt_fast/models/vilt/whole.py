"""A whole forward as one CUDA graph: embedding, blocks, final norm, pooler and head.

What a call brings is written into the graph's buffers first: ids, segments and pixels of the real tokens, cut out of
what was given by one gather each, so that neither the padded width nor the size of the canvas is one of the graph's;
and where all rows lie, by one copy of what was laid out for the bucket when the plan was new. Rows of the bucket that
no token has lie behind the others, and belong to no sample.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers.models.vilt import modeling_vilt as hf

from ... import record
from ...engine import captured
from ...engine import encode as engine
from ...engine.graphs import MOST_ROWS, Given, Graphs, length_of, multiple, power_of_two, put, rows_of
from ...engine.listeners import any_hooked, is_plain
from ...engine.packing import Selection, Spans
from ...engine.quantization import WeightCache
from . import embedding, patches
from .inputs import Inputs, Sizes
from .known import is_known, position_grid, tables
from .plan import SequencePlan
from .reads import Reads


@dataclasses.dataclass(frozen=True, slots=True)
class Bucket:
    """Sizes that a graph of a whole forward is captured for."""

    samples: int
    texts: int
    patches: int
    longest: int
    shown: int  #: text rows that are shown

    @classmethod
    def of(cls, plan: SequencePlan) -> Bucket:
        """The smallest that holds a plan."""
        texts, patches, shown = len(plan.text_rows), len(plan.patch_rows), len(plan.shown_text)
        some = rows_of(texts, 32)
        return cls(power_of_two(plan.batch), some, rows_of(patches), length_of(plan.max_seqlen), some if shown else 0)

    @property
    def rows(self) -> int:
        """All of them: real ones first, each of the others in a place of its own."""
        return self.samples + self.texts + self.patches


@dataclasses.dataclass(slots=True)
class Places:
    """What of a plan a graph reads, in the bucket's sizes; names as in `SequencePlan`."""

    cu_seqlens: torch.Tensor
    seqused_k: torch.Tensor
    text_places: torch.Tensor  #: in the text of each sample
    text_rows: torch.Tensor
    patch_source: torch.Tensor  #: patches are given cut out
    patch_rows: torch.Tensor
    patch_sample: torch.Tensor
    pos_index: torch.Tensor
    pos_weight: torch.Tensor
    cls_rows: torch.Tensor
    pool_rows: torch.Tensor
    shown: torch.Tensor  #: rows of the text that are shown
    text_starts: torch.Tensor
    total_rows: int

    @classmethod
    def within(cls, memory: torch.Tensor, bucket: Bucket, weights: torch.dtype) -> Places:
        """Views of the bytes that they take together."""
        views, start = [], 0
        for dtype, *shape in cls._shapes(bucket, weights):
            size = math.prod(shape) * dtype.itemsize
            views.append(memory[start : start + size].view(dtype).view(shape))
            start += multiple(size, 16)
        return cls(*views, bucket.rows)

    @classmethod
    def bytes(cls, bucket: Bucket, weights: torch.dtype) -> int:
        """How many they take."""
        return sum(multiple(math.prod(shape) * dtype.itemsize, 16) for dtype, *shape in cls._shapes(bucket, weights))

    @staticmethod
    def _shapes(bucket, weights):
        i32, i64 = torch.int32, torch.int64
        n, p, b = bucket.texts, bucket.patches, bucket.samples
        return (
            (i32, b + 1), (i32, b), (i64, n), (i64, n), (i64, p), (i64, p), (i64, p), (i64, p, 4), (weights, p, 4),
            (i64, b), (i64, b), (i64, bucket.shown), (i32, b + 1),
        )  # fmt: skip


@dataclasses.dataclass(slots=True)
class _LaidOut:
    """A plan in its bucket."""

    bucket: Bucket
    bytes: int  #: that its places take
    memory: torch.Tensor | None = None  #: what `Places` are views of; None until it is wanted
    cells: tuple[torch.Tensor, ...] = ()  #: image, y and x of each patch, unless all are in order

    @classmethod
    def of(cls, plan: SequencePlan) -> _LaidOut:
        """That of a plan, which a server keeps."""
        known = _laid_out.get(plan)
        if known is None:
            bucket = Bucket.of(plan)
            known = _laid_out[plan] = cls(bucket, Places.bytes(bucket, plan.pos_weight.dtype))
        return known


_laid_out: weakref.WeakKeyDictionary[SequencePlan, _LaidOut] = weakref.WeakKeyDictionary()


def _lay_out(plan: SequencePlan, known: _LaidOut) -> None:
    """Made once a plan: some thirty launches, and no wait."""
    bucket = known.bucket
    with torch.inference_mode(False), torch.no_grad():
        memory = torch.zeros(known.bytes, dtype=torch.uint8, device=plan.device)
        at = Places.within(memory, bucket, plan.pos_weight.dtype)
        put(at.cu_seqlens, plan.cu_seqlens, plan.total_rows)
        put(at.text_places, plan.text_source % max(plan.text_length, 1), 0)
        torch.arange(bucket.patches, out=at.patch_source)
        texts = plan.texts if bucket.shown else None
        if texts is not None:
            put(at.shown, texts.rows, 0)
            put(at.text_starts, texts.cu_seqlens, len(texts.rows))
        for name in ("seqused_k", "patch_sample", "pos_index", "pos_weight", "pool_rows"):
            getattr(at, name)[: len(getattr(plan, name))] = getattr(plan, name)
        free = plan.total_rows  # the first row that no token has
        for name in ("text_rows", "patch_rows", "cls_rows"):
            rows, own = getattr(at, name), getattr(plan, name)
            rows[: len(own)] = own
            torch.arange(free, free + len(rows) - len(own), out=rows[len(own) :])
            free += len(rows) - len(own)
        if not plan.in_order:
            height, width = plan.patch_grid
            image, cell = plan.patch_source // (height * width), plan.patch_source % (height * width)
            known.cells = image, cell // width, cell % width
        known.memory = memory


@dataclasses.dataclass(frozen=True, slots=True)
class Head:
    """What is made of the rows that are read, and the modules that make it."""

    compute: Callable[[torch.Tensor], torch.Tensor]
    modules: tuple[nn.Module, ...]
    kinds: tuple[type, ...]  #: that they, and those within, may be to be in the graph


@dataclasses.dataclass(slots=True)
class Replayed:
    """What a graph has computed, as a `Trunk` has it."""

    rows: torch.Tensor | None  #: [N, D] after the final norm, if everything is read
    texts: torch.Tensor | None
    pooled: torch.Tensor | None
    logits: torch.Tensor | None  #: of the head, if that is in the graph


@dataclasses.dataclass(slots=True)
class Standing:
    """What is known of a model as it stands, until something about it changes."""

    kind: str  #: of its graphs
    sizes: Sizes | None  #: of the embedding module, where all but the head can be in a graph
    head: Head | None  #: where it can be, too


def standing(
    graphs: Graphs, model, describe: Callable, plain_around: Callable[[], bool], head: Head | None
) -> Standing:
    """What of a model can be in a graph.

    Args:
        describe: of a layer, as the engine sees it.
        plain_around: whether all between the blocks and the head looks at each row by itself, and nobody listens.
    """
    trunk = model.embeddings, model.encoder, model.layernorm, model.pooler
    parts = trunk if head is None else trunk + head.modules
    kind = "whole" if head is None else "whole with its head"

    def look():
        """(sizes and side of the table of image positions where all but the head can be in a graph, whether the head
        can)."""
        nothing = None, 0, False
        if not is_known(model.embeddings) or not plain_around():
            return nothing
        if not (model.pooler is None or _is_of(model.pooler, (hf.ViltPooler, nn.Linear, nn.Tanh))):
            return nothing
        if any(module.training for part in trunk if part is not None for module in part.modules()):
            return nothing
        if any(describe(layer).why_not_plain() for layer in model.encoder.layer):
            return nothing
        sizes, grid = Sizes.of(model.embeddings, tables(model.embeddings)), position_grid(model.embeddings)
        return sizes, grid, head is not None and all(map(functools.partial(_is_of, kinds=head.kinds), head.modules))

    sizes, grid, with_head = graphs.standing(kind, parts, look) or (None, 0, False)
    # What a config holds is none of its attributes.
    if sizes is not None and grid != position_grid(model.embeddings):
        return Standing(kind, None, None)
    return Standing(kind, sizes, head if with_head else None)


def replay(
    graphs: Graphs,
    model,
    describe: Callable,
    known: Standing,
    images: Sequence[Inputs],
    plan: SequencePlan,
    weights: WeightCache | None,
    reads: str | Reads | None,
) -> Replayed | None:
    """The forward as one graph; None where it cannot be one: then the engine has its own way, and says why."""
    inputs, head, device = images[0], known.head, known.sizes.device
    ids, types, pixels = inputs.input_ids, inputs.token_type_ids, inputs.pixel_values
    if len(images) > 1 or ids is None or pixels is None:
        return None
    if inputs.image_of is not None or isinstance(reads, Reads):
        return None  # samples that share an image, or are read in two ways, as training does
    laid_out = _LaidOut.of(plan)
    bucket = laid_out.bucket
    if bucket.rows > MOST_ROWS or not ids.device == pixels.device == plan.device == device:
        return None
    blocks = list(map(describe, model.encoder.layer)) if weights is not None else None
    identity = () if weights is None else captured.places_of_copies(blocks, weights)

    def prepare():
        modules = blocks or list(map(describe, model.encoder.layer))
        stack = captured.stack(modules, weights)
        function = functools.partial(_forward, model, stack, bucket, inputs.modality, reads, head)
        return _given(laid_out, inputs, known.sizes), function

    dtypes = ids.dtype, None if types is None else types.dtype, pixels.dtype, plan.pos_weight.dtype
    key = known.kind, bucket, reads, head is not None, inputs.modality, dtypes
    write = functools.partial(_write, plan, laid_out, inputs, known.sizes.patch)
    result = graphs.run(key, device, write, prepare, identity)
    if result is None:
        return None
    _say(model)
    return _cut(result, plan, model, reads, head)


def _is_of(module, kinds):
    return not any_hooked(module) and all(is_plain(m, *kinds) and not m.training for m in module.modules())


def _given(laid_out, inputs, sizes) -> dict[str, Given]:
    bucket, types = laid_out.bucket, inputs.token_type_ids
    pixels = bucket.patches, sizes.channels, *sizes.patch
    given = {
        "places": Given((laid_out.bytes,), torch.uint8),
        "ids": Given((bucket.texts,), inputs.input_ids.dtype),
        "pixels": Given(pixels, inputs.pixel_values.dtype, shared=True),
    }
    return given if types is None else given | {"types": Given((bucket.texts,), types.dtype)}


@dataclasses.dataclass(slots=True)
class _Held:
    """What buffers hold of a plan, and the parts of them that its calls write to."""

    laid_out: _LaidOut
    ids: torch.Tensor
    types: torch.Tensor | None
    pixels: torch.Tensor

    @classmethod
    def of(cls, at: dict[str, torch.Tensor], plan: SequencePlan, laid_out: _LaidOut) -> _Held:
        """Written into these buffers."""
        if laid_out.memory is None:  # by who writes, in its turn: another stream may be the first to want it
            _lay_out(plan, laid_out)
        at["places"].copy_(laid_out.memory)
        texts, pixels = len(plan.text_source), at["pixels"][: len(plan.patch_source)]
        if plan.in_order:
            pixels = pixels.view(plan.batch, *plan.patch_grid, *pixels.shape[1:])
        return cls(laid_out, at["ids"][:texts], at["types"][:texts] if "types" in at else None, pixels)


def _write(plan, laid_out, inputs, patch, at, held) -> _Held:
    """What a call brings, into the buffers `at`."""
    if held is None or held.laid_out is not laid_out:
        held = _Held.of(at, plan, laid_out)
    ids, types = inputs.input_ids, inputs.token_type_ids
    torch.index_select(ids.reshape(-1), 0, plan.text_source, out=held.ids)
    if types is not None:
        torch.index_select(types.expand(ids.shape).reshape(-1), 0, plan.text_source, out=held.types)
    cells = patches.cells(inputs.pixel_values, patch)
    if plan.in_order:
        held.pixels.copy_(cells)
    else:
        torch.ops.aten.index.Tensor_out(cells, laid_out.cells, out=held.pixels)
    return held


def _forward(model, stack, bucket, modality, reads, head, at) -> tuple[torch.Tensor, ...]:
    """What is captured."""
    found = tables(model.embeddings)
    weights = torch.float64 if found.image_position.dtype == torch.float64 else torch.float32
    places = Places.within(at["places"], bucket, weights)
    text = embedding.text_of(found, places.text_places, ids=at["ids"], token_types=at.get("types"))
    kinds = torch.full((bucket.samples,), modality, device=text.device)
    rows = embedding.with_patches(found, places, text, at["pixels"], kinds)
    wanted = None
    if reads == "pooled":
        starts = torch.arange(bucket.samples + 1, dtype=torch.int32, device=text.device)
        wanted = Selection(places.pool_rows, starts, 1)
    elif reads == "texts":
        wanted = Selection(places.shown, places.text_starts, bucket.longest)
    rows = stack(rows, Spans(places.cu_seqlens, places.seqused_k, bucket.longest), wanted)
    rows = engine.final_norm(model.layernorm, rows, None)
    if reads == "texts":
        return (rows if head is None else head.compute(rows),)
    pooled = () if model.pooler is None else (
        engine.pool(model.pooler, rows, places, first_only=True, selected=wanted is not None),
    )  # fmt: skip
    if reads == "pooled":
        return pooled if head is None else (head.compute(*pooled),)
    return rows, *pooled


def _cut(result, plan, model, reads, head) -> Replayed:
    """What the real rows have of it."""
    if reads is None:
        pooled = None if model.pooler is None else result[1][: plan.batch]
        return Replayed(result[0][: plan.total_rows], None, pooled, None)
    real = result[0][: plan.batch if reads == "pooled" else len(plan.shown_text)]
    if head is not None:
        return Replayed(None, None, None, real)
    return Replayed(None, real, None, None) if reads == "texts" else Replayed(None, None, real, None)


def _say(model) -> None:
    if record.listened():
        inner = model.embeddings
        parts = [("text embedding", inner.text_embeddings), ("image embedding", inner.patch_embeddings)]
        parts += [(f"block {i}", layer) for i, layer in enumerate(model.encoder.layer)]
        parts += [("final norm", model.layernorm)]
        parts += [] if model.pooler is None else [("pooler", model.pooler)]
        record.say("CUDA graph", "", *parts)
