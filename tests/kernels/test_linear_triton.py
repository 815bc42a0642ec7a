"""linear, Triton kernels: error budget over every configuration, residuals, layouts, compile, limits."""

import functools

import pytest
import torch
from support.triton_case import assert_all_within_budget, compiles_ahead_of_time, names_every_argument

from vilt_fast import functional
from vilt_fast.kernels import _device
from vilt_fast.kernels import linear as kernels
from vilt_fast.testing import assert_within_budget, opcheck, poisoned, sliced, strided

SHAPES = [((185, 64), 96), ((1, 7), 5), ((0, 16), 8), ((2, 3, 33), 17), ((13, 1), 1), ((300, 40), 264)]


def _inputs(shape, rows, dtype=torch.float32, bias=True, residual=None):
    bias = torch.randn(rows).to(dtype) if bias else None
    residual = torch.randn(*shape[:-1], rows).to(residual) if residual else None
    return [torch.randn(shape).to(dtype), (torch.randn(rows, shape[-1]) * 0.3).to(dtype), bias, residual]


_triton, _reference = (functools.partial(functional.linear, backend=name) for name in ("triton", "reference"))


def test_reference_is_torchs():
    x, weight, bias, residual = (t.double() for t in _inputs((2, 5, 4), 3, residual=torch.float32))
    want = torch.nn.functional.linear(x, weight, bias)
    assert torch.equal(functional.linear(x, weight, bias), want)
    assert torch.equal(functional.linear(x, weight, bias, residual), want + residual)
    inputs = [t.requires_grad_() for t in (x, weight, bias, residual)]
    assert torch.autograd.gradcheck(functional.linear, inputs)


@pytest.mark.parametrize(
    "dtype, residual",
    [(torch.float32, None), (torch.float32, torch.float32), (torch.float16, None), (torch.float16, torch.float32),
     (torch.float16, torch.float16)],
)  # fmt: skip
@pytest.mark.parametrize("shape, rows", SHAPES)
def test_within_budget(shape, rows, dtype, residual):
    inputs = _inputs(shape, rows, dtype, rows != 96, residual)
    out = dtype if residual is None else torch.promote_types(dtype, residual)
    assert_all_within_budget(_triton, _reference, _reference, inputs, [torch.randn(*shape[:-1], rows).to(out)])


def _configurations():
    for kind, table in kernels._CONFIGS.items():
        for most_rows, most_columns, *_ in table:
            yield kind, most_rows, most_columns


@pytest.mark.parametrize("kind, most_rows, most_columns", list(_configurations()))
@torch.no_grad()
def test_every_shipped_configuration(kind, most_rows, most_columns):
    dtype = torch.float32 if kind == "float32" else torch.float16
    config = kernels._config(kind, most_rows, most_columns, gelu=True)
    M, N, K = config["BLOCK_M"] + 5, 2 * config["BLOCK_N"] + 8, config["BLOCK_K"] + 8
    x, weight, bias, residual = _inputs((M, K), N, dtype, residual=torch.float32)
    out, pre = kernels.launch(
        x, weight, bias, residual, gelu=True, save=True, out_dtype=torch.float32, kind=kind, config=config
    )
    plain = _reference(x, weight, bias)
    exact = _reference(x.double(), weight.double(), bias.double())
    gelu = functools.partial(torch.nn.functional.gelu, approximate="none")
    assert_within_budget(pre, plain, exact, what="pre")
    assert_within_budget(out, gelu(plain) + residual, gelu(exact) + residual, what="out")


@pytest.mark.parametrize("kind", ["pointer", "tma"])
@torch.no_grad()
def test_few_programs_walk_all_tiles(kind, monkeypatch):
    monkeypatch.setattr(_device, "multiprocessors", lambda tensor: 1)
    x, weight, bias, _ = _inputs((700, 16), 96, torch.float16)
    config = dict(kernels._config(kind, 185, 768), GROUP=3)
    out, _ = kernels.launch(
        x, weight, bias, None, gelu=False, save=False, out_dtype=torch.float16, kind=kind, config=config
    )
    exact = _reference(x.double(), weight.double(), bias.double())
    assert_within_budget(out, _reference(x, weight, bias), exact)


@pytest.mark.parametrize("layout", [strided, sliced])
@torch.no_grad()
def test_layouts(layout):
    inputs = _inputs((9, 24), 16, residual=torch.float32)
    assert torch.equal(_triton(*map(layout, inputs)), _triton(*inputs))


@torch.no_grad()
def test_a_row_of_nan_stays_alone():
    x, weight, bias, residual = _inputs((70, 24), 16, residual=torch.float32)
    want = _triton(x, weight, bias, residual)
    for row in (0, 69):
        bad = torch.arange(70) == row
        got = _triton(poisoned(x, bad), weight, bias, residual)
        assert got[row].isnan().all() and torch.equal(got[~bad], want[~bad])


@pytest.mark.parametrize(
    "rows, columns, most", [(185, 768, 512), (185, 3072, 512), (1720, 768, 4096), (13880, 2304, None)]
)
def test_kinds_and_configurations_are_chosen_by_shape(rows, columns, most):
    for kind in ("tma", "pointer"):
        config = kernels._config(kind, rows, columns)
        assert config["BLOCK_M"] <= rows and columns % config["BLOCK_N"] == 0
        assert config["SPECIALIZE"] is False
        assert config["GELU"] is None and kernels._config(kind, rows, columns, gelu=True)["GELU"] == "tail"
    assert kernels._config("float32", rows, columns, gelu=True)["GELU"] == "erf"
    specialized = kernels._config("tma", rows, columns, arch=100, gelu=True)
    assert specialized["SPECIALIZE"] is True and specialized["GELU"] == "erf"


def test_tma_only_where_its_rules_hold(monkeypatch):
    monkeypatch.setattr(_device, "arch", lambda tensor: 90)
    x, weight = torch.zeros(8, 64, dtype=torch.float16), torch.zeros(16, 64, dtype=torch.float16)
    assert kernels.kind_of(x, weight) == "tma"
    assert kernels.kind_of(x.float(), weight.float()) == "float32"
    assert kernels.kind_of(x[:, 1:], weight[:, 1:]) == "pointer"  # base not aligned
    assert kernels.kind_of(x[:, :60].contiguous(), weight[:, :60].contiguous()) == "pointer"  # stride not aligned
    assert kernels.kind_of(x, weight[:12]) == "pointer"  # rows of the output not aligned
    for arch, kind in ((80, "pointer"), (89, "pointer"), (100, "tma"), (120, "pointer"), (0, "pointer")):
        monkeypatch.setattr(_device, "arch", lambda tensor, arch=arch: arch)
        assert kernels.kind_of(x, weight) == kind


def test_registered_op_and_compile():
    inputs = [t.requires_grad_() for t in _inputs((5, 16), 8, residual=torch.float32)]
    x, weight, bias, residual = inputs
    opcheck("linear", "triton", keep=True, x=x, weight=weight, bias=bias, residual=residual)
    opcheck("linear", "triton", keep=True, x=x, weight=weight)
    compiled = torch.compile(lambda *t: _triton(*t).square().sum(), fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*inputs), inputs)
    want = torch.autograd.grad(_triton(*inputs).square().sum(), inputs)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@torch.no_grad()
def test_autocast():
    x, weight, bias, residual = _inputs((6, 32), 16, residual=torch.float32)
    with torch.autocast("cpu", torch.float16):
        assert _triton(x, weight, bias).dtype == torch.float16
        assert _triton(x, weight, bias, residual).dtype == torch.float32


def test_bad_input(monkeypatch):
    x, weight, bias, residual = _inputs((3, 4), 5, residual=torch.float32)
    with pytest.raises(ValueError, match=r"weight has shape \[5, 3\], expected \[N, K\] with K=4"):
        functional.linear(x, weight[:, :3], bias)
    with pytest.raises(ValueError, match=r"residual has shape \[2, 5\], expected \[3, 5\]"):
        functional.linear(x, weight, bias, residual[:2])
    with pytest.raises(TypeError, match="give both the same dtype"):
        functional.linear(x.double(), weight, bias)
    with pytest.raises(RuntimeError, match="residual is torch.float64"):
        _triton(x, weight, bias, residual.double())
    monkeypatch.setattr(_device, "interpreted", lambda: False)
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1 before Python starts"):
        _triton(x, weight, bias)


def test_ahead_of_time():
    assert all(map(names_every_argument, kernels.aot_cases()))
    assert compiles_ahead_of_time("linear") == 3  # and K dealt out, and its sum
