"""ipot and sinkhorn in the native library: float64, closed forms, POT as an oracle, every instruction set."""

import functools
import math

import numpy as np
import ot
import pytest
import torch
from support.transport_case import (
    WEIGHTS,
    any_weights,
    assert_sinkhorn,
    assert_the_scale_of_weights_is_free,
    recurrence,
    sinkhorn,
)

from vilt_fast import functional
from vilt_fast.testing import assert_within_budget, padding_masks, poisoned, strided

CPP = {"backend": "cpp"}
REFERENCE = {"backend": "reference"}
# Ragged, of one, of no and of exactly some vectors (4, 8 and 16 lanes), in blocks of every width (1, 2, 4, 8 vectors).
TEXTS = (40, 1, 7, 16, 3, 0, 12, 5)
IMAGES = (241, 9, 1, 64, 65, 20, 0, 100)


def _costs(seed=0, texts=TEXTS, images=IMAGES):
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(len(texts), max(texts), max(images), generator=generator) * 2
    return cost, padding_masks(texts), padding_masks(images)


def _exact_plan(cost, text_pad, image_pad, beta, iterations, inner=1):
    plan = torch.zeros(cost.shape, dtype=torch.float64)
    for b in range(len(cost)):
        rows, columns = (~text_pad[b]).nonzero().flatten(), (~image_pad[b]).nonzero().flatten()
        if len(rows) and len(columns):
            real = cost[b][rows][:, columns].double().numpy()
            found = torch.from_numpy(recurrence(real, beta, iterations, inner))
            plan[b, rows.unsqueeze(1), columns] = found
    return plan


@functools.cache
def _ipot_oracles(seed, texts, images, beta, iterations, inner):
    """(plain float32 plan, float64 recurrence), once for all instruction sets."""
    arguments = _costs(seed, texts, images)
    options = {"beta": beta, "iterations": iterations, "inner": inner}
    return functional.ipot(*arguments, **options, **REFERENCE), _exact_plan(*arguments, **options)


@functools.cache
def _sinkhorn_oracles(epsilon, iterations):
    cost, *pads = _costs()
    options = {"epsilon": epsilon, "iterations": iterations}
    return functional.sinkhorn(cost, *pads, **options, **REFERENCE), functional.sinkhorn(
        cost.double(), *pads, **options
    )


# ---- IPOT ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("inner", [1, 3])
@pytest.mark.parametrize("beta, iterations", [(0.5, 50), (0.5, 1), (0.5, 2), (2.0, 64), (0.2, 20)])
def test_ipot_is_therecurrence(isa, beta, iterations, inner):
    cost, text_pad, image_pad = _costs()
    options = {"beta": beta, "iterations": iterations, "inner": inner}
    plan = functional.ipot(cost, text_pad, image_pad, **options, **CPP)
    assert_within_budget(plan, *_ipot_oracles(0, TEXTS, IMAGES, beta, iterations, inner))
    assert not plan.masked_select(text_pad.unsqueeze(2) | image_pad.unsqueeze(1)).any()


HARD_TEXTS, HARD_IMAGES = (12, 5, 30, 8), (30, 5, 17, 8)


def _hard_costs():
    cost, *pads = _costs(1, HARD_TEXTS, HARD_IMAGES)
    cost[0, 2], cost[0, :, 7] = 2.0, 2.0  # a word and a patch far from everything
    cost[1] = (cost[1] > 1) * 2.0  # only 0 and 2
    cost[3] = cost[3] * 1e-3 + 1.9  # everything far, all alike
    return cost, *pads


@functools.cache
def _hard_oracles(beta, iterations):
    cost, *pads = _hard_costs()
    options = {"beta": beta, "iterations": iterations}
    return functional.ipot(cost, *pads, **options, **REFERENCE), functional.ipot(cost.double(), *pads, **options)


@pytest.mark.parametrize("beta, iterations", [(0.02, 1000), (0.02, 3), (0.1, 1000), (0.05, 200)])
def test_ipot_is_stable_at_small_beta(isa, beta, iterations):
    cost, *pads = _hard_costs()
    plan = functional.ipot(cost, *pads, beta=beta, iterations=iterations, **CPP)
    assert plan.isfinite().all()
    for b, m in enumerate(HARD_TEXTS):  # the text marginals are exact at any iteration
        torch.testing.assert_close(plan[b].sum(1)[:m], torch.full((m,), 1 / m), rtol=1e-5, atol=0)
    plain, exact = _hard_oracles(beta, iterations)
    assert_within_budget((cost * plan).sum((1, 2)), (cost * plain).sum((1, 2)), (cost.double() * exact).sum((1, 2)))
    assert_within_budget(plan[2], plain[2], exact[2])


@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_ipot_survives_costs_of_any_size(isa, scale):
    """Every step of these leaves the range of floats: the steps in logarithms."""
    cost, text_pad, image_pad = _costs(2, [9, 4], [6, 11])
    arguments = cost * scale, text_pad, image_pad
    plan = functional.ipot(*arguments, iterations=20, inner=2, **CPP)
    plain = functional.ipot(*arguments, iterations=20, inner=2, **REFERENCE)
    assert_within_budget(plan, plain, functional.ipot(arguments[0].double(), *arguments[1:], iterations=20, inner=2))


FORBIDDEN = {
    "sinkhorn": [(dict(epsilon=0.1), huge) for huge in (1e6, 3e8, 1e9, -1e9)],
    "ipot": [(dict(beta=1e-3), 1e6), (dict(beta=0.1, inner=3), 3e8), (dict(beta=0.5), 1e9)],
}


def _solved(op, cost, pads, **options):
    """(plan, value or None)"""
    result = getattr(functional, op)(cost, *pads, **options)
    return (result, None) if op == "ipot" else (result.plan, result.value)


@functools.cache
def _forbidden_case(op, place, number):
    """Costs of which a whole row or column is huge, the float64 plan and value, and how wrong a plan may be.

    As wrong as PyTorch's in float32 without what is huge, plus what is lost of a double of so many bits.
    """
    cost, *pads = _costs(7, [10, 3], [20, 33])
    options, huge = FORBIDDEN[op][number]
    plain, exact = (
        _solved(op, cost.to(dtype), pads, **options, **REFERENCE)[0] for dtype in (torch.float32, torch.float64)
    )
    if place != "column":
        cost[:, 2] = huge
    if place != "row":
        cost[:, :, 5] = huge
    plan, value = _solved(op, cost.double(), pads, **options, **REFERENCE)
    exponent = abs(huge) * 50 / options["beta"] if op == "ipot" else abs(huge) / options["epsilon"]
    return cost, pads, options, plan, value, (plain - exact).abs() + plan * exponent * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("place", ["row", "column", "row and column"])
@pytest.mark.parametrize("op, number", [(op, i) for op, cases in FORBIDDEN.items() for i in range(len(cases))])
def test_a_row_or_column_may_be_forbidden(isa, op, number, place):
    """Its entries cost 1e10 bits and more, and their differences still count."""
    cost, pads, options, exact, value, error = _forbidden_case(op, place, number)
    plan, found = _solved(op, cost, pads, **options, **CPP)
    assert_within_budget(plan, exact + error, exact)
    if found is not None:
        torch.testing.assert_close(found, value.float())


@pytest.mark.parametrize("beta, iterations", [(0.02, 1000), (0.1, 300)])
def test_permutation_costs_give_the_permutation(isa, beta, iterations):
    order = torch.randperm(20)
    cost = torch.full((1, 20, 20), 2.0)
    cost[0, torch.arange(20), order] = 0
    nothing = torch.zeros(1, 20).bool()
    want = torch.zeros(1, 20, 20)
    want[0, torch.arange(20), order] = 0.05
    torch.testing.assert_close(functional.ipot(cost, nothing, nothing, beta=beta, iterations=iterations, **CPP), want)


def test_closed_forms(isa):
    one_word = functional.ipot(torch.rand(1, 1, 7), torch.zeros(1, 1).bool(), torch.zeros(1, 7).bool(), **CPP)
    torch.testing.assert_close(one_word, torch.full((1, 1, 7), 1 / 7))
    one_patch = functional.ipot(torch.rand(1, 6, 1), torch.zeros(1, 6).bool(), torch.zeros(1, 1).bool(), **CPP)
    torch.testing.assert_close(one_patch, torch.full((1, 6, 1), 1 / 6))
    equal = functional.ipot(torch.full((1, 4, 5), 0.7), torch.zeros(1, 4).bool(), torch.zeros(1, 5).bool(), **CPP)
    torch.testing.assert_close(equal, torch.full((1, 4, 5), 1 / 20))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_enough_iterations_approach_the_linear_programme(backend):
    """POT's network simplex: an outside oracle for what IPOT converges to."""
    cost, text_pad, image_pad = _costs(3, [8, 5], [12, 20])
    plan = functional.ipot(cost, text_pad, image_pad, beta=0.05, iterations=3000, backend=backend)
    for b, (m, n) in enumerate(((8, 12), (5, 20))):
        real = cost[b, :m, :n].double().numpy()
        least = ot.emd2(np.full(m, 1 / m), np.full(n, 1 / n), real)
        # T_t is the entropic plan of epsilon = beta / t up to its marginals: above the least by at most eps log(mn).
        assert abs((real * plan[b, :m, :n].numpy()).sum() - least) < 0.05 / 3000 * math.log(m * n) + 1e-5


@pytest.mark.parametrize("shape", [(128, 1024), (200, 33), (2, 300)])
def test_large_and_lopsided(shape):
    cost = torch.rand(2, *shape) * 2
    pads = torch.zeros(2, shape[0]).bool(), torch.zeros(2, shape[1]).bool()
    plan = functional.ipot(cost, *pads, **CPP)
    assert_within_budget(plan, functional.ipot(cost, *pads, **REFERENCE), _exact_plan(cost, *pads, 0.5, 50))


def test_padded_equals_cropped_whatever_padding_holds(isa):
    cost, text_pad, image_pad = _costs()
    plan = functional.ipot(cost, text_pad, image_pad, **CPP)
    pad = text_pad.unsqueeze(2) | image_pad.unsqueeze(1)
    assert torch.equal(functional.ipot(poisoned(cost, pad), text_pad, image_pad, **CPP), plan)
    for b, (m, n) in enumerate(zip(TEXTS, IMAGES, strict=True)):
        alone = functional.ipot(cost[b : b + 1, :m, :n], text_pad[b : b + 1, :m], image_pad[b : b + 1, :n], **CPP)
        assert torch.equal(plan[b, :m, :n], alone[0])


def test_any_subset_of_positions_may_be_real(isa):
    cost, _, _ = _costs()
    text_pad, image_pad = torch.rand(8, 40) < 0.4, torch.rand(8, 241) < 0.4
    plan = functional.ipot(poisoned(cost, text_pad.unsqueeze(2) | image_pad.unsqueeze(1)), text_pad, image_pad, **CPP)
    plain = functional.ipot(cost, text_pad, image_pad, **REFERENCE)
    assert_within_budget(plan, plain, _exact_plan(cost, text_pad, image_pad, 0.5, 50))


def test_threads_and_strides_do_not_change_a_bit():
    cost, text_pad, image_pad = _costs()
    plan = functional.ipot(cost, text_pad, image_pad)
    assert torch.equal(functional.ipot(strided(cost), text_pad.T.clone().T, image_pad, **CPP), plan)
    torch.set_num_threads(1)
    try:
        assert torch.equal(functional.ipot(cost, text_pad, image_pad, **CPP), plan)
    finally:
        torch.set_num_threads(2)
    for dtype in (torch.bfloat16, torch.float16):
        half = functional.ipot(cost.to(dtype), text_pad, image_pad, **CPP)
        assert torch.equal(half, functional.ipot(cost.to(dtype).float(), text_pad, image_pad, **CPP))


def test_empty_samples_and_empty_batches():
    cost, text_pad, image_pad = _costs(texts=[4, 4, 4], images=[5, 5, 5])
    want = functional.ipot(cost, text_pad, image_pad, **CPP)
    text_pad[0], image_pad[1] = True, True
    plan = functional.ipot(cost, text_pad, image_pad, **CPP)
    assert not plan[:2].any() and torch.equal(plan[2], want[2])
    for shape in ((2, 0, 3), (2, 3, 0), (2, 0, 0)):
        pads = torch.zeros(shape[:2]).bool(), torch.zeros(shape[::2]).bool()
        assert functional.ipot(torch.zeros(shape), *pads, **CPP).shape == shape
        assert functional.sinkhorn(torch.zeros(shape), *pads, **CPP).value.tolist() == [0, 0]


# ---- Sinkhorn --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("epsilon, iterations", [(0.5, 10), (0.1, 100), (2.0, 1), (0.01, 300), (0.002, 100)])
def test_sinkhorn_is_the_reference(isa, epsilon, iterations):
    arguments = _costs()
    options = {"epsilon": epsilon, "iterations": iterations}
    got = functional.sinkhorn(*arguments, **options, **CPP)
    plain, exact = _sinkhorn_oracles(epsilon, iterations)
    for name in ("plan", "value", "marginal_error"):
        assert_within_budget(getattr(got, name), getattr(plain, name), getattr(exact, name), what=name)
    assert torch.equal(got.iterations, exact.iterations)


def test_sinkhorn_with_marginals(isa):
    cost, text_pad, image_pad = _costs()
    mu, nu = torch.rand(text_pad.shape) + 0.1, torch.rand(image_pad.shape) * 1e3
    mu[0, 2] = nu[0, 5] = 0  # as if padded
    mu[2] = 0  # nothing to move
    options = dict(text_marginal=poisoned(mu, text_pad), image_marginal=poisoned(nu, image_pad), epsilon=0.2)
    got = functional.sinkhorn(cost, text_pad, image_pad, **options, **CPP)
    plain = functional.sinkhorn(cost, text_pad, image_pad, **options, **REFERENCE)
    doubles = {k: v.double() if torch.is_tensor(v) else v for k, v in options.items()}
    exact = functional.sinkhorn(cost.double(), text_pad, image_pad, **doubles)
    for name in ("plan", "value", "marginal_error"):
        assert_within_budget(getattr(got, name), getattr(plain, name), getattr(exact, name), what=name)
    assert not got.plan[2].any() and got.iterations[2] == 0 and not got.plan[0, 2].any()


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_weight_of_zero_is_padding_whatever_it_costs(backend):
    cost, text_pad, image_pad = _costs(7, [4, 3], [5, 2])
    mu, nu = torch.ones(2, 4), torch.ones(2, 5)
    mu[0, 1] = nu[1, 0] = 0
    options = dict(text_marginal=mu, image_marginal=nu, backend=backend)
    want = functional.sinkhorn(cost, text_pad, image_pad, **options)
    cost[0, 1], cost[1, :, 0] = float("nan"), float("inf")
    for got, plain in zip(functional.sinkhorn(cost, text_pad, image_pad, **options), want, strict=True):
        assert torch.equal(got, plain)
    cost[1, 0, 1] = float("nan")
    with pytest.raises(ValueError, match=r"sinkhorn: cost is NaN or infinite on real entries of samples \[1\]"):
        functional.sinkhorn(cost, text_pad, image_pad, **options)


@pytest.mark.parametrize("flushed", [False, True], ids=["", "denormals flushed"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_sinkhorn_with_weights_of_any_size(isa, kind, flushed):
    """What is real does not depend on the FP mode of the caller or of the library's own threads."""
    arguments = _costs()
    weights = any_weights(kind, *arguments[1:])
    want = assert_sinkhorn("cpp", arguments, weights=weights)
    torch.set_flush_denormal(flushed)
    try:
        got = sinkhorn("cpp", *arguments, weights=weights)
    finally:
        torch.set_flush_denormal(False)
    assert all(map(torch.equal, got, want))
    assert_the_scale_of_weights_is_free("cpp", TEXTS, IMAGES)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_first_plans_give_tiny_weights_their_part(isa, kind):
    """Before it has converged, a row that weighs nothing may hold the mass of columns that are dear for all others."""
    cost, *pads = _costs(texts=(5, 9, 30), images=(9, 40, 70))
    cost = 1.5 + cost / 4
    cost[:, :, 0] = cost[:, ::3] = 0
    rows, columns = any_weights(kind, *pads)
    for weights in ((rows, columns), (rows, None), (None, columns)):
        for iterations in (1, 2, 5):
            assert_sinkhorn("cpp", (cost, *pads), weights=weights, epsilon=0.02, iterations=iterations)


def test_sinkhorn_agrees_with_pot(isa):
    arguments = cost, _, _ = _costs(4, (8, 5), (12, 20))
    result = functional.sinkhorn(*arguments, epsilon=0.1, iterations=1000, **CPP)
    plain = functional.sinkhorn(*arguments, epsilon=0.1, iterations=1000, **REFERENCE).plan
    for b, (m, n) in enumerate(((8, 12), (5, 20))):
        real = cost[b, :m, :n].double().numpy()
        want = ot.sinkhorn(
            np.full(m, 1 / m), np.full(n, 1 / n), real, 0.1, method="sinkhorn_log", stopThr=1e-14, numItermax=5000
        )
        assert_within_budget(result.plan[b, :m, :n], plain[b, :m, :n], torch.from_numpy(want))
    assert result.marginal_error.max() < 8 * torch.finfo(torch.float32).eps


def test_sinkhorn_stops_each_sample_on_its_own():
    arguments = _costs(5, [5, 1, 3], [6, 4, 2])
    got = functional.sinkhorn(*arguments, epsilon=0.2, iterations=1000, tolerance=1e-4, **CPP)
    want = functional.sinkhorn(arguments[0].double(), *arguments[1:], epsilon=0.2, iterations=1000, tolerance=1e-4)
    assert torch.equal(got.iterations, want.iterations) and got.iterations[1] == 1 < got.iterations[0] < 1000
    assert (got.marginal_error <= 1e-4).all()
    stopped = functional.sinkhorn(*arguments, epsilon=0.2, iterations=int(got.iterations[0]), **CPP)
    assert torch.equal(stopped.plan[0], got.plan[0])


def test_sinkhorn_gradient_is_the_plan_and_matches_finite_differences():
    cost, text_pad, image_pad = _costs(6, [4, 3, 0], [5, 2, 3])
    pad = text_pad.unsqueeze(2) | image_pad.unsqueeze(1)
    given = poisoned(cost, pad).requires_grad_()
    options = {"epsilon": 0.3, "iterations": 400}
    weights = torch.tensor([1.0, -2.0, 3.0])
    result = functional.sinkhorn(given, text_pad, image_pad, **options, **CPP)
    (grad,) = torch.autograd.grad((result.value * weights).sum(), given)
    assert torch.equal(grad, result.plan * weights[:, None, None]) and not result.plan.requires_grad
    for b, i, j in ((0, 1, 2), (0, 3, 4), (1, 2, 1)):
        values = []
        for step in (1e-5, -1e-5):
            moved = cost.double()
            moved[b, i, j] += step
            values.append((functional.sinkhorn(moved, text_pad, image_pad, **options).value * weights).sum())
        torch.testing.assert_close(grad[b, i, j].double(), (values[0] - values[1]) / 2e-5, rtol=1e-5, atol=1e-8)
    with pytest.raises(RuntimeError, match="no gradient through the iterations"):
        functional.sinkhorn(given, text_pad, image_pad, gradient="unrolled", **CPP)
    assert functional.sinkhorn(given, text_pad, image_pad, gradient="unrolled").value.requires_grad
