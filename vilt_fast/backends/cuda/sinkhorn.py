"""sinkhorn in CUDA C++: csrc/cuda/sinkhorn.cu, in float32."""

import torch

from ..cpp import _native
from . import _cuda


def supports(*, device=None, dtype=None, rows=1, columns=1, unrolled=False):
    if unrolled:
        return "it has no gradient through the iterations; use gradient='envelope' or another backend."
    return _cuda.problem(device, dtype, rows, columns)


def sinkhorn_fwd(
    *, cost, text_pad, image_pad, epsilon, iterations, tolerance, text_marginal, image_marginal, keep
):  # fmt: skip
    from vilt_fast import _C

    cost = _native.as_float32(cost)
    weights = [_native.as_float32(w) for w in (text_marginal, image_marginal)]
    plan = torch.empty_like(cost)
    value, error = cost.new_zeros(len(cost)), cost.new_zeros(len(cost))
    used = torch.zeros(len(cost), dtype=torch.int64, device=cost.device)
    if plan.numel():
        masks, pairs = _cuda.pairs(text_pad, image_pad)
        with _cuda.stream(cost.device) as stream:
            _C.cuda_sinkhorn(
                *pairs, cost.data_ptr(), *map(_native.address, weights), plan.data_ptr(), value.data_ptr(),
                used.data_ptr(), error.data_ptr(), epsilon, iterations, -1.0 if tolerance is None else tolerance,
                stream,
            )  # fmt: skip
    return (plan, value, used, error), ()
