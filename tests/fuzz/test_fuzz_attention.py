"""Random attention and encoder on the native library, held to the error budget."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from support.fuzzing import DTYPES, LAYOUTS, MACHINES, SEEDS, assert_right, edges, generator, normal, on, sizes
from support.gradients import results

from vilt_fast import functional
from vilt_fast.testing import encoder_parameters, offsets, poisoned

HEAD_DIMS = st.sampled_from([1, 7, 8, 16, 63, 64, 65, 80, 127, 128, 129, 255, 256])
#: Sample lengths beside the ends of a tile, of a panel, of the blocks of queries and of keys.
LONG = st.one_of(sizes(120, 6, 64), sizes(1100, 256, 384, 512))
SHORT = st.one_of(st.just(0), sizes(70, 6, 64))
MOST = 40e6  # multiply-adds of the largest case


@st.composite
def samples(draw):
    """(query lengths, key lengths, how many keys count or None), the last sample an ordinary one."""
    many = draw(st.booleans())
    queries = draw(st.lists(SHORT, min_size=1, max_size=6)) if many else [draw(LONG)]
    keys = queries
    if draw(st.booleans()):
        keys = [draw(SHORT if many else LONG) for _ in queries]
    used = None
    if draw(st.booleans()):
        used = [draw(st.sampled_from(sorted({0, 1, n - 1, n} & set(range(n + 1))))) for n in keys] + [40]
    return [*queries, 40], [*keys, 40], used


def after(keys, used):
    """[rows] bool, True for what lies behind the keys that count."""
    rows = [torch.arange(n) >= (n if used is None else used[b]) for b, n in enumerate(keys)]
    return torch.cat(rows)


@given(
    samples(), st.integers(1, 3), HEAD_DIMS, DTYPES, st.sampled_from(["fused", "apart"]), LAYOUTS,
    st.sampled_from([None, 0.3, -2.0, 3.0]), MACHINES, SEEDS,
)  # fmt: skip
def test_attention(lengths, heads, width, dtype, together, layout, scale, machine, seed):
    (queries, keys, used), g = lengths, generator(seed)
    while heads > 1 and sum(a * b for a, b in zip(queries, keys, strict=True)) * heads * width * 2 > MOST:
        heads -= 1
    fused = normal(g, sum(queries), 3 * heads, width, dtype=dtype)
    other = normal(g, sum(keys), 3 * heads, width, dtype=dtype)
    q, k, v = fused[:, :heads], other[:, heads : 2 * heads], other[:, 2 * heads :]
    if together == "apart":
        q, k, v = (layout(t) for t in (q, k, v))
    unseen = after(keys, used)
    cu_q, cu_k = offsets(queries), offsets(keys)
    used = None if used is None else torch.tensor(used, dtype=torch.int32)

    def call(q, k, v, backend):
        return functional.attention(
            q, k, v, cu_q, cu_k, max(queries), max(keys), seqused_k=used, scale=scale, return_lse=True, backend=backend
        )

    with on(machine):
        got = call(q, k.masked_fill(unseen[:, None, None], torch.nan), poisoned(v, unseen), "cpp")
    plain, exact = call(q, k, v, "reference"), call(q.double(), k.double(), v.double(), "reference")
    for what, *three in zip(("out", "lse"), got, plain, exact, strict=True):
        assert_right(*three, what=what)


@given(
    samples(), st.integers(1, 3), HEAD_DIMS, DTYPES, LAYOUTS, st.sampled_from([None, 0.3, -2.0]), MACHINES, SEEDS
)  # fmt: skip
def test_gradients_of_attention(lengths, heads, width, dtype, layout, scale, machine, seed):
    (queries, keys, used), g = lengths, generator(seed)
    while heads > 1 and sum(a * b for a, b in zip(queries, keys, strict=True)) * heads * width * 5 > MOST:
        heads -= 1
    q, k, v = (normal(g, sum(n), heads, width, dtype=dtype) for n in (queries, keys, keys))
    unseen = after(keys, used)
    bounds = (offsets(queries), offsets(keys), max(queries), max(keys))
    used = None if used is None else torch.tensor(used, dtype=torch.int32)

    def call(*t, backend):
        return functional.attention(*t, *bounds, seqused_k=used, scale=scale, backend=backend)

    with on(machine):
        hostile = (q, k.masked_fill(unseen[:, None, None], torch.nan), poisoned(v, unseen))
        got = results(call, hostile, "cpp", layout=layout)
    plain, exact = (results(call, (q, k, v), "reference", to) for to in (None, torch.float64))
    for what, *three in zip(("out", "dq", "dk", "dv"), got, plain, exact, strict=True):
        assert_right(*three, what=what)


#: (hidden size, heads, inner size): odd ones, and at times those of ViLT-B/32.
WIDTHS = st.one_of(
    st.sampled_from([(30, 2, 71), (35, 5, 33), (32, 2, 64), (64, 1, 256), (96, 3, 200), (65, 1, 130), (256, 1, 257)]),
    st.tuples(sizes(40, 4, 16).filter(lambda n: n >= 8), st.just(1), sizes(140, 4, 64)),
)


@st.composite
def stacks(draw):
    """(lengths, used or None, layers, widths)."""
    kind = draw(st.sampled_from(["a chunk", "many samples", "one sample", "real"]))
    if kind == "real":
        lengths = draw(st.sampled_from([[185], [181, 40, 1], [64, 65]]))
        return lengths, None, 1, (768, 12, draw(st.sampled_from([768, 3072])))
    if kind == "a chunk":  # beside one and two times the rows that are computed together
        total, parts = draw(edges(1800, 896)), draw(st.integers(3, 12))
        lengths = [total // parts] * (parts - 1)
        lengths.append(total - sum(lengths))
    elif kind == "many samples":
        lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=40))
    else:
        lengths = [draw(sizes(600, 6, 64, 384, 512))]
    used = None
    if draw(st.booleans()):
        used = [draw(st.sampled_from(sorted({0, 1, n - 1, n} & set(range(n + 1))))) for n in lengths]
    width = draw(WIDTHS if kind != "a chunk" else st.sampled_from([(30, 2, 71), (32, 2, 64), (20, 1, 33)]))
    return lengths, used, draw(st.integers(1, 3)), width


def check_encoder(compute, stack, biased, dtype, machine, seed):
    (lengths, used, layers, (width, heads, inner)), g = stack, generator(seed)
    lengths, used = [*lengths, 60], None if used is None else [*used, 60]
    unseen = after(lengths, used)
    parameters = encoder_parameters(layers, width, inner, bias=biased, seed=seed, dtype=dtype)
    x = poisoned(normal(g, sum(lengths), width), unseen)
    blobs = parameters
    keys = torch.tensor(lengths if used is None else used, dtype=torch.int32)
    rest = dict(num_heads=heads, eps=[1e-6] * (2 * layers))

    def call(x, parameters, compute, backend):
        return functional.encoder(
            x, parameters, offsets(lengths), keys, max(lengths), compute=compute, backend=backend, **rest
        )

    with on(machine):
        if compute == "int8":
            blobs = [functional.quantize_linear(p) if p.dim() == 2 else p for p in parameters]
        got = call(x, blobs, compute, "cpp")
    real = ~unseen  # the others are NaN, and nobody's keys
    plain = call(x, parameters, compute, "reference")
    exact = call(x.double(), parameters, "float32", "reference")
    assert got[unseen].isnan().all()
    assert_right(got[real], plain[real], exact[real], what=compute)


@given(stacks(), st.booleans(), DTYPES, MACHINES, SEEDS)
def test_encoder_float32(stack, biased, dtype, machine, seed):
    check_encoder("float32", stack, biased, dtype, machine, seed)


@given(stacks(), st.booleans(), DTYPES, MACHINES, SEEDS)
def test_encoder_bfloat16(stack, biased, dtype, machine, seed):
    check_encoder("bfloat16", stack, biased, dtype, machine, seed)


@given(stacks(), st.booleans(), DTYPES, MACHINES, SEEDS)
def test_encoder_int8(stack, biased, dtype, machine, seed):
    check_encoder("int8", stack, biased, dtype, machine, seed)
