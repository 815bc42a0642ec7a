"""linear: reference against torch, the native one with its gradients under the error budget, compile, bad input."""

import pytest
import torch
from support.gradients import assert_gradients_within_budget, results, same
from torch.autograd import gradcheck

from vilt_fast import functional
from vilt_fast.testing import opcheck, sliced, strided

SHAPES = [((185, 64), 96), ((1, 7), 5), ((2, 3, 33), 17), ((13, 1), 1), ((70, 401), 200)]
OPS = {"linear": functional.linear, "linear_gelu": functional.linear_gelu}
BF16 = torch.bfloat16


def _inputs(shape, rows, dtype=torch.float32, bias=True, weights=None):
    weights = weights or dtype
    bias = torch.randn(rows, dtype=weights) if bias else None
    return torch.randn(shape, dtype=dtype), torch.randn(rows, shape[-1], dtype=weights) * 0.3, bias


def test_gradients_of_the_reference():
    inputs = [t.double().requires_grad_() for t in (*_inputs((3, 4), 5), torch.randn(3, 5))]
    assert gradcheck(lambda *t: functional.linear(*t, backend="reference"), inputs)


@pytest.mark.parametrize("layout", [same, strided, sliced], ids=["dense", "strided", "sliced"])
@pytest.mark.parametrize("dtype, weights", [(torch.float32, None), (BF16, None), (BF16, torch.float32)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape, rows", SHAPES)
@pytest.mark.parametrize("op", OPS)
def test_cpp_within_budget(op, shape, rows, bias, dtype, weights, layout):
    assert_gradients_within_budget(OPS[op], _inputs(shape, rows, dtype, bias, weights), layout=layout, what=op)


@pytest.mark.parametrize("op", OPS)
def test_no_rows(op):
    for shape, rows in (((0, 16), 8), ((3, 16), 0)):
        out, *gradients = results(OPS[op], _inputs(shape, rows), "cpp")
        assert out.shape == (*shape[:-1], rows) and not any(g.any() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("op", OPS)
def test_gradients_do_not_depend_on_threads_or_on_what_else_is_wanted(op, dtype):
    inputs = _inputs((1100, 200), 402, dtype)
    before, want = torch.get_num_threads(), results(OPS[op], inputs, "cpp")
    try:
        for threads in (1, 3, 16):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, results(OPS[op], inputs, "cpp"), want)), f"{threads} threads"
    finally:
        torch.set_num_threads(before)
    for wanted in ([0], [1], [2], [0, 2]):
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
        out = OPS[op](*leaves, backend="cpp")
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).bfloat16().to(dtype)
        found = torch.autograd.grad(out, [leaves[i] for i in wanted], upstream)
        assert all(torch.equal(g, want[1 + i]) for g, i in zip(found, wanted, strict=True)), wanted


@pytest.mark.parametrize("op", OPS)
def test_nan_stays_in_its_row(op):
    x, weight, bias = _inputs((9, 8), 6)
    want = results(OPS[op], (x, weight, bias), "cpp")[1]
    x[4] = torch.nan
    got = results(OPS[op], (x, weight, bias), "cpp")[1]
    rest = torch.arange(9) != 4
    assert torch.equal(got[rest], want[rest]) and (op == "linear" or got[4].isnan().all())


def test_the_slope_of_gelu_at_its_ends():
    x = torch.tensor([0.0, -0.0, 1.0, -1.0, 5.3, -5.3, 9.0, -9.0, 13.0, -13.0, 1e4, -1e4, 1e30, -1e30])[:, None]
    slopes = []
    for dtype, backend in ((torch.float32, "cpp"), (torch.float64, "reference")):
        leaf = x.detach().to(dtype, copy=True).requires_grad_()
        functional.linear_gelu(leaf, torch.ones(1, 1, dtype=dtype), None, backend=backend).sum().backward()
        slopes.append(leaf.grad.double())
    torch.testing.assert_close(*slopes, rtol=3e-7, atol=3e-7)


@pytest.mark.core
@pytest.mark.parametrize("op", OPS)
def test_registered_op(op):
    inputs = _inputs((5, 16), 8)
    x, weight, bias = inputs
    with torch.no_grad():
        opcheck(op, "cpp", x=x, weight=weight, bias=bias)
    leaves = [t.clone().requires_grad_() for t in inputs]
    opcheck(op, "cpp", keep=True, **dict(zip(("x", "weight", "bias"), leaves, strict=True)))
    compiled = torch.compile(lambda *t: OPS[op](*t).sum(), fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*leaves), leaves)
    want = torch.autograd.grad(OPS[op](*leaves, backend="cpp").sum(), leaves)
    assert all(map(torch.equal, got, want))


def test_autocast_rounds_parameters_as_they_are_read():
    inputs = _inputs((6, 32), 16)
    for op in OPS.values():
        with torch.autocast("cpu", BF16):
            got = results(op, inputs, "cpp")
            plain = results(op, inputs, "reference")
        x, *parameters = inputs
        want = results(op, [x.to(BF16), *parameters], "cpp")
        assert got[0].dtype == plain[0].dtype == BF16 and torch.equal(got[0], want[0])
        assert [g.dtype for g in got[1:]] == [torch.float32] * 3
        assert torch.equal(got[1], want[1].float()) and all(map(torch.equal, got[2:], want[2:]))


def test_bad_input():
    x, weight, bias = _inputs((3, 4), 5)
    with pytest.raises(TypeError, match="give both the same dtype"):
        functional.linear(x.double(), weight, bias)
    with pytest.raises(TypeError, match="give both the same dtype"):
        functional.linear(x, weight.bfloat16(), bias)
    with pytest.raises(RuntimeError, match="adds no residual"):
        functional.linear(x, weight, bias, torch.zeros(3, 5), backend="cpp")
    with pytest.raises(RuntimeError, match="float64"):
        functional.linear(x.double(), weight.double(), bias.double(), backend="cpp")
    with pytest.raises(ValueError, match="grad_out has shape"):
        torch.ops.vilt_fast.linear_bwd([True, True, True], torch.zeros(2, 5), x, weight, bias, None, "cpp")
    with pytest.raises(ValueError, match="pre has shape"):
        torch.ops.vilt_fast.linear_gelu_bwd(
            [True, True, True], torch.zeros(3, 5), x, weight, bias, torch.zeros(3, 4), "cpp"
        )
