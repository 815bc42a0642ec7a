"""sinkhorn: marginals, closed forms, linear programming as an outside oracle, both gradients."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch.autograd import gradcheck

from vilt_fast import functional
from vilt_fast.testing import padding_masks, poisoned

TEXTS, IMAGES = [5, 1, 3], [6, 4, 2]


def _batch(dtype=torch.float64):
    return torch.rand(3, 5, 6, dtype=dtype) * 2, padding_masks(TEXTS), padding_masks(IMAGES)


def _plain(cost, mu, nu, epsilon, iterations):
    """Sinkhorn's scaling in numpy, not in logarithms."""
    kernel = np.exp(-cost / epsilon)
    b = np.ones_like(nu)
    for _ in range(iterations):
        a = mu / (kernel @ b)
        b = nu / (kernel.T @ a)
    return a[:, None] * kernel * b


@pytest.mark.parametrize("epsilon, iterations", [(0.5, 10), (0.1, 100), (2.0, 1)])
def test_is_sinkhorns_scaling(epsilon, iterations):
    cost, text_pad, image_pad = _batch()
    result = functional.sinkhorn(cost, text_pad, image_pad, epsilon=epsilon, iterations=iterations)
    for b, (m, n) in enumerate(zip(TEXTS, IMAGES, strict=True)):
        mu, nu = np.full(m, 1 / m), np.full(n, 1 / n)
        c = cost[b, :m, :n].numpy()
        want = _plain(c, mu, nu, epsilon, iterations)
        np.testing.assert_allclose(result.plan[b, :m, :n].numpy(), want, rtol=1e-10)
        value = (c * want).sum() + epsilon * (want * np.log(want / np.outer(mu, nu))).sum()
        np.testing.assert_allclose(result.value[b].item(), value, rtol=1e-10)
        np.testing.assert_allclose(result.marginal_error[b].item(), np.abs(want.sum(1) - mu).sum(), atol=1e-12)
    assert result.iterations.tolist() == [iterations] * 3


def test_marginals_and_weights():
    cost, text_pad, image_pad = _batch()
    mu, nu = torch.rand(3, 5, dtype=torch.float64) + 0.1, torch.rand(3, 6, dtype=torch.float64) + 0.1
    mu[0, 2] = 0  # no weight: as if padded
    result = functional.sinkhorn(
        cost, text_pad, image_pad, epsilon=0.3, iterations=500, text_marginal=poisoned(mu, text_pad), image_marginal=nu
    )
    mu, nu = mu.masked_fill(text_pad, 0), nu.masked_fill(image_pad, 0)
    torch.testing.assert_close(result.plan.sum(2), mu / mu.sum(1, keepdim=True))
    torch.testing.assert_close(result.plan.sum(1), nu / nu.sum(1, keepdim=True))
    assert result.marginal_error.max() < 1e-10


def test_small_epsilon_approaches_the_linear_programme():
    cost = torch.rand(1, 4, 5, dtype=torch.float64)
    constraints = np.zeros((9, 20))
    for i in range(4):
        constraints[i, i * 5 : i * 5 + 5] = 1
    for j in range(5):
        constraints[4 + j, j::5] = 1
    exact = linprog(cost.flatten().numpy(), A_eq=constraints, b_eq=[1 / 4] * 4 + [1 / 5] * 5).fun
    result = functional.sinkhorn(
        cost, torch.zeros(1, 4).bool(), torch.zeros(1, 5).bool(), epsilon=0.002, iterations=5000
    )
    transport = (cost * result.plan).sum().item()
    assert exact - 1e-6 <= transport <= exact + 0.002 * np.log(20)  # the entropic bias is at most epsilon log(MN)


def test_float32_is_stable_at_small_epsilon():
    cost, text_pad, image_pad = _batch(torch.float32)
    result = functional.sinkhorn(cost, text_pad, image_pad, epsilon=0.002, iterations=1000)
    assert all(t.isfinite().all() for t in (result.plan, result.value, result.marginal_error))
    torch.testing.assert_close(result.plan.sum(1)[0], torch.full((6,), 1 / 6))


def test_tolerance_stops_each_sample_on_its_own():
    cost, text_pad, image_pad = _batch()
    full = functional.sinkhorn(cost, text_pad, image_pad, epsilon=0.2, iterations=1000)
    result = functional.sinkhorn(cost, text_pad, image_pad, epsilon=0.2, iterations=1000, tolerance=1e-6)
    assert (result.marginal_error <= 1e-6).all() and result.iterations[1] == 1 < result.iterations[0] < 1000
    torch.testing.assert_close(result.plan, full.plan, rtol=0, atol=1e-5)
    stopped = functional.sinkhorn(cost, text_pad, image_pad, epsilon=0.2, iterations=int(result.iterations[0]))
    assert torch.equal(stopped.plan[0], result.plan[0])


def test_envelope_gradient_is_the_plan_and_matches_finite_differences():
    cost, text_pad, image_pad = _batch()
    cost.requires_grad_()

    def value(c):
        return functional.sinkhorn(c, text_pad, image_pad, epsilon=0.3, iterations=400).value

    result = functional.sinkhorn(cost, text_pad, image_pad, epsilon=0.3, iterations=400)
    (grad,) = torch.autograd.grad(result.value.sum(), cost)
    assert torch.equal(grad, result.plan) and not result.plan.requires_grad
    assert gradcheck(value, [cost], fast_mode=True)


def test_unrolled_gradients():
    cost, text_pad, image_pad = _batch()
    mu = (torch.rand(3, 5, dtype=torch.float64) + 0.2).requires_grad_()
    image_pad[2] = True

    def both(c, m):
        r = functional.sinkhorn(c, text_pad, image_pad, epsilon=0.4, iterations=3, gradient="unrolled", text_marginal=m)
        return r.plan, r.value

    assert gradcheck(both, [cost.requires_grad_(), mu])


@pytest.mark.parametrize("gradient", ["envelope", "unrolled"])
def test_padding_and_empty_samples(gradient):
    cost, text_pad, image_pad = _batch()
    pad = text_pad.unsqueeze(2) | image_pad.unsqueeze(1)
    want = functional.sinkhorn(cost, text_pad, image_pad)
    text_pad[1] = True
    given = poisoned(cost, pad).requires_grad_()
    result = functional.sinkhorn(given, text_pad, image_pad, gradient=gradient)
    assert not result.plan[1].any() and result.value[1] == 0 and result.marginal_error[1] == 0
    assert result.iterations.tolist() == [100, 0, 100]
    torch.testing.assert_close(result.plan[::2], want.plan[::2])
    (grad,) = torch.autograd.grad(result.value.sum(), given)
    assert grad.isfinite().all() and not grad[1].any()
    pads = torch.zeros(2, 0).bool(), torch.zeros(2, 3).bool()
    assert functional.sinkhorn(torch.zeros(2, 0, 3), *pads).value.tolist() == [0, 0]


def test_bad_input():
    cost, text_pad, image_pad = _batch()
    for option, message in (
        ({"epsilon": 0}, "epsilon is 0"),
        ({"epsilon": float("nan")}, "epsilon is nan"),
        ({"iterations": 0}, "iterations is 0"),
        ({"tolerance": -1.0}, "tolerance is -1"),
        ({"gradient": "adjoint"}, "gradient is 'adjoint'"),
        ({"text_marginal": torch.ones(3, 4)}, "text_marginal has shape"),
        ({"image_marginal": -torch.ones(3, 6)}, "image_marginal is negative"),
    ):
        with pytest.raises(ValueError, match=message):
            functional.sinkhorn(cost, text_pad, image_pad, **option)
