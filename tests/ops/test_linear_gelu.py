"""linear_gelu: reference against HuggingFace, every backend under the error budget, compile, bad input."""

import pytest
import torch
from torch.autograd import gradcheck
from transformers import ViltConfig
from transformers.models.vilt.modeling_vilt import ViltIntermediate

from vilt_fast import functional
from vilt_fast.testing import assert_within_budget, opcheck, random_weights, sliced, strided

SHAPES = [((185, 64), 96), ((1, 7), 5), ((0, 16), 8), ((2, 3, 33), 17), ((13, 1), 1)]


def _inputs(shape, rows, dtype=torch.float32, bias=True):
    bias = torch.randn(rows, dtype=dtype) if bias else None
    return torch.randn(shape, dtype=dtype), torch.randn(rows, shape[-1], dtype=dtype) * 0.3, bias


def test_reference_is_huggingface():
    config = ViltConfig(hidden_size=24, intermediate_size=40)
    module = random_weights(ViltIntermediate(config)).double()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    got = functional.linear_gelu(x, module.dense.weight, module.dense.bias, backend="reference")
    assert torch.equal(got, module(x))


def test_gradients():
    inputs = [t.double().requires_grad_() for t in _inputs((3, 4), 5)]
    assert gradcheck(functional.linear_gelu, inputs)


@pytest.mark.parametrize("layout", [lambda t: t, strided, sliced], ids=["dense", "strided", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape, rows", SHAPES)
@torch.no_grad()
def test_cpp_within_budget(shape, rows, bias, dtype, layout):
    x, w, b = _inputs(shape, rows, dtype, bias)
    got = functional.linear_gelu(layout(x), layout(w), None if b is None else layout(b), backend="cpp")
    plain = functional.linear_gelu(x, w, b, backend="reference")
    exact = functional.linear_gelu(x.double(), w.double(), None if b is None else b.double(), backend="reference")
    assert got.dtype == dtype and got.is_contiguous()
    assert_within_budget(got, plain, exact, what="linear_gelu")


# A block of rows is at most 516, in tiles of 6; with more threads the same rows are cut into more blocks.
BOUNDARIES = sorted({size + near for k in range(1, 5) for size in (512 * k, 516 * k) for near in (-1, 0, 1)} | {2043})


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_rows_do_not_depend_on_how_many_there_are(dtype, threads):
    """At every size around a boundary between blocks, with K of several blocks."""
    x, w, b = _inputs((2065, 520), 768, dtype)
    small = [functional.linear_gelu(rows, w, b, backend="cpp") for rows in x.split(96)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for size in BOUNDARIES:
            got = functional.linear_gelu(x[:size], w, b, backend="cpp")
            assert torch.equal(got, torch.cat(small)[:size]), f"{size} rows"
    finally:
        torch.set_num_threads(before)
    exact = functional.linear_gelu(x.double(), w.double(), b.double(), backend="reference")
    assert_within_budget(torch.cat(small), functional.linear_gelu(x, w, b, backend="reference"), exact)


@pytest.mark.core
@torch.no_grad()
def test_registered_op():
    inputs = _inputs((5, 16), 8)
    x, weight, bias = inputs
    opcheck("linear_gelu", "cpp", x=x, weight=weight, bias=bias)
    opcheck("linear_gelu", "cpp", x=x, weight=weight)
    compiled = torch.compile(lambda *t: functional.linear_gelu(*t) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), functional.linear_gelu(*inputs, backend="cpp") + 1)


@pytest.mark.core
def test_training_compiles_too():
    x, w, b = (t.requires_grad_() for t in _inputs((5, 16), 8))
    compiled = torch.compile(lambda *t: functional.linear_gelu(*t).sum(), fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, w, b), (x, w, b))
    want = torch.autograd.grad(functional.linear_gelu(x, w, b, backend="reference").sum(), (x, w, b))
    for g, r in zip(got, want, strict=True):
        torch.testing.assert_close(g, r)


@torch.no_grad()
def test_autocast_gives_its_dtype_on_every_backend():
    x, w, b = _inputs((6, 32), 16)
    with torch.autocast("cpu", torch.bfloat16):
        for backend in ("reference", "cpp"):
            assert functional.linear_gelu(x, w, b, backend=backend).dtype == torch.bfloat16


def test_bad_input():
    x, w, b = _inputs((3, 4), 5)
    with pytest.raises(ValueError, match=r"weight has shape \[5, 3\], expected \[N, K\] with K=4"):
        functional.linear_gelu(x, w[:, :3], b)
    with pytest.raises(ValueError, match="bias has shape"):
        functional.linear_gelu(x, w, b[:2])
    with pytest.raises(TypeError, match="give both the same dtype"):
        functional.linear_gelu(x.double(), w, b)
    with pytest.raises(TypeError, match="expected a tensor"):
        functional.linear_gelu([1.0], w, b)
    with pytest.raises(RuntimeError, match="float64"), torch.no_grad():
        functional.linear_gelu(x.double(), w.double(), b.double(), backend="cpp")
