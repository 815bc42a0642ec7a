"""add_layer_norm_fp8: the very bits of the norm and of the pass that quantises, limits."""

import pytest
import torch
from support.triton_case import names_every_argument, round_as_torch

from vilt_fast import functional
from vilt_fast.kernels import _device
from vilt_fast.kernels import add_layer_norm as kernels
from vilt_fast.testing import sliced, strided

DTYPES = [(torch.float32, torch.float32), (torch.float16, torch.float32), (torch.float16, torch.float16)]


@pytest.fixture(autouse=True)
def rounding(monkeypatch):
    round_as_torch(monkeypatch)


def _inputs(shape, dtype=torch.float32, stream=torch.float32, affine=(True, True)):
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(stream)
    weight, bias = (torch.randn(shape[-1]).to(dtype) for _ in range(2))
    return [x, residual, weight if affine[0] else None, bias if affine[1] else None]


def _bits(results):
    return [t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in results]


def _equal(got, want):
    pairs = zip(_bits(got), _bits(want), strict=True)
    return all(torch.equal(torch.nan_to_num(a.float(), 7e30), torch.nan_to_num(b.float(), 7e30)) for a, b in pairs)


def _in_two(*inputs, backend):
    s, y = functional.add_layer_norm(*inputs, 1e-6, backend=backend)
    return s, *functional.quantize_fp8(y, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("affine", [(True, True), (False, False), (True, False)])
@pytest.mark.parametrize("dtype, stream", DTYPES)
@pytest.mark.parametrize("shape", [(7, 33), (2, 3, 8), (0, 5), (1, 1), (5, 768)])
def test_the_bits_of_the_norm_and_a_pass(shape, dtype, stream, affine, backend):
    inputs = _inputs(shape, dtype, stream, affine)
    got = functional.add_layer_norm_fp8(*inputs, 1e-6, backend=backend)
    assert [t.dtype for t in got] == [torch.promote_types(dtype, stream), torch.float8_e4m3fn, torch.float32]
    assert _equal(got, _in_two(*inputs, backend=backend))


@pytest.mark.parametrize("rows", [1, 185])
def test_tiles_of_many_rows(rows, monkeypatch):
    inputs = _inputs((rows, 24), torch.float16)
    want = _in_two(*inputs, backend="triton")
    monkeypatch.setattr(kernels, "_config", lambda N, D: dict(ROWS=8, BLOCK_D=32, num_warps=4))
    assert _equal(functional.add_layer_norm_fp8(*inputs, 1e-6, backend="triton"), want)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(value, backend):
    inputs = _inputs((6, 40))
    clean = functional.add_layer_norm_fp8(*inputs, 1e-6, backend=backend)
    inputs[0][2, 5] = value
    spoiled, keep = functional.add_layer_norm_fp8(*inputs, 1e-6, backend=backend), torch.arange(6) != 2
    assert (spoiled[1].float() * spoiled[2][:, None])[2].isnan().all()
    assert _equal([t[keep] for t in spoiled], [t[keep] for t in clean])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_rows_of_zeros(backend):
    x = torch.randn(3, 20)
    s, q, scale = functional.add_layer_norm_fp8(x, -x, None, None, 1e-6, backend=backend)
    assert not s.any() and not q.float().any() and torch.equal(scale, torch.ones(3))


@pytest.mark.parametrize("layout", [strided, sliced])
def test_layouts(layout):
    inputs = _inputs((6, 9))
    got, want = (functional.add_layer_norm_fp8(*some, 1e-6, backend="triton") for some in (map(layout, inputs), inputs))
    assert _equal(got, want)


def test_registered_op_and_compile():
    inputs = _inputs((6, 40))
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")  # test_schema knows no e4m3
    torch.library.opcheck(torch.ops.vilt_fast.add_layer_norm_fp8.default, (*inputs, 1e-6, "triton"), test_utils=checks)
    compiled = torch.compile(
        lambda *given: functional.add_layer_norm_fp8(*given, 1e-6, backend="triton"), fullgraph=True,
        backend="aot_eager",
    )  # fmt: skip
    assert _equal(compiled(*inputs), functional.add_layer_norm_fp8(*inputs, 1e-6, backend="triton"))


def test_limits_are_named(monkeypatch):
    inputs = _inputs((3, 4))
    with pytest.raises(RuntimeError, match="add_layer_norm_fp8: has no gradient"):
        functional.add_layer_norm_fp8(inputs[0].clone().requires_grad_(), *inputs[1:], 1e-6)
    with pytest.raises(ValueError, match="add_layer_norm_fp8: residual has shape"):
        functional.add_layer_norm_fp8(inputs[0], inputs[1][:2], *inputs[2:], 1e-6)
    monkeypatch.setattr(_device, "interpreted", lambda: False)
    monkeypatch.setattr(_device, "problem", lambda device=None, **dtypes: "")
    monkeypatch.setattr(_device, "has_e4m3", lambda device=None: False)
    with pytest.raises(RuntimeError, match="e4m3 needs an NVIDIA GPU of compute capability 8.9"):
        functional.add_layer_norm_fp8(*inputs, 1e-6, backend="triton")


def test_ahead_of_time():
    assert all(map(names_every_argument, kernels.aot_cases()))
    assert any("add_layer_norm_fp8" in case["name"] for case in kernels.aot_cases())
