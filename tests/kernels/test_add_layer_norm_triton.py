"""add_layer_norm, Triton kernels: error budget, dropout, mixed dtypes, determinism, compile, limits."""

import functools
import math

import pytest
import torch
from support.triton_case import assert_all_within_budget, compiles_ahead_of_time, names_every_argument, results

from vilt_fast import functional
from vilt_fast.kernels import _device
from vilt_fast.kernels import add_layer_norm as kernels
from vilt_fast.testing import assert_within_budget, opcheck, poisoned, sliced, strided

DTYPES = [(torch.float32, torch.float32), (torch.float16, torch.float32), (torch.float16, torch.float16)]


def _inputs(shape, dtype=torch.float32, stream=torch.float32, affine=True):
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(stream)
    weight, bias = (torch.randn(shape[-1]).to(dtype) for _ in range(2))
    return [x, residual, weight if affine else None, bias if affine else None]


def _call(x, residual, weight, bias, *, backend, eps=1e-6, dropout_p=0.0):
    return functional.add_layer_norm(x, residual, weight, bias, eps, dropout_p=dropout_p, backend=backend)


_triton, _reference = (functools.partial(_call, backend=name) for name in ("triton", "reference"))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype, stream", DTYPES)
@pytest.mark.parametrize("shape", [(7, 33), (2, 3, 8), (0, 5), (1, 1), (5, 768)])
def test_within_budget(shape, dtype, stream, affine):
    inputs = _inputs(shape, dtype, stream, affine)
    cotangents = [torch.randn(shape).to(stream), torch.randn(shape).to(dtype)]
    assert_all_within_budget(_triton, _reference, _reference, inputs, cotangents)


def _tiles_of_many_rows(monkeypatch, width=32):
    """What large inputs get: several rows a tile, several tiles a program in the backward."""
    monkeypatch.setattr(kernels, "_config", lambda N, D: dict(ROWS=8, BLOCK_D=width, num_warps=4))
    monkeypatch.setattr(kernels, "_GROUPS", 3)


@pytest.mark.parametrize("dtype, stream", DTYPES)
@pytest.mark.parametrize("rows", [1, 8, 77])
def test_tiles_of_many_rows(rows, dtype, stream, monkeypatch):
    _tiles_of_many_rows(monkeypatch)
    inputs = _inputs((rows, 24), dtype, stream)
    cotangents = [torch.randn(rows, 24).to(stream), torch.randn(rows, 24).to(dtype)]
    assert_all_within_budget(_triton, _reference, _reference, inputs, cotangents)


@pytest.mark.parametrize("eps", [1e-12, 0.1])
def test_eps_is_used(eps):
    inputs = [None if t is None else t * 1e-2 for t in _inputs((3, 9))]
    inputs[1] = -inputs[0] + inputs[1] * 1e-3
    call = functools.partial(_call, eps=eps)
    functions = [functools.partial(call, backend=name) for name in ("triton", "reference", "reference")]
    assert_all_within_budget(*functions, inputs, [torch.randn(3, 9), torch.randn(3, 9)])


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_alone(used):
    inputs = _inputs((6, 20), torch.float16)
    cotangents = [torch.randn(6, 20) if used == 0 else None, torch.randn(6, 20).half() if used == 1 else None]
    (_, got), (_, want) = (results(f, inputs, cotangents) for f in (_triton, _reference))
    _, exact = results(_reference, inputs, cotangents, torch.float64)
    for g, w, e in zip(got, want, exact, strict=True):
        if w is None:  # the sum alone does not see weight and bias
            assert g is None or not g.any()
        else:
            assert_within_budget(g, w, e)


@pytest.mark.parametrize("dtype, stream", DTYPES)
def test_dropout_forward_and_backward(dtype, stream):
    shape, p = (50, 70), 0.3
    inputs = _inputs(shape, dtype, stream)
    inputs[0] = inputs[0].abs() + 1  # nowhere near 0, so s shows the mask
    cotangents = [torch.randn(shape).to(stream), torch.randn(shape).to(dtype)]
    torch.manual_seed(5)
    outputs, gradients = results(functools.partial(_triton, dropout_p=p), inputs, cotangents)
    kept = (outputs[0].float() - inputs[1].float()).abs() > 0.5
    assert abs(kept.float().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / kept.numel())

    def plain(x, residual, weight, bias):
        return _reference(torch.where(kept, x / (1 - p), 0), residual, weight, bias)

    want, exact = results(plain, inputs, cotangents), results(plain, inputs, cotangents, torch.float64)
    for got, w, e in zip((*outputs, *gradients), (*want[0], *want[1]), (*exact[0], *exact[1]), strict=True):
        assert_within_budget(got, w, e)


def test_dropout_depends_on_the_seed_and_on_nothing_else(monkeypatch):
    x, zeros = torch.ones(128, 160), torch.zeros(128, 160)
    seeds = [torch.tensor([n]) for n in (1 << 61, 1 << 61, 3)]

    def draw(rows, seed):
        (s, _), _ = kernels.add_layer_norm_fwd(
            x=x[:rows], residual=zeros[:rows], weight=None, bias=None, eps=1e-6, dropout_p=0.5, seed=seed, keep=False
        )
        return s > 0

    singly = draw(30, seeds[0])
    _tiles_of_many_rows(monkeypatch, width=256)
    first, again, other = (draw(128, seed) for seed in seeds)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first[:30], singly)  # other tiles, same elements
    for lines in (first.double(), first.double().T):  # no two rows or columns are alike beyond chance
        correlation = torch.corrcoef(lines) - torch.eye(len(lines))
        assert correlation.abs().max() < 6 / math.sqrt(lines.shape[1])
    first, second = (_triton(x[:9], zeros[:9], None, None, dropout_p=0.5)[0] for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("layout", [strided, sliced])
def test_layouts(layout):
    inputs = _inputs((6, 9))
    for got, want in zip(_triton(*map(layout, inputs)), _triton(*inputs), strict=True):
        assert torch.equal(got, want)


def test_a_row_of_nan_stays_alone():
    inputs = _inputs((5, 12))
    spoiled = [poisoned(inputs[0], torch.arange(5) == 2), *inputs[1:]]
    for got, want in zip(_triton(*spoiled), _triton(*inputs), strict=True):
        assert got[2].isnan().all()
        assert torch.equal(got[[0, 1, 3, 4]], want[[0, 1, 3, 4]])


def test_equal_runs_give_equal_bits(monkeypatch):
    _tiles_of_many_rows(monkeypatch)
    inputs, cotangents = _inputs((60, 10)), [torch.randn(60, 10), torch.randn(60, 10)]
    first, second = (results(_triton, inputs, cotangents) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True))


def test_registered_op_and_compile():
    x, residual, weight, bias = (t.requires_grad_() for t in _inputs((4, 6)))
    opcheck(
        "add_layer_norm", "triton", keep=True, x=x, residual=residual, weight=weight, bias=bias, eps=1e-6, dropout_p=0.0
    )
    opcheck(
        "add_layer_norm", "triton", keep=True,
        x=x, residual=residual.half(), weight=weight, eps=1e-6, dropout_p=0.5, seed=torch.tensor([7]),
    )  # fmt: skip

    def loss(*tensors):
        s, y = _triton(*tensors)
        return (s * y).sum()

    inputs = (x, residual, weight, bias)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(*inputs), inputs) for f in (compiled, loss))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    dropped = torch.compile(functools.partial(_triton, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    dropped(*inputs)[1].sum().backward()


def test_limits_are_named(monkeypatch):
    inputs = _inputs((3, 4))
    with pytest.raises(RuntimeError, match="x is torch.float64, expected float32, float16 or bfloat16"):
        _triton(*(t.double() for t in inputs))
    with pytest.raises(RuntimeError, match="bfloat16, which Triton's interpreter gets wrong"):
        _triton(*(t.bfloat16() for t in inputs))
    with pytest.raises(RuntimeError, match="rows are 8193 wide, at most 8192"):
        _triton(*_inputs((1, 8193)))
    with pytest.raises(ValueError, match="dropout_p is 1.0"):
        _triton(*inputs, dropout_p=1.0)
    monkeypatch.setattr(_device, "interpreted", lambda: False)
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1 before Python starts"):
        _triton(*inputs)


def test_ahead_of_time():
    assert all(map(names_every_argument, kernels.aot_cases()))
    assert compiles_ahead_of_time("add_layer_norm") == 2
