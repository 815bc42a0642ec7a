"""Hashes of memory on the CPU: csrc/cpu/fingerprint.cpp."""

import torch

from . import _native


def supports(*, device=None, dtype=None):
    return _native.problem(device)


def fingerprint_fwd(*, tensors, steps, keep):
    from vilt_fast import _C

    tensors = [tensor.detach() for tensor in tensors]
    held = [t if t.is_contiguous() or _rows(t) else t.contiguous() for t in tensors]
    return (_C.fingerprint(list(map(_span, held, steps)), torch.get_num_threads()),), ()


def _rows(tensor):
    """Whether it is dense but for its rows."""
    return tensor.dim() == 2 and tensor.stride(1) == 1 and tensor.stride(0) >= tensor.shape[1]


def _span(tensor, step):
    size = tensor.element_size()
    if tensor.is_contiguous():
        return tensor.data_ptr(), 1, tensor.numel() * size, 0, step * size
    rows, columns = tensor.shape
    return tensor.data_ptr(), rows, columns * size, tensor.stride(0) * size, step * size
