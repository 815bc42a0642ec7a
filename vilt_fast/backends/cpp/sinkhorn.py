"""sinkhorn on the CPU: csrc/cpu/sinkhorn.cpp, in float32. It looks whether the costs are finite, as it reads them."""

import torch

from . import _native, ipot


def supports(*, device=None, dtype=None, rows=1, columns=1, unrolled=False):
    if unrolled:
        return "it has no gradient through the iterations; use gradient='envelope' or another backend."
    return ipot.supports(device=device, dtype=dtype)


def sinkhorn_fwd(
    *, cost, text_pad, image_pad, epsilon, iterations, tolerance, text_marginal, image_marginal, keep
):  # fmt: skip
    from vilt_fast import _C

    cost = _native.as_float32(cost)
    text_pad, image_pad = text_pad.contiguous(), image_pad.contiguous()
    marginals = [_native.as_float32(m) for m in (text_marginal, image_marginal)]
    plan = torch.empty_like(cost)
    value, error = cost.new_empty(len(cost)), cost.new_empty(len(cost))
    used = torch.empty(len(cost), dtype=torch.int64)
    _C.sinkhorn(
        cost.data_ptr(), text_pad.data_ptr(), image_pad.data_ptr(), *map(_native.address, marginals),
        plan.data_ptr(), value.data_ptr(), error.data_ptr(), used.data_ptr(), *cost.shape, epsilon,
        -1.0 if tolerance is None else tolerance, iterations, torch.get_num_threads(),
    )  # fmt: skip
    return (plan, value, used, error), ()
