"""Outputs and gradients of an op by one of its backends, for comparing backends."""

import torch

from vilt_fast.testing import assert_within_budget


def same(tensor):
    return tensor


def results(function, inputs, backend, dtype=None, layout=same):
    """Outputs of ``function(*inputs, backend=backend)``, then the gradients of all inputs that are there.

    Inputs, and what is differentiated with, are cast to `dtype` if one is given, and laid out by `layout`.
    """
    leaves = [t if t is None else layout(t.detach().to(dtype or t.dtype)).requires_grad_() for t in inputs]
    outputs = function(*leaves, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    draw = torch.Generator().manual_seed(7)
    # Rounded, so that it is the same for every dtype.
    upstream = [layout(torch.randn(o.shape, generator=draw).bfloat16().to(o.dtype)) for o in outputs]
    present = [leaf for leaf in leaves if leaf is not None]
    return [*outputs, *torch.autograd.grad(outputs, present, upstream)]


def assert_gradients_within_budget(
    function, inputs, backend="cpp", layout=same, what="", check=assert_within_budget, together=False
):
    """`backend` against the reference in the dtypes of the inputs and in float64, outputs and all gradients.

    Args:
        together: all results as one, because the budget of a few elements is luck.
    """
    got = results(function, inputs, backend, layout=layout)
    plain, exact = (results(function, inputs, "reference", dtype) for dtype in (None, torch.float64))
    if together:
        got, plain, exact = ([torch.cat([t.flatten() for t in all_of])] for all_of in (got, plain, exact))
    for number, three in enumerate(zip(got, plain, exact, strict=True)):
        assert three[0].dtype == three[1].dtype
        check(*three, what=f"{what} {number}")
