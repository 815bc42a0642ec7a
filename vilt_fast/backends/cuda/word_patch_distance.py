"""word_patch_distance in CUDA C++: csrc/cuda/word_patch_distance.cu."""

import torch

from ..cpp import _native
from . import _cuda


def supports(*, device=None, dtype=None, rows=1, columns=1, hidden=8, requires_grad=False):
    if reason := _cuda.problem(device, dtype, rows, columns):
        return reason
    if requires_grad:
        return "it has no backward and an input requires a gradient; use torch.no_grad() or backend='triton'."
    if hidden == 0 or hidden % (16 // (dtype or torch.float16).itemsize):
        return f"hidden size is {hidden}, expected rows of a multiple of 16 bytes."
    return ""


def _rows(states):
    """Dense rows that start at multiples of 16 bytes."""
    states = states.detach().contiguous()
    return states if states.data_ptr() % 16 == 0 else states.clone()


def word_patch_distance_fwd(
    *, text, image, text_pad, image_pad, beta, iterations, inner, return_plan, keep
):  # fmt: skip
    """Costs go through memory only if they exceed shared memory."""
    from vilt_fast import _C

    (B, M, D), N = text.shape, image.shape[1]
    numbers = dict(dtype=torch.float32, device=text.device)
    distance, plan = torch.zeros(B, **numbers), torch.empty((B, M, N) if return_plan else 0, **numbers)
    if M == 0 or N == 0:
        return (distance, plan), ()
    text, image = _rows(text), _rows(image)
    masks, pairs = _cuda.pairs(text_pad, image_pad)
    with _cuda.stream(text.device) as stream:
        scratch = torch.empty(B, M, N, **numbers) if _C.cuda_word_patch_scratch(M, N) else None
        _C.cuda_word_patch_distance(
            *pairs, text.data_ptr(), image.data_ptr(), _cuda.FLOATS[text.dtype], D, distance.data_ptr(),
            _native.address(plan), _native.address(scratch), beta, iterations, inner, stream,
        )  # fmt: skip
    return (distance, plan), ()
