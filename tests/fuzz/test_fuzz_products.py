"""Random products, their gradients, and what stands beside them, on the native library, held to the error budget."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from support.fuzzing import (
    DTYPES,
    LAYOUTS,
    LEVELS,
    MACHINES,
    SEEDS,
    assert_right,
    denormal,
    edges,
    generator,
    normal,
    on,
    sizes,
)
from support.gradients import results

from vilt_fast import _C, functional
from vilt_fast.testing import packing_indices

ROWS = (6, 512, 516)  # of a tile, of an item
DEPTH = (4, 256, 512, 1024)  # values in a panel: float32, bfloat16, int8
#: (M, N, K), one of them large.
PRODUCTS = st.one_of(
    st.tuples(edges(3100, *ROWS), sizes(130, 16, 64), sizes(40, 2)),
    st.tuples(sizes(30, 6), sizes(130, 16, 64), edges(5000, *DEPTH)),
    st.tuples(sizes(30, 6), edges(3100, 64), sizes(70, 2, 16)),
    st.tuples(sizes(200, 6), sizes(130, 16, 64), sizes(300, *DEPTH[:2])),
)


@given(PRODUCTS, DTYPES, LAYOUTS, LAYOUTS, st.booleans(), st.booleans(), MACHINES, SEEDS)
def test_linear_gelu(shape, dtype, rows_as, weight_as, biased, tiny, machine, seed):
    (m, n, k), g = shape, generator(seed)
    # The budget of a few elements is luck: they are held to that of all the rows.
    x = denormal(normal(g, max(m, 64), k, dtype=dtype), tiny)
    weight = denormal(normal(g, n, k, dtype=dtype, scale=k**-0.5), tiny)
    bias = normal(g, n, dtype=dtype) if biased else None
    with on(machine):
        got = functional.linear_gelu(rows_as(x[:m]), weight_as(weight), bias, backend="cpp")
    plain, exact = (
        functional.linear_gelu(*(t if t is None else t.to(to) for t in (x, weight, bias)), backend="reference")
        for to in (dtype, torch.float64)
    )
    assert_right(torch.cat([got, plain[m:]]), plain, exact)


#: (M, N, K) of a gradient: beside the blocks that are summed at once, and those of columns and rows of the sums.
GRADIENTS = st.one_of(
    st.tuples(edges(1200, 6, *DEPTH[1:3]), sizes(70, 6, 16), sizes(70, 8, 64)),
    st.tuples(sizes(40, 2, 6), edges(800, 48, 192), sizes(70, 16, 64)),
    st.tuples(sizes(40, 2, 6), sizes(70, 6, 16), edges(1200, 64, 384)),
)
WEIGHTS = st.sampled_from(["same", "float32"])


@given(
    GRADIENTS, st.sampled_from(["linear", "linear_gelu"]), DTYPES, WEIGHTS, LAYOUTS, st.booleans(),
    st.sampled_from(["all", "x", "weight", "bias"]), MACHINES, SEEDS,
)  # fmt: skip
def test_gradients_of_linear(shape, op, dtype, weights, layout, biased, wanted, machine, seed):
    (m, n, k), g = shape, generator(seed)
    weights = dtype if weights == "same" else torch.float32
    inputs = {
        "x": normal(g, m, k, dtype=dtype),
        "weight": normal(g, n, k, dtype=weights, scale=k**-0.5),
        "bias": normal(g, n, dtype=weights) if biased else None,
    }
    names = [name for name, t in inputs.items() if t is not None and wanted in ("all", name)] or ["x"]

    def call(*chosen, backend):
        given = [t if t is None else t.to(chosen[0].dtype if chosen[0].dtype == torch.float64 else t.dtype)
                 for t in (inputs | dict(zip(names, chosen, strict=True))).values()]  # fmt: skip
        return getattr(functional, op)(*given, backend=backend)

    with on(machine):
        got = results(call, [inputs[name] for name in names], "cpp", layout=layout)
    plain, exact = (results(call, [inputs[name] for name in names], "reference", to) for to in (None, torch.float64))
    for what, *three in zip(["out", *names], got, plain, exact, strict=True):
        assert_right(*three, what=what)


@given(
    sizes(300, 4, 64), sizes(1100, 16, 64), DTYPES, DTYPES, LAYOUTS, st.booleans(), st.sampled_from([0.0, 0.1, 0.7]),
    MACHINES, SEEDS,
)  # fmt: skip
def test_add_layer_norm(rows, width, dtype, residual_dtype, layout, affine, p, machine, seed):
    g = generator(seed)
    inputs = [normal(g, rows, width, dtype=dtype), normal(g, rows, width, dtype=residual_dtype)]
    inputs += [normal(g, width) for _ in range(2)] if affine else []
    wide = torch.promote_types(dtype, residual_dtype)

    def call(x, residual, weight=None, bias=None, *, backend):
        return functional.add_layer_norm(x, residual, weight, bias, 1e-3, dropout_p=p, backend=backend)

    with on(machine):
        torch.manual_seed(seed)
        got = results(call, inputs, "cpp", layout=layout)
        torch.manual_seed(seed)
        kept = call(torch.ones(rows, width), torch.zeros(rows, width), backend="cpp")[0] != 0

    def masked(x, residual, weight=None, bias=None, *, backend):
        s, y = functional.add_layer_norm(x * (kept / (1 - p)), residual, weight, bias, 1e-3, backend=backend)
        return s.to(s.dtype if x.dtype == torch.float64 else wide), y.to(x.dtype)

    plain, exact = (results(masked, inputs, "reference", to) for to in (None, torch.float64))
    for what, *three in zip(("s", "y", "dx", "dresidual", "dweight", "dbias"), got, plain, exact, strict=False):
        assert_right(*three, what=what)


@given(sizes(200, 64), sizes(1100, 4, 16), DTYPES, LAYOUTS, MACHINES, SEEDS)
def test_quantize_linear(n, k, dtype, weight_as, machine, seed):
    weight = normal(generator(seed), n, k, dtype=dtype)
    weight[0] = 0
    weight[n // 2, : k // 2] *= 1e30
    with on(machine):
        blob = functional.quantize_linear(weight_as(weight))
    columns, units = -(-n // 64) * 64, -(-k // 4)
    panels, scale = blob[: columns * units * 4].view(torch.int8), blob[columns * units * 4 :][: columns * 8]
    q = panels.reshape(-1, units, 64, 4).permute(0, 2, 1, 3).reshape(columns, -1).double()
    scale, scaled_sum = scale.view(torch.float32).double().view(2, columns, 1)
    error = (q[:n, :k] * scale[:n] - weight).abs()
    assert (error <= scale[:n] * (0.5 + 2.0**-14)).all() and q[n:].eq(0).all() and q[:, k:].eq(0).all()
    assert q.abs().max() <= 127
    torch.testing.assert_close(scaled_sum, q.sum(1, keepdim=True) * scale, rtol=1e-6, atol=0)
    with on((_C.cpu_features()["isas"][0], 1)):
        assert torch.equal(functional.quantize_linear(weight), blob)


@st.composite
def pictures(draw):
    """(patch, channels, width, canvas, grids, texts, chosen)."""
    patch = draw(st.sampled_from([1, 2, 3, 4, 5, 8, 16, 17]))
    channels = draw(st.sampled_from([1, 3]))
    if draw(st.booleans()):  # few samples with many patches
        side = 22 if patch < 8 else 8
        grids = draw(st.lists(st.tuples(sizes(side, side), sizes(side, side)), min_size=1, max_size=3))
    else:
        grids = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=9))
    grids = [*grids, (4, 4)]  # the budget of a few patches is luck
    canvas = tuple(max(sides) + draw(st.integers(0, 1)) for sides in zip(*grids, strict=True))
    texts = draw(st.lists(st.integers(0, 4), min_size=len(grids), max_size=len(grids)))
    chosen = draw(st.sampled_from([None, None, 0, 1, 160, 240, 479, 480, 481]))
    return patch, channels, draw(sizes(130, 16, 64)), canvas, grids, texts, chosen


@given(
    pictures(), DTYPES, DTYPES, DTYPES, st.booleans(), st.sampled_from(["rows", "pixels last", "apart"]), MACHINES,
    SEEDS,
)  # fmt: skip
def test_patch_embed(picture, dtype, pixel_dtype, out_dtype, optional, layout, machine, seed):
    (patch, channels, width, canvas, grids, texts, chosen), g = picture, generator(seed)
    table = (2, 3)
    index = packing_indices(texts, grids, canvas=canvas, table=table, chosen=chosen, query_rows=1, seed=seed)
    # What no patch covers is never read.
    pixels = torch.full(
        (len(grids), channels, canvas[0] * patch + patch // 2, canvas[1] * patch + patch // 2), torch.nan
    )
    for image, (h, w) in zip(pixels, grids, strict=True):
        image[:, : h * patch, : w * patch] = normal(g, channels, h * patch, w * patch)
    pixels = pixels.to(pixel_dtype)
    k = channels * patch**2
    tensors = dict(
        weight=normal(g, width, channels, patch, patch, dtype=dtype, scale=k**-0.5),
        bias=normal(g, width, dtype=dtype) if optional else None,
        cls_token=normal(g, width, dtype=dtype),
        position=normal(g, 1 + table[0] * table[1], width, dtype=dtype),
        modality=normal(g, 2, width, dtype=dtype) if optional else None,
        text=normal(g, sum(texts), width, dtype=dtype) if optional else None,
    )  # fmt: skip
    if not optional:
        index["modality_index"] = index["text_rows"] = None
    apart = {"rows": torch.Tensor.contiguous, "apart": _every_other}
    view = apart.get(layout, lambda t: t.contiguous(memory_format=torch.channels_last))(pixels)
    with on(machine):
        got = functional.patch_embed(view, **tensors, **index, out_dtype=out_dtype, backend="cpp")
    wide = {name: t if t is None else t.double() for name, t in tensors.items()}
    plain = functional.patch_embed(pixels, **tensors, **index, out_dtype=out_dtype, backend="reference")
    exact = functional.patch_embed(pixels.double(), **wide, **index, out_dtype=torch.float64, backend="reference")
    assert_right(got, plain, exact)


def _every_other(pixels):
    """The same values at every other place of each line, NaN between them."""
    return torch.stack([pixels, torch.full_like(pixels, torch.nan)], -1).flatten(-2)[..., ::2]


@given(LEVELS, sizes(100, 4, 16), SEEDS)
def test_a_blob_of_tiny_weights_is_no_larger_than_they_are(level, k, seed):
    weight = normal(generator(seed), 3, k) * torch.tensor([[1e-36], [1e-38], [1e-42]])
    with on((level, 1)):
        blob = functional.quantize_linear(weight)
    units = -(-k // 4)
    scale = blob[units * 256 :][: 64 * 4].view(torch.float32)[:3]
    assert (scale * 127 <= weight.abs().amax(1) * 1.01 + 1e-43).all()
