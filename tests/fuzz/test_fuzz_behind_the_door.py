"""`torch.ops.vilt_fast.*` on the native library with one argument spoilt: an exception, or a result, never a crash.

Whether something past an end was read shows under AddressSanitizer (`make sanitize`).
"""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.fuzzing import MACHINES, on

from vilt_fast import functional
from vilt_fast.ops._define import OPS
from vilt_fast.testing import encoder_parameters, offsets, packing_indices

INT = torch.int32


@functools.cache
def arguments_of(op):
    """The arguments of a call that is right, by name, in their order."""
    torch.manual_seed(0)
    right = _right(op)
    return right if op.endswith("_bwd") else {name: right[name] for name in OPS[op.split()[0]].arguments}


def _right(op):
    masks = dict(text_pad=torch.zeros(2, 5).bool(), image_pad=torch.zeros(2, 7).bool())
    q, cu = torch.randn(9, 2, 8), offsets([4, 5])
    if op == "linear_gelu":
        return dict(x=torch.randn(7, 12), weight=torch.randn(9, 12), bias=torch.randn(9))
    if op == "linear_int8":
        weight = functional.quantize_linear(torch.randn(9, 12))
        return dict(x=torch.randn(7, 12), weight=weight, bias=torch.randn(9), out_features=9, gelu=False)
    if op == "attention":
        return dict(
            q=q, k=q + 1, v=q + 2, cu_seqlens_q=cu, cu_seqlens_k=cu.clone(), max_seqlen_q=5, max_seqlen_k=5,
            seqused_k=torch.tensor([4, 3], dtype=INT), causal_start=None, dropout_p=0.0, scale=0.5, seed=None,
        )  # fmt: skip
    if op.startswith("encoder"):
        parameters = encoder_parameters(2, 16, 24)
        if op == "encoder int8":
            parameters = [functional.quantize_linear(p) if p.dim() == 2 else p for p in parameters]
        wanted = dict(wanted=None, cu_wanted=None)
        if op == "encoder wanted":
            wanted = dict(wanted=torch.tensor([0, 3, 5]), cu_wanted=offsets([2, 1]))
        return dict(
            x=torch.randn(9, 16), parameters=parameters, cu_seqlens=cu, seqused_k=torch.tensor([4, 3], dtype=INT),
            max_seqlen=5, num_heads=2, eps=[1e-6] * 4, compute="int8" if op == "encoder int8" else "float32",
            return_hidden=op != "encoder wanted", **wanted,
        )  # fmt: skip
    if op == "patch_embed":
        index = packing_indices([2, 1], [(2, 2), (1, 2)], canvas=(2, 2), table=(2, 2))
        return dict(
            pixels=torch.randn(2, 3, 8, 8), weight=torch.randn(10, 3, 4, 4), bias=torch.randn(10),
            cls_token=torch.randn(10), position=torch.randn(5, 10), modality=torch.randn(2, 10),
            text=torch.randn(3, 10), **index, dropout_p=0.0, out_dtype=torch.float32, pixel_scale=None,
            pixel_shift=None, seed=None,
        )  # fmt: skip
    if op == "ipot":
        return dict(cost=torch.rand(2, 5, 7), **masks, beta=0.5, iterations=3, inner=1)
    if op == "sinkhorn":
        return dict(
            cost=torch.rand(2, 5, 7), **masks, epsilon=0.5, iterations=3, tolerance=None,
            text_marginal=torch.rand(2, 5), image_marginal=torch.rand(2, 7),
        )  # fmt: skip
    states = dict(text=torch.randn(2, 5, 6), image=torch.randn(2, 7, 6))
    if op == "word_patch_distance":
        return dict(**states, **masks, beta=0.5, iterations=3, inner=1, return_plan=True)
    return dict(
        needs=[True, True], grad_distance=torch.ones(2), **states, **masks, plan=torch.rand(2, 5, 7),
        state=torch.empty(0), beta=0.5, iterations=3,
    )  # fmt: skip


NAMES = (
    "linear_gelu", "linear_int8", "attention", "encoder", "encoder int8", "encoder wanted", "patch_embed", "ipot",
    "sinkhorn", "word_patch_distance", "word_patch_distance_bwd",
)  # fmt: skip
#: (op, argument, dimension) that may have another size, and which a smaller one of is no mistake.
FREE = {
    ("linear_gelu", "x", 0), ("linear_gelu", "x", 1), ("linear_int8", "x", 0), ("patch_embed", "pixels", 2),
    ("patch_embed", "pixels", 3),
    ("patch_embed", "position", 0), ("patch_embed", "modality", 0), ("encoder", "parameters", 0),
    ("word_patch_distance_bwd", "state", 0),
}  # fmt: skip


def call(op, arguments):
    name = op.split()[0]
    return getattr(torch.ops.vilt_fast, name)(*arguments.values(), "cpp")


@pytest.mark.parametrize("op", NAMES)
def test_what_is_spoilt_below_is_right(op):
    call(op, arguments_of(op))


def spoilt(draw, op, tensor):
    """(the tensor otherwise, whether that is a mistake for sure)."""
    kind = draw(st.sampled_from(["shorter", "longer", "flat", "turned", "empty", "dtype", "numbers", "strided"]))
    dim = draw(st.integers(0, tensor.dim() - 1))
    if kind == "shorter":
        return tensor.narrow(dim, 0, tensor.shape[dim] - 1), dim
    if kind == "longer":
        return torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim), dim
    if kind == "flat":
        return tensor.flatten()[:1] if tensor.dim() > 1 else tensor[:1, None], dim
    if kind == "turned":
        return tensor.transpose(0, dim), None
    if kind == "empty":
        return tensor[:0], dim if dim == 0 else None
    if kind == "dtype":
        dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]
        return tensor.to(draw(st.sampled_from(dtypes))), None
    if kind == "strided":
        return torch.stack([tensor, tensor], -1)[..., 0], None
    if tensor.is_floating_point():
        values = [float("nan"), float("inf"), -1e38, 1e-42]
    elif tensor.dtype == torch.bool:
        values = [True, False]
    else:
        values = [
            v
            for v in (-1, 3, 255, 2**31 - 1, 2**40)
            if torch.iinfo(tensor.dtype).min <= v <= torch.iinfo(tensor.dtype).max
        ]
    other = tensor.clone()
    other.view(-1)[draw(st.integers(0, max(0, tensor.numel() - 1)))] = draw(st.sampled_from(values))
    return other, None


@pytest.mark.parametrize("op", NAMES)
@given(st.data(), MACHINES)
def test_a_spoilt_argument(op, data, machine):
    arguments, draw = dict(arguments_of(op)), data.draw
    tensors = [name for name, value in arguments.items() if isinstance(value, (torch.Tensor, list))]
    numbers = [name for name, value in arguments.items() if isinstance(value, (int, float)) and name != "return_hidden"]
    name = draw(st.sampled_from(tensors * 2 + numbers))
    value, where = arguments[name], None
    if name == "parameters":
        place = draw(st.integers(0, len(value) - 1))
        other, where = spoilt(draw, op, value[place])
        value = [*value[:place], other, *value[place + 1 :]]
        if op == "encoder int8" or other.numel() == 0:
            where = None
    elif isinstance(value, torch.Tensor):
        if value.numel():
            value, where = spoilt(draw, op, value)
    elif isinstance(value, list):
        value = value[:-1]
    else:
        value = draw(st.sampled_from([0, -1, 1, 3, 2**20]))
        value = float(value) if isinstance(arguments[name], float) else value
        if name in ("iterations", "inner") and value > 100:
            value = -value
    arguments[name] = value
    raised = None
    with on(machine):
        try:
            call(op, arguments)
        except Exception as error:
            raised = error
    if where is not None and (op, name, where) not in FREE:
        assert raised is not None, f"{name}: {value.shape}"
    assert not isinstance(raised, (KeyError, SystemError, AssertionError, AttributeError)), repr(raised)
