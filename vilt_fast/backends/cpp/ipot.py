"""ipot on the CPU: csrc/cpu/ipot.cpp, in float32 (half precision is widened first: costs are small).

It reads the costs anyway, so it looks whether they are finite, and raises the ValueError.
"""

import torch

from . import _native

_FLOATS = (None, torch.float32, torch.bfloat16, torch.float16)


def supports(*, device=None, dtype=None, rows=1, columns=1):
    if dtype not in _FLOATS:
        return f"dtype is {dtype}, expected float32, bfloat16 or float16."
    return _native.problem(device)


def ipot_fwd(*, cost, text_pad, image_pad, beta, iterations, inner, keep):
    from vilt_fast import _C

    cost = _native.as_float32(cost)
    text_pad, image_pad = text_pad.contiguous(), image_pad.contiguous()
    plan = torch.empty_like(cost)
    _C.ipot(
        cost.data_ptr(), text_pad.data_ptr(), image_pad.data_ptr(), plan.data_ptr(), *cost.shape, beta, iterations,
        inner, torch.get_num_threads(),
    )  # fmt: skip
    return (plan,), ()
