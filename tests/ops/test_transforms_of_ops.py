"""torch.func and forward-mode AD on the ops: the reference's derivatives, or an error that names op and backend."""

import functools

import pytest
import torch
from support.op_cases import CASES, drawn
from torch.autograd import forward_ad

from vilt_fast import functional
from vilt_fast.testing import encoder_parameters, offsets, padding_masks

PADS = padding_masks([3, 2]), padding_masks([4, 1])


def distance(text, image, *, backend):
    return functional.word_patch_distance(text, image, *PADS, backend=backend)


def transport(cost, *, backend, gradient="envelope"):
    return functional.sinkhorn(cost.abs(), *PADS, backend=backend, iterations=20, gradient=gradient).value


CASES = CASES | {
    "word_patch_distance": (distance, [(2, 3, 8), (2, 4, 8)]),
    "sinkhorn": (transport, [(2, 3, 4)]),
    "sinkhorn, unrolled": (functools.partial(transport, gradient="unrolled"), [(2, 3, 4)]),
}


def flat(function, *inputs, **options):
    """All that it gives that is finite, end to end."""
    outputs = function(*inputs, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.cat([o[~o.isinf()].flatten() for o in outputs])


OFTEN = [case for case in CASES if "dtypes" not in case and case != "linear_cross_entropy"]  # checkpoints are refused


@pytest.mark.parametrize("case", OFTEN)
@pytest.mark.parametrize("grad", [False, True])
def test_both_modes_agree(case, grad):
    """<u, J v> = <J^t u, v>, with J v by tangents and by torch.func, J^t u by autograd."""
    function, shapes, *_ = CASES[case]
    inputs, tangents = ([t.double() for t in drawn(shapes)] for _ in range(2))
    if case == "text_embed":  # its padding row has a tangent, as in torch, and no gradient
        tangents[0][1] = 0
    leaves = [t.clone().requires_grad_() for t in inputs]
    output = flat(function, *leaves, backend="reference")
    u = torch.randn(output.shape, dtype=torch.float64)
    back = torch.autograd.grad((output * u).sum(), leaves)
    expected = sum((b * t).sum() for b, t in zip(back, tangents, strict=True))
    with torch.set_grad_enabled(grad):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, v) for t, v in zip(inputs, tangents, strict=True)]
            tangent = forward_ad.unpack_dual(flat(function, *duals, backend=None)).tangent
        call = functools.partial(flat, function, backend=None)
        _, forward = torch.func.jvp(call, tuple(inputs), tuple(tangents))
    found = torch.func.grad(lambda *given: (call(*given) * u).sum(), tuple(range(len(inputs))))(*inputs)
    for one in (tangent, forward):
        torch.testing.assert_close((one * u).sum(), expected)
    torch.testing.assert_close(found, back)


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize("direct", [False, True])
def test_a_backend_without_tangents_says_so(backend, direct):
    x, weight, bias = drawn([(5, 8), (6, 8), (6,)])
    with forward_ad.dual_level(), torch.no_grad():
        given = (forward_ad.make_dual(x, torch.ones_like(x)), weight, bias)
        with pytest.raises(RuntimeError, match=f"^linear_gelu: backend '{backend}' has no derivative in forward mode"):
            if direct:
                torch.ops.vilt_fast.linear_gelu(*given, backend)
            else:
                functional.linear_gelu(*given, backend=backend)
        assert functional.linear_gelu(x, weight, bias, backend=backend).shape == (5, 6)  # nothing to lose


def test_a_tensor_in_a_list_is_looked_at():
    x, parameters = torch.randn(5, 8), encoder_parameters(1, 8, 16)
    with forward_ad.dual_level(), torch.no_grad():
        parameters[3] = forward_ad.make_dual(parameters[3], torch.ones_like(parameters[3]))
        given = (x, parameters, offsets([5]), torch.tensor([5], dtype=torch.int32), 5)
        with pytest.raises(RuntimeError, match="^encoder: backend 'cpp' has no derivative in forward mode"):
            functional.encoder(*given, num_heads=2, eps=[1e-6, 1e-6], backend="cpp")
        found = forward_ad.unpack_dual(functional.encoder(*given, num_heads=2, eps=[1e-6, 1e-6]))
    assert found.tangent.any()


def test_a_backend_of_its_own_gradient_under_torch_func():
    function, shapes = CASES["attention"]
    inputs = drawn(shapes)
    found, expected = (
        torch.func.grad(lambda *given, b=backend: function(*given, backend=b).pow(2).sum(), (0, 1, 2))(*inputs)
        for backend in ("torch", "reference")
    )
    torch.testing.assert_close(found, expected)
