"""ipot, sinkhorn and word_patch_distance, Triton kernels: error budget, ragged and empty pairs, NaN, large pairs."""

import pytest
import torch
from support.transport_case import (
    WEIGHTS,
    any_weights,
    assert_a_bad_cost_spoils_its_own_sample,
    assert_distance,
    assert_finds_the_permutation,
    assert_ipot,
    assert_only_real_entries_count,
    assert_sinkhorn,
    assert_the_scale_of_weights_is_free,
    costs,
    distance,
    hidden,
    ipot,
    sinkhorn,
    with_gradients,
)
from support.triton_case import compiles_ahead_of_time, names_every_argument

from vilt_fast import functional
from vilt_fast.kernels import _device
from vilt_fast.kernels import ipot as ipot_kernels
from vilt_fast.kernels import sinkhorn as sinkhorn_kernels
from vilt_fast.kernels import word_patch_distance as distance_kernels
from vilt_fast.testing import opcheck, padding_masks, poisoned, sliced, strided

HALVES = [torch.float32, torch.float16]
SMALL = dict(texts=(9, 1, 4, 0), images=(17, 3, 20, 5))


@pytest.mark.parametrize("beta, iterations, inner", [(0.5, 50, 1), (0.5, 1, 1), (2.0, 17, 2), (0.1, 5, 3)])
def test_ipot(beta, iterations, inner):
    assert_ipot("triton", costs(), beta=beta, iterations=iterations, inner=inner)


@pytest.mark.parametrize("shape", [(128, 1024), (41, 60), (20, 257)])
def test_ipot_of_large_pairs(shape):
    assert not ipot_kernels.config(*shape)[0]
    assert_ipot("triton", costs(*zip(shape, strict=True)), iterations=2, inner=1 + (shape[0] < 128))


@pytest.mark.parametrize("beta, iterations", [(0.02, 60), (0.1, 30)])
def test_ipot_at_small_beta(beta, iterations):
    cost, *pads = costs(**SMALL)
    plan = ipot("triton", cost, *pads, beta=beta, iterations=iterations)
    assert plan.isfinite().all()
    for b, m in enumerate(SMALL["texts"][:3]):  # exact at any iteration
        torch.testing.assert_close(plan[b].sum(1)[:m], torch.full((m,), 1 / m), rtol=1e-5, atol=0)
    exact = functional.ipot(cost.double(), *pads, beta=beta, iterations=iterations)
    plain = functional.ipot(cost, *pads, beta=beta, iterations=iterations, backend="reference")
    far = [((cost * x).sum((1, 2)).double() - (cost * exact).sum((1, 2))).abs().max() for x in (plan, plain)]
    assert far[0] <= 2 * far[1] + torch.finfo(torch.float32).eps * exact.numel()


def test_ipot_of_a_permutation():
    for beta in (0.02, 0.2):
        assert_finds_the_permutation("triton", beta)


@pytest.mark.parametrize("shape", [(40, 240), (60, 300)])
def test_any_positions_may_be_real_and_padding_may_be_nan(shape):
    assert_only_real_entries_count("triton", shape)


@pytest.mark.parametrize("beta", [0.5, 0.02])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_cost_that_is_not_finite_spoils_its_own_sample(value, beta):
    assert_a_bad_cost_spoils_its_own_sample("triton", **SMALL, value=value, beta=beta)


@pytest.mark.parametrize("epsilon, iterations", [(0.1, 9), (2.0, 1), (0.01, 9)])
def test_sinkhorn(epsilon, iterations):
    assert_sinkhorn("triton", costs(), epsilon=epsilon, iterations=iterations)


def test_sinkhorn_with_marginals_and_tolerance():
    cost, text_pad, image_pad = costs()
    weights = [torch.rand(text_pad.shape) + 0.1, torch.rand(image_pad.shape) * 1e3]
    weights[0][0, 2] = weights[1][0, 5] = 0  # as if padded
    weights[0][2] = 0  # nothing to move
    weights = [poisoned(weights[0], text_pad), poisoned(weights[1], image_pad)]
    plan, _, used, _ = assert_sinkhorn(
        "triton", (cost, text_pad, image_pad), epsilon=0.2, iterations=9, weights=weights
    )
    assert not plan[2].any() and used[2] == 0 and not plan[0, 2].any()
    used = sinkhorn("triton", *costs((5, 1, 3), (6, 4, 2)), epsilon=0.2, iterations=99, tolerance=1e-4)[2]
    assert used[1] == 1 < used[0] < 99


@pytest.mark.parametrize("kind", WEIGHTS)
def test_sinkhorn_with_weights_of_any_size(kind):
    """Also in the first plans, where a row that weighs nothing may hold the mass of columns dear for all others."""
    cost, *pads = costs((5, 9), (9, 20))
    cost = 1.5 + cost / 4
    cost[:, :, 0] = cost[:, ::3] = 0
    rows, columns = any_weights(kind, *pads)
    for weights, iterations in (((rows, columns), 1), ((rows, columns), 9), ((rows, None), 2), ((None, columns), 2)):
        assert_sinkhorn("triton", (cost, *pads), weights=weights, epsilon=0.02, iterations=iterations)


def test_the_scale_of_weights_is_free():
    assert_the_scale_of_weights_is_free("triton", (5, 3), (9, 4))


def test_sinkhorn_gradient_is_the_plan():
    cost, *pads = costs(**SMALL)
    cost.requires_grad_()
    result = functional.sinkhorn(cost, *pads, backend="triton", iterations=5)
    (gradient,) = torch.autograd.grad(result.value.sum() * 2, cost)
    assert torch.equal(gradient, result.plan * 2)
    with pytest.raises(RuntimeError, match="no gradient through the iterations"):
        functional.sinkhorn(cost, *pads, backend="triton", gradient="unrolled")


def test_sinkhorn_of_a_large_pair():
    assert_sinkhorn("triton", costs((128,), (1024,)), iterations=2)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("beta, iterations, inner", [(0.5, 18, 1), (0.1, 3, 2)])
def test_distance(dtype, gradients, beta, iterations, inner):
    options = dict(beta=beta, iterations=iterations, inner=inner)
    assert_distance("triton", hidden(dtype), gradients=gradients, **options)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("gradients", [False, True])
def test_distance_of_large_pairs(dtype, gradients):
    assert_distance("triton", hidden(dtype, 20, (60, 3), (30, 260)), gradients=gradients, iterations=3)


def test_distance_at_128_by_1024():
    assert_distance("triton", hidden(width=16, texts=(128,), images=(1024,)), iterations=1)


def test_distance_whatever_padding_and_other_samples_hold():
    text, image, *pads = hidden(width=24)
    call = lambda *x: distance("triton", *x, iterations=4)[0]  # noqa: E731
    want = with_gradients(call, text, image, *pads)
    got = with_gradients(call, poisoned(text, pads[0]), poisoned(image, pads[1]), *pads)
    assert all(map(torch.equal, got, want))
    assert not got[1][pads[0]].any() and not got[2][pads[1]].any() and got[0][3] == 0
    text[1, 0, 0] = float("nan")
    got = with_gradients(call, text, image, *pads)
    others = torch.arange(len(text)) != 1
    assert got[0][1].isnan() and all(torch.equal(g[others], w[others]) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("layout", [strided, sliced])
def test_layouts(layout):
    cost, *pads = costs(**SMALL)
    assert torch.equal(ipot("triton", layout(cost), *pads), ipot("triton", cost, *pads))
    text, image, *pads = hidden(width=8, **SMALL)
    call = lambda *x: distance("triton", *x, iterations=4)[0]  # noqa: E731
    got, want = (with_gradients(call, *x, *pads) for x in ((layout(text), layout(image)), (text, image)))
    assert all(map(torch.equal, got, want))


def test_without_words_or_patches():
    for M, N in ((0, 3), (3, 0)):
        pads = torch.zeros(2, M).bool(), torch.zeros(2, N).bool()
        assert ipot("triton", torch.zeros(2, M, N), *pads).shape == (2, M, N)
        assert sinkhorn("triton", torch.zeros(2, M, N), *pads)[1].tolist() == [0, 0]
        got = with_gradients(lambda *x: distance("triton", *x)[0], torch.ones(2, M, 8), torch.ones(2, N, 8), *pads)
        assert got[0].tolist() == [0, 0] and not got[1].any() and not got[2].any()


def test_registered_ops_and_compile():
    cost, *pads = costs(**SMALL)
    named = dict(text_pad=pads[0], image_pad=pads[1], iterations=3)
    opcheck("ipot", "triton", cost=cost, **named, beta=0.5, inner=1)
    cost.requires_grad_()
    opcheck("sinkhorn", "triton", keep=True, cost=cost, **named, epsilon=0.5, tolerance=1e-3)
    text, image, *pads = hidden(width=8, **SMALL)
    states = [text.requires_grad_(), image.requires_grad_()]
    for plan in (False, True):
        given = dict(text=text, image=image, beta=0.5, inner=1, return_plan=plan)
        opcheck("word_patch_distance", "triton", keep=True, **given, **named)

    def call(t, v):
        found = functional.word_patch_distance(t, v, *pads, iterations=3, backend="triton").sum()
        costs = 1 - t @ v.transpose(1, 2)
        return found + functional.sinkhorn(costs, *pads, iterations=3, backend="triton").value.sum() + (
            functional.ipot(costs, *pads, iterations=3, backend="triton").sum()
        )  # fmt: skip

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(*states), states) for f in (compiled, call))
    assert all(map(torch.equal, got, want))


def test_limits_are_named(monkeypatch):
    cost, *pads = costs(**SMALL)
    with pytest.raises(RuntimeError, match="there are 129 text tokens, at most 128"):
        functional.ipot(torch.zeros(1, 129, 3), padding_masks([129]), padding_masks([3]), backend="triton")
    with pytest.raises(RuntimeError, match="cost is torch.float64, expected float32, float16 or bfloat16"):
        functional.ipot(cost.double(), *pads, backend="triton")
    monkeypatch.setattr(_device, "interpreted", lambda: False)
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1 before Python starts"):
        functional.sinkhorn(cost, *pads, backend="triton")


@pytest.mark.parametrize("module", [ipot_kernels, sinkhorn_kernels, distance_kernels])
def test_ahead_of_time(module):
    assert all(map(names_every_argument, module.aot_cases()))
    kernels = {case["kernel"].__name__ for case in module.aot_cases()}
    assert compiles_ahead_of_time(module.__name__.rpartition(".")[2]) == len(kernels)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [dict(), dict(texts=(128, 7), images=(1024, 300))])
def test_on_a_gpu(dtype, shape):
    for options in (dict(), dict(beta=0.1, iterations=100, inner=2)):
        assert_ipot("triton", costs(**shape), "cuda", **options)
        assert_distance("triton", hidden(dtype, 768, **shape), "cuda", **options)
        assert_distance("triton", hidden(dtype, 768, **shape), "cuda", gradients=True, **options)
    assert_sinkhorn("triton", costs(**shape), "cuda")
