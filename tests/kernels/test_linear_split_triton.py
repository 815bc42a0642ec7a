"""linear of few rows, K dealt out over programs: error budget, equal bits, rows that are NaN, and when it is taken."""

import functools

import pytest
import torch
from support.triton_case import names_every_argument

from vilt_fast import functional, order
from vilt_fast.kernels import _device, linear, linear_split
from vilt_fast.testing import assert_within_budget, poisoned

_reference = functools.partial(functional.linear, backend="reference")
SPLIT = dict(BLOCK_M=64, BLOCK_N=32, BLOCK_K=16, num_warps=4, num_stages=2, GROUP=2)


def _inputs(M, N, K, dtype=torch.float32, bias=True, residual=None):
    x, weight = torch.randn(M, K).to(dtype), (torch.randn(N, K) * K**-0.5).to(dtype)
    added = torch.randn(N).to(dtype) if bias else None
    return x, weight, added, None if residual is None else torch.randn(M, N).to(residual)


def _split(x, weight, bias, residual, depth=32, *, gelu=False, kind="pointer"):
    """What linear.launch gives."""
    out = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    config = linear._config(kind, 185, 768, gelu=gelu) | SPLIT | {"DEPTH": depth}
    return linear.launch(x, weight, bias, residual, gelu=gelu, save=gelu, out_dtype=out, kind=kind, config=config)


@pytest.mark.parametrize(
    "dtype, residual",
    [(torch.float32, None), (torch.float32, torch.float32), (torch.float16, None), (torch.float16, torch.float32),
     (torch.float16, torch.float16)],
)  # fmt: skip
@pytest.mark.parametrize("M, N, K, depth", [(70, 40, 100, 48), (1, 300, 64, 32), (5, 7, 9, 16), (64, 32, 96, 32)])
@torch.no_grad()
def test_within_budget(M, N, K, depth, dtype, residual):
    """Splits that K fills and that it does not, one split and several, odd rows and columns."""
    inputs = _inputs(M, N, K, dtype, N != 40, residual)
    got, _ = _split(*inputs, depth)
    exact = _reference(*(None if t is None else t.double() for t in inputs))
    assert_within_budget(got, _reference(*inputs), exact)


@pytest.mark.parametrize("kind", ["pointer", "tma"])
@torch.no_grad()
def test_descriptors_and_gelu(kind):
    x, weight, bias, residual = _inputs(50, 48, 80, torch.float16, residual=torch.float32)
    out, pre = _split(x, weight, bias, residual, gelu=True, kind=kind)
    plain, exact = _reference(x, weight, bias), _reference(x.double(), weight.double(), bias.double())
    assert_within_budget(pre, plain, exact)
    gelu = torch.nn.functional.gelu
    assert_within_budget(out, gelu(plain) + residual, gelu(exact) + residual)


@torch.no_grad()
def test_equal_runs_give_equal_bits_and_the_order_of_splits_is_fixed():
    x, weight, bias, residual = _inputs(40, 24, 96, residual=torch.float32)
    first, again = (_split(x, weight, bias, residual)[0] for _ in range(2))
    assert torch.equal(first, again)
    shares = [_split(x[:, k : k + 32], weight[:, k : k + 32], None, None)[0] for k in (0, 32, 64)]
    assert torch.equal(first, (shares[0] + shares[1]) + shares[2] + bias + residual)


@torch.no_grad()
def test_a_row_of_nan_stays_alone():
    x, weight, bias, residual = _inputs(70, 24, 64, residual=torch.float32)
    want, _ = _split(x, weight, bias, residual)
    for row in (0, 69):
        bad = torch.arange(70) == row
        got, _ = _split(poisoned(x, bad), weight, bias, residual)
        assert got[row].isnan().all() and torch.equal(got[~bad], want[~bad])


@torch.no_grad()
def test_taken_where_the_table_says_so_and_k_is_that_long(monkeypatch):
    monkeypatch.setattr(_device, "arch", lambda tensor: 90)
    taken, launch = [], linear_split.launch

    def noted(*arguments):
        taken.append(arguments)
        launch(*arguments)

    monkeypatch.setattr(linear_split, "launch", noted)
    monkeypatch.setitem(order.TRIED, "linear", SPLIT | {"DEPTH": 64})
    for dtype, K, times in (
        (torch.float16, 64, 0), (torch.float16, 72, 1), (torch.float32, 72, 0), (torch.float16, 65, 0)  # no descriptor
    ):  # fmt: skip
        inputs = _inputs(20, 16, K, dtype)
        got = functional.linear(*inputs, backend="triton")
        assert_within_budget(got, _reference(*inputs), _reference(*(t if t is None else t.double() for t in inputs)))
        assert len(taken) == times, (dtype, K)
        taken.clear()
    functional.linear_gelu(*_inputs(20, 16, 72, torch.float16)[:3], backend="triton")
    assert not taken
    ordinary = linear._config("tma", 185, 768)
    assert linear._measured(ordinary, "tma", 185, 64, 90) == ordinary
    monkeypatch.setitem(order.TRIED, "linear", SPLIT | {"DEPTH": 64, "PDL": True})
    assert linear._measured(ordinary, "tma", 185, 64, 90) == ordinary | {"PDL": True}


@torch.no_grad()
def test_splits_that_would_share_columns_are_refused():
    with pytest.raises(ValueError, match="splits of 40 columns, expected a multiple of BLOCK_K=16"):
        _split(*_inputs(3, 8, 80), 40)


def test_ahead_of_time():
    assert all(map(names_every_argument, linear_split.cases()))
