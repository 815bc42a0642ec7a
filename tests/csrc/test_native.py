"""Every entry point of vilt_fast._C at every instruction-set level of this machine, against float64.

Budgets come from the data (testing.assert_within_budget): twice the error of plain PyTorch in the same dtype. For int8
the same-dtype reference is the quantisation scheme written in PyTorch.
"""

import functools
import math
import subprocess
import sys

import pytest
import torch
from support.native import (
    NAMES,
    Blob,
    address,
    name,
    plain_linear,
    quantized_weight,
    randn,
    rows_apart,
    weight_argument,
)
from torch.nn import functional as F

from vilt_fast import _C
from vilt_fast.testing import assert_within_budget, encoder_parameters, offsets, packing_indices

ISAS = _C.cpu_features()["isas"]
SIZES = {"M": (1, 5, 6, 7, 185), "N": (1, 15, 63, 64, 65, 100), "K": (1, 3, 32, 769)}


@pytest.fixture(autouse=True)
def _one_thread(isa):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the references are many tiny operations
    yield
    torch.set_num_threads(threads)


def linear(x, w, b, *, gelu=False, compute="f32", out_dtype=torch.float32, threads=2):
    (m, k), n = x.shape, w.shape[0]
    out = torch.full((m, n + 3), 7.0, dtype=out_dtype)
    keep, w_dtype = weight_argument(w, compute)
    _C.linear(
        address(x), name(x), address(keep), w_dtype, address(b), name(b), address(out), NAMES[out_dtype],
        m, n, k, x.stride(0), out.stride(0), gelu, compute, threads,
    )  # fmt: skip
    assert (out[:, n:] == 7).all(), "wrote past the last column"
    return out[:, :n]


def test_levels_and_selection(isa, monkeypatch):
    assert _C.cpu_features()["isa"] == isa and ISAS[0] == "generic"
    with pytest.raises(ValueError, match="not available"):
        _C.set_isa("avx1024")
    assert _C.cpu_features()["isa"] == isa
    _C.set_isa(None)
    assert _C.cpu_features()["isa"] == ISAS[-1]
    monkeypatch.setenv("VILT_FAST_CPU_ISA", isa)
    assert _C.cpu_features()["isa"] == isa
    monkeypatch.setenv("VILT_FAST_CPU_ISA", "avx1024")
    with pytest.raises(ValueError, match="available: generic"):
        _C.cpu_features()


def test_works_without_torch_loaded(isa):
    code = "import sys; from vilt_fast import _C; print(_C.cpu_features()['isa'], 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [ISAS[-1], "False"]


@functools.cache  # the answers are the same at every level
def linear_case(n, k, compute):
    x, w, b = randn(max(SIZES["M"]), k, seed=k), randn(n, k, seed=n), randn(n, seed=n + k)
    return x, w, b, F.linear(x.double(), w.double(), b.double()), plain_linear(x, w, b, compute)


@pytest.mark.parametrize("compute", ["f32", "bf16", "int8"])
def test_linear_sizes(compute):
    for k in SIZES["K"]:
        for n in SIZES["N"]:
            x, w, b, exact, plain = linear_case(n, k, compute)
            for i, m in enumerate(SIZES["M"]):
                got = linear(rows_apart(x[:m]), w, b, compute=compute, threads=1 + (i + n) % 3)
                # The budget of a few elements is luck: every prefix of the rows is held to that of all of them.
                padded = torch.cat([got, plain[m:].float()])
                assert_within_budget(padded, plain, exact, what=f"{compute} {m}x{n}x{k}")


@pytest.mark.parametrize("compute", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_dtypes_gelu_and_long_rows(compute, dtype):
    for k in (70, 5000):  # 5000: several blocks along K
        x, w, b = randn(50, k, dtype=dtype), (randn(129, k, seed=1) / k**0.5).to(dtype), randn(129, seed=2, dtype=dtype)
        exact = F.gelu(F.linear(x.double(), w.double(), b.double()))
        plain = F.gelu(plain_linear(x, w, b, compute)).to(dtype)
        for threads in (1, 2, 3):
            got = linear(rows_apart(x), w, b, gelu=True, compute=compute, out_dtype=dtype, threads=threads)
            assert_within_budget(got, plain, exact, what=f"{compute} K={k} threads={threads}")


def test_linear_float32_weights_in_bf16_are_rounded_while_packing():
    x, w = randn(20, 66, dtype=torch.bfloat16), randn(70, 66, seed=1)
    assert torch.equal(linear(x, w, None, compute="bf16"), linear(x, w.bfloat16(), None, compute="bf16"))


def test_linear_empty():
    for m, n in ((0, 5), (5, 0), (0, 0)):
        linear(torch.empty(m, 8), torch.empty(n, 8), None, compute="f32")


@pytest.mark.parametrize("compute", ["f32", "bf16", "int8"])
def test_linear_keeps_nan_and_infinity_in_their_row(compute):
    x, w, b = randn(14, 40), randn(33, 40, seed=1), randn(33, seed=2)
    clean = linear(x, w, b, compute=compute)
    x[3, 7], x[9, 39] = math.nan, math.inf
    got = linear(x, w, b, compute=compute)
    others = [i for i in range(14) if i not in (3, 9)]
    assert got[3].isnan().all() and not got[9].isfinite().any()
    assert torch.equal(got[others], clean[others])


def test_gelu_accuracy():
    x = torch.cat([torch.linspace(-12, 12, 200_001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4])]).unsqueeze(1)
    got, one = linear(x, torch.ones(1, 1), None, gelu=True), F.gelu(x.double())
    size = x.double().abs().clamp(min=1)
    ours, torchs = (got - one).abs() / size, (F.gelu(x) - one).abs() / size
    assert ours.max() <= torchs.max()
    assert (
        got[-1] == 0
        and got[-2] == 1e4
        and linear(torch.tensor([[math.nan]]), torch.ones(1, 1), None, gelu=True).isnan()
    )


@pytest.mark.parametrize("shape", [(1, 1), (64, 4), (65, 6), (100, 129)])
def test_quantized_blob_holds_the_rounded_weight(shape):
    n, k = shape
    w = randn(n, k)
    w[n // 2] = 0
    blob = Blob(w, threads=3)
    columns, units = -(-n // 64) * 64, -(-k // 4)
    raw = blob.memory[blob.start :]
    q = raw[: columns * units * 4].view(torch.int8).reshape(-1, units, 64, 4).permute(0, 2, 1, 3).reshape(columns, -1)
    scale = raw[columns * units * 4 :][: columns * 4].clone().view(torch.float32)
    assert_within_budget(q[:n, :k] * scale[:n, None], quantized_weight(w), w.double())
    assert q[n:].eq(0).all() and q[:, k:].eq(0).all() and q[n // 2].eq(0).all() and q.min() >= -127


def attention(q, k, v, cu_q, cu_k, *, scale=None, used=None, threads=2):
    (rows, heads, d), out = q.shape, torch.full_like(q, math.nan)
    lse = torch.full((heads, rows), math.nan)
    scale = d**-0.5 if scale is None else scale
    _C.attention(
        address(q), address(k), address(v), address(out), name(q), heads, d, len(cu_q) - 1,
        *(t.stride(0) for t in (q, k, v, out)), address(cu_q), address(cu_k), address(used), scale, address(lse),
        threads,
    )  # fmt: skip
    return out, lse


def plain_attention(q, k, v, cu_q, cu_k, *, scale=None, used=None):
    out, lse = (
        torch.zeros_like(q),
        q.new_full((q.shape[1], q.shape[0]), -math.inf, dtype=torch.promote_types(q.dtype, torch.float32)),
    )
    scale = q.shape[2] ** -0.5 if scale is None else scale
    for b in range(len(cu_q) - 1):
        start, rows = int(cu_k[b]), slice(int(cu_q[b]), int(cu_q[b + 1]))
        end = int(cu_k[b + 1]) if used is None else start + int(used[b])
        if start == end:
            continue
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[start:end]) * scale
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[start:end])
        lse[:, rows] = torch.logsumexp(scores.to(lse.dtype), -1)
    return out, lse


ATTENTION = {
    "ragged": ([5, 0, 185, 1, 64], [5, 3, 185, 70, 0], None),
    "keys shorter than rows": ([40, 33, 181], [40, 33, 181], [17, 0, 181]),
    "several key blocks": ([70, 390], [600, 513], [599, 513]),
    "one row": ([1], [1], None),
}


@functools.cache
def attention_case(case, dtype, heads, d):
    lengths_q, lengths_k, used = ATTENTION[case]
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    used = None if used is None else torch.tensor(used, dtype=torch.int32)
    fused = randn(sum(lengths_q), 3 * heads, d, seed=d, dtype=dtype) * 1.5
    keys = randn(sum(lengths_k), 3 * heads, d, seed=d + 1, dtype=dtype) * 1.5
    q, k, v = fused[:, :heads], keys[:, heads : 2 * heads], keys[:, 2 * heads :]
    plain = plain_attention(q, k, v, cu_q, cu_k, used=used)
    return q, k, v, cu_q, cu_k, used, plain, plain_attention(q.double(), k.double(), v.double(), cu_q, cu_k, used=used)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ATTENTION)
def test_attention(case, dtype):
    for threads, (heads, d) in enumerate([(2, 64), (1, 128), (3, 7), (1, 80), (1, 256)], start=1):
        q, k, v, cu_q, cu_k, used, plain, exact = attention_case(case, dtype, heads, d)
        got = attention(q, k, v, cu_q, cu_k, used=used, threads=1 + threads % 3)
        for what, *values in zip(("out", "lse"), got, plain, exact, strict=True):
            assert_within_budget(*values, what=f"{case} {what} d={d}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_extreme_scores_and_nan(dtype):
    cu = offsets([70, 9, 20])
    q, k, v = (randn(99, 2, 64, seed=s, dtype=dtype) for s in range(3))
    for scale in (8.0, -8.0, 0.0):
        out, lse = attention(q, k, v, cu, cu, scale=scale)
        plain, plain_lse = plain_attention(q, k, v, cu, cu, scale=scale)
        exact, exact_lse = plain_attention(q.double(), k.double(), v.double(), cu, cu, scale=scale)
        assert_within_budget(out, plain, exact, what=f"scale {scale}")
        assert_within_budget(lse, plain_lse, exact_lse, what=f"lse, scale {scale}")
    clean, _ = attention(q, k, v, cu, cu)
    k[75, 1, 3] = math.nan  # one key of sample 1, head 1
    used = torch.tensor([70, 9, 20], dtype=torch.int32)
    out, _ = attention(q, k, v, cu, cu, used=used)
    assert out[70:79, 1].isnan().all() and torch.equal(out[70:79, 0], clean[70:79, 0])
    assert torch.equal(out[:70], clean[:70]) and torch.equal(out[79:], clean[79:])
    used[1] = 5  # the key is padding now
    assert attention(q, k, v, cu, cu, used=used)[0].isfinite().all()


def encoder(x, parameters, heads, cu, *, compute="f32", used=None, threads=2, eps=1e-6, hidden=True):
    layers, (rows, width), before = len(parameters) // 16, x.shape, x.clone()
    out, states = torch.full_like(x, math.nan), torch.full((layers, rows, width), math.nan)
    pairs = [(p if p.numel() else None, "f32" if not p.numel() else name(p)) for p in parameters]
    if compute == "int8":
        pairs = [weight_argument(p, compute) if p is not None and p.dim() == 2 else (p, d) for p, d in pairs]
    _C.encoder(
        address(x), address(out), address(states) if hidden else 0, rows, width, layers, [address(p) for p, _ in pairs],
        [d for _, d in pairs], parameters[12].shape[0] if parameters else 1, heads, [eps] * (2 * layers), address(cu),
        address(used), len(cu) - 1, 0, 0, compute, threads,
    )  # fmt: skip
    assert torch.equal(x.nan_to_num(), before.nan_to_num())
    return out, states


def plain_encoder(x, parameters, heads, cu, *, compute="f32", used=None, eps=1e-6):
    """The blocks: residual stream and norms in the dtype of x, products in `compute` (in float64 if x is)."""
    stream = x.dtype
    product = torch.bfloat16 if compute in ("bf16", "int8") and stream != torch.float64 else stream

    def linear(x, w, b):
        b = b if b.numel() else w.new_zeros(w.shape[0])
        if compute == "int8" and stream != torch.float64:
            return plain_linear(x, w, b, "int8").to(product)
        return F.linear(x.to(product), w.to(product), b.to(product))

    states = []
    for i in range(0, len(parameters), 16):
        ln1, ln1_b, wq, bq, wk, bk, wv, bv, wo, bo, ln2, ln2_b, w1, b1, w2, b2 = (
            p.to(stream) for p in parameters[i : i + 16]
        )
        h = F.layer_norm(x, x.shape[1:], ln1, ln1_b, eps)
        q, k, v = (linear(h, w, b).unflatten(1, (heads, -1)) for w, b in ((wq, bq), (wk, bk), (wv, bv)))
        x = x + linear(plain_attention(q, k, v, cu, cu, used=used)[0].flatten(1), wo, bo)
        h = F.layer_norm(x, x.shape[1:], ln2, ln2_b, eps)
        x = x + linear(F.gelu(linear(h, w1, b1)), w2, b2)
        states.append(x)
    return x, torch.stack(states)


ENCODER = {
    "ragged": (96, 3, 200, [17, 5, 0, 40, 31], [17, 3, 0, 40, 0]),
    "one long sample": (64, 1, 64, [600], None),
    "odd sizes, many samples": (30, 2, 71, [9, 8, 7] * 40, None),
    "odd width": (35, 5, 33, [12, 30], None),
}


@functools.cache
def encoder_case(case, compute):
    width, heads, inner, lengths, used = ENCODER[case]
    cu, x = offsets(lengths), randn(sum(lengths), width)
    used = None if used is None else torch.tensor(used, dtype=torch.int32)
    dtype = torch.bfloat16 if compute == "bf16" else torch.float32
    parameters = encoder_parameters(2, width, inner, bias=case != "odd width", dtype=dtype)
    _, exact = plain_encoder(x.double(), parameters, heads, cu, used=used)
    _, plain = plain_encoder(x, parameters, heads, cu, used=used, compute=compute)
    return x, parameters, heads, cu, used, plain, exact


@pytest.mark.parametrize("compute", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("case", ENCODER)
def test_encoder(case, compute):
    x, parameters, heads, cu, used, plain, exact = encoder_case(case, compute)
    for threads in (1, 2, 3):
        out, states = encoder(x, parameters, heads, cu, compute=compute, used=used, threads=threads)
        assert torch.equal(out, states[-1])
        assert_within_budget(states, plain, exact, what=f"{case} {compute} threads={threads}")
    assert torch.equal(out, encoder(x, parameters, heads, cu, compute=compute, used=used, hidden=False)[0])


def test_encoder_without_layers_or_rows():
    x = randn(5, 8)
    assert torch.equal(encoder(x, [], 2, offsets([2, 3]))[0], x)
    encoder(torch.empty(0, 8), encoder_parameters(1, 8, 16), 2, offsets([0, 0]))


@pytest.mark.parametrize("compute", ["f32", "bf16", "int8"])
@pytest.mark.parametrize(("width", "inner"), [(32, 64), (30, 71), (35, 33)])  # odd: half a unit at the end of a row
def test_encoder_keeps_nan_in_its_sample(compute, width, inner):
    lengths = [9, 20, 7]
    parameters, x, cu = encoder_parameters(2, width, inner), randn(36, width), offsets(lengths)
    heads = 2 - width % 2
    clean, _ = encoder(x, parameters, heads, cu, compute=compute)
    x[12, 5] = math.nan
    out, _ = encoder(x, parameters, heads, cu, compute=compute)
    assert out[9:29].isnan().all() and torch.equal(out[:9], clean[:9]) and torch.equal(out[29:], clean[29:])


@pytest.mark.parametrize("compute", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "every other pixel"])
def test_patch_embed(layout, dtype, compute):
    for threads, (patch, width, grids) in enumerate(
        [(4, 65, [(2, 3), (3, 2)]), (5, 100, [(16, 20)] * 2), (32, 16, [(1, 2)])], 1
    ):
        gh, gw, batch = max(h for h, _ in grids), max(w for _, w in grids), len(grids)
        index = packing_indices([3] * batch, grids, canvas=(gh, gw), chosen=290)
        pixels = randn(batch, 3, gh * patch + 1, gw * patch + 2, dtype=dtype)
        if layout == "channels last":
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        elif layout == "every other pixel":
            pixels = torch.stack([pixels, torch.full_like(pixels, math.nan)], -1).flatten(-2)[..., ::2]
        k = 3 * patch * patch
        weight, bias = (randn(width, k, seed=1) / k**0.5).to(dtype), randn(width, seed=2, dtype=dtype)
        position, cls, modality = (randn(*s, width, seed=3, dtype=dtype) for s in ((10,), (), (3,)))
        modality_rows = torch.arange(batch) % 3
        rows = int(index["cls_rows"].max()) + 400
        out = torch.full((rows, width), 7.0)
        keep, w_dtype = weight_argument(weight, compute)
        at = {key: value.data_ptr() for key, value in index.items() if torch.is_tensor(value)}
        _C.patch_embed(
            address(pixels), name(pixels), pixels.stride(), patch, 3, address(keep), w_dtype, address(bias), name(bias),
            width, at["patch_source"], gh, gw, at["patch_rows"], at["pos_index"], at["pos_weight"],
            address(position), name(position), address(cls), name(cls), at["cls_rows"],
            address(modality), name(modality), address(modality_rows), at["patch_sample"], address(out),
            len(index["patch_rows"]), batch, compute, threads, [],
        )  # fmt: skip
        cells = pixels[:, :, : gh * patch, : gw * patch].unflatten(2, (gh, patch)).unflatten(4, (gw, patch))
        cells = cells.permute(0, 2, 4, 1, 3, 5).reshape(-1, k)[index["patch_source"]]
        double = [t.double() for t in (position, cls, modality)]

        def embed(projected, position, cls, modality, index=index, rows=rows, modality_rows=modality_rows):
            place = (position[index["pos_index"]] * index["pos_weight"].to(position.dtype).unsqueeze(-1)).sum(1)
            result = projected.new_full((rows, projected.shape[1]), 7.0)
            result[index["patch_rows"]] = projected + place + modality[modality_rows[index["patch_sample"]]]
            result[index["cls_rows"]] = cls + position[0] + modality[modality_rows]
            return result

        exact = embed(F.linear(cells.double(), weight.double(), bias.double()), *double)
        plain = embed(
            plain_linear(cells, weight, bias, compute).float(), *(t.float() for t in (position, cls, modality))
        )
        assert_within_budget(out, plain, exact, what=f"patch {patch}")


def test_bad_arguments():
    x, w = randn(4, 8), randn(4, 8)
    with pytest.raises(ValueError, match="compute is"):
        linear(x, w, None, compute="fp8")
    with pytest.raises(ValueError, match="num_threads"):
        linear(x, w, None, threads=0)
    with pytest.raises(ValueError, match="q8 weights"):
        _C.linear(*[address(x), "f32", address(w), "f32", 0, "f32", address(x), "f32"], 4, 4, 8, 8, 8, False, "int8", 1)
    with pytest.raises(ValueError, match="x_dtype"):
        _C.linear(*[address(x), "f16", address(w), "f32", 0, "f32", address(x), "f32"], 4, 4, 8, 8, 8, False, "f32", 1)
    with pytest.raises(ValueError, match="pre is what goes into the GELU"):
        _C.linear(*[address(x), "f32", address(w), "f32", 0, "f32", address(x), "f32"], 4, 4, 8, 8, 8, False, "f32", 1,
                  pre=address(x))  # fmt: skip
    with pytest.raises(ValueError, match="mean and rstd, or neither"):
        _C.add_layer_norm(*[address(x), "f32"] * 2, 0, 0, "f32", *[address(x), "f32"] * 2, address(w), 0, 4, 8, 8, 8,
                          1e-6, 0.0, 0, 1)  # fmt: skip
    q, four, wrong = randn(4, 1, 300), offsets([4]), torch.tensor([0, -4], dtype=torch.int32)
    with pytest.raises(ValueError, match="d <= 256"):
        attention(q, q, q, four, four)
    q = q[..., :8]
    with pytest.raises(ValueError, match="cu_k"):
        attention(q, q, q, four, wrong)
    with pytest.raises(ValueError, match="seqused_k"):
        attention(q, q, q, four, four, used=torch.tensor([5], dtype=torch.int32))
    with pytest.raises(ValueError, match="end at N"):
        encoder(randn(4, 8), encoder_parameters(1, 8, 8), 2, offsets([3]))
    with pytest.raises(ValueError, match="16 params"):
        encoder(randn(4, 8), encoder_parameters(2, 8, 8)[:20], 2, offsets([4]))
    with pytest.raises(ValueError, match="divisible"):
        encoder(randn(4, 8), encoder_parameters(1, 8, 8), 3, offsets([4]))
