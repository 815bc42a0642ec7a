"""linear_fp8 and quantize_fp8: the rounding, the product against float64, the Triton kernels, limits."""

import functools

import pytest
import torch
from support.triton_case import names_every_argument

from vilt_fast import functional
from vilt_fast.kernels import linear, linear_fp8
from vilt_fast.reference import linear_fp8 as reference
from vilt_fast.testing import assert_within_budget, strided

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
VALUES = E4M3[E4M3.isfinite()]  # every finite e4m3
SHAPES = [((185, 64), 96), ((1, 7), 5), ((0, 16), 8), ((2, 3, 33), 17), ((13, 1), 1), ((300, 136), 264)]


def on_the_grid(*shape):
    """Rows that e4m3 holds exactly, with a power of two as scale: Triton's interpreter rounds e4m3 wrongly."""
    x = VALUES[torch.randint(len(VALUES), shape)]
    x[..., :1] = 448.0
    return x * 2.0 ** torch.randint(-6, 3, (*shape[:-1], 1))


def test_rounding_is_to_the_nearest():
    """Against every e4m3 number there is, and half a step of three mantissa bits."""
    x = torch.randn(50, 40) * torch.logspace(-3, 3, 50)[:, None]
    q, scale = functional.quantize_fp8(x, backend="reference")
    assert q.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    torch.testing.assert_close(scale, x.abs().amax(1) / 448)
    unit = (x / scale[:, None]).double()
    nearest = (unit[..., None] - VALUES.double()).abs().amin(-1)
    assert torch.equal((unit - q.double()).abs(), nearest)
    assert (
        (q.float() * scale[:, None] - x).abs() <= torch.maximum(x.abs() / 16, scale[:, None] * 2**-10) * 1.0001
    ).all()


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_quantisation_of_what_e4m3_holds_is_exact(backend, dtype):
    for shape in ((5, 253), (3, 2, 1500), (1, 1), (0, 8)):
        x = on_the_grid(*shape).clamp(-60000, 60000).to(dtype)
        q, scale = functional.quantize_fp8(x, backend=backend)
        assert q.shape == x.shape and scale.shape == x.shape[:-1]
        assert torch.equal(q.float() * scale[..., None], x.float())
    q, scale = functional.quantize_fp8(torch.zeros(2, 9), backend=backend)
    assert not q.float().any() and torch.equal(scale, torch.ones(2))


@pytest.mark.gpu
def test_triton_rounds_as_torch_does():
    x = (torch.randn(500, 768) * torch.logspace(-3, 3, 500)[:, None]).cuda()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        got, want = (functional.quantize_fp8(x.to(dtype), backend=name) for name in ("triton", "reference"))
        torch.testing.assert_close(got[1], want[1], rtol=2**-22, atol=0)
        # A quotient that is off by one rounding may fall on the other side of a tie.
        assert (got[0].float() != want[0].float()).float().mean() < 1e-4


def _inputs(shape, rows, dtype):
    x = on_the_grid(*shape).clamp(-60000, 60000).to(dtype)
    weight, scale = functional.quantize_fp8(torch.randn(rows, shape[-1]) * 0.3, backend="reference")
    return x, weight, scale, torch.randn(rows).to(dtype)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("shape, rows", SHAPES)
def test_within_budget(shape, rows, gelu, dtype, backend):
    x, weight, scale, bias = _inputs(shape, rows, dtype)
    if rows == 96:
        bias = None
    if dtype == torch.float16:  # sums of 448s are beyond float16
        x, bias = x / 64, None if bias is None else bias / 64
    got = functional.linear_fp8(x, weight, scale, bias, gelu=gelu, backend=backend)
    plain = reference.linear_fp8(x, weight, scale, bias, gelu)
    q, step = reference.quantize_fp8(x)
    exact = (q.double() * step.double()[..., None]) @ (weight.double() * scale.double()[:, None]).t()
    exact = exact if bias is None else exact + bias.double()
    exact = torch.nn.functional.gelu(exact) if gelu else exact
    assert got.dtype == dtype
    assert_within_budget(got, plain, exact)


@pytest.mark.parametrize("kind", ["tma fp8", "pointer fp8"])
@pytest.mark.parametrize("place", range(4))
def test_every_shipped_configuration(kind, place):
    table = linear._CONFIGS[kind]
    most_rows, most_columns, *_ = table[min(place, len(table) - 1)]
    config = linear._config(kind, most_rows, most_columns)
    M, N, K = config["BLOCK_M"] + 5, 2 * config["BLOCK_N"] + 16, config["BLOCK_K"] + 16
    x, weight, scale, bias = _inputs((M, K), N, torch.float32)
    q, step = reference.quantize_fp8(x)
    got, _ = linear.launch(
        q, weight, bias, None, gelu=True, save=False, out_dtype=torch.float32, kind=kind, config=config,
        scales=(step, scale, None, None),
    )  # fmt: skip
    exact = torch.nn.functional.gelu(
        (q.double() * step.double()[:, None]) @ (weight.double() * scale.double()[:, None]).t() + bias.double()
    )
    assert_within_budget(got, reference.linear_fp8(x, weight, scale, bias, True), exact)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(backend, value):
    x, weight, scale, bias = _inputs((6, 40), 9, torch.float32)
    clean = functional.linear_fp8(x, weight, scale, bias, backend=backend)
    x[2, 5] = value
    spoiled = functional.linear_fp8(x, weight, scale, bias, backend=backend)
    assert spoiled[2].isnan().all()
    keep = torch.arange(6) != 2
    assert torch.equal(spoiled[keep], clean[keep])


def test_layouts():
    x, weight, scale, bias = _inputs((12, 40), 24, torch.float32)
    call = functools.partial(functional.linear_fp8, weight=weight, weight_scale=scale, bias=bias, backend="triton")
    assert torch.equal(call(strided(x)), call(x))
    assert torch.equal(call(x.t().contiguous().t()), call(x))


def test_registered_ops_and_compile():
    x, weight, scale, bias = _inputs((6, 40), 9, torch.float32)
    ops = torch.ops.vilt_fast
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")  # test_schema knows no e4m3
    torch.library.opcheck(
        ops.linear_fp8.default, (x, weight, scale, bias, True, None, None, "triton"), test_utils=checks
    )
    torch.library.opcheck(ops.quantize_fp8.default, (x, "triton"), test_utils=checks)
    compiled = torch.compile(
        lambda x: functional.linear_fp8(x, weight, scale, bias, backend="triton") * 2, fullgraph=True,
        backend="aot_eager",
    )  # fmt: skip
    assert torch.equal(compiled(x), functional.linear_fp8(x, weight, scale, bias, backend="triton") * 2)


def test_under_autocast():
    x, weight, scale, bias = _inputs((6, 40), 9, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.linear_fp8(x, weight, scale, bias, backend="reference").dtype == torch.bfloat16


def test_bad_inputs():
    x, weight, scale, bias = _inputs((6, 40), 9, torch.float32)
    with pytest.raises(TypeError, match="weight is torch.float32"):
        functional.linear_fp8(x, weight.float(), scale, bias)
    with pytest.raises(ValueError, match="weight_scale"):
        functional.linear_fp8(x, weight, scale[:5], bias)
    with pytest.raises(RuntimeError, match="no gradient"):
        functional.linear_fp8(x.requires_grad_(), weight, scale, bias)


def test_ahead_of_time():
    assert all(map(names_every_argument, linear_fp8.aot_cases()))
