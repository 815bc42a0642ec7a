"""Quantised copies of weights, made again whenever a weight has changed.

The only derived weights in the project: all other kernels read the parameters as they are. A copy is kept with the
marks of its sources (storage, version counter, dtype, shape and, on the CPU, a fingerprint of the bits), which are
compared at every call. A sample of the bits is looked at, and all of them where there is no version counter (parameters
born under `torch.inference_mode()`) or VILT_FAST_CHECK=1 asks for it. Where bits should be looked at and cannot be (on
a GPU, which that would wait for), the copy is made again at every call. What torch.compile traces cannot compare: there
the comparison, and what is computed with the copies, are one op that knows its cache by number.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from .. import functional, record
from ..backends.cpp.quantize_linear import blob_size, gathered
from ..ops import fingerprint, registry
from ..ops._check import exporting
from ..reference.encoder import MATRICES, LayerParameters
from ..remembered import Known, once
from .asked import Asked

#: Places of the six matrices among the tensors of a layer.
_PLACES = [LayerParameters._fields.index(f"{name}_weight") for name in MATRICES]
KINDS = ("int8", "fp8")


class E4M3Rows(NamedTuple):
    """Rows that the kernel before has quantised."""

    q: torch.Tensor  #: [N, K] float8_e4m3fn
    scale: torch.Tensor  #: [N] float32, or [N, groups of columns]
    dtype: torch.dtype  #: of what they stand for


class WeightCache(Asked):
    """Copies of the weight matrices of a model's blocks: int8 for the native encoder, e4m3 for `linear_fp8`.

    An optimizer step, `load_state_dict`, a `.data` assignment and, on the CPU, a `.data` edit of whole tensors or rows
    are seen at the next call. An edit through `.data` or `numpy()` bumps no version counter, so that one is found by
    sampling elements, one or more of every row; sampling would wait for a GPU, so there it is not found at all. After
    editing a few single elements that way, or any on a GPU, call `vilt_fast.refresh(model)`; under VILT_FAST_CHECK=1,
    and for parameters without a version counter, every edit is seen.
    """

    def __init__(self, kind: str):
        super().__init__(kind)
        self.kind = kind
        self._copies: dict[tuple, tuple] = {}
        self._making = threading.Lock()  #: threads that come together make one copy
        self._number = next(_numbers)
        _caches[self._number] = self

    def quantized(self, parameters: list[torch.Tensor], first_block: int = 0) -> list[torch.Tensor]:
        """`parameters` of whole blocks, the first of them `first_block`, with each matrix replaced by its int8 copy."""
        size = len(LayerParameters._fields)
        places = [start + place for start in range(0, len(parameters), size) for place in _PLACES]
        known = type(parameters) is Known
        sources = parameters.part("matrices", places) if known else [parameters[place] for place in places]
        matrices = {first_block * size + place: source for place, source in zip(places, sources, strict=True)}
        marks = dict(zip(matrices, _marks(sources), strict=True))
        blobs, missing = self._found(marks)
        if missing:
            with self._making:
                blobs, missing = self._found(marks)
                weights = [matrices[place] for place in missing]
                with _unnoticed():
                    made = gathered(map(functional.quantize_linear, weights), [blob_size(*w.shape) for w in weights])
                for place, blob in zip(missing, made, strict=True):
                    blobs[place] = blob
                    self._keep(place, [marks[place]], blob, [matrices[place]])
        copies = {place - first_block * size: blob for place, blob in blobs.items()}
        if known:
            return parameters.replaced("int8", copies)
        return [copies.get(place, tensor) for place, tensor in enumerate(parameters)]

    def _found(self, marks):
        """({place: its copy}, the places that have none) of weights with these marks."""
        kept = {place: self._copies.get(place) for place in marks}
        found = {place: copy[1] for place, copy in kept.items() if copy is not None and copy[0] == [marks[place]]}
        return found, [place for place in marks if place not in found]

    def encoder(self, first_block: int, x, parameters, *spans, **options) -> torch.Tensor:
        """`functional.encoder` in int8, with the copies of these parameters."""
        if not torch.compiler.is_compiling():
            return functional.encoder(x, self.quantized(parameters, first_block), *spans, **options, compute="int8")
        _refuse_export()
        return _encoder(x, parameters, *spans, *options.values(), self._number, first_block)

    def linear_fp8(
        self, place: tuple, x: torch.Tensor | E4M3Rows, linears: Sequence[nn.Linear], gelu: bool
    ) -> torch.Tensor:
        """`functional.linear_fp8` with the copies of linears side by side; `place` names them in the model."""
        x, scale, dtype = x if isinstance(x, E4M3Rows) else (x, None, None)
        if not torch.compiler.is_compiling():
            return functional.linear_fp8(x, *self.fp8(place, linears), gelu=gelu, x_scale=scale, dtype=dtype)
        return _linear_fp8(x, *_parameters(linears), gelu, scale, dtype, self._number, *place)

    def linear_gelu_fp8(self, place: tuple, x: torch.Tensor | E4M3Rows, linears: Sequence[nn.Linear]) -> E4M3Rows:
        """`functional.linear_gelu_fp8`, in the same way."""
        dtype = x.dtype
        x, scale, _ = x if isinstance(x, E4M3Rows) else (x, None, None)
        if not torch.compiler.is_compiling():
            made = functional.linear_gelu_fp8(x, *self.fp8(place, linears), x_scale=scale)
        else:
            made = _linear_gelu_fp8(x, *_parameters(linears), scale, self._number, *place)
        return E4M3Rows(*made, dtype)

    def fp8(self, place: tuple, linears: Sequence[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(weight, weight_scale, bias) of `linear_fp8` for linears side by side; `place` names them in the model."""
        return self._fp8(place, [linear.weight for linear in linears], [linear.bias for linear in linears])

    def _fp8(self, place, weights, biases):
        sources = [*weights, *(bias for bias in biases if bias is not None)]
        return self._copy(place, _marks(sources), sources, lambda *_: _side_by_side(weights, biases))

    def blob(self, place: str, weight: torch.Tensor) -> torch.Tensor:
        """The int8 copy of a weight outside the blocks, as a matrix [N, the rest]; `place` names it in the model."""
        if torch.compiler.is_compiling():
            _refuse_export()
            return _blob(weight, self._number, place)
        return self._copy(place, _marks([weight]), [weight], _as_matrix)

    def clear(self) -> None:
        """Forget all copies; the next call makes them anew."""
        self._copies.clear()

    def _copy(self, place, marks, sources, make):
        kept = self._copies.get(place)
        if kept is None or kept[0] != marks:
            with self._making:
                kept = self._copies.get(place)
                if kept is None or kept[0] != marks:
                    with _unnoticed():
                        made = make(*sources)
                        if kept is not None and any(isinstance(mark[-1], _Unknown) for mark in marks):
                            made = _renewed(kept[1], made)
                    self._keep(place, marks, made, sources)
                kept = self._copies[place]
        return kept[1]

    def _keep(self, place, marks, made, sources):
        # A weak reference keeps no memory alive, and no later storage is found at the place of this one.
        self._copies[place] = marks, made, [StorageWeakRef(tensor.untyped_storage()) for tensor in sources]

    def __getstate__(self):
        return {"kind": self.kind}

    def __setstate__(self, state):
        self.__init__(state["kind"])


def hands_on(op: str, rows: torch.Tensor | E4M3Rows) -> bool:
    """Whether a kernel hands on e4m3 by `op` here, in place of a pass over what it has written.

    A guess, unless order.csv says `FUSED=False` of the op.
    """
    lying = rows.q if isinstance(rows, E4M3Rows) else rows
    kind = lying.device.type
    if torch.is_autocast_enabled(kind) and rows.dtype == torch.float32:  # which a product would round first
        return False
    return registry.fused(op, kind, rows.dtype, registry.size_of(lying))


def why_emulated(rows: torch.Tensor) -> str:
    """Why no kernel computes fp8 on rows like these, or ""."""
    if not rows.is_cuda:
        return f"the tensors are on {rows.device}"
    return registry.why_unavailable("linear_fp8", "triton", device="cuda", dtype=rows.dtype).rstrip(".")


@contextlib.contextmanager
def _unnoticed():
    """Nobody is told of what is computed within, and calls in either mode may write to it."""
    with record.unheard(), torch.inference_mode(False), torch.no_grad():
        yield


def _as_matrix(weight):
    return functional.quantize_linear(weight.detach().flatten(1))


def _side_by_side(weights, biases):
    weight, scale = functional.quantize_fp8(torch.cat([w.detach() for w in weights]))
    if all(bias is None for bias in biases):
        return weight, scale, None
    biases = [w.new_zeros(len(w)) if bias is None else bias for w, bias in zip(weights, biases, strict=True)]
    return weight, scale, torch.cat([bias.detach() for bias in biases])


def _renewed(old, new):
    """`new`, in the memory of `old` where they are alike, for a CUDA graph that reads it there."""
    if isinstance(new, tuple):
        return tuple(map(_renewed, old, new))
    if old is None or new is None or (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
        return new
    return old.copy_(new)


class _Unknown:
    """Bits that should be looked at and cannot be. One is not equal to another."""


def _marks(tensors: Sequence[torch.Tensor]) -> list[tuple]:
    """What tells each tensor from another one, and from itself with other values, while its storage is known."""
    forms = once(tensors, "forms", lambda: [(t.storage_offset(), t.dtype, t.shape, t.stride()) for t in tensors])
    versions = [None if tensor.is_inference() else tensor._version for tensor in tensors]
    storages = [tensor.untyped_storage()._cdata for tensor in tensors]
    return list(zip(storages, versions, forms, _bits(tensors), strict=True))


def _bits(tensors):
    """The fingerprint of each tensor; None where no bits are looked at."""
    check = os.environ.get("VILT_FAST_CHECK") == "1"
    whole = [check or tensor.is_inference() for tensor in tensors]
    known = not fingerprint.why_unavailable("cpu")
    if known and once(tensors, "on the CPU", lambda: all(tensor.is_cpu for tensor in tensors)):
        return fingerprint.fingerprint(tensors, whole)
    bits = [_Unknown() if all_of_it else None for all_of_it in whole]
    for i, tensor in enumerate(tensors):
        if tensor.is_cpu:
            bits[i] = fingerprint.fingerprint([tensor], [whole[i]])[0] if known else _Unknown()
    return bits


# --- in a compiled graph ----------------------------------------------------------------------------------------------

_NO_BIAS = torch.empty(0)
_numbers = itertools.count()
_caches: weakref.WeakValueDictionary[int, WeightCache] = weakref.WeakValueDictionary()


def _refuse_export():
    if exporting():
        raise RuntimeError("8-bit copies are not exported: accelerate the model without quantize first.")


@torch.library.custom_op(
    "vilt_fast::encoder_of_copies",
    mutates_args=(),
    schema="(Tensor x, Tensor[] parameters, Tensor cu_seqlens, Tensor seqused_k, SymInt max_seqlen, int num_heads, "
    "float[] eps, bool return_hidden, Tensor? wanted, Tensor? cu_wanted, int cache, int first_block) -> Tensor",
)
def _encoder(
    x, parameters, cu_seqlens, seqused_k, max_seqlen, num_heads, eps, return_hidden, wanted, cu_wanted, cache,
    first_block,
):  # fmt: skip
    options = dict(num_heads=num_heads, eps=eps, return_hidden=return_hidden, wanted=wanted, cu_wanted=cu_wanted)
    return _caches[cache].encoder(first_block, x, parameters, cu_seqlens, seqused_k, max_seqlen, **options)


@_encoder.register_fake
def _(
    x, parameters, cu_seqlens, seqused_k, max_seqlen, num_heads, eps, return_hidden, wanted, cu_wanted, cache,
    first_block,
):  # fmt: skip
    if return_hidden:
        return x.new_empty(len(parameters) // len(LayerParameters._fields), *x.shape)
    return x.new_empty(x.shape[0] if wanted is None else wanted.shape[0], x.shape[1])


def _parameters(linears):
    _refuse_export()
    return [m.weight for m in linears], [_NO_BIAS if m.bias is None else m.bias for m in linears]


def _copies(cache, block, name, weights, biases):
    return _caches[cache]._fp8((block, name), weights, [bias if bias.numel() else None for bias in biases])


@torch.library.custom_op(
    "vilt_fast::linear_fp8_of_copies",
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, Tensor[] biases, bool gelu, Tensor? scale, ScalarType? dtype, int cache, "
    "int block, str name) -> Tensor",
)
def _linear_fp8(x, weights, biases, gelu, scale, dtype, cache, block, name):
    copies = _copies(cache, block, name, weights, biases)
    return functional.linear_fp8(x, *copies, gelu=gelu, x_scale=scale, dtype=dtype)


@_linear_fp8.register_fake
def _(x, weights, biases, gelu, scale, dtype, cache, block, name):
    return x.new_empty(*x.shape[:-1], sum(len(w) for w in weights), dtype=dtype or x.dtype)


@torch.library.custom_op(
    "vilt_fast::linear_gelu_fp8_of_copies",
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, Tensor[] biases, Tensor? scale, int cache, int block, str name) -> "
    "(Tensor, Tensor)",
)
def _linear_gelu_fp8(x, weights, biases, scale, cache, block, name):
    return functional.linear_gelu_fp8(x, *_copies(cache, block, name, weights, biases), x_scale=scale)


@_linear_gelu_fp8.register_fake
def _(x, weights, biases, scale, cache, block, name):
    outputs = sum(len(w) for w in weights)
    scales = x.new_empty((outputs + 127) // 128, *x.shape[:-1], dtype=torch.float32)
    return x.new_empty(*x.shape[:-1], outputs, dtype=torch.float8_e4m3fn), scales.movedim(0, -1)


@torch.library.custom_op(
    "vilt_fast::blob_of_copies", mutates_args=(), schema="(Tensor weight, int cache, str place) -> Tensor"
)
def _blob(weight, cache, place):
    return _caches[cache].blob(place, weight).clone()  # a compiler may write over what it was given, once that is used


@_blob.register_fake
def _(weight, cache, place):
    return weight.new_empty(blob_size(len(weight), weight[0].numel()), dtype=torch.uint8)
