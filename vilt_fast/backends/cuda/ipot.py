"""ipot in CUDA C++: csrc/cuda/ipot.cu, in float32."""

import torch

from ..cpp import _native
from . import _cuda


def supports(*, device=None, dtype=None, rows=1, columns=1):
    return _cuda.problem(device, dtype, rows, columns)


def ipot_fwd(*, cost, text_pad, image_pad, beta, iterations, inner, keep):
    from vilt_fast import _C

    cost = _native.as_float32(cost)
    plan = torch.empty_like(cost)
    if plan.numel():
        masks, pairs = _cuda.pairs(text_pad, image_pad)
        with _cuda.stream(cost.device) as stream:
            _C.cuda_ipot(*pairs, cost.data_ptr(), plan.data_ptr(), beta, iterations, inner, stream)
    return (plan,), ()
