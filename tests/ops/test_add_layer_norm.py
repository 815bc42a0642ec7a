"""add_layer_norm: reference against HuggingFace's order of operations, gradients, mixed dtypes, bad input."""

import pytest
import torch
from support.gradients import assert_gradients_within_budget, results, same
from torch.autograd import gradcheck

from vilt_fast import functional
from vilt_fast.testing import assert_within_budget, opcheck, sliced, strided


def _inputs(*shape, dtype=torch.float64):
    return [torch.randn(*shape, dtype=dtype), torch.randn(*shape, dtype=dtype)] + [
        torch.randn(shape[-1], dtype=dtype) for _ in range(2)
    ]


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 0.1])
@pytest.mark.parametrize("shape", [(7, 33), (2, 3, 8), (0, 5), (1, 1)])
def test_reference_is_the_formula(shape, eps):
    x, residual, weight, bias = _inputs(*shape)
    s, y = functional.add_layer_norm(x, residual, weight, bias, eps, backend="reference")
    centred = (x + residual) - (x + residual).mean(-1, keepdim=True)
    formula = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias
    assert torch.equal(s, x + residual)
    torch.testing.assert_close(y, formula, rtol=1e-11, atol=1e-12)


def test_gradients():
    inputs = [t.requires_grad_() for t in _inputs(3, 5)]
    assert gradcheck(lambda *t: functional.add_layer_norm(*t, 1e-6), inputs)


def test_wide_residual_and_missing_affine():
    x, residual = torch.randn(4, 8, dtype=torch.bfloat16), torch.randn(4, 8)
    s, y = functional.add_layer_norm(x, residual, None, None, 1e-6)
    assert s.dtype == torch.float32 and y.dtype == torch.bfloat16
    want = torch.nn.functional.layer_norm(x.double() + residual.double(), (8,), eps=1e-6)
    assert_within_budget(y, want.to(torch.bfloat16), want)


BF16, FLOAT = torch.bfloat16, torch.float32
KINDS = {
    "float32": (FLOAT,) * 4,
    "bfloat16": (BF16,) * 4,
    "autocast": (BF16, FLOAT, FLOAT, FLOAT),
    "odd": (FLOAT, BF16, BF16, BF16),
}


def _of(kind, *shape):
    return [t.to(dtype) for t, dtype in zip(_inputs(*shape), KINDS[kind], strict=True)]


@pytest.mark.parametrize("layout", [same, strided, sliced], ids=["dense", "strided", "sliced"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(7, 33), (2, 3, 8), (1, 1), (300, 64), (5, 769)])
def test_cpp_within_budget(shape, kind, layout):
    inputs = _of(kind, *shape)

    def call(*t, backend):
        return functional.add_layer_norm(*t, 1e-3, backend=backend)

    assert_gradients_within_budget(call, inputs, layout=layout, what=kind)
    assert_gradients_within_budget(lambda x, r, w, backend: call(x, r, w, None, backend=backend), inputs[:3])
    assert_gradients_within_budget(lambda x, r, backend: call(x, r, None, None, backend=backend), inputs[:2])


def _dropped(inputs, p, backend):
    """Outputs, gradients and what of x was kept, with a mask that a seed of torch's gives."""
    torch.manual_seed(3)
    found = results(
        lambda *t, backend: functional.add_layer_norm(*t, 1e-3, dropout_p=p, backend=backend), inputs, backend
    )
    torch.manual_seed(3)
    ones = torch.ones_like(inputs[0])
    s, _ = functional.add_layer_norm(ones, torch.zeros_like(ones), None, None, 1e-3, dropout_p=p, backend=backend)
    return found, s != 0


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("shape", [(90, 33), (41, 130)])
def test_cpp_dropout_within_budget(shape, kind):
    """Against the formula with the mask that the kernel has drawn: the backward draws the same."""
    inputs = _of(kind, *shape)
    got, kept = _dropped(inputs, 0.25, "cpp")

    def masked(x, residual, *rest, backend):
        s, y = functional.add_layer_norm(x * (kept / 0.75), residual, *rest, 1e-3, backend=backend)
        return s.to(torch.promote_types(x.dtype, residual.dtype)), y.to(x.dtype)

    plain, exact = (results(masked, inputs, "reference", dtype) for dtype in (None, torch.float64))
    for number, three in enumerate(zip(got, plain, exact, strict=True)):
        assert_within_budget(*three, what=f"{kind} {number}")


def test_dropout_drops_what_triton_drops():
    inputs = _of("float32", 37, 132)
    for p in (0.1, 0.5, 0.9):
        assert torch.equal(_dropped(inputs, p, "cpp")[1], _dropped(inputs, p, "triton")[1])


def test_dropout_is_fair_and_depends_on_its_seed():
    x = torch.ones(400, 200)
    draws = [functional.add_layer_norm(x, x * 0, None, None, 1e-3, dropout_p=0.3, backend="cpp")[0] for _ in range(2)]
    kept = [draw != 0 for draw in draws]
    assert not torch.equal(*kept)
    for mask in kept:  # six standard deviations
        for shares, count in (
            (mask.double().mean(0), 400),
            (mask.double().mean(1), 200),
            (mask.double().mean(), 80000),
        ):
            assert ((shares - 0.7).abs() < 6 * (0.21 / count) ** 0.5).all()
    torch.testing.assert_close(draws[0][kept[0]], torch.full((int(kept[0].sum()),), 1 / 0.7), rtol=2e-7, atol=0)


def test_sums_do_not_depend_on_threads():
    inputs, before = _of("float32", 700, 48), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 16):
            torch.set_num_threads(threads)
            found.append(_dropped(inputs, 0.1, "cpp")[0])
    finally:
        torch.set_num_threads(before)
    assert all(all(map(torch.equal, one, found[0])) for one in found)


def test_gradients_of_one_output_and_of_some_inputs():
    inputs = _of("autocast", 9, 20)
    for output in (0, 1):
        for wanted in ([0], [1], [2, 3], [0, 3]):
            found = []
            for backend in ("cpp", "reference"):
                leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
                out = functional.add_layer_norm(*leaves, 1e-3, backend=backend)[output].float().pow(3).sum()
                asked = [leaves[i] for i in wanted]
                given = torch.autograd.grad(out, asked, allow_unused=True) if out.requires_grad else [None] * len(asked)
                found.append([torch.zeros_like(t) if g is None else g for g, t in zip(given, asked, strict=True)])
            for got, want in zip(*found, strict=True):
                torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.core
def test_registered_op():
    x, residual, weight, bias = (t.requires_grad_() for t in _of("float32", 5, 8))
    named = dict(x=x, residual=residual, weight=weight, bias=bias, eps=1e-3, dropout_p=0.0)
    opcheck("add_layer_norm", "cpp", keep=True, **named)
    opcheck("add_layer_norm", "cpp", keep=True, **named | dict(dropout_p=0.5, seed=torch.tensor([5])))


def test_non_contiguous():
    inputs = _inputs(6, 9)
    for got, want in zip(
        functional.add_layer_norm(*map(strided, inputs), 1e-6), functional.add_layer_norm(*inputs, 1e-6), strict=True
    ):
        assert torch.equal(got, want)


def test_a_backward_checks_behind_its_door():
    s, mean, weight = torch.randn(3, 4), torch.zeros(3), torch.ones(4)

    def call(grad_s=s, grad_y=s, mean=mean, weight=weight, p=0.0):
        return torch.ops.vilt_fast.add_layer_norm_bwd(
            [True] * 4, grad_s, grad_y, s, mean, torch.ones(3), weight, weight, p, None, FLOAT, FLOAT, 1e-3, "cpp"
        )

    assert len(call()) == 4
    for name, given in dict(grad_s=s[:2], grad_y=s[:, :2], mean=mean[:2], weight=weight[:2]).items():
        with pytest.raises(ValueError, match=f"{name} has shape"):
            call(**{name: given})
    with pytest.raises(ValueError, match="seed"):
        call(p=0.5)


def test_bad_input():
    x, residual, weight, bias = _inputs(3, 4)
    with pytest.raises(ValueError, match=r"residual has shape \[2, 4\]"):
        functional.add_layer_norm(x, residual[:2], weight, bias, 1e-6)
    with pytest.raises(ValueError, match=r"weight has shape \[3\], expected \[D\] with D=4"):
        functional.add_layer_norm(x, residual, weight[:3], bias, 1e-6)
    with pytest.raises(TypeError, match="x is torch.int64"):
        functional.add_layer_norm(x.long(), residual, weight, bias, 1e-6)
