"""objectives.wpa: the original's functions written out here once more, its orientation, exclusions and signs."""

import pytest
import torch
import torch.nn.functional as F

from vilt_fast import functional
from vilt_fast.objectives.wpa import cost_matrix_cosine, ipot, optimal_transport_dist, trace, wpa_loss
from vilt_fast.testing import assert_within_budget, padding_masks, poisoned

TEXTS, IMAGES = [6, 2, 4], [9, 7, 3]
BACKENDS = ["reference", "cpp"]
NAMES = ("value", "text", "image")


def _batch(dtype=torch.float64):
    text, image = torch.randn(3, 6, 16, dtype=torch.float64), torch.randn(3, 9, 16, dtype=torch.float64)
    return text.to(dtype), image.to(dtype), padding_masks(TEXTS), padding_masks(IMAGES)


def _loop(cost, text_pad, image_pad, beta, iterations):
    """The original's recurrence: patches by words, masks as large numbers in the denominators. Plan [B, N, M]."""
    pad = (text_pad.unsqueeze(2) | image_pad.unsqueeze(1)).transpose(1, 2)
    m, n = ((~p).sum(1).to(cost.dtype)[:, None, None] for p in (text_pad, image_pad))
    kernel = torch.exp(-cost.transpose(1, 2) / beta).masked_fill(pad, 0)
    plan = torch.ones_like(kernel).masked_fill(pad, 0)
    sigma = (1 / m[:, 0]).expand_as(text_pad).masked_fill(text_pad, 0).unsqueeze(2)
    big = [p.to(cost.dtype).unsqueeze(1) * 1e4 for p in (text_pad, image_pad)]
    for _ in range(iterations):
        q = kernel * plan
        delta = 1 / (n * (q @ sigma).transpose(1, 2) + big[1])
        sigma = (1 / (m * delta @ q + big[0])).transpose(1, 2)
        plan = delta.transpose(1, 2) * q * sigma.transpose(1, 2)
    return plan.masked_fill(pad, 0)


def _distance(text, image, text_pad, image_pad, beta=0.5, iterations=50):
    cost = 1 - F.normalize(text, dim=-1, eps=1e-5) @ F.normalize(image, dim=-1, eps=1e-5).transpose(1, 2)
    cost = cost.masked_fill(text_pad.unsqueeze(2) | image_pad.unsqueeze(1), 0)
    plan = _loop(cost.detach(), text_pad, image_pad, beta, iterations)
    return torch.einsum("bmn,bnm->b", cost, plan)


def test_costs_and_trace():
    text, image, _, _ = _batch()
    cost = cost_matrix_cosine(text, image)
    want = 1 - F.cosine_similarity(text.unsqueeze(2), image.unsqueeze(1), dim=-1)
    torch.testing.assert_close(cost, want)
    assert torch.equal(cost_matrix_cosine(text * 0, image), torch.ones_like(cost))
    torch.testing.assert_close(cost_matrix_cosine(text[:, :1] * 0 + 0.5, text[:, :1] * 0 + 0.5, eps=4.0),
                               torch.full((3, 1, 1), 0.75, dtype=torch.float64))  # fmt: skip
    square = torch.rand(2, 5, 5)
    torch.testing.assert_close(trace(square), torch.stack([x.trace() for x in square]))


@pytest.mark.parametrize("beta, iteration", [(0.5, 50), (0.1, 30)])
def test_ipot_has_the_originals_orientation(beta, iteration):
    text, image, text_pad, image_pad = _batch()
    cost = cost_matrix_cosine(text, image)
    joint = text_pad.unsqueeze(-1) | image_pad.unsqueeze(-2)
    lengths = (~text_pad).sum(1).double(), (~image_pad).sum(1).double()
    plan = ipot(cost, lengths[0], text_pad, lengths[1], image_pad, joint, beta, iteration, 1)
    assert plan.shape == (3, 9, 6)
    torch.testing.assert_close(plan, _loop(cost, text_pad, image_pad, beta, iteration), rtol=1e-9, atol=1e-14)
    # Dividing the words' shares by another number scales the plan, the patches' has no effect.
    scaled = ipot(cost, 2 * lengths[0], text_pad, 3 * lengths[1], image_pad, joint, beta, iteration, 1)
    torch.testing.assert_close(scaled, plan / 2)
    native = ipot(cost.float(), lengths[0], text_pad, lengths[1], image_pad, joint, beta, iteration, 1, backend="cpp")
    torch.testing.assert_close(native, plan.float())
    again = ipot(cost, *(x for p in zip(lengths, (text_pad, image_pad), strict=True) for x in p), joint, beta, 5, 3)
    torch.testing.assert_close(again.sum(1)[~text_pad], 1 / lengths[0].repeat_interleave(torch.tensor(TEXTS)))


def _value_and_gradients(function, text, image):
    """function(text, image) and the gradients of its sum, for copies of the two."""
    given = [x.clone().requires_grad_() for x in (text, image)]
    value = function(*given)
    return value.detach(), *torch.autograd.grad(value.sum(), given)


@pytest.mark.parametrize("beta, iteration", [(0.5, 50), (0.1, 20)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_distance_and_gradients_are_the_originals(backend, beta, iteration):
    text, image, text_pad, image_pad = _batch(torch.float32)
    tail = text_pad, image_pad, beta, iteration

    def ours(t, v):
        return optimal_transport_dist(poisoned(t, text_pad), poisoned(v, image_pad), *tail, 1, backend=backend)

    plain = _value_and_gradients(lambda t, v: _distance(t, v, *tail), text, image)
    exact = _value_and_gradients(lambda t, v: _distance(t, v, *tail), text.double(), image.double())
    for name, *values in zip(NAMES, _value_and_gradients(ours, text, image), plain, exact, strict=True):
        assert_within_budget(*values, what=name)


def _loss(text, image, text_masks, image_masks, labels, distilled=False):
    """compute_itm_wpa, sample by sample."""
    total, counted = 0.0, 0
    for t, v, tm, vm, label in zip(text, image, text_masks, image_masks, labels, strict=True):
        if label not in (0, 1):
            continue
        words, patches = tm.bool().clone(), vm.bool().clone()
        words[int(tm.bool().sum()) - 1] = False
        words[0] = False
        patches[: 2 if distilled else 1] = False
        counted += 1
        if words.any() and patches.any():
            d = _distance(t[None, words], v[None, patches], ~words[None, words], ~patches[None, patches])
            total = total + (d if label == 1 else -d)
    return (0.1 * total / counted).squeeze()


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss(backend, distilled):
    text, image = torch.randn(5, 6, 16), torch.randn(5, 9, 16)
    text_masks = (~padding_masks([6, 2, 4, 5, 6])).long()  # the second is [CLS] [SEP]: nothing to align
    image_masks = (~padding_masks([9, 7, 3, 1, 9])).long()  # the fourth has no patch
    tail = text_masks, image_masks, torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0])
    kept = text_masks.clone(), image_masks.clone()

    def ours(t, v):
        return wpa_loss(t, v, *tail, distilled=distilled, backend=backend)

    got = _value_and_gradients(ours, text, image)
    plain = _value_and_gradients(lambda t, v: _loss(t, v, *tail, distilled), text, image)
    exact = _value_and_gradients(lambda t, v: _loss(t, v, *tail, distilled), text.double(), image.double())
    for name, *values in zip(NAMES, got, plain, exact, strict=True):
        assert_within_budget(*values, what=name)
    assert torch.equal(text_masks, kept[0]) and torch.equal(image_masks, kept[1])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(text, image), got[0])
    halved = ours(text.bfloat16(), image.bfloat16())
    assert halved.dtype == torch.float32 and torch.equal(
        halved, ours(text.bfloat16().float(), image.bfloat16().float())
    )


def test_loss_without_pairs_with_other_labels_and_without_text():
    text, image = torch.randn(2, 4, 8), torch.randn(2, 5, 8)
    masks = torch.ones(2, 4), torch.ones(2, 5)
    pair = wpa_loss(text[:1], image[:1], masks[0][:1], masks[1][:1], torch.tensor([1]))
    text[1, 2] = float("nan")
    assert torch.equal(wpa_loss(text, image, *masks, torch.tensor([1, -100])), pair)
    assert wpa_loss(text[:1], image[:1], masks[0][:1], masks[1][:1], torch.tensor([-100])).isnan()
    assert wpa_loss(text[:, :0], image, masks[0][:, :0], masks[1], torch.tensor([1, 0])) == 0


def test_bad_input():
    text, image, text_pad, image_pad = _batch()
    with pytest.raises(ValueError, match="cost_matrix_cosine: x has shape"):
        cost_matrix_cosine(text[0], image)
    with pytest.raises(ValueError, match="trace: x has shape"):
        trace(text)
    with pytest.raises(ValueError, match="joint_pad has shape"):
        ipot(cost_matrix_cosine(text, image), torch.ones(3), text_pad, torch.ones(3), image_pad, text_pad, 0.5, 50, 1)
    with pytest.raises(ValueError, match="image has shape"):
        optimal_transport_dist(text, image[..., :3], text_pad, image_pad)
    # A mask as HuggingFace has it, 1 where real: converted as it is, it would put the mass on padding.
    cost, masks = cost_matrix_cosine(text, image), [(~pad).long() for pad in (text_pad, image_pad)]
    for refused in (
        lambda: optimal_transport_dist(text, image, *masks),
        lambda: functional.ipot(cost, *masks),
        lambda: functional.sinkhorn(cost, *masks),
        lambda: ipot(cost, torch.ones(3), masks[0], torch.ones(3), masks[1], torch.zeros_like(cost), 0.5, 50, 1),
    ):
        with pytest.raises(TypeError, match="True where padded: `attention_mask == 0`") as error:
            refused()
        assert "to(" not in str(error.value)
