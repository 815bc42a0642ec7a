"""Heads and patches by 8-bit copies: what they compute, that they follow their weights, and where they do not apply."""

import copy

import pytest
import torch
from support.models import batch, build, call
from torch import nn

import vilt_fast
from vilt_fast import functional
from vilt_fast.engine import head as heads
from vilt_fast.engine.quantization import WeightCache


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    monkeypatch.setattr(heads, "_WORTHWHILE", 1)


@pytest.fixture
def in_8_bits(monkeypatch):
    """A list that grows by the shape of each result of linear_int8."""
    seen, linear_int8 = [], functional.linear_int8

    def counted(*args, **kwargs):
        out = linear_int8(*args, **kwargs)
        seen.append(tuple(out.shape))
        return out

    monkeypatch.setattr(functional, "linear_int8", counted)
    return seen


def classifier(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.LayerNorm(48), nn.GELU(), nn.Linear(48, 70)).to(dtype).eval()


def close(got, want, share=0.05):
    """Of the same weights, which 8 bits blur; how much they may is what the tests of the ops say."""
    return (got.double() - want.double()).norm() < share * want.double().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_plain_stack_computes_by_copies_that_follow_it(dtype, in_8_bits):
    head, weights, rows = classifier(dtype), WeightCache("int8"), torch.randn(3, 32).to(dtype)
    first = heads.run_head(head, rows, weights)
    assert in_8_bits == [(3, 48), (3, 70)] and first.dtype == dtype
    assert close(first, head(rows)) and not torch.equal(first, head(rows))
    head[3].weight.mul_(2)
    assert close(heads.run_head(head, rows, weights), head(rows))
    assert torch.equal(heads.run_head(head, rows, None), head(rows))


CHANGES = {
    "hook": lambda head: head[0].register_forward_hook(lambda *_: None),
    "other activation": lambda head: head.__setitem__(2, nn.ReLU()),
    "tanh gelu": lambda head: head.__setitem__(2, nn.GELU("tanh")),
    "own class": lambda head: head.__setitem__(0, type("Mine", (nn.Linear,), {})(32, 48)),
    "double": lambda head: head.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_other_head_is_called_itself(change, in_8_bits):
    head = classifier()
    CHANGES[change](head)
    rows = torch.randn(3, 32).to(head[0].weight.dtype)
    assert torch.equal(heads.run_head(head, rows, WeightCache("int8")), head(rows)) and not in_8_bits


def test_its_gradient_is_that_of_the_parameters_as_they_are(in_8_bits):
    head, rows = classifier(), torch.randn(3, 32, requires_grad=True)
    loss = heads.run_head(head, rows, WeightCache("int8")).square().sum()
    head[1].eps, head[2] = 1.0, nn.ReLU()  # what happens to the module now changes nothing
    got = torch.autograd.grad(loss, [rows, *classifier_parameters(head)])
    head = classifier()
    want = torch.autograd.grad(head(rows).square().sum(), [rows, *classifier_parameters(head)])
    for mine, exact in zip(got, want, strict=True):
        assert close(mine, exact, 0.1)
    assert len(in_8_bits) == 2


def classifier_parameters(head):
    return [p for layer in (head[0], head[1], head[3]) for p in layer.parameters()]


@pytest.mark.parametrize("kind, outputs", [("question_answering", 2), ("nlvr2", 2), ("retrieval", 1), ("masked_lm", 0)])
def test_models_use_them_in_inference_only(kind, outputs, in_8_bits):
    model = vilt_fast.accelerate(build(kind, torch.float32), quantize="int8")
    plain = vilt_fast.accelerate(build(kind, torch.float32))
    inputs = batch(kind, torch.float32)
    with torch.no_grad():
        logits = call(model, inputs).logits
        assert close(logits, call(plain, inputs).logits, 0.2)
    count = outputs if kind != "retrieval" else len(in_8_bits)
    assert len(in_8_bits) == count
    assert torch.equal(call(model, inputs).logits, logits)  # gradients recorded, and nobody asks
    in_8_bits.clear()
    call(model.train(), inputs)
    assert not in_8_bits


def test_patches_are_projected_by_a_copy_that_follows_its_weight(monkeypatch):
    dtypes, patch_embed = [], functional.patch_embed

    def noted(pixels, weight, *args, **kwargs):
        dtypes.append(weight.dtype)
        return patch_embed(pixels, weight, *args, **kwargs)

    monkeypatch.setattr(functional, "patch_embed", noted)
    model = vilt_fast.accelerate(build("trunk", torch.float32), quantize="int8")
    inputs = batch("trunk", torch.float32)
    with torch.no_grad():
        first = call(model, inputs).pooler_output
        model.embeddings.patch_embeddings.projection.weight.mul_(0.5)
        changed = call(model, inputs).pooler_output
        fresh = vilt_fast.accelerate(copy.deepcopy(vilt_fast.restore(model)), quantize="int8")
        assert torch.equal(changed, call(fresh, inputs).pooler_output) and not torch.equal(changed, first)
    assert dtypes == [torch.uint8] * 3
    call(fresh.train(), inputs)
    assert dtypes[3:] == [torch.float32]


def test_the_gradient_of_patches_is_that_of_the_weight():
    found = []
    for quantize in ("int8", None):
        model = vilt_fast.accelerate(build("trunk", torch.float32), quantize=quantize)
        inputs = batch("trunk", torch.float32)
        inputs["pixel_values"].requires_grad_()
        call(model, inputs).pooler_output.square().sum().backward()
        projection = model.embeddings.patch_embeddings.projection
        found.append((projection.weight.grad, projection.bias.grad, inputs["pixel_values"].grad))
    for mine, exact in zip(*found, strict=True):
        assert close(mine, exact, 0.3)
