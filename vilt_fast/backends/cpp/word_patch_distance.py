"""word_patch_distance and its gradient on the CPU: csrc/cpu/word_patch_distance.cpp.

Hidden states are float32 or bfloat16 with any strides but a dense last dimension (float16 is widened).
"""

import torch

from . import _native, ipot


def supports(*, device=None, dtype=None, rows=1, columns=1, hidden=1, requires_grad=False):
    return "the hidden size is 0." if hidden < 1 else ipot.supports(device=device, dtype=dtype)


def _hidden(tensor):
    """The same values in a dtype the library reads, last dimension dense."""
    tensor = tensor.detach()
    tensor = tensor.float() if tensor.dtype == torch.float16 else tensor
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _strided(tensor):
    return [tensor.data_ptr(), tensor.stride(0), tensor.stride(1)]


def word_patch_distance_fwd(
    *, text, image, text_pad, image_pad, beta, iterations, inner, return_plan, keep
):  # fmt: skip
    """Kept is the plan, unless it is an output; without either nothing of its size is allocated."""
    from vilt_fast import _C

    text, image = _hidden(text), _hidden(image)
    text_pad, image_pad = text_pad.contiguous(), image_pad.contiguous()
    samples, words, width = text.shape
    sizes = samples, words, image.shape[1], width
    distance = torch.empty(samples)
    plan = torch.empty(sizes[:3] if return_plan or keep else 0)
    _C.word_patch_distance(
        _strided(text), _strided(image), _native.NAMES[text.dtype], text_pad.data_ptr(), image_pad.data_ptr(),
        distance.data_ptr(), plan.data_ptr() if return_plan or keep else 0, *sizes, beta, iterations, inner,
        torch.get_num_threads(),
    )  # fmt: skip
    nothing = torch.empty(0)
    return (distance, plan if return_plan else nothing), (nothing.clone() if return_plan else plan,) if keep else ()


def word_patch_distance_bwd(
    *, needs, grad_distance, text, image, text_pad, image_pad, plan, state, beta, iterations
):  # fmt: skip
    from vilt_fast import _C

    dtype = text.dtype
    text, image = _hidden(text), _hidden(image)
    text_pad, image_pad = text_pad.contiguous(), image_pad.contiguous()
    plan = _native.as_float32(plan if state.dim() == 1 else state)
    grad = _native.as_float32(grad_distance)
    gradients = [
        torch.empty(x.shape, dtype=x.dtype) if need else None for x, need in zip((text, image), needs, strict=True)
    ]
    samples, words, width = text.shape
    _C.word_patch_gradient(
        _strided(text), _strided(image), _native.NAMES[text.dtype], text_pad.data_ptr(), image_pad.data_ptr(),
        grad.data_ptr(), plan.data_ptr(), *map(_native.address, gradients),
        samples, words, image.shape[1], width, torch.get_num_threads(),
    )  # fmt: skip
    return tuple(None if g is None else g.to(dtype) for g in gradients), ()
