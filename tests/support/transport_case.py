"""What the tests of transport share: the recurrence in numpy, hard batches, the error budget of kernels for GPUs.

Those kernels are called below the validation of `functional`, which refuses NaN and a device that
is not theirs.
"""

import numpy as np
import torch

from vilt_fast import functional
from vilt_fast.ops._define import OPS
from vilt_fast.testing import assert_within_budget, padding_masks, poisoned

# ViLT's largest sample, then ragged ones: of one, of none, of just more than some tile.
TEXTS = (40, 1, 7, 0)
IMAGES = (240, 9, 1, 20)


def recurrence(cost, beta, iterations, inner):
    """The loop of the paper for one unpadded sample, numpy float64, nothing shared with the reference."""
    m, n = cost.shape
    kernel = np.exp(-cost.T / beta)
    plan, sigma = np.ones((n, m)), np.full(m, 1 / m)
    for _ in range(iterations):
        q = kernel * plan
        for _ in range(inner):
            delta = 1 / (n * (q @ sigma))
            sigma = 1 / (m * (q.T @ delta))
        plan = delta[:, None] * q * sigma[None, :]
    return plan.T


def costs(texts=TEXTS, images=IMAGES):
    """(cost [B, M, N] in 0..2, text_pad, image_pad) with so many real tokens each."""
    return torch.rand(len(texts), max(texts), max(images)) * 2, padding_masks(texts), padding_masks(images)


# Marginals as confident softmaxes give them: what is smallest beside what is largest.
WEIGHTS = {"some denormal": (1e-40, 1.0), "all denormal": (1e-42, 1e-39), "far apart": (1e-8, 1e30)}


def any_weights(kind, *pads):
    """Weights [B, size] for each mask: of one size and, every third, of the other."""
    small, large = WEIGHTS[kind]
    weights = [(torch.rand(pad.shape) + 0.5) * large for pad in pads]
    for weight in weights:
        weight[:, ::3] *= small / large
    return weights


def assert_the_scale_of_weights_is_free(backend, texts, images):
    """Even where their sum leaves float32."""
    cost, *pads = costs(texts, images)
    weights = [torch.rand(pad.shape) + 0.5 for pad in pads]
    want = sinkhorn(backend, cost, *pads, iterations=5, weights=weights)
    got = sinkhorn(backend, cost, *pads, iterations=5, weights=[w * 2.0**127 for w in weights])
    assert all(map(torch.equal, got, want))


def hidden(dtype=torch.float32, width=40, texts=TEXTS, images=IMAGES):
    """(text, image, text_pad, image_pad) whose costs spread over 0..2; one word is zero, one shorter than the clamp."""
    centre = torch.randn(len(texts), 1, width)
    text = torch.randn(len(texts), max(texts), width) + centre
    image = torch.randn(len(texts), max(images), width) - centre / 2
    if max(texts) > 2:
        text[0, 1], text[0, 2] = 0, text[0, 2] * 1e-7
    return text.to(dtype), image.to(dtype), padding_masks(texts), padding_masks(images)


def on(device, tensors):
    return [t.to(device) if torch.is_tensor(t) else t for t in tensors]


def ipot(backend, cost, text_pad, image_pad, beta=0.5, iterations=50, inner=1):
    return OPS["ipot"](
        backend, cost=cost, text_pad=text_pad, image_pad=image_pad, beta=beta, iterations=iterations, inner=inner
    )[0]


def assert_ipot(backend, arguments, device="cpu", **options):
    """The plan is within the budget and zero on padding; returns it."""
    cost, *pads = arguments
    plan = ipot(backend, *on(device, arguments), **options).cpu()
    plain = functional.ipot(*arguments, **options, backend="reference")
    assert_within_budget(
        plan, plain, functional.ipot(cost.double(), *pads, **options, backend="reference"), what="plan"
    )
    assert not plan[pads[0].unsqueeze(2) | pads[1].unsqueeze(1)].any()
    return plan


def sinkhorn(backend, cost, text_pad, image_pad, epsilon=0.1, iterations=100, tolerance=None, weights=(None, None)):
    return OPS["sinkhorn"](
        backend, cost=cost, text_pad=text_pad, image_pad=image_pad, epsilon=epsilon, iterations=iterations,
        tolerance=tolerance, text_marginal=weights[0], image_marginal=weights[1],
    )  # fmt: skip


def assert_sinkhorn(backend, arguments, device="cpu", weights=(None, None), **options):
    """Plan, value and error are within the budget, as many iterations as float64 needs; returns the four."""
    cost, *pads = arguments
    got = [x.cpu() for x in sinkhorn(backend, *on(device, arguments), **options, weights=on(device, weights))]
    plain, exact = (
        functional.sinkhorn(
            cost.to(dtype), *pads, **options, backend="reference",
            **{name: w for name, w in zip(("text_marginal", "image_marginal"), weights, strict=True) if w is not None},
        )
        for dtype in (torch.float32, torch.float64)
    )  # fmt: skip
    for name, place in (("plan", 0), ("value", 1), ("marginal_error", 3)):
        assert_within_budget(got[place], getattr(plain, name), getattr(exact, name), what=name)
    assert torch.equal(got[2], exact.iterations)
    return got


def distance(backend, text, image, text_pad, image_pad, beta=0.5, iterations=50, inner=1, return_plan=False):
    """(distance, plan) of the op."""
    return OPS["word_patch_distance"](
        backend, text=text, image=image, text_pad=text_pad, image_pad=image_pad, beta=beta, iterations=iterations,
        inner=inner, return_plan=return_plan,
    )  # fmt: skip


def with_gradients(function, text, image, text_pad, image_pad):
    """distance [B] and the gradients of text and image, for weights that differ between samples."""
    states = [x.detach().clone().requires_grad_() for x in (text, image)]
    found = function(*states, text_pad, image_pad)
    weights = torch.linspace(-2, 3, len(text), dtype=found.dtype, device=found.device)
    return [found.detach(), *torch.autograd.grad((found * weights).sum(), states)]


def assert_distance(backend, arguments, device="cpu", gradients=False, **options):
    """Distance and plan, or distance and gradients, are within the budget; returns them."""
    text, image, *pads = arguments
    wide = text.double(), image.double(), *pads

    def reference(*tensors):
        return functional.word_patch_distance(*tensors, **options, backend="reference", return_plan=not gradients)

    if gradients:
        got = with_gradients(lambda *x: distance(backend, *x, **options)[0], *on(device, arguments))
        plain, exact = (with_gradients(reference, *x) for x in (arguments, wide))
        names = ("distance", "text", "image")
    else:
        got = distance(backend, *on(device, arguments), **options, return_plan=True)
        plain, exact, names = reference(*arguments), reference(*wide), ("distance", "plan")
    got = [x.cpu() for x in got]
    for name, *three in zip(names, got, plain, exact, strict=True):
        assert three[0].dtype == three[1].dtype
        assert_within_budget(*three, what=name)
    return got


def assert_only_real_entries_count(backend, shape):
    """Any positions may be real, and what padding holds has no influence, even NaN."""
    cost = torch.rand(2, *shape)
    pads = [torch.rand(2, size) < 0.4 for size in shape]
    pad = pads[0].unsqueeze(2) | pads[1].unsqueeze(1)
    plan = assert_ipot(backend, (cost, *pads), iterations=5)
    assert torch.equal(ipot(backend, poisoned(cost, pad), *pads, iterations=5), plan)
    got = sinkhorn(backend, poisoned(cost, pad), *pads, iterations=5)
    assert all(map(torch.equal, got, assert_sinkhorn(backend, (cost, *pads), iterations=5)))


def assert_a_bad_cost_spoils_its_own_sample(backend, texts, images, value, beta):
    cost, *pads = costs(texts, images)
    want, exact = ipot(backend, cost, *pads, beta=beta, iterations=5), sinkhorn(backend, cost, *pads, iterations=5)
    cost[1, 0, 1] = value
    plan, found = ipot(backend, cost, *pads, beta=beta, iterations=5), sinkhorn(backend, cost, *pads, iterations=5)
    others = torch.tensor([0, 2, 3])
    assert not plan[1].isfinite().all() and torch.equal(plan[others], want[others])
    assert found[1][1].isnan() and torch.equal(found[1][others], exact[1][others])


def assert_finds_the_permutation(backend, beta, **options):
    """Costs that vanish on a permutation and a small beta: the plan is that permutation."""
    order = torch.randperm(12)
    cost = torch.full((1, 12, 12), 2.0)
    cost[0, torch.arange(12), order] = 0
    want = torch.zeros(1, 12, 12)
    want[0, torch.arange(12), order] = 1 / 12
    torch.testing.assert_close(ipot(backend, cost, *[torch.zeros(1, 12).bool()] * 2, beta=beta, **options), want)
