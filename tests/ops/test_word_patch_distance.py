"""word_patch_distance: against the formula in numpy, finite differences, padding, empty samples."""

import numpy as np
import pytest
import torch

from vilt_fast import functional
from vilt_fast.testing import assert_within_budget, padding_masks, poisoned

TEXTS, IMAGES = [4, 1, 3], [5, 6, 2]


def _batch(dtype=torch.float64, width=8):
    text, image = torch.randn(3, 4, width, dtype=torch.float64), torch.randn(3, 6, width, dtype=torch.float64)
    return text.to(dtype), image.to(dtype), padding_masks(TEXTS), padding_masks(IMAGES)


def _formula(text, image):
    text, image = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-5) for x in (text, image))
    cost = 1 - text @ image.T
    m, n = cost.shape
    plan, sigma = np.ones((m, n)), np.full(m, 1 / m)
    for _ in range(50):
        q = np.exp(-cost / 0.5) * plan
        delta = 1 / (n * (sigma @ q))
        sigma = 1 / (m * (q @ delta))
        plan = sigma[:, None] * q * delta
    return (cost * plan).sum(), plan


def test_is_the_formula():
    text, image, text_pad, image_pad = _batch()
    distance, plan = functional.word_patch_distance(text, image, text_pad, image_pad, return_plan=True)
    for b, (m, n) in enumerate(zip(TEXTS, IMAGES, strict=True)):
        want, want_plan = _formula(text[b, :m].numpy(), image[b, :n].numpy())
        np.testing.assert_allclose(distance[b].item(), want, rtol=1e-10)
        np.testing.assert_allclose(plan[b, :m, :n].numpy(), want_plan, rtol=1e-9, atol=1e-15)


def test_identical_points_are_close():
    x = torch.eye(6, dtype=torch.float64).unsqueeze(0)
    pads = torch.zeros(1, 6).bool(), torch.zeros(1, 6).bool()
    assert functional.word_patch_distance(x, x, *pads, beta=0.02, iterations=200).item() < 1e-12


def test_gradient_holds_the_plan_constant():
    text, image, text_pad, image_pad = _batch()
    text.requires_grad_()
    image.requires_grad_()
    distance, plan = functional.word_patch_distance(text, image, text_pad, image_pad, return_plan=True)
    grads = torch.autograd.grad(distance.sum(), (text, image))

    def with_this_plan(t, v):
        t, v = (x / x.norm(dim=2, keepdim=True) for x in (t, v))
        return ((1 - t @ v.transpose(1, 2)) * plan).sum().item()

    step = 1e-6
    for which, (x, grad) in enumerate(zip((text, image), grads, strict=True)):
        for b, i, d in ((0, 1, 2), (1, 0, 0), (2, 1, 7)):
            inputs = [text.detach().clone(), image.detach().clone()]
            inputs[which][b, i, d] += step
            up = with_this_plan(*inputs)
            inputs[which][b, i, d] -= 2 * step
            down = with_this_plan(*inputs)
            np.testing.assert_allclose(grad[b, i, d].item(), (up - down) / (2 * step), rtol=1e-5, atol=1e-9)
        assert x.grad is None and not plan.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_accumulate_in_float32(dtype):
    text, image, text_pad, image_pad = _batch(dtype)
    got = functional.word_patch_distance(text, image, text_pad, image_pad)
    exact = functional.word_patch_distance(text.double(), image.double(), text_pad, image_pad)
    plain = functional.word_patch_distance(text.float(), image.float(), text_pad, image_pad)
    assert got.dtype == torch.float32
    assert_within_budget(got, plain, exact)


def test_padding_may_hold_anything():
    text, image, text_pad, image_pad = _batch()
    want = functional.word_patch_distance(text, image, text_pad, image_pad)
    text, image = poisoned(text, text_pad).requires_grad_(), poisoned(image, image_pad).requires_grad_()
    got = functional.word_patch_distance(text, image, text_pad, image_pad)
    assert torch.equal(got, want)
    for grad, pad in zip(torch.autograd.grad(got.sum(), (text, image)), (text_pad, image_pad), strict=True):
        assert grad.isfinite().all() and not grad[pad].any()


def test_empty_samples_zero_vectors_and_nan():
    text, image, text_pad, image_pad = _batch()
    text_pad[0] = True
    image_pad[1] = True
    text[2, 0] = 0
    text.requires_grad_()
    image.requires_grad_()
    got = functional.word_patch_distance(text, image, text_pad, image_pad)
    assert got[0] == 0 and got[1] == 0 and got[2] > 0
    for grad in torch.autograd.grad(got.sum(), (text, image)):
        assert grad.isfinite().all() and not grad[:2].any()
    broken = text.detach().clone()
    broken[2, 1] = float("nan")
    sick = functional.word_patch_distance(broken, image, text_pad, image_pad)
    assert sick[2].isnan() and torch.equal(sick[:2], got[:2])
    none = functional.word_patch_distance(text[:, :0], image, text_pad[:, :0], image_pad)
    assert none.tolist() == [0, 0, 0]


def test_bad_input():
    text, image, text_pad, image_pad = _batch()
    with pytest.raises(ValueError, match=r"image has shape \[3, 6, 7\], expected \[B, N, D\] with B=3, M=4, D=8"):
        functional.word_patch_distance(text, image[..., :7], text_pad, image_pad)
    with pytest.raises(TypeError, match="give both the same dtype"):
        functional.word_patch_distance(text.float(), image, text_pad, image_pad)
    with pytest.raises(ValueError, match="beta is 0"):
        functional.word_patch_distance(text, image, text_pad, image_pad, beta=0)
    with pytest.raises(ValueError, match="no sample"):
        functional.word_patch_distance(text[:0], image[:0], text_pad[:0], image_pad[:0])
    with pytest.raises(TypeError, match="expected torch.bool"):
        functional.word_patch_distance(text, image, text_pad.int(), image_pad)
