"""linear_int8 against the same rounding in plain PyTorch, and what it does not take."""

import pytest
import torch
import torch.nn.functional as F

from vilt_fast import functional
from vilt_fast.reference.encoder import quantized_channels, quantized_rows
from vilt_fast.testing import assert_within_budget, opcheck, sliced, strided


def _inputs(rows=5, columns=70, out=37, dtype=torch.float32):
    return torch.randn(rows, columns).to(dtype), torch.randn(out, columns).to(dtype), torch.randn(out).to(dtype)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 768, 129), (5, 70, 37), (517, 33, 64), (0, 8, 8)])
@torch.no_grad()
def test_error_is_that_of_rounding_to_8_bits(shape, dtype, gelu, monkeypatch):
    from vilt_fast import _C

    x, weight, bias = _inputs(*shape, dtype)
    act = F.gelu if gelu else lambda t: t
    exact = act(F.linear(x.double(), weight.double(), bias.double()))
    rounded = F.linear(quantized_rows(x.float()), quantized_channels(weight.float()), bias.float()) if len(x) else exact
    plain = act(rounded).to(dtype)
    blob = functional.quantize_linear(weight)
    for isa in _C.cpu_features()["isas"]:
        monkeypatch.setenv("VILT_FAST_CPU_ISA", isa)
        got = functional.linear_int8(x, blob, bias, len(weight), gelu=gelu)
        assert got.dtype == dtype
        assert_within_budget(got, plain, exact, what=isa)


@pytest.mark.parametrize("layout", [strided, sliced])
@torch.no_grad()
def test_any_layout_and_no_bias(layout):
    x, weight, _ = _inputs()
    blob = functional.quantize_linear(weight)
    want = functional.linear_int8(x, blob, torch.zeros(37), 37)
    assert torch.equal(functional.linear_int8(layout(x), blob, None, 37), want)
    assert torch.equal(functional.linear_int8(x.view(5, 1, 70), blob, None, 37), want[:, None])


@torch.no_grad()
def test_registered_op():
    x, weight, bias = _inputs()
    opcheck("linear_int8", "cpp", x=x, weight=functional.quantize_linear(weight), bias=bias, out_features=37, gelu=True)


def test_bad_input():
    x, weight, bias = _inputs()
    blob = functional.quantize_linear(weight)
    for arguments, error, message in (
        ((x, blob, bias, 36), ValueError, "bias has shape"),
        ((x, blob, None, 36), ValueError, r"a matrix \[37, 70\], expected \[36, 70\]"),
        ((x[:, :69], blob, bias, 37), ValueError, "expected .37, 69."),
        ((x, blob[:-1], bias, 37), ValueError, "no blob of quantize_linear"),
        ((x, weight, bias, 37), ValueError, "weight has shape"),
        ((x.double(), blob, bias, 37), TypeError, "x is torch.float64"),
        ((x.clone().requires_grad_(), blob, bias, 37), RuntimeError, "has no gradient"),
    ):
        with pytest.raises(error, match=message):
            functional.linear_int8(*arguments)
