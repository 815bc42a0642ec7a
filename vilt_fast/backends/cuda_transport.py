"""Launchers of the CUDA kernels in `vilt_fast._C` for optimal transport: ipot, sinkhorn, word_patch_distance.

`_C` takes device addresses, sizes and a stream; every shape and dtype has been checked. Nothing waits for the device.
"""

import contextlib

import torch

from . import cpp

_FLOATS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@torch.compiler.assume_constant_result
def _missing():
    if missing := cpp._missing():
        return missing
    from vilt_fast import _C

    if not getattr(_C, "cuda_archs", None):
        return "vilt_fast._C was built without CUDA; VILT_FAST_CUDA=1 pip install . with nvcc builds it."
    try:
        return "" if _C.cuda_devices() else f"it is built ({_C.cuda_archs}), but no GPU is visible."
    except RuntimeError as error:
        return f"it is built ({_C.cuda_archs}), but cannot run here. {error}"


def supports(op, device=None, dtype=None, rows=1, columns=1, hidden=8, gradient="none", requires_grad=False, **facts):
    """ "" when the CUDA kernels can run this, else why not."""
    if device not in (None, "cuda"):
        return f"tensors are on {device}, it runs on NVIDIA GPUs."
    if missing := _missing():
        return missing
    if dtype is not None and dtype not in _FLOATS:
        return f"dtype is {dtype}, expected float32, float16 or bfloat16."
    if max(rows, columns) > 1024:
        return f"there are {rows} words and {columns} patches, at most 1024 of each."
    if requires_grad:
        return "it has no backward and an input requires a gradient; use torch.no_grad() or backend='triton'."
    if gradient == "unrolled":
        return "it has no gradient through the iterations; use gradient='envelope' or another backend."
    if hidden == 0 or hidden % (16 // (dtype or torch.float16).itemsize):
        return f"hidden size is {hidden}, expected rows of a multiple of 16 bytes."
    return ""


@contextlib.contextmanager
def _stream(device):
    """The current stream of the device, which is the current one meanwhile."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream().cuda_stream


def _pairs(text_pad, image_pad):
    """Masks that stay alive, and their addresses and sizes."""
    masks = text_pad.contiguous(), image_pad.contiguous()
    return masks, [*(mask.data_ptr() for mask in masks), *text_pad.shape, image_pad.shape[1]]


def ipot_fwd(cost, text_pad, image_pad, *, beta=0.5, iterations=50, inner=1):
    """plan [B, M, N] float32."""
    from vilt_fast import _C

    cost = cpp.as_float32(cost)
    plan = torch.empty_like(cost)
    if plan.numel():
        masks, pairs = _pairs(text_pad, image_pad)
        with _stream(cost.device) as stream:
            _C.cuda_ipot(*pairs, cost.data_ptr(), plan.data_ptr(), beta, iterations, inner, stream)
    return plan


def sinkhorn_fwd(
    cost, text_pad, image_pad, *, epsilon=0.1, iterations=100, tolerance=None, text_marginal=None,
    image_marginal=None, gradient="envelope",
):  # fmt: skip
    """(plan, value, iterations, marginal_error); no gradient."""
    from vilt_fast import _C

    cost = cpp.as_float32(cost)
    weights = [cpp.as_float32(w) for w in (text_marginal, image_marginal)]
    plan = torch.empty_like(cost)
    value, error = cost.new_zeros(len(cost)), cost.new_zeros(len(cost))
    used = torch.zeros(len(cost), dtype=torch.int64, device=cost.device)
    if plan.numel():
        masks, pairs = _pairs(text_pad, image_pad)
        with _stream(cost.device) as stream:
            _C.cuda_sinkhorn(
                *pairs, cost.data_ptr(), *map(cpp._address, weights), plan.data_ptr(), value.data_ptr(),
                used.data_ptr(), error.data_ptr(), epsilon, iterations, -1.0 if tolerance is None else tolerance,
                stream,
            )  # fmt: skip
    return plan, value, used, error


def _rows(states):
    """Dense rows that start at multiples of 16 bytes."""
    states = states.detach().contiguous()
    return states if states.data_ptr() % 16 == 0 else states.clone()


def word_patch_distance_fwd(text, image, text_pad, image_pad, *, beta=0.5, iterations=50, inner=1, return_plan=False):
    """(distance [B], plan [B, M, N] or an empty tensor); costs go through memory only if they exceed shared memory."""
    from vilt_fast import _C

    (B, M, D), N = text.shape, image.shape[1]
    numbers = dict(dtype=torch.float32, device=text.device)
    distance, plan = torch.zeros(B, **numbers), torch.empty((B, M, N) if return_plan else 0, **numbers)
    if M == 0 or N == 0:
        return distance, plan
    text, image = _rows(text), _rows(image)
    masks, pairs = _pairs(text_pad, image_pad)
    with _stream(text.device) as stream:
        scratch = torch.empty(B, M, N, **numbers) if _C.cuda_word_patch_scratch(M, N) else None
        _C.cuda_word_patch_distance(
            *pairs, text.data_ptr(), image.data_ptr(), _FLOATS[text.dtype], D, distance.data_ptr(),
            cpp._address(plan), cpp._address(scratch), beta, iterations, inner, stream,
        )  # fmt: skip
    return distance, plan
