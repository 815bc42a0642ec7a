"""What `vilt_fast._C` takes: addresses, names of dtypes, blobs; and its int8 written in PyTorch."""

import math

import torch
from torch.nn import functional as F

from vilt_fast import _C

NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def name(tensor):
    return "f32" if tensor is None else NAMES[tensor.dtype]


def rows_apart(tensor):
    """The same values with 4 NaN columns between rows."""
    wide = torch.full((tensor.shape[0], tensor.shape[1] + 4), math.nan, dtype=tensor.dtype)
    wide[:, : tensor.shape[1]] = tensor
    return wide[:, : tensor.shape[1]]


class Blob:
    """A weight in the int8 format of quantize_linear."""

    def __init__(self, weight, threads=2):
        size = _C.quantized_bytes(*weight.shape)
        self.memory = torch.full((size + 128,), 0xAB, dtype=torch.uint8)
        self.start = -self.memory.data_ptr() % 64
        _C.quantize_linear(weight.data_ptr(), name(weight), *weight.shape, self.data_ptr(), threads)
        assert (self.memory[: self.start] == 0xAB).all() and (self.memory[self.start + size :] == 0xAB).all()

    def data_ptr(self):
        return self.memory.data_ptr() + self.start


def weight_argument(weight, compute):
    return (Blob(weight), "q8") if compute == "int8" else (weight, name(weight))


def quantized_rows(x):
    """u8 per row, as the kernels do it, dequantised again (in the dtype of x)."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = (high - low) / 255
    return torch.where(scale > 0, ((x - low) / scale).round() * scale, 0) + low


def quantized_weight(w):
    scale = w.abs().amax(-1, keepdim=True) / 127
    return torch.where(scale > 0, (w / scale).round() * scale, 0)


def plain_linear(x, w, b, compute):
    """What PyTorch makes of the same compute type, as float32 or bfloat16."""
    if compute == "int8":
        return F.linear(quantized_rows(x.float()), quantized_weight(w.float()), b.float())
    dtype = torch.bfloat16 if compute == "bf16" else torch.float32
    return F.linear(x.to(dtype), w.to(dtype), b.to(dtype))
