"""attention in Triton: outputs, log-sum-exp and gradients under the error budget, in the interpreter without a GPU."""

import pytest
import torch
from support.triton_case import compiles_ahead_of_time, names_every_argument

from vilt_fast import functional
from vilt_fast.kernels import attention as kernels
from vilt_fast.kernels import attention_bwd, attention_single
from vilt_fast.ops import registry
from vilt_fast.testing import assert_within_budget, offsets, opcheck, sliced, strided

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
CASES = {  # query lengths, key lengths, used keys, causal starts
    "ragged": ([5, 1, 9, 33], [5, 1, 9, 33], None, None),
    "cross": ([3, 40, 1], [38, 2, 6], None, None),
    "query only": ([5, 70, 8], [5, 70, 8], [4, 69, 7], None),
    "empty": ([0, 4, 3, 0], [0, 4, 0, 2], None, None),
    "no keys used": ([3, 20], [3, 20], [0, 18], None),
    "prefix causal": ([5, 70, 8], [5, 70, 8], None, [2, 33, 8]),
    "causal": ([70, 3], [70, 3], [69, 3], [0, 0]),
    "ViLT": ([185, 17], [185, 17], [184, 17], None),
    "long": ([40, 9], [330, 12], None, None),
    "long prefix causal": ([70, 330], [70, 330], [69, 330], [20, 290]),
}


def _int32(values):
    return None if values is None else torch.tensor(values, dtype=torch.int32, device=DEVICE)


def _inputs(q_lengths, k_lengths, heads=2, width=16, dtype=torch.float32, device=DEVICE):
    draws = [torch.randn(sum(n), heads, width).to(device, dtype) for n in (q_lengths, k_lengths, k_lengths)]
    rows = [offsets(n).to(device) for n in (q_lengths, k_lengths)]
    return [*draws, *rows, max(q_lengths), max(k_lengths)]


def _results(function, tensors, upstream):
    """out, lse, dq, dk, dv of function(q, k, v); the gradient goes through both outputs."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    out, lse = function(*tensors)
    finite = torch.where(lse.isfinite(), lse, 0)
    gradients = torch.autograd.grad(
        [out, finite], tensors, [g.to(t) for g, t in zip(upstream, (out, lse), strict=True)]
    )
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients), strict=True))


def _compare(arguments, layout=lambda t: t, what="", **options):
    q, k, v, *rest = arguments
    upstream = torch.randn(q.shape).to(q), torch.randn(q.shape[1], q.shape[0]).to(q.device)

    def through(backend):
        return lambda *t: functional.attention(*t, *rest, return_lse=True, backend=backend, **options)

    got = _results(through("triton"), [layout(t) for t in (q, k, v)], upstream)
    plain = _results(through("reference"), (q, k, v), upstream)
    exact = _results(through("reference"), [t.double() for t in (q, k, v)], upstream)
    for name in got:
        assert got[name].dtype == plain[name].dtype
        assert_within_budget(got[name], plain[name], exact[name], what=f"{name} {what}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_within_budget(case, dtype):
    q_lengths, k_lengths, used, starts = CASES[case]
    arguments = _inputs(q_lengths, k_lengths, heads=2 if max(k_lengths) < 100 else 1, dtype=dtype)
    _compare(arguments, seqused_k=_int32(used), causal_start=_int32(starts), what=case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, width", [(1, 1), (3, 7), (2, 40), (2, 64), (1, 100), (2, 128), (1, 256)])
def test_head_dims(heads, width, dtype):
    _compare(_inputs([19, 4], [19, 4], heads, width, dtype), scale=0.3 * width**-0.5)


@pytest.mark.parametrize("scale", [-0.2, 0.0])
def test_any_scale(scale):
    _compare(_inputs([19, 4], [35, 4]), scale=scale, seqused_k=_int32([30, 4]))


def test_large_scores_do_not_overflow():
    q, k, v, *rest = _inputs([9, 5], [90, 5])
    _compare([q * 60, k * 60, v, *rest])


@pytest.mark.parametrize("layout", [strided, sliced, lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)])
def test_layouts(layout):
    _compare(_inputs([9, 17], [9, 17]), lambda t: layout(t.cpu()).to(t.device) if layout is not strided else layout(t))


@torch.no_grad()
def test_slices_of_a_fused_projection_are_read_in_place():
    fused = torch.randn(26, 3, 2, 16, device=DEVICE)
    rows = offsets([9, 17]).to(DEVICE)
    views = fused.unbind(1)
    assert all(kernels.in_place(t, 17) is t for t in views)
    got, want = (
        functional.attention(*t, rows, rows, 17, 17, backend="triton") for t in (views, fused.clone().unbind(1))
    )
    assert torch.equal(got, want)


FORWARDS = [
    dict(BLOCK_M=m, BLOCK_N=n, BLOCK_N2=n2, SINGLE=True)
    for m, (n, n2) in zip([16, 32, 64, 32] * 2, kernels._SINGLE_TILES, strict=True)
] + [dict(BLOCK_M=m, BLOCK_N=n, BLOCK_N2=0, SINGLE=False) for m, n in ((16, 16), (32, 32), (64, 32), (128, 64))]


@pytest.mark.parametrize("blocks", FORWARDS, ids=lambda b: "-".join(str(size) for size in b.values()))
@torch.no_grad()
def test_every_block_size(blocks, monkeypatch):
    longest = blocks["BLOCK_N"] + blocks["BLOCK_N2"] if blocks["SINGLE"] else 75
    config = dict(blocks, num_warps=4, num_stages=2)
    monkeypatch.setattr(kernels, "_forward_config", lambda *sizes: config)
    q, k, v, *rest = _inputs([33, 20, 3], [longest, longest - 1, 1])
    for starts in (None, _int32([0, 19, 1])):
        options = dict(causal_start=starts, return_lse=True)
        runs = (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64))
        results = [
            functional.attention(*[t.to(d) for t in (q, k, v)], *rest, backend=b, **options) for b, d in runs
        ]  # fmt: skip
        for name, *tensors in zip(("out", "lse"), *results, strict=True):
            assert_within_budget(*tensors, what=name)


@pytest.mark.parametrize("m, n", [(16, 16), (16, 32), (64, 32), (32, 64)])
def test_every_block_size_backward(m, n, monkeypatch):
    tiles = (m, n, 4, 1)
    monkeypatch.setattr(attention_bwd, "tiles_of", lambda *key: (tiles,) * 3)
    _compare(_inputs([33, 20, 3], [70, 16, 1]), causal_start=_int32([40, 2, 0]), seqused_k=_int32([66, 16, 1]))


def test_configurations_cover_every_length():
    for arch in (0, 80, 86, 89, 90, 100, 103, 120):
        for itemsize in (2, 4):
            for width in (1, 64, 65, 128, 129, 256):
                plain, halved = (kernels.tiles_of(arch, itemsize, width, dropout) for dropout in (False, True))
                for (m, n, *_), (m2, n2, *_) in zip(plain[:2], halved[:2], strict=True):
                    assert (m2, n2) == (m, max(16, n // 2))
                assert halved[2][:2] == (max(16, plain[2][0] // 2), plain[2][1])
                for longest in (0, 1, 17, 185, 281, 320, 321, 4096):
                    for pairs in (12, 768):
                        config = kernels._forward_config(arch, itemsize, width, longest, longest, pairs, 132)
                        whole, tiles = "SINGLE" not in config, config["BLOCK_N"] + config["BLOCK_N2"]
                        assert (
                            not config.get("SINGLE", True) or (attention_single.LONGEST if whole else tiles) >= longest
                        )
                        assert not whole or (arch, itemsize, pairs) == (90, 2, 768)
                        config = kernels._forward_config(arch, itemsize, width, longest, longest, pairs, 132, True)
                        assert not config["SINGLE"]
    shipped = {(c["constexprs"]["BLOCK_N"], c["constexprs"]["BLOCK_N2"]) for c in kernels.aot_cases()}
    assert shipped >= set(kernels._SINGLE_TILES), "every tile is compiled ahead of time"


# --- what must not matter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("longest", [5, 330])
def test_rows_that_are_not_keys_may_hold_anything(longest):
    q, k, v, *rest = _inputs([min(longest, 40), 4], [longest, 4])
    upstream = torch.randn_like(q), torch.randn(q.shape[1], q.shape[0], device=DEVICE)

    def function(*tensors):
        return functional.attention(
            *tensors, *rest, seqused_k=_int32([longest - 1, 4]), return_lse=True, backend="triton"
        )

    want = _results(function, (q, k, v), upstream)
    k[longest - 1], v[longest - 1] = float("nan"), float("inf")
    got = _results(function, (q, k, v), upstream)
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert not got["dk"][longest - 1].any() and not got["dv"][longest - 1].any()


def test_nan_stays_in_its_sample():
    q, k, v, *rest = _inputs([5, 4, 5], [5, 4, 5])
    upstream = torch.randn_like(q), torch.randn(q.shape[1], q.shape[0], device=DEVICE)

    def function(*tensors):
        return functional.attention(*tensors, *rest, return_lse=True, backend="triton")

    want = _results(function, (q, k, v), upstream)
    k[6] = float("nan")
    got = _results(function, (q, k, v), upstream)
    for name in ("out", "dq", "dk", "dv"):
        assert torch.equal(got[name][:5], want[name][:5]) and torch.equal(got[name][9:], want[name][9:]), name
    assert got["out"][5:9].isnan().all() and got["dq"][5:9].isnan().all()


def test_equal_runs_give_equal_bits():
    arguments = _inputs([70, 20], [70, 20])
    upstream = torch.randn_like(arguments[0]), torch.randn(2, 90, device=DEVICE)
    runs = [
        _results(
            lambda *t: functional.attention(*t, *arguments[3:], return_lse=True, backend="triton"),
            arguments[:3], upstream,
        )
        for _ in range(2)
    ]  # fmt: skip
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


# --- dropout ----------------------------------------------------------------------------------------------------------


def _seeded(seed=3):
    return torch.Generator(DEVICE).manual_seed(seed)


@torch.no_grad()
def _kept(arguments, p, **options):
    """Which probabilities survive, bool [H, q, k] of one sample: the values are unit vectors, so out is the matrix."""
    q, k, _, *rest = arguments
    keys, heads, width = k.shape
    columns = []
    for first in range(0, keys, width):
        unit = torch.zeros(keys, heads, width, device=DEVICE)
        unit[range(first, min(first + width, keys)), :, range(min(width, keys - first))] = 1
        out = functional.attention(
            q.float(), k.float(), unit, *rest, dropout_p=p, generator=_seeded(), backend="triton", **options
        )
        columns.append(out)
    return torch.cat(columns, 2)[..., :keys].transpose(0, 1) != 0


def _dense(kept, p, start=None):
    """Attention of one sample with a given dropout mask, written out."""

    def function(q, k, v):
        scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
        if start is not None:
            i, j = torch.meshgrid(*(torch.arange(n, device=q.device) for n in scores.shape[1:]), indexing="ij")
            scores = scores.masked_fill((j >= start) & (i < j), float("-inf"))
        out = torch.einsum("hij,jhd->ihd", scores.softmax(-1) * kept / (1 - p), v)
        return out, scores.to(torch.promote_types(q.dtype, torch.float32)).logsumexp(-1)

    return function


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, keys, start", [(40, 40, None), (40, 40, 11), (20, 130, None)])
def test_dropout_within_budget(rows, keys, start, dtype):
    arguments = _inputs([rows], [keys], dtype=dtype, width=32)
    options = dict(causal_start=_int32(None if start is None else [start]))
    kept = _kept(arguments, 0.3, **options)
    q, k, v, *rest = arguments
    upstream = torch.randn_like(q), torch.randn(q.shape[1], q.shape[0], device=DEVICE)

    def triton(*tensors):
        return functional.attention(
            *tensors, *rest, dropout_p=0.3, generator=_seeded(), return_lse=True, backend="triton", **options
        )

    got = _results(triton, (q, k, v), upstream)
    plain = _results(_dense(kept, 0.3, start), (q, k, v), upstream)
    exact = _results(_dense(kept, 0.3, start), [t.double() for t in (q, k, v)], upstream)
    for name in got:
        assert_within_budget(got[name], plain[name], exact[name], what=name)


def test_dropout_draws_what_it_should():
    arguments = _inputs([60], [60], heads=3)
    kept = _kept(arguments, 0.25).double()
    count = kept.numel()
    assert abs(kept.mean().item() - 0.75) < 5 * (0.75 * 0.25 / count) ** 0.5
    for shifted in (kept.roll(1, 0), kept.roll(1, 1), kept.roll(1, 2)):  # heads, rows, keys draw independently
        both = ((kept - 0.75) * (shifted - 0.75)).mean().item()
        assert abs(both) < 5 * 0.75 * 0.25 / count**0.5


def test_dropout_does_not_depend_on_tiles_or_neighbours(monkeypatch):
    arguments = _inputs([30], [30])
    kept = _kept(arguments, 0.5)
    for config in FORWARDS[3], FORWARDS[-3]:
        monkeypatch.setattr(kernels, "_forward_config", lambda *s, c=config: dict(c, num_warps=4, num_stages=2))
        assert torch.equal(_kept(arguments, 0.5), kept)


@torch.no_grad()
@pytest.mark.parametrize("kind", sorted({"cpu", DEVICE}))
def test_generator_makes_dropout_repeatable(kind):
    arguments = _inputs([4, 3], [4, 3])
    draws = [
        functional.attention(
            *arguments, dropout_p=0.5, generator=torch.Generator(kind).manual_seed(s), backend="triton"
        )
        for s in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


# --- the op -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_registered_op(dropout_p):
    q, k, v, *rest = _inputs([5, 0, 3], [4, 2, 3])
    seed = torch.tensor([7], device=DEVICE) if dropout_p else None
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    named = dict(zip(names, rest, strict=True), seqused_k=_int32([3, 2, 3]), dropout_p=dropout_p, scale=0.25, seed=seed)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    opcheck("attention", "triton", keep=True, q=q, k=k, v=v, **named)


def test_compiles_with_its_gradient():
    q, k, v, *rest = _inputs([5, 0, 3], [4, 2, 3])
    used = _int32([3, 2, 3])

    def function(*tensors):
        return functional.attention(*tensors, *rest, seqused_k=used, backend="triton").square().sum()

    gradients = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        gradients.append(torch.autograd.grad(run(*leaves), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_limits():
    arguments = _inputs([3, 2], [3, 2], dtype=torch.float64)
    with pytest.raises(RuntimeError, match="float64, expected float32, float16 or bfloat16"):
        functional.attention(*arguments, backend="triton")
    with pytest.raises(RuntimeError, match="head dim is 257, expected 1 to 256"):
        functional.attention(*_inputs([3, 2], [3, 2], width=257), backend="triton")
    assert "meta" in kernels.supports(device="meta")
    assert registry.launcher("attention_bwd", "triton") is attention_bwd.attention_bwd


def test_compiles_ahead_of_time():
    """One configuration a kernel; benchmarks/aot_report.py compiles all of them and looks at what comes out."""
    cases = [*kernels.aot_cases(), *attention_bwd.aot_cases()]
    assert all(map(names_every_argument, cases)) and len({case["name"] for case in cases}) == len(cases)
    assert compiles_ahead_of_time("attention") == 1
    assert compiles_ahead_of_time("attention_bwd") == 2


@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_launches_without_waiting_and_in_a_cuda_graph(dropout_p):
    arguments = _inputs([185, 281], [185, 281], heads=12, width=64, dtype=torch.bfloat16)
    leaves = [t.requires_grad_() for t in arguments[:3]]
    upstream = torch.randn_like(leaves[0])

    def step():
        out = functional.attention(*leaves, *arguments[3:], dropout_p=dropout_p, backend="triton")
        return out, *torch.autograd.grad(out, leaves, upstream)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        want = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    if not dropout_p:
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_at_the_sizes_of_vilt(dtype):
    lengths = [185, 281, 200, 64]
    _compare(_inputs(lengths, lengths, 12, 64, dtype), seqused_k=_int32([185, 280, 200, 63]))
