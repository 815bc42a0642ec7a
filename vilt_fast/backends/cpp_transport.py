"""Launchers of the native CPU library for optimal transport: ipot, sinkhorn, word_patch_distance and its gradient.

`vilt_fast._C` takes addresses; every shape and dtype has been checked. It reads the costs anyway, so it looks whether
they are finite, and raises the ValueError. Costs are float32 (half precision is widened first: costs are small), hidden
states float32 or bfloat16 with any strides but a dense last dimension (float16 is widened).
"""

import torch

from . import cpp

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@torch.compiler.assume_constant_result
def _outdated():
    """An editable install can pull newer Python over an older library."""
    from vilt_fast import _C

    return "" if hasattr(_C, "ipot") else "the native library vilt_fast._C is older than this; build it again."


def supports(op, device="cpu", dtype=None, gradient="none", hidden=1, **facts):
    """ "" when the native library can run this, else why not."""
    if missing := cpp._missing() or _outdated():
        return missing
    if device != "cpu":
        return f"tensors are on {device}, it runs on the CPU."
    if dtype is not None and dtype not in _FLOATS:
        return f"dtype is {dtype}, expected float32, bfloat16 or float16."
    if hidden < 1:
        return "the hidden size is 0."
    if gradient == "unrolled":
        return "it has no gradient through the iterations; use gradient='envelope' or another backend."
    return ""


def _masks(text_pad, image_pad):
    return text_pad.contiguous(), image_pad.contiguous()


def ipot_fwd(cost, text_pad, image_pad, *, beta=0.5, iterations=50, inner=1):
    from vilt_fast import _C

    cost = cpp.as_float32(cost)
    text_pad, image_pad = _masks(text_pad, image_pad)
    plan = torch.empty_like(cost)
    _C.ipot(
        cost.data_ptr(), text_pad.data_ptr(), image_pad.data_ptr(), plan.data_ptr(), *cost.shape, beta, iterations,
        inner, torch.get_num_threads(),
    )  # fmt: skip
    return plan


def sinkhorn_fwd(
    cost, text_pad, image_pad, *, epsilon=0.1, iterations=100, tolerance=None, text_marginal=None,
    image_marginal=None, gradient="envelope",
):  # fmt: skip
    """(plan, value, iterations, marginal_error); no gradient."""
    from vilt_fast import _C

    cost = cpp.as_float32(cost)
    text_pad, image_pad = _masks(text_pad, image_pad)
    marginals = [cpp.as_float32(m) for m in (text_marginal, image_marginal)]
    plan = torch.empty_like(cost)
    value, error = cost.new_empty(len(cost)), cost.new_empty(len(cost))
    used = torch.empty(len(cost), dtype=torch.int64)
    _C.sinkhorn(
        cost.data_ptr(), text_pad.data_ptr(), image_pad.data_ptr(), *map(cpp._address, marginals),
        plan.data_ptr(), value.data_ptr(), error.data_ptr(), used.data_ptr(), *cost.shape, epsilon,
        -1.0 if tolerance is None else tolerance, iterations, torch.get_num_threads(),
    )  # fmt: skip
    return plan, value, used, error


def _hidden(tensor):
    """The same values in a dtype the library reads, last dimension dense."""
    tensor = tensor.detach()
    tensor = tensor.float() if tensor.dtype == torch.float16 else tensor
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _strided(tensor):
    return [tensor.data_ptr(), tensor.stride(0), tensor.stride(1)]


def word_patch_distance_fwd(text, image, text_pad, image_pad, *, beta=0.5, iterations=50, inner=1, return_plan=False):
    """(distance [B], plan [B, M, N] or an empty tensor); without the plan nothing of its size is allocated."""
    from vilt_fast import _C

    text, image = _hidden(text), _hidden(image)
    text_pad, image_pad = _masks(text_pad, image_pad)
    samples, words, width = text.shape
    sizes = samples, words, image.shape[1], width
    distance = torch.empty(samples)
    plan = torch.empty(sizes[:3] if return_plan else 0)
    _C.word_patch_distance(
        _strided(text), _strided(image), cpp._NAMES[text.dtype], text_pad.data_ptr(), image_pad.data_ptr(),
        distance.data_ptr(), plan.data_ptr() if return_plan else 0, *sizes, beta, iterations, inner,
        torch.get_num_threads(),
    )  # fmt: skip
    return distance, plan


def word_patch_distance_bwd(grad, needs, text, image, text_pad, image_pad, plan):
    """Gradients of (text, image), None where ``needs`` says so."""
    from vilt_fast import _C

    dtype = text.dtype
    text, image = _hidden(text), _hidden(image)
    text_pad, image_pad = _masks(text_pad, image_pad)
    grad = grad.to(torch.float32).contiguous()
    gradients = [
        torch.empty(x.shape, dtype=x.dtype) if need else None for x, need in zip((text, image), needs, strict=True)
    ]
    samples, words, width = text.shape
    _C.word_patch_gradient(
        _strided(text), _strided(image), cpp._NAMES[text.dtype], text_pad.data_ptr(), image_pad.data_ptr(),
        grad.data_ptr(), plan.data_ptr(), *map(cpp._address, gradients),
        samples, words, image.shape[1], width, torch.get_num_threads(),
    )  # fmt: skip
    return [None if g is None else g.to(dtype) for g in gradients]
