"""linear_qkv, Triton kernel: error budget over every configuration, gradients, missing biases, layouts, limits."""

import functools

import pytest
import torch
from support.triton_case import assert_all_within_budget, compiles_ahead_of_time, names_every_argument

from vilt_fast import functional
from vilt_fast.kernels import _device, linear
from vilt_fast.kernels import linear_qkv as kernels
from vilt_fast.testing import assert_within_budget, opcheck, poisoned, sliced, strided

SHAPES = [((185, 64), 96), ((1, 7), 5), ((0, 16), 8), ((2, 3, 33), 17), ((13, 1), 1)]


def _inputs(shape, rows, dtype=torch.float32, biases=(True, True, True)):
    weights = [(torch.randn(rows, shape[-1]) * 0.3).to(dtype) for _ in range(3)]
    return [torch.randn(shape).to(dtype), *weights, *(torch.randn(rows).to(dtype) if b else None for b in biases)]


_triton, _reference = (functools.partial(functional.linear_qkv, backend=name) for name in ("triton", "reference"))


def test_reference_is_three_linear_layers():
    x, *sides = _inputs((2, 5, 4), 3)
    for got, weight, bias in zip(_reference(x, *sides), sides[:3], sides[3:], strict=True):
        assert torch.equal(got, torch.nn.functional.linear(x, weight, bias))
    assert torch.autograd.gradcheck(_reference, [t.double().requires_grad_() for t in (x, *sides)])


@pytest.mark.parametrize("biases", [(True, True, True), (True, False, True), (False, False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape, rows", SHAPES)
def test_within_budget(shape, rows, dtype, biases):
    cotangents = [torch.randn(*shape[:-1], rows).to(dtype) for _ in range(3)]
    assert_all_within_budget(_triton, _reference, _reference, _inputs(shape, rows, dtype, biases), cotangents)


@pytest.mark.parametrize(
    "kind, most_rows", [(kind, rows) for kind in ("tma", "pointer", "float32") for rows in (512, 4096)]
)
@torch.no_grad()
def test_every_shipped_configuration(kind, most_rows):
    config = kernels._config(kind, most_rows, 768)
    assert config == kernels._config(kind, most_rows, 768, arch=100)
    config["GROUP"] = 2
    M, N, K = 2 * config["BLOCK_M"] + 5, config["BLOCK_N"] + 8, config["BLOCK_K"] + 8
    x, *sides = _inputs((M, K), N, torch.float32 if kind == "float32" else torch.float16)
    outs = [x.new_full((M, N), float("nan")) for _ in range(3)]
    kernels.launch(x, sides[:3], sides[3:], outs, kind=kind, config=config)
    exact = _reference(*(t.double() for t in (x, *sides)))
    for three in zip(outs, _reference(x, *sides), exact, strict=True):
        assert_within_budget(*three)


@pytest.mark.parametrize("used", [0, 1, 2])
def test_one_of_the_three_alone_has_a_gradient(used):
    got, want = [], []
    inputs = _inputs((6, 8), 5)
    for call, found in ((_triton, got), (_reference, want)):
        leaves = [t.clone().requires_grad_() for t in inputs]
        call(*leaves)[used].square().sum().backward()
        found += [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("frozen", range(7))
def test_frozen_inputs_get_no_gradient(frozen):
    inputs = [t.requires_grad_(place != frozen) for place, t in enumerate(_inputs((5, 6), 7))]
    torch.cat(_triton(*inputs)).sum().backward()
    assert [t.grad is None for t in inputs] == [place == frozen for place in range(7)]


@pytest.mark.parametrize("layout", [strided, sliced])
@torch.no_grad()
def test_layouts(layout):
    inputs = _inputs((9, 24), 16)
    for got, want in zip(_triton(*map(layout, inputs)), _triton(*inputs), strict=True):
        assert torch.equal(got, want) and got.is_contiguous()


@torch.no_grad()
def test_slices_of_a_fused_weight_are_read_where_they_lie():
    x, fused, bias = torch.randn(5, 8), torch.randn(18, 8), torch.randn(18)
    got = _triton(x, *fused.chunk(3), *bias.chunk(3))
    torch.testing.assert_close(torch.cat(got, 1), torch.nn.functional.linear(x, fused, bias))


@torch.no_grad()
def test_a_row_of_nan_stays_alone():
    x, *sides = _inputs((70, 24), 16)
    want = _triton(x, *sides)
    bad = torch.arange(70) == 69
    for got, right in zip(_triton(poisoned(x, bad), *sides), want, strict=True):
        assert got[69].isnan().all() and torch.equal(got[~bad], right[~bad])


def test_registered_op_and_compile():
    inputs = [t.requires_grad_() for t in _inputs((5, 16), 8)]
    names = ("x", "query_weight", "key_weight", "value_weight", "query_bias", "key_bias", "value_bias")
    opcheck("linear_qkv", "triton", keep=True, **dict(zip(names, inputs, strict=True)))
    compiled = torch.compile(lambda *t: torch.cat(_triton(*t)).square().sum(), fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*inputs), inputs)
    want = torch.autograd.grad(torch.cat(_triton(*inputs)).square().sum(), inputs)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@torch.no_grad()
def test_bad_input_and_limits(monkeypatch):
    x, *sides = _inputs((3, 4), 5)
    with pytest.raises(ValueError, match=r"key_weight has shape \[4, 4\], expected \[N, K\]"):
        functional.linear_qkv(x, sides[0], sides[1][:4], *sides[2:])
    with pytest.raises(ValueError, match="value_bias has shape"):
        functional.linear_qkv(x, *sides[:5], sides[5][:2])
    with pytest.raises(TypeError, match="give both the same dtype"):
        functional.linear_qkv(x, sides[0].half(), *sides[1:])
    with pytest.raises(RuntimeError, match="x is torch.float64"):
        _triton(*(t.double() for t in (x, *sides)))
    with torch.autocast("cpu", torch.float16):
        assert {t.dtype for t in _triton(x, *sides)} == {torch.float16}
    monkeypatch.setattr(_device, "interpreted", lambda: False)
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1 before Python starts"):
        _triton(x, *sides)


def test_descriptors_only_where_all_three_weights_can_be_reached(monkeypatch):
    monkeypatch.setattr(_device, "arch", lambda tensor: 90)
    x, weight = torch.zeros(8, 64, dtype=torch.float16), torch.zeros(17, 64, dtype=torch.float16)
    whole, odd = weight[:16], weight.view(-1)[1 : 1 + 16 * 64].view(16, 64)
    assert linear.kind_of(x, whole, whole, whole) == "tma"
    assert linear.kind_of(x, whole, odd, whole) == linear.kind_of(x, whole, whole, odd) == "pointer"


def test_ahead_of_time():
    assert all(map(names_every_argument, kernels.aot_cases()))
    assert compiles_ahead_of_time("linear_qkv") == 1
