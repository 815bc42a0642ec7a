"""linear_gelu, Triton kernels: error budget, the derivative of GELU, what is kept, compile, limits."""

import functools

import pytest
import torch
from support.triton_case import assert_all_within_budget, compiles_ahead_of_time, names_every_argument, results

from vilt_fast import functional
from vilt_fast.kernels import _device
from vilt_fast.kernels import linear_gelu as kernels
from vilt_fast.testing import assert_within_budget, opcheck, sliced, strided

SHAPES = [((185, 64), 96), ((1, 7), 5), ((0, 16), 8), ((2, 3, 33), 17), ((13, 1), 1), ((40, 24), 264)]


def _inputs(shape, rows, dtype=torch.float32, bias=True):
    bias = torch.randn(rows).to(dtype) if bias else None
    return [torch.randn(shape).to(dtype), (torch.randn(rows, shape[-1]) * 0.3).to(dtype), bias]


_triton, _reference = (functools.partial(functional.linear_gelu, backend=name) for name in ("triton", "reference"))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape, rows", SHAPES)
def test_within_budget(shape, rows, dtype, bias):
    cotangent = torch.randn(*shape[:-1], rows).to(dtype)
    assert_all_within_budget(_triton, _reference, _reference, _inputs(shape, rows, dtype, bias), [cotangent])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_derivative_over_the_whole_range(dtype):
    pre = torch.linspace(-30, 30, 601).to(dtype).repeat(23, 1)
    grad = torch.randn(pre.shape).to(dtype)
    dpre, sums = kernels.through_gelu(grad, pre, True)

    def derivative(x, g):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(torch.nn.functional.gelu(x), x, g)[0]

    plain, exact = derivative(pre, grad), derivative(pre.double(), grad.double())
    assert_within_budget(dpre, plain, exact, what="dpre")
    assert sums.dtype == torch.float32
    assert_within_budget(sums, plain.float().sum(0), exact.sum(0), what="sums")


@pytest.mark.parametrize("rows", [1, 8, 9, 47, 49])
def test_groups_of_rows_cover_all_rows(rows, monkeypatch):
    monkeypatch.setattr(kernels, "_GROUPS", 3)
    pre, grad = torch.randn(rows, 300), torch.randn(rows, 300)
    dpre, sums = kernels.through_gelu(grad, pre, True)
    assert_within_budget(sums, dpre.sum(0), dpre.double().sum(0))
    again = kernels.through_gelu(grad, pre, True)
    assert torch.equal(again[0], dpre) and torch.equal(again[1], sums)


def test_the_pre_activation_is_kept_only_for_a_gradient():
    x, weight, bias = _inputs((4, 8), 6)
    for keep in (False, True):
        (out,), kept = kernels.linear_gelu_fwd(x=x, weight=weight, bias=bias, keep=keep)
        assert len(kept) == keep and torch.equal(out, _triton(x, weight, bias))
    torch.testing.assert_close(kept[0], torch.nn.functional.linear(x, weight, bias))
    with pytest.raises(RuntimeError, match="called with keep=False"):
        torch.ops.vilt_fast.linear_gelu(x.requires_grad_(), weight, bias, "triton")[0].sum().backward()


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_inputs_get_no_gradient(frozen):
    inputs = [t.requires_grad_(place != frozen) for place, t in enumerate(_inputs((5, 6), 7))]
    _triton(*inputs).sum().backward()
    want = results(_reference, inputs, [torch.ones(5, 7)])[1]
    for place, (tensor, gradient) in enumerate(zip(inputs, want, strict=True)):
        if place == frozen:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, gradient)


@pytest.mark.parametrize("layout", [strided, sliced])
def test_layouts(layout):
    inputs = [t.requires_grad_() for t in map(layout, _inputs((9, 24), 16))]
    plain = [t.detach().clone().requires_grad_() for t in inputs]
    cotangent = strided(torch.randn(9, 16))
    got, want = (torch.autograd.grad(_triton(*three), three, cotangent) for three in (inputs, plain))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_registered_op_and_compile():
    inputs = [t.requires_grad_() for t in _inputs((5, 16), 8)]
    x, weight, bias = inputs
    opcheck("linear_gelu", "triton", keep=True, x=x, weight=weight, bias=bias)
    opcheck("linear_gelu", "triton", keep=True, x=x, weight=weight)
    compiled = torch.compile(lambda *t: _triton(*t).square().sum(), fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*inputs), inputs)
    want = torch.autograd.grad(_triton(*inputs).square().sum(), inputs)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_checkpointing_gives_the_same_gradient():
    inputs = [t.requires_grad_() for t in _inputs((5, 16), 8)]
    checkpointed = torch.utils.checkpoint.checkpoint(_triton, *inputs, use_reentrant=False)
    got = torch.autograd.grad(checkpointed.square().sum(), inputs)
    want = torch.autograd.grad(_triton(*inputs).square().sum(), inputs)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_limits_are_named(monkeypatch):
    inputs = _inputs((3, 4), 5)
    with pytest.raises(RuntimeError, match="x is torch.float64, expected float32, float16 or bfloat16"):
        _triton(*(t.double() for t in inputs))
    monkeypatch.setattr(_device, "interpreted", lambda: False)
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1 before Python starts"):
        _triton(*inputs)


def test_ahead_of_time():
    assert all(map(names_every_argument, kernels.aot_cases()))
    assert compiles_ahead_of_time("linear_gelu") == 2
