"""linear_cross_entropy, Triton kernels: error budget, chunks and splits, odd labels, compile, limits."""

import functools

import pytest
import torch
import torch.nn.functional as F
from support.triton_case import assert_all_within_budget, compiles_ahead_of_time, names_every_argument, results

from vilt_fast import functional
from vilt_fast.kernels import _device
from vilt_fast.kernels import linear_cross_entropy as kernels
from vilt_fast.testing import assert_within_budget, opcheck, poisoned, sliced, strided

SHAPES = [(11, 6, 17), (1, 16, 1), (70, 72, 300), (3, 64, 129)]  # rows, width, vocabulary


def _inputs(rows=11, width=6, vocabulary=17, dtype=torch.float32, bias=True, every=3):
    labels = torch.randint(vocabulary, (rows,))
    if every:
        labels[every - 1 :: every] = -100
    bias = torch.randn(vocabulary).to(dtype) if bias else None
    return [torch.randn(rows, width).to(dtype), (torch.randn(vocabulary, width) * 0.5).to(dtype), bias, labels]


def _call(x, weight, bias, labels, *, backend, reduction="mean", ignore_index=-100):
    return functional.linear_cross_entropy(
        x, weight, bias, labels, reduction=reduction, ignore_index=ignore_index, backend=backend
    )


_triton, _reference = (functools.partial(_call, backend=name) for name in ("triton", "reference"))


def _assert_within_budget(inputs, reduction):
    functions = [functools.partial(f, reduction=reduction) for f in (_triton, _reference, _reference)]
    cotangent = torch.randn(len(inputs[0]) if reduction == "none" else ())
    assert_all_within_budget(*functions, inputs, [cotangent])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows, width, vocabulary", SHAPES)
def test_within_budget(rows, width, vocabulary, reduction, dtype, bias):
    if vocabulary == 300 and (reduction == "sum" or not bias):
        vocabulary = 130
    _assert_within_budget(_inputs(rows, width, vocabulary, dtype, bias), reduction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("alive", [1, 40 * 256, 1 << 24], ids=["least", "two chunks", "one chunk"])
def test_chunks_and_splits(alive, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "_ALIVE", alive)
    monkeypatch.setattr(_device, "multiprocessors", lambda tensor: 1)
    assert kernels._chunk(40, 400) == {1: 128, 40 * 256: 256, 1 << 24: 512}[alive]
    _assert_within_budget(_inputs(40, 20, 400, dtype), "mean")


def test_labelled_rows_are_listed_in_order():
    labels = torch.randint(-1, 2, (2500,))
    kept, count = torch.empty(2500, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    losses, picked = (torch.full((2500,), 9.0) for _ in range(2))
    kernels._linear_cross_entropy_compact_kernel[(1,)](labels, kept, count, losses, picked, 2500, -1, BLOCK=1024)
    want = (labels != -1).nonzero().squeeze(1)
    assert count.item() == len(want) and torch.equal(kept[: len(want)].long(), want)
    assert picked.isnan().all() and torch.equal(losses, torch.where(labels == -1, 0.0, 9.0))


def test_many_vocabulary_tiles_are_combined():
    rows, tiles = 45, 70
    maxima, sums = torch.randn(tiles, rows) * 30, torch.rand(tiles, rows) + 1
    maxima[:40, 3] = float("-inf")  # tiles without a possible word
    kept, count = torch.arange(rows, dtype=torch.int32), torch.tensor([rows], dtype=torch.int32)
    picked, lse, losses = torch.randn(rows), torch.empty(rows), torch.empty(rows)
    kernels._linear_cross_entropy_combine_kernel[(2,)](
        kept, count, picked, maxima, sums, lse, losses, rows, tiles, BLOCK_R=32, BLOCK_T=32
    )
    plain, exact = (torch.logsumexp(m + s.log(), 0) for m, s in ((maxima, sums), (maxima.double(), sums.double())))
    assert_within_budget(lse, plain, exact)
    assert_within_budget(losses, plain - picked, exact - picked)


def test_the_tiles_of_many_rows():
    _assert_within_budget(_inputs(700, 8, 20, torch.float16), "mean")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [3, 0])
def test_nothing_labelled_is_what_torch_gives(rows, reduction):
    x, weight, bias, _ = _inputs()
    labels = torch.full((rows,), -100)
    inputs = [t.requires_grad_() for t in (x[:rows].contiguous(), weight, bias)]
    got = _triton(*inputs, labels, reduction=reduction)
    want = F.cross_entropy(F.linear(*inputs), labels, reduction=reduction)
    torch.testing.assert_close(got, want, equal_nan=True)
    for gradient in torch.autograd.grad(got, inputs, torch.ones_like(got)):
        assert not gradient.any()


def test_unlabelled_rows_may_hold_anything():
    x, weight, bias, labels = _inputs(40, 20, 50)
    labels[0] = -100  # the row that stands in for rows past the end of a tile
    cotangent = torch.randn(40)
    spoiled = [poisoned(x, labels == -100), weight, bias, labels]
    call = functools.partial(_triton, reduction="none")
    got = results(call, spoiled, [poisoned(cotangent, labels == -100)])
    want = results(call, [x, weight, bias, labels], [cotangent])
    for g, w in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        assert torch.equal(g, w)
    assert not got[1][0][labels == -100].any()


def test_a_row_of_nan_spoils_only_its_own_loss():
    x, weight, bias, labels = _inputs(9, every=0)
    want = _triton(x, weight, bias, labels, reduction="none")
    for row in (0, 8):
        bad = torch.arange(9) == row
        got = _triton(poisoned(x, bad), weight, bias, labels, reduction="none")
        assert got[row].isnan() and torch.equal(got[~bad], want[~bad])


def test_words_ruled_out_by_the_bias():
    x, weight, bias, labels = _inputs(30, 8, 200)
    bias[:150] = float("-inf")
    labels = torch.where(labels == -100, labels, labels % 50 + 150)
    assert_all_within_budget(_triton, _reference, _reference, [x, weight, bias, labels], [torch.ones(())])
    labels[0] = 3
    assert _triton(x, weight, bias, labels, reduction="none")[0] == float("inf")


def test_a_label_out_of_range_is_nan_where_labels_are_not_looked_at():
    x, weight, bias, labels = _inputs(9, every=0)
    labels[2], labels[5] = 17, -1
    given = dict(x=x, weight=weight, bias=bias, labels=labels, ignore_index=-100)
    (losses, _), _ = kernels.linear_cross_entropy_fwd(**given, keep=False)
    assert losses.isnan().tolist() == [row in (2, 5) for row in range(9)]


def test_another_ignore_index():
    x, weight, bias, labels = _inputs()
    labels[labels == -100] = 2
    got = _triton(x, weight, bias, labels, ignore_index=2)
    torch.testing.assert_close(got, F.cross_entropy(F.linear(x, weight, bias), labels, ignore_index=2))


def test_a_small_gradient_survives_float16():
    inputs = _inputs(40, 16, 300, torch.float16)
    call = functools.partial(_triton, reduction="none")
    tiny = torch.full((40,), 2.0**-16)
    _, got = results(lambda *t: call(*t) * 2.0**-16, inputs, [torch.ones(40)])
    _, exact = results(lambda *t: _reference(*t, reduction="none"), inputs, [tiny], torch.float64)
    _, unscaled = results(call, inputs, [torch.ones(40)])
    for g, u, e in zip(got, unscaled, exact, strict=True):
        plain = (u.double() * 2.0**-16).to(torch.float16)  # the gradient of the plain sum, scaled and rounded once
        assert torch.equal(g, plain) or (g - plain).abs().max() <= torch.finfo(torch.float16).smallest_normal * 2**-10
        assert_within_budget(g, plain, e)


@pytest.mark.parametrize("layout", [strided, sliced])
def test_layouts(layout):
    x, weight, bias, labels = _inputs(12, 16, 40)
    inputs = [t.requires_grad_() for t in map(layout, (x, weight, bias))]
    plain = [t.detach().clone().requires_grad_() for t in inputs]
    losses = [_triton(*three, labels) for three in (inputs, plain)]
    assert torch.equal(*losses)
    got, want = (torch.autograd.grad(loss, three) for loss, three in zip(losses, (inputs, plain), strict=True))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_inputs_get_no_gradient(frozen):
    *tensors, labels = _inputs()
    inputs = [t.requires_grad_(place != frozen) for place, t in enumerate(tensors)]
    _triton(*inputs, labels).backward()
    want = results(_triton, [*tensors, labels], [torch.ones(())])[1]
    for place, (tensor, gradient) in enumerate(zip(inputs, want, strict=True)):
        assert tensor.grad is None if place == frozen else torch.equal(tensor.grad, gradient)


def test_equal_runs_give_equal_bits():
    inputs = _inputs(40, 20, 200, torch.float16)
    first, second = (results(_triton, inputs, [torch.ones(())]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True))


def test_registered_op_and_compile():
    *tensors, labels = _inputs()
    inputs = [t.requires_grad_() for t in tensors]
    x, weight, bias = inputs
    for given in (bias, None):
        named = dict(x=x, weight=weight, bias=given, labels=labels, ignore_index=-100)
        opcheck("linear_cross_entropy", "triton", keep=True, **named)
    compiled = torch.compile(lambda *t: _triton(*t), fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(*inputs, labels), inputs) for f in (compiled, _triton))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_autocast():
    *tensors, labels = _inputs()
    with torch.autocast("cpu", torch.float16):
        losses = [_call(*tensors, labels, backend=name) for name in ("triton", "reference")]
    assert_within_budget(losses[0], losses[1], _reference(*(t.double() for t in tensors), labels))


def test_limits_are_named(monkeypatch):
    *tensors, labels = _inputs()
    with pytest.raises(RuntimeError, match="x is torch.float64, expected float32, float16 or bfloat16"):
        _triton(*(t.double() for t in tensors), labels)
    monkeypatch.setattr(_device, "interpreted", lambda: False)
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1 before Python starts"):
        _triton(*tensors, labels)


def test_ahead_of_time():
    assert all(map(names_every_argument, kernels.aot_cases()))
    assert compiles_ahead_of_time("linear_cross_entropy") == 8
