"""The blobs of int8 weights: csrc/cpu/quantize.cpp, followed by the sizes they were made from."""

import ctypes
import functools
import itertools
import mmap
from collections.abc import Iterable, Sequence

import torch

from . import _native

_ALIGNMENT = 64
_Sizes = ctypes.c_int64 * 2
_PAGE = 2 << 20


def supports(*, device=None, dtype=None):
    return _native.problem(device, dtype=dtype)


@functools.lru_cache(maxsize=64)
def blob_size(rows, columns):
    """Bytes of the blob of a weight [rows, columns], its sizes in the last 16."""
    from vilt_fast import _C

    return -(-_C.quantized_bytes(rows, columns) // 16) * 16 + 16


def quantize_linear_fwd(*, weight, keep):
    """Native blob of weight [N, K], then N and K as int64: uint8, one dimension."""
    from vilt_fast import _C

    weight = weight.detach().contiguous()
    blob = torch.zeros(blob_size(*weight.shape), dtype=torch.uint8)
    blob[-16:].view(torch.int64).copy_(torch.tensor(weight.shape))
    _C.quantize_linear(
        weight.data_ptr(), _native.NAMES[weight.dtype], *weight.shape, blob.data_ptr(), torch.get_num_threads()
    )
    return (blob,), ()


def aligned(blob):
    """Whether the library can read a blob where it lies."""
    return blob.data_ptr() % _ALIGNMENT == 0


def opened(blob, name, *parts):
    """The blob as the library wants it, aligned, and the (N, K) it was made from; ValueError if it is none.

    `name` says whose it is, formatted with `parts` where that is wanted.
    """
    blob, size = blob.contiguous(), blob.numel()
    address, rows, columns = blob.data_ptr(), 0, 0
    if size > 16:
        rows, columns = _Sizes.from_address(address + size - 16)
    if min(rows, columns) < 1 or blob_size(rows, columns) != size:
        raise ValueError(f"{name.format(*parts)} is uint8 but no blob of quantize_linear; make one.")
    return (blob if aligned(blob) else blob.clone()), (rows, columns)


def gathered(blobs: Iterable[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
    """Blobs of so many bytes one behind the other, in pages of 2 MB where the system has them: of pages of 4 KB the
    processor finds but a few at once. Fewer bytes than that stay where they are."""
    places = [0, *itertools.accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]
    if places[-1] < _PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return list(blobs)
    memory = mmap.mmap(-1, places[-1] + _PAGE)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    first = -whole.data_ptr() % _PAGE
    return [whole[first + at : first + at + len(blob)].copy_(blob) for at, blob in zip(places, blobs, strict=False)]
