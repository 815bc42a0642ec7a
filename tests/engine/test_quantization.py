"""int8: the only copies of weights that outlive a call, and everything that could leave one stale."""

import copy
import functools

import pytest
import torch
from support.changes import CHANGES, data_row, linears, moved_there_and_back, moved_to_bfloat16, moved_to_float64
from support.models import (
    as_dtype,
    assert_close,
    assert_same_gradients,
    batch,
    build,
    call,
    gradients,
    labels,
    leaves,
    trunk_of,
)

import vilt_fast
from vilt_fast import functional
from vilt_fast.backends.cpp import _native
from vilt_fast.engine import quantization
from vilt_fast.engine.quantization import WeightCache
from vilt_fast.ops import registry
from vilt_fast.testing import assert_within_budget, encoder_parameters

MATRICES = (2, 4, 6, 8, 12, 14)


def accelerated(kind="trunk", dtype=torch.float32, **config):
    return vilt_fast.accelerate(build(kind, dtype, **config), quantize="int8")


def inference(model, kind="trunk", **flags):
    """The output for inputs in the model's dtype, without autograd."""
    with torch.no_grad():
        return call(model, batch(kind, next(model.parameters()).dtype), **flags)


def same(first, second):
    pairs = zip(leaves(first), leaves(second), strict=True)
    return all(a is b or torch.equal(a, b) for (_, a), (_, b) in pairs)


# --- right ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["trunk", "masked_lm", "nlvr2", "question_answering"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_that_of_rounding_to_8_bits(kind, dtype, monkeypatch):
    """Against float64, at most twice the error of the reference op, which rounds to 8 bits in plain PyTorch."""
    exact_model = vilt_fast.accelerate(build(kind, dtype).double())
    model = accelerated(kind, dtype)
    parts = {}
    for seed in range(4):
        inputs = batch(kind, dtype, seed=seed)
        with torch.no_grad():
            exact = call(exact_model, as_dtype(inputs, torch.float64), output_hidden_states=True)
            ours = call(model, inputs, output_hidden_states=True)
            with monkeypatch.context() as patch:
                emulation = functools.partial(functional.encoder, backend="reference")
                patch.setattr(WeightCache, "quantized", lambda self, parameters, first_block=0: parameters)
                patch.setattr(functional, "encoder", emulation)
                emulated = call(model, inputs, output_hidden_states=True)
        for (path, a), (_, b), (_, c) in zip(*map(leaves, (ours, emulated, exact)), strict=True):
            width = min(t.shape[1] for t in (a, b, c)) if a.dim() == 3 else None
            parts.setdefault(path, []).append(tuple(t[:, :width] for t in (a, b, c)))
    for path, tensors in parts.items():
        a, b, c = map(torch.cat, zip(*tensors, strict=True))
        assert_within_budget(a, b, c, what=path)
        if path == "hidden_states.1":
            assert (a.double() - c).norm() > 1e-4 * c.norm()  # it really is int8
            assert (a.double() - c).norm() < 0.1 * c.norm()


def test_every_block_runs_in_int8(monkeypatch):
    computed = []
    encoder = functional.encoder

    def noted(rows, parameters, *args, **kwargs):
        computed.append((kwargs["compute"], len(parameters) // 16))
        return encoder(rows, parameters, *args, **kwargs)

    monkeypatch.setattr(functional, "encoder", noted)
    model = accelerated()
    inference(model)
    assert computed == [("int8", 3)]
    inference(model, output_attentions=True)  # the fused encoder gives none: computed in float
    assert computed == [("int8", 3)]
    model.encoder.layer[1].register_forward_hook(lambda *_: None)
    inference(model)
    assert computed == [("int8", 3), ("int8", 1), ("int8", 1)]


def test_quantised_once_and_only_in_inference(quantized):
    model = accelerated()
    assert quantized == []  # accelerating costs nothing
    call(model.train(), batch("trunk", torch.float32))
    assert quantized == []  # in training the float weights compute
    call(model.eval(), batch("trunk", torch.float32))
    assert len(quantized) == 19
    inference(model)
    assert len(quantized) == 19
    inference(model)
    with torch.inference_mode():
        call(model, batch("trunk", torch.float32))
    model.train()
    inference(model)
    assert len(quantized) == 19
    vilt_fast.refresh(model)
    inference(model)
    assert len(quantized) == 38
    vilt_fast.restore(model)
    call(model, batch("trunk", torch.float32))
    assert len(quantized) == 38


def test_dtypes_without_int8_compute_in_float():
    for dtype in (torch.float64, torch.float16):
        plain = vilt_fast.accelerate(build("trunk", dtype))
        assert same(inference(accelerated(dtype=dtype)), inference(plain))


@pytest.mark.parametrize("kind", ["masked_lm", "nlvr2", "question_answering"])
def test_training_uses_float_weights(kind):
    model, plain = accelerated(kind), vilt_fast.accelerate(build(kind, torch.float32))
    inputs = batch(kind, torch.float32) | {"labels": labels(kind, torch.float32)}
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, plain)]
    for _ in range(3):
        inference(model, kind)  # fills the cache with weights that are about to change
        for m, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            call(m.train(), inputs).loss.backward()
            optimizer.step()
            m.eval()
        assert_same_gradients(
            {k: None if g is None else g.double() for k, g in gradients(model).items()},
            {k: None if g is None else g.double() for k, g in gradients(plain).items()},
        )
        fresh = accelerated(kind)
        fresh.load_state_dict(model.state_dict())
        assert same(inference(model, kind), inference(fresh, kind))


# --- never stale ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["trunk", "nlvr2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen_at_the_next_call(kind, dtype, change):
    model = accelerated(kind, dtype)
    before = inference(model, kind)
    change(model)
    fresh = copy.deepcopy(model)  # takes no copies along
    after = inference(model, kind)
    assert same(after, inference(fresh, kind))
    if change not in (moved_to_bfloat16, moved_there_and_back, moved_to_float64):  # the same weights, rounded
        assert not same(after, before)


@pytest.mark.parametrize("place", range(6))
def test_each_matrix_is_watched(place):
    model = accelerated()
    before = inference(model).pooler_output
    holder, name = linears(model)[6 + place]  # of the middle block
    getattr(holder, name).weight.data[-1] *= 1.5
    assert not torch.equal(inference(model).pooler_output, before)


@pytest.mark.parametrize(("width", "inner"), [(768, 3072), (64, 256), (96, 100), (32, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_edited_through_data_is_seen_at_full_size(width, inner, dtype):
    """`.data` bumps no version counter: whatever row is edited, the sampled fingerprint must notice."""
    parameters = encoder_parameters(1, width, inner, dtype=dtype)
    cache = WeightCache("int8")
    kept = cache.quantized(parameters)
    assert all(a is b for a, b in zip(cache.quantized(parameters), kept, strict=True))
    for place in MATRICES:
        rows = len(parameters[place])
        for row in {0, 1, rows // 2, rows - 2, rows - 1, *torch.randint(rows, (5,)).tolist()}:
            parameters[place].data[row] += 0.25
            now = cache.quantized(parameters)
            assert not torch.equal(now[place], kept[place]), f"matrix {place}, row {row}"
            assert all(now[i] is kept[i] for i in range(16) if i != place)
            kept = now


def test_equal_address_is_not_equal_weight():
    """A freed weight's address may come back with other values and the same version."""
    cache = WeightCache("int8")
    parameters = encoder_parameters(1, 32, 64)
    weight = parameters[2]
    first = cache.quantized(parameters)[2]
    weight.data.copy_(torch.randn(32, 32))
    parameters[2] = weight.data  # another tensor object, version 0, at the same address
    assert not torch.equal(cache.quantized(parameters)[2], first)


def test_single_elements_are_seen_after_refresh():
    model = accelerated()
    inference(model)
    weight = trunk_of(model).encoder.layer[0].output.dense.weight
    weight.data.view(-1)[::7] *= -3
    vilt_fast.refresh(model)
    assert same(inference(model), inference(copy.deepcopy(model)))


EDITS = {"data": lambda w: w.data, "numpy": lambda w: w.detach().numpy(), "dlpack": lambda w: torch.from_dlpack(w.data)}


@pytest.mark.parametrize("through", EDITS)
@pytest.mark.parametrize("born", ["in inference mode", "and VILT_FAST_CHECK=1"])
def test_single_elements_are_seen(born, through, monkeypatch, quantized):
    if born == "in inference mode":  # parameters without a version counter
        with torch.inference_mode():
            model = copy.deepcopy(build("trunk", torch.float32))
        assert next(model.parameters()).is_inference()
        vilt_fast.accelerate(model, quantize="int8")
    else:
        monkeypatch.setenv("VILT_FAST_CHECK", "1")
        model = accelerated()
    before = inference(model)
    assert same(inference(model), before) and len(quantized) == 19
    with torch.inference_mode():
        EDITS[through](trunk_of(model).encoder.layer[1].intermediate.dense.weight)[17, 13] = 3.0
    assert not same(inference(model), before) and len(quantized) == 20
    assert same(inference(model), inference(vilt_fast.refresh(model)))


def test_bits_that_cannot_be_looked_at_are_taken_anew(monkeypatch):
    """fp8 of parameters without a version counter on a GPU, which a look at them would wait for."""
    monkeypatch.setattr(quantization, "_bits", lambda tensors: [quantization._Unknown() for _ in tensors])
    with torch.inference_mode():
        model = copy.deepcopy(build("trunk", torch.float32))
    vilt_fast.accelerate(model, quantize="fp8")
    before, cache = inference(model), []
    copies = quantization.WeightCache.fp8
    monkeypatch.setattr(WeightCache, "fp8", lambda *args: cache.append(copies(*args)) or cache[-1])
    weight = trunk_of(model).encoder.layer[1].output.dense.weight
    inference(model)
    places = [t.data_ptr() for found in cache for t in found if t is not None]
    with torch.inference_mode():
        weight[1, 1] = 3.0
    cache.clear()
    after = inference(model)
    assert not same(after, before)
    assert [t.data_ptr() for found in cache for t in found if t is not None] == places  # where a graph reads them
    assert same(after, inference(vilt_fast.refresh(model)))


def test_blocks_in_another_order_are_other_blocks():
    model = accelerated()
    before = inference(model).pooler_output
    layers = model.encoder.layer
    layers[0], layers[2] = layers[2], layers[0]
    assert not torch.equal(inference(model).pooler_output, before)
    assert same(inference(model), inference(copy.deepcopy(model)))


@pytest.mark.parametrize("layer", [0, 1])
def test_a_hook_put_on_and_off_shifts_no_copy(layer, quantized):
    model = accelerated()
    before = inference(model)
    handle = model.encoder.layer[layer].register_forward_hook(lambda *_: None)
    inference(model)
    handle.remove()
    assert same(inference(model), before)
    assert len(quantized) == 19  # and nothing is quantised twice


def test_copies_share_nothing():
    model = accelerated()
    before = inference(model)
    twin = copy.deepcopy(model)
    data_row(twin)
    assert not same(inference(twin), before) and same(inference(model), before)
    data_row(model)
    assert same(inference(twin), inference(model))


def test_switching_between_int8_and_float():
    model = accelerated()
    plain = vilt_fast.accelerate(build("trunk", torch.float32))
    int8 = inference(model)
    assert same(inference(vilt_fast.accelerate(model)), inference(plain))
    assert same(inference(vilt_fast.accelerate(model, quantize="int8")), int8)
    moved_to_float64(model)
    assert registry.why_unavailable("encoder", "cpp") == ""
    assert same(inference(model.float()), int8)


# --- fp8 --------------------------------------------------------------------------------------------------------------


def as_e4m3(linear):
    """Let a linear multiply its weight and its rows as e4m3."""
    weight, scale = functional.quantize_fp8(linear.weight.detach(), backend="reference")
    linear.forward = lambda x: functional.linear_fp8(x, weight, scale, linear.bias.detach(), backend="reference")


@pytest.mark.parametrize("kind", ["trunk", "nlvr2", "masked_lm"])
def test_fp8_is_the_model_with_its_linears_rounded_to_e4m3(kind):
    """In float64, where both round the same numbers to 8 bits and what they multiply is exact."""
    model = vilt_fast.accelerate(build(kind), quantize="fp8")
    theirs, full = (vilt_fast.accelerate(build(kind)) for _ in range(2))
    for holder, name in linears(theirs):
        as_e4m3(getattr(holder, name))
    with torch.no_grad():
        mine, other, plain = (call(m, batch(kind)) for m in (model, theirs, full))
    for (path, a), (_, b), (_, c) in zip(*map(leaves, (mine, other, plain)), strict=True):
        assert_close(a, b, path)
        assert not torch.allclose(a, c, rtol=1e-4), path  # it really is 8 bits


@pytest.mark.parametrize("sampled", [True, False])
def test_fp8_copies_are_made_once_and_follow_their_weights(sampled, monkeypatch):
    if not sampled:  # as on a GPU
        monkeypatch.setattr(quantization, "_bits", lambda tensors: [None] * len(tensors))
    made = []
    quantize_fp8 = functional.quantize_fp8
    monkeypatch.setattr(functional, "quantize_fp8", lambda w, **k: made.append(tuple(w.shape)) or quantize_fp8(w, **k))
    model = vilt_fast.accelerate(build("trunk", torch.float32), quantize="fp8")
    call(model.train(), batch("trunk", torch.float32))
    assert made == []  # in training the float weights compute
    model.eval()
    first = inference(model)
    assert made == [(96, 32), (32, 32), (64, 32), (32, 64)] * 3
    assert same(first, inference(model)) and len(made) == 12
    with torch.no_grad():
        model.encoder.layer[1].attention.attention.key.bias.add_(1.0)
        model.encoder.layer[2].output.dense.weight.mul_(2.0)
    changed = inference(model)
    assert made[12:] == [(96, 32), (32, 64)]
    fresh = vilt_fast.accelerate(copy.deepcopy(vilt_fast.restore(model)), quantize="fp8")
    assert same(changed, inference(fresh)) and not same(changed, first)


def test_fp8_leaves_wrapped_linears_alone():
    model = vilt_fast.accelerate(build("trunk", torch.float32), quantize="fp8")
    other = vilt_fast.accelerate(build("trunk", torch.float32))
    for m in (model, other):
        for layer in m.encoder.layer:
            layer.output.dense = Wrapped(layer.output.dense)
    assert same(inference(model), inference(other))


class Wrapped(torch.nn.Module):
    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x):
        return self.base_layer(x)


def test_int8_without_the_native_part_is_refused(monkeypatch):
    model = build("trunk", torch.float32)
    monkeypatch.setattr(_native, "missing", lambda: "the library is not built; pip install . with a C++ compiler")
    with pytest.raises(RuntimeError, match=r"quantize='int8' .*native part.*pip install \. with a C\+\+ compiler"):
        vilt_fast.accelerate(model, quantize="int8")
    assert "forward" not in vars(model)
    vilt_fast.accelerate(model)
