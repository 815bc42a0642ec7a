"""The blobs of int8 weights: csrc/cpu/quantize.cpp, followed by the sizes they were made from."""

import torch

from . import _native

_ALIGNMENT = 64


def supports(*, device=None, dtype=None):
    return _native.problem(device, dtype=dtype)


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


def opened(name, blob):
    """The blob as the library wants it, aligned, and the (N, K) it was made from; ValueError if it is none."""
    rows, columns = blob[-16:].clone().view(torch.int64).tolist() if blob.numel() > 16 else (0, 0)
    if min(rows, columns) < 1 or blob_size(rows, columns) != blob.numel():
        raise ValueError(f"{name} is uint8 but no blob of quantize_linear; make one.")
    blob = blob.contiguous()
    return (blob.clone() if blob.data_ptr() % _ALIGNMENT else blob), (rows, columns)
