"""linear_cross_entropy: against torch's cross entropy, in chunks, on labelled rows only."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from vilt_fast import functional
from vilt_fast.reference import linear_cross_entropy as reference
from vilt_fast.testing import assert_within_budget


def _inputs(rows=11, width=6, vocabulary=17, dtype=torch.float64, bias=True):
    labels = torch.randint(vocabulary, (rows,))
    labels[::3] = -100
    return [
        torch.randn(rows, width, dtype=dtype), torch.randn(vocabulary, width, dtype=dtype),
        torch.randn(vocabulary, dtype=dtype) if bias else None, labels,
    ]  # fmt: skip


@pytest.fixture(
    params=[(1 << 24, 1 << 22), (1 << 24, 0), (17 * 3, 0)],
    ids=["kept", "one chunk", "three rows a chunk"],
    autouse=True,
)
def chunk(request, monkeypatch):
    for name, logits in zip(("CHUNK", "KEPT"), request.param, strict=True):
        monkeypatch.setattr(reference, name, logits)


def _torch(x, weight, bias, labels, reduction):
    return F.cross_entropy(F.linear(x, weight, bias), labels, reduction=reduction)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_value_and_gradients_are_torchs(reduction, bias):
    *tensors, labels = _inputs(bias=bias)
    results = []
    ours = functools.partial(functional.linear_cross_entropy, reduction=reduction)
    for function in (ours, lambda *t: _torch(*t, reduction)):
        inputs = [None if t is None else t.clone().requires_grad_() for t in tensors]
        loss = function(*inputs, labels)
        given = [t for t in inputs if t is not None]
        results.append((loss, *torch.autograd.grad(loss, given, torch.ones_like(loss))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_probabilities_in_place_of_classes(reduction):
    *tensors, _ = _inputs()
    labels = torch.randn(11, 17, dtype=torch.float64).softmax(-1)
    results = []
    for function in (functools.partial(functional.linear_cross_entropy, reduction=reduction), _torch):
        inputs = [t.clone().requires_grad_() for t in tensors]
        loss = function(*inputs, labels) if function is not _torch else _torch(*inputs, labels, reduction)
        results.append((loss, *torch.autograd.grad(loss, inputs, torch.ones_like(loss))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    half = functional.linear_cross_entropy(*(t.bfloat16() for t in tensors), labels.bfloat16())
    assert half.dtype == torch.float32
    with pytest.raises(ValueError, match=r"labels has shape \[11, 16\], expected \[R, V\]"):
        functional.linear_cross_entropy(*tensors, labels[:, :16])
    with pytest.raises(RuntimeError, match="it takes labels that are classes"):
        functional.linear_cross_entropy(*tensors, labels, backend="triton")


def test_gradcheck():
    *tensors, labels = _inputs(5, 3, 4)
    inputs = [t.requires_grad_() for t in tensors]
    assert gradcheck(lambda *t: functional.linear_cross_entropy(*t, labels), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_within_budget(dtype):
    *tensors, labels = _inputs(40, 32, 101, dtype)
    got = functional.linear_cross_entropy(*tensors, labels, reduction="none")
    plain = _torch(*tensors, labels, "none")
    exact = _torch(*(t.double() for t in tensors), labels, "none")
    assert got.dtype == torch.float32
    assert_within_budget(got, plain, exact)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [3, 0])
def test_nothing_labelled_is_what_torch_gives(rows, reduction):
    x, weight, bias, _ = _inputs()
    labels = torch.full((rows,), -100)
    x, weight = x[:rows].requires_grad_(), weight.requires_grad_()
    got = functional.linear_cross_entropy(x, weight, bias, labels, reduction=reduction)
    torch.testing.assert_close(got, _torch(x, weight, bias, labels, reduction), equal_nan=True)
    if reduction == "sum":
        for grad in torch.autograd.grad(got, (x, weight)):
            assert not grad.any()


def test_unlabelled_rows_may_hold_anything():
    x, weight, bias, labels = _inputs()
    want = functional.linear_cross_entropy(x, weight, bias, labels)
    x[labels == -100] = float("nan")
    x.requires_grad_()
    loss = functional.linear_cross_entropy(x, weight, bias, labels)
    assert torch.equal(loss, want) and torch.autograd.grad(loss, x)[0].isfinite().all()


def test_another_ignore_index():
    x, weight, bias, labels = _inputs()
    labels[labels == -100] = 2
    got = functional.linear_cross_entropy(x, weight, bias, labels, ignore_index=2)
    torch.testing.assert_close(got, F.cross_entropy(F.linear(x, weight, bias), labels, ignore_index=2))


def test_bad_input():
    x, weight, bias, labels = _inputs()
    with pytest.raises(IndexError, match="label 17 is outside 0..16"):
        functional.linear_cross_entropy(x, weight, bias, labels.clone().fill_(17))
    with pytest.raises(TypeError, match="labels is torch.int32"):
        functional.linear_cross_entropy(x, weight, bias, labels.int())
    with pytest.raises(ValueError, match="labels has shape"):
        functional.linear_cross_entropy(x, weight, bias, labels[:3])
    with pytest.raises(ValueError, match="reduction is 'avg'"):
        functional.linear_cross_entropy(x, weight, bias, labels, reduction="avg")
