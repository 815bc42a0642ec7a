"""One program a sample and head: error budget forward and backward at every length class, masks, NaN, equal bits."""

import pytest
import torch
from support.triton_case import names_every_argument

from vilt_fast import functional
from vilt_fast.kernels import attention, attention_bwd, attention_single
from vilt_fast.testing import assert_within_budget, offsets, sliced

CASES = {  # query lengths, key lengths, used keys, causal starts
    "ragged": ([5, 1, 9, 70], [5, 1, 9, 70], None, None),
    "classes": ([20, 33], [193, 288], [193, 287], None),
    "short": ([65, 3], [192, 129], [192, 128], None),
    "query only": ([5, 70, 8], [5, 70, 8], [4, 69, 7], None),
    "empty": ([0, 4, 3, 0], [0, 4, 0, 2], None, None),
    "no keys used": ([3, 20], [3, 20], [0, 18], None),
    "prefix causal": ([5, 70, 8], [5, 70, 8], None, [2, 33, 8]),
    "long causal": ([200, 3], [200, 3], [199, 3], [130, 0]),
}


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """Names of the kernels that ran; whatever the machine, these take what is short and has no dropout."""
    monkeypatch.setattr(
        attention_single, "fits", lambda a, i, w, longest, p, m, dropout: longest <= 288 and not dropout
    )
    seen = []
    for name in ("forward", "backward"):
        own = getattr(attention_single, name)

        def noted(*arguments, name=name, own=own):
            seen.append(name)
            return own(*arguments)

        monkeypatch.setattr(attention_single, name, noted)
    return seen


def _inputs(q_lengths, k_lengths, heads=1, width=16, dtype=torch.float32):
    draws = [torch.randn(sum(n), heads, width).to(dtype) for n in (q_lengths, k_lengths, k_lengths)]
    return [*draws, offsets(q_lengths), offsets(k_lengths), max(q_lengths), max(k_lengths)]


def _results(arguments, backend, upstream, dtype=None, **options):
    q, k, v, *rest = arguments
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (q, k, v)]
    out, lse = functional.attention(*leaves, *rest, return_lse=True, backend=backend, **options)
    finite = torch.where(lse.isfinite(), lse, 0)
    pairs = zip(upstream, (out, lse), strict=True)
    return [out, lse, *torch.autograd.grad([out, finite], leaves, [g.to(t) for g, t in pairs])]


@pytest.mark.parametrize("dtype, width, heads", [(torch.float32, 16, 2), (torch.float16, 64, 1), (torch.float16, 7, 1)])
@pytest.mark.parametrize("case", CASES)
def test_within_budget(case, dtype, width, heads, launched):
    q_lengths, k_lengths, used, starts = CASES[case]
    arguments = _inputs(q_lengths, k_lengths, heads, width, dtype)
    numbers = {"seqused_k": used, "causal_start": starts}
    options = {k: None if n is None else torch.tensor(n, dtype=torch.int32) for k, n in numbers.items()}
    upstream = torch.randn(arguments[0].shape), torch.randn(arguments[0].shape[1::-1])
    got, plain, exact = (
        _results(arguments, backend, upstream, to, **options)
        for backend, to in (("triton", None), ("reference", None), ("reference", torch.float64))
    )
    assert launched == ["forward", "backward"]
    for name, *three in zip(("out", "lse", "dq", "dk", "dv"), got, plain, exact, strict=True):
        assert_within_budget(*three, what=f"{name} {case}")


def test_what_is_not_its_own_may_hold_anything():
    """NaN in another sample, in keys that are not used, and in the padding of a layout."""
    lengths = [70, 40, 9]
    arguments, used = _inputs(lengths, lengths, 2), torch.tensor([66, 40, 9], dtype=torch.int32)
    upstream = torch.ones(119, 2, 16), torch.zeros(2, 119)
    want = _results(arguments, "triton", upstream, seqused_k=used)
    dirty = [sliced(t) for t in arguments[:3]]
    for t in dirty[1:]:
        t[66:70] = float("nan")
    got = _results([*dirty, *arguments[3:]], "triton", upstream, seqused_k=used)
    for name, g, w in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        assert torch.equal(g, w), name
    assert not got[3][66:70].any() and not got[4][66:70].any()
    for t in arguments[:3]:
        t[70:110] = float("nan")
    got = _results(arguments, "triton", upstream, seqused_k=used)
    for place, (g, w) in enumerate(zip(got, want, strict=True)):
        rows = (g.transpose(0, 1), w.transpose(0, 1)) if place == 1 else (g, w)
        assert torch.equal(rows[0][:70], rows[1][:70]) and torch.equal(rows[0][110:], rows[1][110:])


def test_equal_runs_give_equal_bits_and_neighbours_do_not_matter():
    both, alone = _inputs([150, 200], [150, 200]), None
    upstream = torch.randn(350, 1, 16), torch.randn(1, 350)
    first, again = (_results(both, "triton", upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    alone = [*(t[150:] for t in both[:3]), offsets([200]), offsets([200]), 200, 200]
    single = _results(alone, "triton", (upstream[0][150:], upstream[1][:, 150:]))
    for place, (a, b) in enumerate(zip(first, single, strict=True)):
        assert torch.equal(a[:, 150:] if place == 1 else a[150:], b)


def test_other_ways_where_it_does_not_fit(launched):
    q, k, v, *rest = _inputs([5], [300])
    functional.attention(q, k, v, *rest, backend="triton")
    functional.attention(q[:, :, :], k[:5], v[:5], rest[0], rest[0], 5, 5, dropout_p=0.5, backend="triton")
    assert launched == []


def test_it_is_for_short_and_many(monkeypatch):
    monkeypatch.undo()
    fits = attention_single.fits
    assert fits(90, 2, 64, 288, 768, 132, False)
    for other in (
        (100, 2, 64, 288, 768, 132, False), (80, 2, 64, 288, 768, 132, False), (90, 4, 64, 288, 768, 132, False),
        (90, 2, 65, 288, 768, 132, False), (90, 2, 64, 289, 768, 132, False), (90, 2, 64, 288, 96, 132, False),
        (90, 2, 64, 288, 768, 132, True),
    ):  # fmt: skip
        assert not fits(*other), other
    assert attention._forward_config(90, 2, 64, 281, 281, 768, 132) == attention_single.FORWARD
    assert attention_bwd._config(90, 2, 64, 281, 768, 132)["sample"] == attention_single.BACKWARD
    assert attention_bwd._config(90, 2, 64, 281, 768, 132, True)["sample"] is None


def test_ahead_of_time():
    assert all(map(names_every_argument, attention_single.aot_cases()))


def test_configurations_stay_as_they_are(monkeypatch):
    before = dict(attention_single.FORWARD), dict(attention_single.BACKWARD)
    monkeypatch.setattr(attention, "_forward_config", lambda *sizes: attention_single.FORWARD)
    arguments = _inputs([3], [3])
    _results(arguments, "triton", (torch.ones(3, 1, 16), torch.zeros(1, 3)))
    assert (attention_single.FORWARD, attention_single.BACKWARD) == before
