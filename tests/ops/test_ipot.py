"""ipot: the reference against an independent float64 recurrence, closed forms and invariants."""

import numpy as np
import pytest
import torch
from support.transport_case import recurrence

from vilt_fast import functional
from vilt_fast.testing import padding_masks, poisoned

TEXTS, IMAGES = [5, 1, 3, 7], [6, 4, 1, 9]


def _batch(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(len(TEXTS), max(TEXTS), max(IMAGES), generator=generator, dtype=torch.float64) * 2
    return cost.to(dtype), padding_masks(TEXTS), padding_masks(IMAGES)


@pytest.mark.parametrize("inner", [1, 2, 5])
@pytest.mark.parametrize("beta, iterations", [(0.5, 50), (0.5, 1), (0.1, 30), (2.0, 7)])
def test_is_the_recurrence(beta, iterations, inner):
    cost, text_pad, image_pad = _batch()
    plan = functional.ipot(cost, text_pad, image_pad, beta=beta, iterations=iterations, inner=inner)
    for b, (m, n) in enumerate(zip(TEXTS, IMAGES, strict=True)):
        want = recurrence(cost[b, :m, :n].numpy(), beta, iterations, inner)
        np.testing.assert_allclose(plan[b, :m, :n].numpy(), want, rtol=1e-10, atol=1e-15)
        assert not plan[b, m:].any() and not plan[b, :, n:].any()


def _rounding(cost, beta, iterations):
    """Relative error that float32 logarithms can gather: one rounding of the largest |log Q| an iteration."""
    largest = cost.max().item() / beta + np.log(cost.shape[1] * cost.shape[2])
    return iterations * torch.finfo(torch.float32).eps * largest


@pytest.mark.parametrize("beta, iterations", [(0.5, 50), (0.1, 1000)])
def test_float32_stays_within_its_roundings(beta, iterations):
    cost, text_pad, image_pad = _batch(dtype=torch.float32)
    plan = functional.ipot(cost, text_pad, image_pad, beta=beta, iterations=iterations)
    exact = functional.ipot(cost.double(), text_pad, image_pad, beta=beta, iterations=iterations)
    assert ((plan - exact).norm() / exact.norm()).item() < _rounding(cost, beta, iterations)


def test_one_word_shares_itself_equally():
    plan = functional.ipot(torch.rand(1, 1, 7), torch.zeros(1, 1).bool(), torch.zeros(1, 7).bool(), iterations=1)
    torch.testing.assert_close(plan, torch.full((1, 1, 7), 1 / 7))


def test_one_patch_takes_everything():
    plan = functional.ipot(torch.rand(1, 6, 1), torch.zeros(1, 6).bool(), torch.zeros(1, 1).bool(), iterations=3)
    torch.testing.assert_close(plan, torch.full((1, 6, 1), 1 / 6))


def test_equal_costs_give_the_product_of_the_marginals():
    plan = functional.ipot(torch.full((1, 4, 5), 0.7), torch.zeros(1, 4).bool(), torch.zeros(1, 5).bool())
    torch.testing.assert_close(plan, torch.full((1, 4, 5), 1 / 20))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta, iterations", [(0.02, 1000), (0.02, 50), (0.1, 1000)])
def test_permutation_costs_give_the_permutation(beta, iterations, dtype):
    order = torch.tensor([2, 0, 3, 1])
    cost = torch.full((1, 4, 4), 2.0, dtype=dtype)
    cost[0, torch.arange(4), order] = 0
    nothing = torch.zeros(1, 4).bool()
    want = torch.zeros(1, 4, 4, dtype=dtype)
    want[0, torch.arange(4), order] = 0.25
    plan = functional.ipot(cost, nothing, nothing, beta=beta, iterations=iterations)
    torch.testing.assert_close(plan, want)


@pytest.mark.parametrize("seed", range(3))
def test_float32_is_stable_at_small_beta(seed):
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(2, 12, 30, generator=generator) * 2
    cost[1, 0] = 2.0  # a word that is far from everything
    cost[1, :, 0] = 2.0
    pads = torch.zeros(2, 12).bool(), torch.zeros(2, 30).bool()
    plan = functional.ipot(cost, *pads, beta=0.02, iterations=1000)
    exact = functional.ipot(cost.double(), *pads, beta=0.02, iterations=1000)
    assert plan.isfinite().all()
    torch.testing.assert_close(plan.sum(2), torch.full((2, 12), 1 / 12))
    # No more of the second sample: words and patches that cost the same everywhere make its plan ill-conditioned.
    distance, want = (cost[0] * plan[0]).sum().double(), (cost[0] * exact[0]).sum()
    assert (distance - want).abs() / want < _rounding(cost, 0.02, 1000)


def test_text_marginals_are_exact_and_image_marginals_are_not():
    cost, text_pad, image_pad = _batch()
    plan = functional.ipot(cost, text_pad, image_pad)
    for b, (m, n) in enumerate(zip(TEXTS, IMAGES, strict=True)):
        torch.testing.assert_close(plan[b, :m, :n].sum(1), torch.full((m,), 1 / m, dtype=torch.float64))
        assert (plan[b, :m, :n].sum(0) - 1 / n).abs().max() < 0.05
    assert (plan[3].sum(0) - 1 / 9).abs().max() > 1e-9


def test_padded_equals_cropped_and_padding_may_be_nan():
    cost, text_pad, image_pad = _batch()
    pad = text_pad.unsqueeze(2) | image_pad.unsqueeze(1)
    plan = functional.ipot(cost, text_pad, image_pad)
    assert torch.equal(functional.ipot(poisoned(cost, pad), text_pad, image_pad), plan)
    for b, (m, n) in enumerate(zip(TEXTS, IMAGES, strict=True)):
        alone = functional.ipot(cost[b : b + 1, :m, :n], text_pad[b : b + 1, :m], image_pad[b : b + 1, :n])[0]
        torch.testing.assert_close(plan[b, :m, :n], alone, rtol=1e-12, atol=1e-15)


def test_holes_in_the_masks():
    cost, _, _ = _batch()
    text_pad, image_pad = torch.rand(4, 7) < 0.4, torch.rand(4, 9) < 0.4
    plan = functional.ipot(cost, text_pad, image_pad)
    for b in range(4):
        real = cost[b][~text_pad[b]][:, ~image_pad[b]]
        want = recurrence(real.numpy(), 0.5, 50, 1)
        np.testing.assert_allclose(plan[b][~text_pad[b]][:, ~image_pad[b]].numpy(), want, rtol=1e-10, atol=1e-15)


def test_empty_samples_give_zeros_and_harm_nobody():
    cost, text_pad, image_pad = _batch()
    want = functional.ipot(cost, text_pad, image_pad)
    text_pad[0], image_pad[1], text_pad[2], image_pad[2] = True, True, True, True
    plan = functional.ipot(cost, text_pad, image_pad)
    assert not plan[:3].any() and torch.equal(plan[3], want[3])
    for shape in ((2, 0, 3), (2, 3, 0)):
        pads = torch.zeros(shape[:2]).bool(), torch.zeros(shape[::2]).bool()
        assert functional.ipot(torch.zeros(shape), *pads).shape == shape


def test_half_costs_give_a_float32_plan():
    cost, text_pad, image_pad = _batch(dtype=torch.bfloat16)
    plan = functional.ipot(cost, text_pad, image_pad)
    assert plan.dtype == torch.float32 and torch.equal(plan, functional.ipot(cost.float(), text_pad, image_pad))


def test_bad_input():
    cost, text_pad, image_pad = _batch()
    for beta in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="beta is"):
            functional.ipot(cost, text_pad, image_pad, beta=beta)
    for option in ({"iterations": 0}, {"inner": 0}, {"iterations": 2.5}):
        with pytest.raises(ValueError, match="expected an integer >= 1"):
            functional.ipot(cost, text_pad, image_pad, **option)
    with pytest.raises(ValueError, match="image_pad has shape"):
        functional.ipot(cost, text_pad, image_pad[:, :2])
    with pytest.raises(TypeError, match="text_pad is torch.int64, expected torch.bool"):
        functional.ipot(cost, text_pad.long(), image_pad)
    with pytest.raises(ValueError, match="cost has shape"):
        functional.ipot(cost[0], text_pad, image_pad)
    with pytest.raises(ValueError, match="no sample"):
        functional.ipot(cost[:0], text_pad[:0], image_pad[:0])
    cost[2, 0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"samples \[2\]"):
        functional.ipot(cost, text_pad, image_pad)
