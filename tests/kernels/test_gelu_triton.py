"""The GELU of epilogues by the tail of Phi: its stated bounds over every number of 16 bits, its limits."""

import pytest
import torch
import triton
import triton.language as tl

from vilt_fast.kernels._gelu import gelu
from vilt_fast.testing import assert_within_budget


@triton.jit
def _gelu_kernel(x, out, n, BY: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, gelu(tl.load(x + at, mask=at < n, other=0.0), BY), mask=at < n)


def _gelu(x, by="tail"):
    out = torch.empty_like(x)
    _gelu_kernel[(triton.cdiv(len(x), 1 << 16),)](x, out, len(x), BY=by, BLOCK=1 << 16)
    return out


def _every(dtype):
    """All finite values of a dtype, as float32."""
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    return values[values.isfinite()]


def _exact(x):
    """x Phi(x) in float64, by erfc: the digits of a small Phi(x) are kept."""
    wide = x.double()
    return wide * 0.5 * torch.erfc(-wide * 0.5**0.5)


def _half_ulp(value, dtype):
    """Half the distance of the numbers of a dtype at `value`."""
    kind = torch.finfo(dtype)
    exponent = value.abs().clamp(min=kind.tiny).log2().floor()
    return 0.5 * kind.eps * 2.0**exponent


VALUES = {
    "bfloat16": lambda: _every(torch.bfloat16),
    "float16": lambda: _every(torch.float16),
    "between": lambda: torch.linspace(-15, 15, 300_001),
}


@pytest.mark.parametrize("values", VALUES)
def test_the_stated_bounds(values):
    x = VALUES[values]()
    got, exact = _gelu(x).double(), _exact(x)
    error = (got - exact).abs()
    relative = error / exact.abs().clamp(min=torch.finfo(torch.float32).tiny)
    far = x < -6.2
    assert relative[x > 0].max() <= 1.3e-5
    assert relative[~far].max() <= 2.7e-5
    assert relative[far].max() <= 1.1e-4
    assert (error <= _half_ulp(exact, torch.bfloat16) / 18).all()
    assert (error <= _half_ulp(exact, torch.float16) / 10)[~far].all()
    assert (error <= _half_ulp(exact, torch.float16)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_it_is_as_near_as_torchs_own(dtype):
    x = _every(dtype)
    exact, plain = _exact(x), torch.nn.functional.gelu(x.to(dtype)).double()
    got = _gelu(x).to(dtype).double()
    assert ((got - exact).abs() <= 1.12 * _half_ulp(exact, dtype)).all(), "one rounding, and an eighth of half a unit"
    small = (x < -4) & (exact.abs() > torch.finfo(dtype).tiny)
    assert ((got - exact).abs()[small] / exact.abs()[small]).max() < 2**-7
    if dtype == torch.bfloat16:
        assert ((plain - exact).abs()[small] / exact.abs()[small]).max() > 0.5, "torch's own loses the tail"


def test_limits():
    inf, nan = float("inf"), float("nan")
    got = _gelu(torch.tensor([nan, inf, -inf, 0.0, -1e30, 1e30, -14.25]))
    assert got[0].isnan() and got[1] == inf
    assert (got[[2, 3, 4, 6]] == 0).all() and got[5] == torch.tensor(1e30)


def test_erf_is_torchs():
    x = torch.linspace(-8, 8, 4001)
    assert_within_budget(_gelu(x, "erf"), torch.nn.functional.gelu(x), _exact(x))
