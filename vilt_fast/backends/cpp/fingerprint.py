"""Hashes of memory on the CPU: csrc/cpu/fingerprint.cpp."""

import torch

from ...remembered import once
from . import _native


def supports(*, device=None, dtype=None):
    return _native.problem(device)


def fingerprint_fwd(*, tensors, steps, keep):
    from vilt_fast import _C

    if not once(tensors, "in place", lambda: all(t.is_contiguous() or _rows(t) for t in tensors)):
        tensors = [t if t.is_contiguous() or _rows(t) else t.detach().contiguous() for t in tensors]
    spans = once(tensors, ("spans", *steps), lambda: [*map(_span, tensors, steps)])
    return (_C.fingerprint(spans, torch.get_num_threads()),), ()


def _span(tensor, step):
    size = tensor.element_size()
    if tensor.is_contiguous():
        return tensor.data_ptr(), 1, tensor.numel() * size, 0, step * size
    rows, columns = tensor.shape
    return tensor.data_ptr(), rows, columns * size, tensor.stride(0) * size, step * size


def _rows(tensor):
    """Whether it is dense but for its rows."""
    return tensor.dim() == 2 and tensor.stride(1) == 1 and tensor.stride(0) >= tensor.shape[1]
