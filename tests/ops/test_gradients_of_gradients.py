"""Gradients of gradients (`create_graph=True`): those of the reference, of every op with a backward of its own."""

import functools

import pytest
import torch
from support.op_cases import CASES, drawn

from vilt_fast import functional
from vilt_fast.ops._define import OPS
from vilt_fast.testing import assert_within_budget, offsets, padding_masks


def first(function, inputs):
    """Gradients of a function of what `function` gives, recorded."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum(o.double().pow(2).masked_fill(o.isinf(), 0).sum() for o in outputs)
    return torch.autograd.grad(loss, inputs, create_graph=True)


def second(function, inputs):
    """Gradients of a function of those, end to end."""
    draw = torch.Generator().manual_seed(1)
    loss = sum((g * torch.randn(g.shape, generator=draw).to(g.dtype)).double().sum() for g in first(function, inputs))
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, inputs)])


@pytest.mark.parametrize("case", CASES)
def test_within_budget(case):
    function, shapes, *dtypes = CASES[case]
    inputs = drawn(shapes, *dtypes)
    three = [
        second(functools.partial(function, backend=backend), [t.to(dtype or t.dtype).requires_grad_() for t in inputs])
        for backend, dtype in (("triton", None), ("reference", None), ("reference", torch.float64))
    ]
    assert_within_budget(*three)


def test_every_op_with_a_backward_is_tried():
    own = {name for name, op in OPS.items() if op._fake_backward and op._again}
    assert own == {name.partition(",")[0] for name in CASES}


def test_the_third_derivative():
    x, weight = (t.double().requires_grad_() for t in drawn([(3, 4), (2, 4)]))
    found = []
    for backend in ("torch", "reference"):
        cu, rows = offsets([2, 1]), x.unflatten(1, (2, 2))
        loss = functional.attention(rows, rows @ weight[:, :2], rows, cu, cu, 2, 2, backend=backend).pow(3).sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
            loss = gradient.pow(2).sum()
        found.append(torch.autograd.grad(loss, weight)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("case", ["attention", "add_layer_norm", "text_embed", "patch_embed"])
def test_a_mask_that_a_kernel_has_drawn_is_an_error(case):
    function, shapes, *_ = CASES[case]
    inputs = [t.requires_grad_() for t in drawn(shapes)]
    *_, gradient = first(functools.partial(function, backend="triton", dropout_p=0.5), inputs)
    with pytest.raises(RuntimeError, match=rf"^{case}: its gradient cannot be differentiated again"):
        gradient.sum().backward()


def test_a_plan_that_counts_as_a_constant_is_an_error():
    text, image, pads = *drawn([(2, 3, 8), (2, 4, 8)]), (padding_masks([3, 2]), padding_masks([4, 1]))
    cost = torch.rand(2, 3, 4)
    calls = {
        "word_patch_distance": lambda: functional.word_patch_distance(text, image, *pads).sum(),
        "sinkhorn": lambda: functional.sinkhorn(cost, *pads, backend="cpp").value.sum(),
    }
    for name, call in calls.items():
        inputs = (cost,) if name == "sinkhorn" else (text, image)
        for tensor in inputs:
            tensor.requires_grad_()
        gradient, *_ = torch.autograd.grad(call(), inputs, create_graph=True)
        with pytest.raises(RuntimeError, match=rf"^{name}: its gradient cannot be differentiated again"):
            gradient.sum().backward()
