"""Gradients of gradients (`create_graph=True`): those of the reference, of every op with a backward of its own."""

import functools

import pytest
import torch

from vilt_fast import functional
from vilt_fast.ops._define import OPS
from vilt_fast.testing import assert_within_budget, offsets, packing_indices, padding_masks


def drawn(shapes, dtypes=()):
    dtypes = dtypes or [torch.float32] * len(shapes)
    return [torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]


def attention(q, k, v, *, backend, **options):
    cu, used = offsets([5, 1, 6]), torch.tensor([4, 0, 6], dtype=torch.int32)
    return functional.attention(q, k, v, cu, cu, 6, 6, seqused_k=used, backend=backend, **options)


def patch_embed(pixels, weight, bias, cls_token, position, modality, text, *, backend, **options):
    places = packing_indices([3, 2], [(2, 2), (1, 2)], canvas=(2, 2))
    return functional.patch_embed(
        pixels, weight, bias, cls_token, position, modality, text, **places, backend=backend, **options
    )


def text_embed(word, position, token_type, weight, bias, modality, *, backend, **options):
    ids, places, types = torch.tensor([1, 4, 4, 0]), torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 0, 0])
    tables = (word, position, token_type, weight, bias, modality)
    return functional.text_embed(ids, None, places, types, *tables, eps=1e-5, padding_idx=1, backend=backend, **options)


def linear_cross_entropy(x, weight, bias, *, backend, ignore_index=-100):
    labels = torch.tensor([3, ignore_index, 0, 6, 1])
    return functional.linear_cross_entropy(x, weight, bias, labels, ignore_index=ignore_index, backend=backend)


def add_layer_norm(x, residual, weight, bias, *, backend, **options):
    return functional.add_layer_norm(x, residual, weight, bias, 1e-2, backend=backend, **options)


HEADS, ROW = (12, 2, 4), (5, 6)
HALF, FLOAT = torch.float16, torch.float32
CASES = {  #: an op, and the shapes (and dtypes) of what it is differentiated in
    "attention": (attention, [HEADS] * 3),
    "attention, with its sums": (functools.partial(attention, return_lse=True), [HEADS] * 3),
    "add_layer_norm": (add_layer_norm, [ROW, ROW, (6,), (6,)]),
    "add_layer_norm, of two dtypes": (add_layer_norm, [ROW, ROW, (6,), (6,)], [HALF, FLOAT, HALF, HALF]),
    "linear": (functional.linear, [ROW, (7, 6), (7,), (5, 7)]),
    "linear_gelu": (functional.linear_gelu, [ROW, (7, 6), (7,)]),
    "linear_cross_entropy": (functools.partial(linear_cross_entropy, ignore_index=-3), [ROW, (7, 6), (7,)]),
    "text_embed": (text_embed, [(5, 8), (3, 8), (2, 8), (8,), (8,), (2, 8)]),
    "patch_embed": (patch_embed, [(2, 3, 8, 8), (8, 3, 4, 4), (8,), (8,), (10, 8), (2, 8), (5, 8)]),
}


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
