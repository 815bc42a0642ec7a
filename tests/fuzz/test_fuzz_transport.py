"""Random transport problems on the native library, held to the error budget: hard costs, masks and marginals."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from support.fuzzing import DTYPES, LAYOUTS, MACHINES, SEEDS, assert_right, denormal, generator, on, sizes
from support.transport_case import sinkhorn, with_gradients

from vilt_fast import functional
from vilt_fast.testing import padding_masks, poisoned

MOST = 8e6  # entries times steps of the largest case
STEPS = st.sampled_from([1, 2, 3, 50, 64, 65, 130])
COSTS = st.sampled_from(["usual", "row", "column", "entry", "denormal", "constant", "negative", "wide"])


@st.composite
def problems(draw):
    """(sizes (M, N), text lengths, image lengths, seed of their places or None: at the front, steps)."""
    m, n = max(5, draw(sizes(45, 4, 8, 16))), max(9, draw(sizes(260, 4, 16, 64)))
    samples = draw(st.integers(1, 4))
    # The last ones have no padding: the budget of a few entries, or of the value of one sample, is luck.
    texts, images = ([draw(st.integers(0, most)) for _ in range(samples)] + [most] * 6 for most in (m, n))
    steps = max(1, min(draw(STEPS), int(MOST / (len(texts) * m * n))))
    return (m, n), texts, images, draw(st.none() | SEEDS), steps


def pads_of(problem):
    """text_pad [B, M] and image_pad [B, N]."""
    (m, n), texts, images, places, _ = problem
    pads = padding_masks(texts, m), padding_masks(images, n)
    if places is None:
        return pads
    g = generator(places)
    return tuple(pad[:, torch.randperm(pad.shape[1], generator=g)] for pad in pads)


def costs_of(kind, text_pad, image_pad, seed):
    g = generator(seed)
    cost = torch.rand(*text_pad.shape, image_pad.shape[1], generator=g) * 2
    if kind == "row":
        cost[:, 0] = 1e9
    elif kind == "column":
        cost[:, :, 1] = 1e9
    elif kind == "entry":
        cost[:, 2, 2] = 1e9
    elif kind == "denormal":
        denormal(cost, True)
    elif kind == "constant":
        cost[:] = 0.7
    elif kind == "negative":
        cost -= 5
    elif kind == "wide":
        cost *= 50
    return cost


def pad_of(text_pad, image_pad):
    return text_pad.unsqueeze(2) | image_pad.unsqueeze(1)


@given(problems(), COSTS, st.sampled_from([0.02, 0.1, 0.5, 5.0]), st.integers(1, 3), MACHINES, SEEDS)
def test_ipot(problem, kind, beta, inner, machine, seed):
    pads = pads_of(problem)
    options = dict(beta=beta, iterations=problem[-1], inner=inner)
    cost = costs_of(kind, *pads, seed)
    with on(machine):
        plan = functional.ipot(poisoned(cost, pad_of(*pads)), *pads, **options, backend="cpp")
    plain, exact = (functional.ipot(c, *pads, **options, backend="reference") for c in (cost, cost.double()))
    assert_right(plan, plain, exact)
    assert not plan[pad_of(*pads)].any()


WEIGHTS = st.sampled_from([None, (1.0, 1.0), (0.0, 1.0), (1e-40, 1.0), (1e-42, 1e-39), (1e-8, 1e30), (1e-38, 1.0)])


def weights_of(pair, pad, seed):
    """[B, size] or None: of one size and, every third, of the other."""
    if pair is None:
        return None
    small, large = pair
    weight = (torch.rand(pad.shape, generator=generator(seed)) + 0.5) * large
    weight[:, ::3] *= small / large
    return weight.masked_fill(pad, torch.nan)


@given(
    problems(), COSTS, st.sampled_from([0.02, 0.1, 0.5, 5.0]), st.sampled_from([None, None, 1e-2, 1e-4]), WEIGHTS,
    WEIGHTS, MACHINES, SEEDS,
)  # fmt: skip
def test_sinkhorn(problem, kind, epsilon, tolerance, rows, columns, machine, seed):
    pads, iterations = pads_of(problem), problem[-1]
    cost = costs_of(kind, *pads, seed)
    weights = weights_of(rows, pads[0], seed), weights_of(columns, pads[1], seed + 1)
    with on(machine):
        plan, value, used, error = sinkhorn(
            "cpp", poisoned(cost, pad_of(*pads)), *pads, epsilon=epsilon, iterations=iterations, tolerance=tolerance,
            weights=weights,
        )  # fmt: skip
    got = plan, value, error
    assert (used <= iterations).all()
    if tolerance is not None:  # it has stopped as soon as, and no sooner than, its error allowed
        assert (error[used < iterations] <= tolerance).all()
    given = {n: w for n, w in zip(("text_marginal", "image_marginal"), weights, strict=True) if w is not None}
    for steps in used.unique().tolist():
        own = used == steps
        if steps == 0:
            assert not plan[own].any()
            continue
        plain, exact = (
            functional.sinkhorn(cost.to(to), *pads, epsilon=epsilon, iterations=steps, backend="reference", **given)
            for to in (torch.float32, torch.float64)
        )
        for name, mine in zip(("plan", "value", "marginal_error"), got, strict=True):
            other = getattr(plain, name)
            mine = torch.where(own.view(-1, *[1] * (mine.dim() - 1)), mine, other)
            assert_right(mine, other, getattr(exact, name), what=f"{name}, {steps} steps")


HIDDEN = st.sampled_from(["plain", "zero", "tiny", "huge", "denormal"])
BETAS = st.sampled_from([0.1, 0.5, 2.0])


def states_of(kind, width, dtype, pads, seed):
    """Hidden states of both sides, whose costs spread over 0..2."""
    g = generator(seed)
    text, image = (torch.randn(*pad.shape, width, generator=g) for pad in pads)
    centre = torch.randn(len(text), 1, width, generator=g)
    text, image = text + centre, image - centre / 2
    if kind == "zero":
        text[:, 1] = 0
    elif kind == "tiny":
        text[:, 1] *= 1e-7
    elif kind == "huge":
        image[:, 1] *= 1e30
    elif kind == "denormal":
        denormal(image, True)
    return text.to(dtype), image.to(dtype)


WIDTHS = sizes(100, 4, 16, 64).filter(lambda n: n > 1)  # of one number every cosine is 1 and every gradient 0


@given(problems(), HIDDEN, WIDTHS, DTYPES, LAYOUTS, BETAS, st.integers(1, 2), st.booleans(), MACHINES, SEEDS)
def test_word_patch_distance(problem, kind, width, dtype, layout, beta, inner, gradients, machine, seed):
    pads = pads_of(problem)
    states = states_of(kind, width, dtype, pads, seed)
    options = dict(beta=beta, iterations=problem[-1], inner=1 if gradients else inner)
    dirty = [layout(poisoned(side, pad)) for side, pad in zip(states, pads, strict=True)]

    def call(sides, backend):
        def found(*x):
            return functional.word_patch_distance(*x, **options, return_plan=not gradients, backend=backend)

        return with_gradients(found, *sides, *pads) if gradients else found(*sides, *pads)

    with on(machine):
        got = call(dirty, "cpp")
    plain, exact = call(states, "reference"), call([side.double() for side in states], "reference")
    names = ("distance", "text", "image") if gradients else ("distance", "plan")
    for name, *three in zip(names, got, plain, exact, strict=True):
        assert_right(*three, what=name)
