"""linear_gelu_fp8, and linear_fp8 of rows that are e4m3 already: against float64, the Triton kernels, limits."""

import functools

import pytest
import torch
from support.triton_case import round_as_torch

from vilt_fast import functional
from vilt_fast.kernels import linear
from vilt_fast.reference import linear_fp8 as reference
from vilt_fast.testing import assert_within_budget

LEAST = 2.0**-126


@pytest.fixture(autouse=True)
def rounding(monkeypatch):
    round_as_torch(monkeypatch)


def _inputs(rows, inputs, outputs, bias=True):
    """(x, its e4m3 and scales, weight, weight_scale, bias)."""
    x = torch.randn(rows, inputs) * torch.logspace(-2, 1, rows)[:, None]
    weight = functional.quantize_fp8(torch.randn(outputs, inputs) * 0.3, backend="reference")
    return x, *functional.quantize_fp8(x, backend="reference"), *weight, torch.randn(outputs) if bias else None


def _numbers(q, scale):
    """What e4m3 and scales stand for, in float64; scales of rows or of groups of columns."""
    wide = scale.double()
    wide = wide.repeat_interleave(128, -1)[..., : q.shape[-1]] if wide.dim() == q.dim() else wide[..., None]
    return q.double() * wide


def _exact(q, scale, weight, weight_scale, bias):
    y = torch.nn.functional.linear(_numbers(q, scale), _numbers(weight, weight_scale))
    return torch.nn.functional.gelu(y if bias is None else y + bias.double())


def _assert_nearest(q, scale, step, weight, weight_scale, bias, x):
    """Every number is rounded to the nearest e4m3 of its group: half a step of three bits, or of subnormal numbers.

    Beyond that eight roundings of float32 of what is summed (erf of a negative number cancels), and those of GELU.
    """
    exact = _exact(x, step, weight, weight_scale, bias)
    summed = _numbers(x, step).abs() @ _numbers(weight, weight_scale).abs().t() + (0 if bias is None else bias.abs())
    slack = 8 * 2.0**-24 * summed + 1.1e-4 * exact.abs()
    unit = scale.repeat_interleave(128, -1)[..., : q.shape[-1]].double()
    allowed = torch.maximum(exact.abs() / 16, unit * 2**-10) + slack
    assert ((_numbers(q, scale) - exact).abs() <= allowed).all()
    for bound, most in ((exact.abs() - slack, torch.ge), (exact.abs() + slack, torch.le)):
        groups = torch.nn.functional.pad(bound, (0, -bound.shape[-1] % 128)).unflatten(-1, (-1, 128))
        assert most(scale.double() * (1 + 2**-22 if most is torch.ge else 1 - 2**-22), groups.amax(-1) / 448).all()


SHAPES = [(185, 64, 96), (1, 7, 5), (0, 16, 8), (13, 1, 1), (200, 48, 264), (40, 136, 384)]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("rows, inputs, outputs", SHAPES)
def test_each_group_of_columns_is_rounded_to_the_nearest(rows, inputs, outputs, backend):
    x, q, step, weight, weight_scale, bias = _inputs(rows, inputs, outputs, outputs != 96)
    given = weight, weight_scale, bias
    got, scale = functional.linear_gelu_fp8(x, *given, backend=backend)
    assert got.shape == (rows, outputs) and scale.shape == (rows, -(-outputs // 128))
    _assert_nearest(got, scale, step, *given, q)
    again = functional.linear_gelu_fp8(q, *given, x_scale=step, backend=backend)
    assert torch.equal(again[0].float(), got.float()) and torch.equal(again[1], scale)


@pytest.mark.parametrize("kind", ["tma fp8", "pointer fp8"])
@pytest.mark.parametrize("most_rows", [185, 13880])
def test_every_shipped_configuration(kind, most_rows):
    _, q, step, weight, weight_scale, bias = _inputs(133, 144, 272)
    config = linear._config(kind, most_rows, 3072, gelu=True, groups="out")
    scale = torch.full((3, 133), float("nan"))
    got, _ = linear.launch(
        q, weight, bias, None, gelu=True, save=False, out_dtype=torch.float8_e4m3fn, kind=kind, config=config,
        scales=(step, weight_scale, None, scale),
    )  # fmt: skip
    _assert_nearest(got, scale.t(), step, weight, weight_scale, bias, q)


@pytest.mark.parametrize("kind", ["tma fp8", "pointer fp8"])
@pytest.mark.parametrize("most_rows, most_columns", [(185, 768), (185, 3072), (1720, 768), (13880, 768)])
def test_products_of_groups(kind, most_rows, most_columns):
    """In every shipped configuration, of rows whose groups are of very different sizes."""
    torch.manual_seed(0)
    _, _, _, weight, weight_scale, bias = _inputs(1, 320, 144)
    q, _ = functional.quantize_fp8(torch.randn(70, 320), backend="reference")
    scale = torch.rand(70, 3) * torch.tensor([1e-4, 1.0, 1e2])
    config = linear._config(kind, most_rows, most_columns, groups="x")
    got, _ = linear.launch(
        q, weight, bias, None, gelu=False, save=False, out_dtype=torch.float32, kind=kind, config=config,
        scales=(None, weight_scale, scale.t().contiguous(), None),
    )  # fmt: skip
    plain = reference.linear_fp8(q, weight, weight_scale, bias, False, scale, torch.float32)
    exact = torch.nn.functional.linear(_numbers(q, scale), _numbers(weight, weight_scale), bias.double())
    assert_within_budget(got, plain, exact)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("gelu", [False, True])
def test_rows_that_are_quantised_already_give_the_same(gelu, backend):
    x, q, step, weight, weight_scale, bias = _inputs(30, 40, 24)
    call = functools.partial(
        functional.linear_fp8, weight=weight, weight_scale=weight_scale, bias=bias, gelu=gelu, backend=backend
    )
    assert torch.equal(call(q, x_scale=step, dtype=torch.float32), call(x))
    half = functools.partial(call, dtype=torch.float16)
    assert torch.equal(half(q.view(5, 6, 40), x_scale=step.view(5, 6)), half(q, x_scale=step).view(5, 6, 24))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("rows", [1, 185])
def test_two_layers_are_as_accurate_as_with_a_scale_a_row(rows, backend):
    """The error of handing on e4m3 by groups, against float64, beside that of rounding to 32 bits in between."""
    torch.manual_seed(1)
    x, q, step, weight, weight_scale, bias = _inputs(rows, 64, 300)
    second = functional.quantize_fp8(torch.randn(32, 300) * 0.3, backend="reference")
    first = weight, weight_scale, bias
    inner, scale = functional.linear_gelu_fp8(x, *first, backend=backend)
    got = functional.linear_fp8(inner, *second, None, x_scale=scale, dtype=torch.float32, backend=backend)
    plain = reference.linear_fp8(reference.linear_fp8(x, *first, True), *second, None)
    exact = torch.nn.functional.linear(_exact(q, step, *first), _numbers(*second))
    assert_within_budget(got, plain, exact)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(value, backend):
    x, _, _, weight, weight_scale, bias = _inputs(70, 40, 140)
    second = functional.quantize_fp8(torch.randn(16, 140), backend="reference")

    def both(x):
        inner, scale = functional.linear_gelu_fp8(x, weight, weight_scale, bias, backend=backend)
        return functional.linear_fp8(inner, *second, None, x_scale=scale, dtype=torch.float32, backend=backend)

    clean = both(x)
    x[3, 5] = value
    spoiled, keep = both(x), torch.arange(70) != 3
    assert spoiled[3].isnan().all() and torch.equal(spoiled[keep], clean[keep])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_an_infinity_among_the_scales_reaches_its_row_alone(backend):
    """As of a sum that is beyond float32."""
    _, q, step, weight, weight_scale, _ = _inputs(6, 40, 140)
    step[2] = 1e38
    inner, scale = functional.linear_gelu_fp8(q, weight, weight_scale * 1e3, None, x_scale=step, backend=backend)
    second = functional.quantize_fp8(torch.randn(16, 140), backend="reference")
    got = functional.linear_fp8(inner, *second, None, x_scale=scale, dtype=torch.float32, backend=backend)
    assert not got[2].isfinite().any() and got[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_rows_of_zeros_and_of_next_to_nothing(backend):
    x, _, _, weight, weight_scale, _ = _inputs(4, 40, 130)
    x[1], x[2] = 0.0, x[2] * 1e-38
    got, scale = functional.linear_gelu_fp8(x, weight, weight_scale, None, backend=backend)
    assert not got[1].float().any() and torch.equal(scale[1], torch.full((2,), LEAST))
    assert _numbers(got, scale).isfinite().all() and got[0].float().any()


def test_registered_op_and_compile():
    _, q, step, weight, weight_scale, bias = _inputs(6, 40, 9)
    ops = torch.ops.vilt_fast
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")  # test_schema knows no e4m3
    first = (q, weight, weight_scale, bias, step, "triton")
    torch.library.opcheck(ops.linear_gelu_fp8.default, first, test_utils=checks)
    second = functional.quantize_fp8(torch.randn(16, 9), backend="reference")

    def both(q, step):
        inner, scale = functional.linear_gelu_fp8(q, weight, weight_scale, bias, x_scale=step, backend="triton")
        return functional.linear_fp8(inner, *second, None, x_scale=scale, dtype=torch.float32, backend="triton")

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, step), both(q, step))


def test_bad_inputs():
    x, q, step, weight, weight_scale, bias = _inputs(6, 40, 9)
    given = weight, weight_scale, bias
    with pytest.raises(RuntimeError, match="linear_gelu_fp8: has no gradient"):
        functional.linear_gelu_fp8(x.requires_grad_(), *given)
    with pytest.raises(TypeError, match="x is torch.float32, expected torch.float8_e4m3fn"):
        functional.linear_gelu_fp8(x.detach(), *given, x_scale=step)
    with pytest.raises(TypeError, match="x is torch.float8_e4m3fn"):
        functional.linear_gelu_fp8(q, *given)
    with pytest.raises(ValueError, match=r"x_scale has shape \[6, 2\], expected \[6\], or \[6, 1\] for groups of 128"):
        functional.linear_fp8(q, *given, x_scale=torch.ones(6, 2), dtype=torch.float32)
    with pytest.raises(TypeError, match="dtype is None, expected a floating dtype where x comes with x_scale"):
        functional.linear_fp8(q, *given, x_scale=step)
    with pytest.raises(TypeError, match="dtype is torch.float32, .* else None"):
        functional.linear_fp8(x.detach(), *given, dtype=torch.float32)
