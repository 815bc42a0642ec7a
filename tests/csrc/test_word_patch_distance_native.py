"""word_patch_distance in the native library: float64, finite differences, padding, strides, every instruction set."""

import functools

import pytest
import torch

from vilt_fast import functional
from vilt_fast.testing import assert_within_budget, opcheck, padding_masks, poisoned, sliced, strided

CPP, REFERENCE = {"backend": "cpp"}, {"backend": "reference"}
TEXTS = (40, 1, 7, 16, 3, 0, 12, 5)
IMAGES = (241, 9, 1, 64, 65, 20, 0, 16)


def _hidden(dtype=torch.float32, width=50, seed=0, texts=TEXTS, images=IMAGES):
    """Word and patch vectors whose costs are spread over 0..2, one word a zero vector, one below the clamp."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(len(texts), 1, width, generator=generator, dtype=torch.float64)
    text = torch.randn(len(texts), max(texts), width, generator=generator, dtype=torch.float64) + centre
    image = torch.randn(len(texts), max(images), width, generator=generator, dtype=torch.float64) - centre / 2
    text[0, 1], text[0, 2] = 0, text[0, 2] * 1e-7
    return text.to(dtype), image.to(dtype), padding_masks(texts), padding_masks(images)


def _distance_and_gradients(text, image, text_pad, image_pad, weights, **options):
    text, image = text.detach().clone().requires_grad_(), image.detach().clone().requires_grad_()
    distance, plan = functional.word_patch_distance(text, image, text_pad, image_pad, return_plan=True, **options)
    grads = torch.autograd.grad((distance * weights.to(distance.dtype)).sum(), (text, image))
    return dict(zip(("distance", "plan", "text", "image"), (distance, plan, *grads), strict=True))


WEIGHTS = torch.linspace(-2, 3, len(TEXTS))


@functools.cache
def _distance_oracles(dtype, width):
    text, image, *pads = _hidden(dtype, width)
    plain = _distance_and_gradients(text, image, *pads, WEIGHTS, **REFERENCE)
    return plain, _distance_and_gradients(text.double(), image.double(), *pads, WEIGHTS)


@pytest.mark.parametrize("width", [3, 16, 50, 768])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_word_patch_distance_and_gradients(isa, dtype, width):
    text, image, text_pad, image_pad = _hidden(dtype, width)
    got = _distance_and_gradients(text, image, text_pad, image_pad, WEIGHTS, **CPP)
    plain, exact = _distance_oracles(dtype, width)
    assert got["distance"].dtype == got["plan"].dtype == torch.float32 and got["text"].dtype == dtype
    for name in got:
        assert_within_budget(got[name], plain[name], exact[name], what=name)
    assert not got["text"][text_pad].any() and not got["image"][image_pad].any()
    with torch.no_grad():
        assert torch.equal(functional.word_patch_distance(text, image, text_pad, image_pad), got["distance"])


def test_width_one_has_costs_of_0_1_and_2(isa):
    """All vectors are parallel: costs are exact, and the gradient has nowhere to point to."""
    text, image, text_pad, image_pad = _hidden(width=1)
    got = _distance_and_gradients(text, image, text_pad, image_pad, WEIGHTS, **CPP)
    plain, exact = _distance_oracles(torch.float32, 1)
    for name in ("distance", "plan"):
        assert_within_budget(got[name], plain[name], exact[name], what=name)
    # What is left of it is the rounding of 241 terms, seen through 1 / |x|.
    size = (image.abs() + image_pad.unsqueeze(2)) * got["image"].abs()
    assert size.max() < 241 * torch.finfo(torch.float32).eps


def test_gradient_matches_finite_differences():
    """Of <C, T> in float64 with T held at the plan of the kernel."""
    text, image, text_pad, image_pad = _hidden(width=20, seed=3, texts=[6, 3], images=[9, 5])
    text[0, 1:3] = torch.randn(2, 20)
    got = _distance_and_gradients(text, image, text_pad, image_pad, torch.tensor([1.0, -0.5]), **CPP)
    plan = got["plan"].double() * torch.tensor([1.0, -0.5])[:, None, None]

    def value(t, v):
        t, v = (x / x.norm(dim=2, keepdim=True) for x in (t, v))
        return ((1 - t @ v.transpose(1, 2)) * plan).sum()

    inputs = [text.double(), image.double()]
    for which, name in enumerate(("text", "image")):
        for b, i, d in ((0, 1, 2), (1, 0, 0), (1, 2, 19)):
            sides = []
            for step in (1e-5, -1e-5):
                moved = [x.clone() for x in inputs]
                moved[which][b, i, d] += step
                sides.append(value(*moved))
            difference = (sides[0] - sides[1]) / 2e-5
            # Summed over 20 products in float32: a few roundings of the largest entry.
            assert abs(got[name][b, i, d] - difference) < 32 * torch.finfo(torch.float32).eps * got[name].abs().max()


def test_one_gradient_only_and_a_frozen_side():
    text, image, text_pad, image_pad = _hidden()
    both = _distance_and_gradients(text, image, text_pad, image_pad, torch.ones(8), **CPP)
    for side, other in ((text, image), (image, text)):
        given = side.clone().requires_grad_()
        pair = (given, other) if side is text else (other, given)
        functional.word_patch_distance(*pair, text_pad, image_pad, **CPP).sum().backward()
        assert torch.equal(given.grad, both["text" if side is text else "image"]) and other.grad is None


def test_rows_may_lie_anywhere_and_padding_may_be_nan(isa):
    text, image, text_pad, image_pad = _hidden()
    want = _distance_and_gradients(text, image, text_pad, image_pad, torch.ones(8), **CPP)
    wide = torch.full((8, 300, 50), float("nan"))
    wide[:, 2:42], wide[:, 50:291] = poisoned(text, text_pad), poisoned(image, image_pad)
    for t, v in (
        (wide[:, 2:42], wide[:, 50:291]), (sliced(text), sliced(image)), (strided(text), strided(image)),
        (text.transpose(0, 1).clone().transpose(0, 1), image.transpose(1, 2).clone().transpose(1, 2)),
    ):  # fmt: skip
        t, v = t.detach().requires_grad_(), v.detach().requires_grad_()
        got = functional.word_patch_distance(t, v, text_pad, image_pad, **CPP)
        grads = torch.autograd.grad(got.sum(), (t, v))
        assert torch.equal(got, want["distance"])
        assert torch.equal(grads[0], want["text"]) and torch.equal(grads[1], want["image"])


def test_nan_stays_in_its_sample_and_large_rows_do_not_overflow(isa):
    text, image, text_pad, image_pad = _hidden()
    want = functional.word_patch_distance(text, image, text_pad, image_pad, **CPP)
    for value in (float("nan"), float("inf")):
        broken = image.clone()
        broken[3, 2, 7] = value
        got, plan = functional.word_patch_distance(text, broken, text_pad, image_pad, return_plan=True, **CPP)
        others = torch.arange(8) != 3
        assert got[3].isnan() and torch.equal(got[others], want[others]) and plan[others].isfinite().all()
    large = functional.word_patch_distance(text * 1e30, image * 1e-3, text_pad, image_pad, **CPP)
    assert torch.equal(want.isfinite(), large.isfinite())
    keep = torch.arange(8) != 0  # the first has a word below the clamp
    torch.testing.assert_close(large[keep], want[keep], rtol=1e-5, atol=1e-6)


def test_nothing_real_gives_zero_and_finite_gradients():
    text, image, text_pad, image_pad = _hidden(texts=[4, 4, 4, 4], images=[5, 5, 5, 5], seed=1)
    text_pad[0], image_pad[1], text_pad[2], image_pad[2] = True, True, True, True
    got = _distance_and_gradients(text, image, text_pad, image_pad, torch.ones(4), **CPP)
    assert got["distance"][:3].tolist() == [0, 0, 0] and got["distance"][3] != 0
    for name in ("plan", "text", "image"):
        assert got[name].isfinite().all() and not got[name][:3].any()
    none = functional.word_patch_distance(text[:, :0], image, text_pad[:, :0], image_pad, **CPP)
    assert none.tolist() == [0, 0, 0, 0]
    with pytest.raises(RuntimeError, match="hidden size is 0"):
        functional.word_patch_distance(text[..., :0], image[..., :0], text_pad, image_pad, **CPP)


def test_identical_points_are_close(isa):
    x = torch.eye(24).unsqueeze(0)
    pads = torch.zeros(1, 24).bool(), torch.zeros(1, 24).bool()
    assert functional.word_patch_distance(x, x, *pads, beta=0.02, iterations=200, **CPP).item() < 1e-6


def test_neither_plan_nor_costs_are_allocated_without_a_gradient():
    text, image, text_pad, image_pad = _hidden(width=8, texts=[40] * 4, images=[240] * 4)
    functional.word_patch_distance(text, image, text_pad, image_pad, **CPP)
    with torch.profiler.profile(profile_memory=True) as profile:
        functional.word_patch_distance(text, image, text_pad, image_pad, **CPP)
    largest = max(abs(event.self_cpu_memory_usage) for event in profile.events())
    assert 0 < largest < 240 * 4  # a hundredth of one plan


def test_registration_and_compile():
    text, image, *pads = _hidden(texts=[4, 3], images=[5, 2])
    given = text.requires_grad_(), image.requires_grad_()
    named = dict(text=given[0], image=given[1], text_pad=pads[0], image_pad=pads[1], beta=0.5, iterations=5, inner=1)
    for plan in (True, False):
        opcheck("word_patch_distance", "cpp", keep=True, **named, return_plan=plan)

    def call(t, v):
        return functional.word_patch_distance(t, v, *pads, iterations=5) * 2

    want, got = call(*given), torch.compile(call, fullgraph=True, backend="aot_eager")(*given)
    assert torch.equal(want, got)
    for a, b in zip(torch.autograd.grad(want.sum(), given), torch.autograd.grad(got.sum(), given), strict=True):
        assert torch.equal(a, b)
