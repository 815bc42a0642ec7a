"""add_layer_norm: reference against HuggingFace's order of operations, gradients, mixed dtypes, bad input."""

import pytest
import torch
from torch.autograd import gradcheck

from vilt_fast import functional
from vilt_fast.testing import assert_within_budget, strided


def _inputs(*shape, dtype=torch.float64):
    return [torch.randn(*shape, dtype=dtype), torch.randn(*shape, dtype=dtype)] + [
        torch.randn(shape[-1], dtype=dtype) for _ in range(2)
    ]


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 0.1])
@pytest.mark.parametrize("shape", [(7, 33), (2, 3, 8), (0, 5), (1, 1)])
def test_reference_is_the_formula(shape, eps):
    x, residual, weight, bias = _inputs(*shape)
    s, y = functional.add_layer_norm(x, residual, weight, bias, eps, backend="reference")
    centred = (x + residual) - (x + residual).mean(-1, keepdim=True)
    formula = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias
    assert torch.equal(s, x + residual)
    torch.testing.assert_close(y, formula, rtol=1e-11, atol=1e-12)


def test_gradients():
    inputs = [t.requires_grad_() for t in _inputs(3, 5)]
    assert gradcheck(lambda *t: functional.add_layer_norm(*t, 1e-6), inputs)


def test_wide_residual_and_missing_affine():
    x, residual = torch.randn(4, 8, dtype=torch.bfloat16), torch.randn(4, 8)
    s, y = functional.add_layer_norm(x, residual, None, None, 1e-6)
    assert s.dtype == torch.float32 and y.dtype == torch.bfloat16
    want = torch.nn.functional.layer_norm(x.double() + residual.double(), (8,), eps=1e-6)
    assert_within_budget(y, want.to(torch.bfloat16), want)


def test_non_contiguous():
    inputs = _inputs(6, 9)
    for got, want in zip(
        functional.add_layer_norm(*map(strided, inputs), 1e-6), functional.add_layer_norm(*inputs, 1e-6), strict=True
    ):
        assert torch.equal(got, want)


def test_bad_input():
    x, residual, weight, bias = _inputs(3, 4)
    with pytest.raises(ValueError, match=r"residual has shape \[2, 4\]"):
        functional.add_layer_norm(x, residual[:2], weight, bias, 1e-6)
    with pytest.raises(ValueError, match=r"weight has shape \[3\], expected \[D\] with D=4"):
        functional.add_layer_norm(x, residual, weight[:3], bias, 1e-6)
    with pytest.raises(TypeError, match="x is torch.int64"):
        functional.add_layer_norm(x.long(), residual, weight, bias, 1e-6)
