"""attention: reference against HuggingFace and a dense formula, every backend under the error budget."""

import math

import pytest
import torch
from support.gradients import assert_gradients_within_budget, results
from torch.autograd import gradcheck
from transformers import ViltConfig
from transformers.models.vilt.modeling_vilt import ViltSelfAttention

from vilt_fast import functional
from vilt_fast.testing import assert_within_budget, offsets, opcheck, random_weights, sliced, strided

BACKENDS = ("torch", "cpp")
LENGTHS = {
    "ragged": ([5, 1, 9, 5, 17], [5, 1, 9, 5, 17], None),
    "cross": ([3, 4, 1, 7], [8, 2, 6, 1], None),
    "equal": ([6, 6, 6], [6, 6, 6], None),
    "one": ([33], [33], None),
    "query only": ([5, 3, 8], [5, 3, 8], [4, 3, 7]),
    "empty": ([0, 4, 3, 0], [0, 4, 0, 2], None),
    "no keys used": ([3, 2], [3, 2], [0, 2]),
    "long": ([281, 70], [281, 70], [280, 70]),
}


def _inputs(q_lengths, k_lengths, heads=3, width=16, dtype=torch.float64):
    draws = [torch.randn(sum(n), heads, width, dtype=dtype) for n in (q_lengths, k_lengths, k_lengths)]
    return [*draws, offsets(q_lengths), offsets(k_lengths), max(q_lengths), max(k_lengths)]


def _int32(values):
    return None if values is None else torch.tensor(values, dtype=torch.int32)


def _dense(q, k, v, allowed, scale):
    """One sample, written out: allowed [q, k]."""
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    weights = scores.exp() * allowed
    total = weights.sum(-1, keepdim=True)
    probs = torch.where(total > 0, weights / total, 0)
    return torch.einsum("hij,jhd->ihd", probs, v), total.squeeze(-1).log()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", LENGTHS)
def test_reference_is_the_dense_formula(case, causal):
    q_lengths, k_lengths, used = LENGTHS[case]
    arguments = _inputs(q_lengths, k_lengths)
    q, k, v, q_rows, k_rows = arguments[:5]
    starts = [b % 4 for b in range(len(q_lengths))] if causal else None
    out, lse = functional.attention(
        *arguments, seqused_k=_int32(used), causal_start=_int32(starts), return_lse=True, backend="reference"
    )
    for b, (nq, nk) in enumerate(zip(q_lengths, k_lengths, strict=True)):
        i, j = torch.meshgrid(torch.arange(nq), torch.arange(nk), indexing="ij")
        allowed = j < (nk if used is None else used[b])
        if causal:
            allowed = allowed & ~((j >= starts[b]) & (i < j))
        rows_q, rows_k = slice(q_rows[b], q_rows[b + 1]), slice(k_rows[b], k_rows[b + 1])
        want, want_lse = _dense(q[rows_q], k[rows_k], v[rows_k], allowed, 16**-0.5)
        torch.testing.assert_close(out[rows_q], want, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(lse[:, rows_q], want_lse, rtol=1e-12, atol=1e-14)


def test_reference_is_huggingface():
    config = ViltConfig(hidden_size=24, num_attention_heads=3)
    module = random_weights(ViltSelfAttention(config)).double().eval()
    lengths = [5, 2, 7]
    padded = torch.randn(3, 7, 24, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor(lengths).unsqueeze(1)
    bias = torch.zeros(3, 1, 1, 7, dtype=torch.float64).masked_fill(~mask[:, None, None], -math.inf)
    (want,) = module(padded, bias)
    x = padded[mask]
    q, k, v = (layer(x).unflatten(1, (3, 8)) for layer in (module.query, module.key, module.value))
    rows = offsets(lengths)
    got = functional.attention(q, k, v, rows, rows, 7, 7, backend="reference").flatten(1)
    torch.testing.assert_close(got, want[mask], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients(backend):
    q, k, v, *rest = _inputs([2, 1, 1], [1, 2, 0], heads=1, width=2)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    for causal in (None, _int32([1, 0, 0])):
        assert gradcheck(lambda *t, c=causal: functional.attention(*t, *rest, causal_start=c, backend=backend), inputs)


def _three_ways(arguments, backend, layout=lambda t: t, **options):
    q, k, v, *rest = arguments
    got = functional.attention(layout(q), layout(k), layout(v), *rest, backend=backend, **options)
    plain = functional.attention(q, k, v, *rest, backend="reference", **options)
    exact = functional.attention(q.double(), k.double(), v.double(), *rest, backend="reference", **options)
    return got, plain, exact


@pytest.mark.parametrize("layout", [lambda t: t, strided, sliced], ids=["dense", "strided", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_backends_within_budget(backend, case, dtype, layout):
    q_lengths, k_lengths, used = LENGTHS[case]
    arguments = _inputs(q_lengths, k_lengths, dtype=dtype)
    got, plain, exact = _three_ways(arguments, backend, layout, seqused_k=_int32(used))
    assert got.dtype == dtype
    assert_within_budget(got, plain, exact, what=f"{backend} {case}")


@pytest.mark.parametrize("heads, width", [(1, 64), (2, 128), (2, 40), (1, 7), (1, 256)])
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_head_dims(backend, heads, width):
    arguments = _inputs([19, 4], [19, 4], heads, width, torch.float32)
    assert_within_budget(*_three_ways(arguments, backend, scale=0.3), what=f"head dim {width}")


@torch.no_grad()
def test_large_scores_do_not_overflow():
    q, k, v, *rest = _inputs([9, 5], [9, 5], dtype=torch.float32)
    for backend in BACKENDS:
        assert_within_budget(*_three_ways([q * 60, k * 60, v, *rest], backend), what=backend)


def test_gradients_of_torch_within_budget():
    q, k, v, *rest = _inputs([5, 1, 9, 5], [5, 1, 9, 5], dtype=torch.float32)
    upstream = torch.randn_like(q)

    def gradients(backend, dtype):
        inputs = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        out = functional.attention(*inputs, *rest, seqused_k=_int32([4, 1, 9, 5]), backend=backend)
        return torch.autograd.grad(out, inputs, upstream.to(dtype))

    runs = (("torch", torch.float32), ("reference", torch.float32), ("reference", torch.float64))
    for name, *tensors in zip("qkv", *(gradients(*run) for run in runs), strict=True):
        assert_within_budget(*tensors, what=f"d{name}")


@pytest.mark.parametrize("layout", [lambda t: t, strided, sliced], ids=["dense", "strided", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("return_lse", [False, True])
def test_cpp_gradients_within_budget(case, return_lse, dtype, layout):
    q_lengths, k_lengths, used = ([*n, 40] if n else n for n in LENGTHS[case])  # the budget of a few elements is luck
    q, k, v, *rest = _inputs(q_lengths, k_lengths, dtype=dtype)
    if return_lse and (0 in k_lengths or 0 in (used or ())):
        return  # the reference has NaN in a gradient of the logarithm of nothing

    def call(q, k, v, backend):
        return functional.attention(
            q, k, v, *rest, seqused_k=_int32(used), return_lse=return_lse, scale=0.3, backend=backend
        )

    assert_gradients_within_budget(call, (q, k, v), layout=layout, what=case, together=True)


@pytest.mark.parametrize("heads, width", [(1, 64), (2, 128), (2, 40), (1, 7), (1, 256), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpp_gradients_of_head_dims(heads, width, dtype):
    q, k, v, *rest = _inputs([19, 70], [130, 6], heads, width, dtype)

    def call(*t, backend):
        return functional.attention(*t, *rest, backend=backend)

    assert_gradients_within_budget(call, (q, k, v), together=True)


def test_cpp_gradients_of_rows_that_are_not_keys():
    q, k, v, *rest = _inputs([5, 4, 3], [5, 4, 3], dtype=torch.float32)

    def call(*t, backend):
        return functional.attention(*t, *rest, seqused_k=_int32([4, 4, 0]), backend=backend)

    want = results(call, (q, k, v), "cpp")
    unseen = torch.tensor([4, 9, 10, 11])
    k[unseen], v[unseen] = torch.nan, torch.inf
    got = results(call, (q, k, v), "cpp")
    assert all(map(torch.equal, got, want)) and not got[2][unseen].any() and not got[3][unseen].any()


def test_cpp_gradients_do_not_depend_on_threads():
    q, k, v, *rest = _inputs([70, 33, 5], [70, 33, 5], dtype=torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 16):
            torch.set_num_threads(threads)
            found.append(
                results(lambda *t, backend: functional.attention(*t, *rest, backend=backend), (q, k, v), "cpp")
            )
    finally:
        torch.set_num_threads(before)
    assert all(all(map(torch.equal, one, found[0])) for one in found)


def test_the_gradient_of_lse_alone():
    q, k, v, *rest = _inputs([4], [4], dtype=torch.float32)
    found = []
    for backend in ("cpp", "reference"):
        leaves = [t.clone().requires_grad_() for t in (q, k)]
        functional.attention(*leaves, v, *rest, return_lse=True, backend=backend)[1].sum().backward()
        found.append([t.grad for t in leaves])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("case", ["cross", "query only", "empty"])
@torch.no_grad()
def test_cpp_log_sum_exp(case):
    q_lengths, k_lengths, used = LENGTHS[case]
    arguments = _inputs(q_lengths, k_lengths, dtype=torch.float32)
    for got, plain, exact in zip(*_three_ways(arguments, "cpp", seqused_k=_int32(used), return_lse=True), strict=True):
        assert_within_budget(got, plain, exact)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@torch.no_grad()
def test_rows_that_are_not_keys_may_hold_anything(backend):
    q, k, v, *rest = _inputs([5, 4], [5, 4], dtype=torch.float32)
    used = _int32([4, 4])
    want = functional.attention(q, k, v, *rest, seqused_k=used, backend=backend)
    k[4], v[4] = float("nan"), float("inf")
    assert torch.equal(functional.attention(q, k, v, *rest, seqused_k=used, backend=backend), want)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@torch.no_grad()
def test_nan_stays_in_its_sample(backend):
    q, k, v, *rest = _inputs([5, 4, 5], [5, 4, 5], dtype=torch.float32)
    want = functional.attention(q, k, v, *rest, backend=backend)
    k[6] = float("nan")
    got = functional.attention(q, k, v, *rest, backend=backend)
    assert torch.equal(got[:5], want[:5]) and torch.equal(got[9:], want[9:]) and got[5:9].isnan().all()


def test_causal_torch_within_budget():
    arguments = _inputs([5, 8, 5], [5, 8, 5], dtype=torch.float32)
    assert_within_budget(*_three_ways(arguments, "torch", causal_start=_int32([2, 0, 5])))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_dropout_keeps_the_mean_and_scales_the_rest(backend):
    q, k, _, *rest = _inputs([4], [64], heads=2, width=8)
    v = torch.ones(64, 2, 8, dtype=torch.float64)
    draws = torch.stack([functional.attention(q, k, v, *rest, dropout_p=0.25, backend=backend) for _ in range(200)])
    spread = draws.std(0) / math.sqrt(200)
    assert ((draws.mean(0) - 1).abs() < 6 * spread).all() and (draws.std(0) > 0).all()


def test_generator_makes_dropout_repeatable():
    arguments = _inputs([4, 3], [4, 3])
    draws = [
        functional.attention(*arguments, dropout_p=0.5, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.core
@torch.no_grad()
def test_registered_op():
    arguments = _inputs([5, 0, 3], [4, 2, 3], dtype=torch.float32)
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    seqused_k = _int32([3, 2, 3])
    named = dict(zip(names, arguments, strict=True), seqused_k=seqused_k, dropout_p=0.0, scale=0.25)
    opcheck("attention", "cpp", **named)
    with torch.enable_grad():
        leaves = {name: named[name].clone().requires_grad_() for name in "qkv"}
        opcheck("attention", "cpp", keep=True, **named | leaves)
    compiled = torch.compile(
        lambda *t: functional.attention(*t, seqused_k=seqused_k) * 2, fullgraph=True, backend="aot_eager"
    )
    want = functional.attention(*arguments, seqused_k=seqused_k, backend="cpp") * 2
    assert torch.equal(compiled(*arguments), want)


def test_bad_input():
    q, k, v, rows_q, rows_k, *longest = _inputs([3, 2], [3, 2], dtype=torch.float32)
    with pytest.raises(ValueError, match=r"v has shape \[4, 3, 16\], expected \[Nk, H, d\]"):
        functional.attention(q, k, v[:4], rows_q, rows_k, *longest)
    with pytest.raises(TypeError, match="cu_seqlens_q is torch.int64, expected torch.int32"):
        functional.attention(q, k, v, rows_q.long(), rows_k, *longest)
    with pytest.raises(ValueError, match="seqused_k has shape"):
        functional.attention(q, k, v, rows_q, rows_k, *longest, seqused_k=_int32([1]))
    with pytest.raises(ValueError, match="no sample"):
        functional.attention(q, k, v, rows_q[:1], rows_k[:1], *longest)
    with pytest.raises(ValueError, match="dropout_p is 1.0"):
        functional.attention(q, k, v, rows_q, rows_k, *longest, dropout_p=1.0)
    with pytest.raises(RuntimeError, match="log-sum-exp"):
        functional.attention(q, k, v, rows_q, rows_k, *longest, return_lse=True, backend="torch")
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="no dropout"):
            functional.attention(q, k, v, rows_q, rows_k, *longest, dropout_p=0.1, backend="cpp")
        with pytest.raises(RuntimeError, match="no causal"):
            functional.attention(q, k, v, rows_q, rows_k, *longest, causal_start=_int32([0, 0]), backend="cpp")
        for wrong in ([0, 3, 6], [1, 3, 5], [0, 6, 5]):
            with pytest.raises(ValueError, match="cu_seqlens_k"):
                functional.attention(q, k, v, rows_q, _int32(wrong), *longest, backend="cpp")
        with pytest.raises(ValueError, match="seqused_k"):
            functional.attention(q, k, v, rows_q, rows_k, *longest, seqused_k=_int32([4, 2]), backend="cpp")


def test_more_rows_than_int32_counts():
    rows = torch.empty(1, 1, 16).expand(2**31, 1, 16)
    bounds = torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match="split the batch"):
        functional.attention(rows, rows, rows, bounds, bounds, 1, 1)
