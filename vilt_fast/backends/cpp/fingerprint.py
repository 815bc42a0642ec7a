"""Hashes of memory on the CPU: csrc/cpu/fingerprint.cpp."""

import torch

from . import _native


def supports(*, device=None, dtype=None):
    return _native.problem(device)


def fingerprint_fwd(*, tensors, steps, keep):
    from vilt_fast import _C

    held, spans = [], []  # held: copies, until the call is over
    for tensor, step in zip(tensors, steps, strict=True):
        size = tensor.element_size()
        if not tensor.is_contiguous():
            if _rows(tensor):
                rows, columns = tensor.shape
                spans.append((tensor.data_ptr(), rows, columns * size, tensor.stride(0) * size, step * size))
                continue
            tensor = tensor.detach().contiguous()
            held.append(tensor)
        spans.append((tensor.data_ptr(), 1, tensor.numel() * size, 0, step * size))
    return (_C.fingerprint(spans, torch.get_num_threads()),), ()


def _rows(tensor):
    """Whether it is dense but for its rows."""
    return tensor.dim() == 2 and tensor.stride(1) == 1 and tensor.stride(0) >= tensor.shape[1]
