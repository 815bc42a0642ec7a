"""What was found of blocks holds while they are what they were: every change is seen at the next call."""

import copy
import gc
import weakref

import pytest
import torch
from support import block_changes as changes
from support.models import batch, build, call, leaves
from torch import nn
from torch.nn import functional as F
from transformers.models.vilt import modeling_vilt as hf

import vilt_fast
from vilt_fast.engine.snapshot import Snapshot
from vilt_fast.models.vilt import trunk


def accelerated(quantize=None):
    return vilt_fast.accelerate(build("trunk", torch.float32), quantize=quantize)


def output(model, grad=False):
    with torch.set_grad_enabled(grad):
        return [t.detach() for _, t in leaves(call(model, batch("trunk", torch.float32))) if torch.is_tensor(t)]


def same(first, second):
    return all(map(torch.equal, first, second))


@pytest.fixture
def described(monkeypatch):
    """A list that grows by each block that is described."""
    seen, own = [], trunk._block
    monkeypatch.setattr(trunk, "_block", lambda layer, **more: seen.append(layer) or own(layer, **more))
    return seen


CHANGES = [
    changes.own_forward, changes.other_class, changes.hooks_put_in_place, changes.other_norm, changes.other_heads,
    changes.other_activation, changes.other_function_within, changes.names_exchanged,
    changes.layer_within_replaced, changes.norms_exchanged, changes.other_strides, changes.no_bias,
    changes.a_tensor_that_is_no_parameter, changes.weights_in_place, changes.weights_behind_the_back,
    changes.listened_to, changes.listened_to_within, changes.listened_to_before,
]  # fmt: skip


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_of_a_block_is_seen_at_the_next_call(change, quantize):
    model = accelerated(quantize)
    before = output(model)
    assert same(output(model), before)
    change(model.encoder.layer[1])
    after = output(model)
    assert not same(after, before)
    fresh = copy.deepcopy(model)  # takes nothing along that was found
    assert same(after, output(fresh)) and same(after, output(model))


@pytest.mark.parametrize(
    "where, name, value",
    [
        (nn.Linear, "forward", lambda self, x: F.linear(x, self.weight, self.bias) * 2),
        (nn.LayerNorm, "eps", property(lambda self: 1.0, lambda self, value: None)),
        (hf.ViltOutput, "forward", lambda self, x, y: y),
        (hf.ViltLayer, "__call__", lambda self, x, *args, **kwargs: (x * 2,)),
        (F, "linear", changes.linear_with_two_biases),
    ],
)
def test_what_changes_of_a_class_or_a_library_is_seen_at_the_next_call(monkeypatch, where, name, value):
    model = accelerated()
    before = output(model)
    assert same(output(model), before)
    monkeypatch.setattr(where, name, value, raising=False)
    assert same(output(copy.deepcopy(model)), after := output(model)) and not same(after, before)
    monkeypatch.undo()
    assert same(output(model), before)


def test_hooks_of_all_modules_are_seen_at_the_next_call():
    model = accelerated()
    before = output(model)
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, args, out: out * 2 if isinstance(m, nn.Linear) else None
    )
    try:
        assert not same(output(model), before)
    finally:
        handle.remove()
    assert same(output(model), before)


def test_layers_may_be_exchanged_added_and_taken_out():
    model = accelerated()
    layers = model.encoder.layer
    output(model)
    for change in (
        lambda: layers._modules.update({"0": layers[2], "2": layers[0]}),
        lambda: layers.append(copy.deepcopy(layers[1])),
        lambda: layers.__delitem__(0),
    ):
        before = output(model)
        change()
        assert same(output(copy.deepcopy(model)), after := output(model)) and not same(after, before)


def test_what_has_not_changed_is_not_described_again(described):
    model = accelerated("int8")
    for grad in (False, True):
        output(model, grad), described.clear()
        output(model, grad)
        changes.weights_in_place(model.encoder.layer[0]), changes.weights_behind_the_back(model.encoder.layer[2])
        output(model, grad)
        assert not described
    changes.other_norm(model.encoder.layer[1])
    output(model, grad)
    assert described


def test_modes_are_told_apart(native_blocks):
    model = accelerated()
    model.encoder.layer[1].output.dropout.p = 0.5
    for training, grad, native in (
        (False, False, 3), (False, True, 3), (True, True, 0), (False, True, 3), (True, False, 2)
    ):  # fmt: skip
        native_blocks.clear()
        output(model.train(training), grad)
        assert len(native_blocks) == native
    native_blocks.clear()
    with torch.autocast("cpu", torch.bfloat16):
        output(model.eval())
    output(model)
    assert native_blocks == ["bfloat16"] * 3 + ["float32"] * 3


def test_a_run_is_as_long_again_when_what_ended_it_is_gone(native_blocks, monkeypatch):
    calls, encoder = [], vilt_fast.functional.encoder
    monkeypatch.setattr(vilt_fast.functional, "encoder", lambda *a, **k: calls.append(1) or encoder(*a, **k))
    model = accelerated()
    handle = model.encoder.layer[1].register_forward_hook(lambda *_: None)
    output(model), output(model)
    assert len(native_blocks) == 4 and len(calls) == 4  # one block, a padded one, one block; twice
    handle.remove()
    output(model)
    assert len(native_blocks) == 7 and len(calls) == 5


def test_nothing_of_a_model_outlives_it():
    model = accelerated()
    output(model)
    forward, parts = model.forward, [weakref.ref(m) for m in (model, *model.encoder.layer)]
    assert forward.runs._kept
    del model
    gc.collect()
    assert all(part() is None for part in parts) and not forward.runs._kept


def test_parameters_that_are_let_go_of_are_freed():
    model = accelerated()
    output(model)
    dense = model.encoder.layer[1].output.dense
    old = weakref.ref(dense.weight)
    dense.weight = nn.Parameter(torch.zeros_like(dense.weight))
    gc.collect()
    assert old() is None


def test_modules_that_looking_does_not_tell_all_of():
    assert Snapshot.of([nn.Linear(2, 2)])
    odd = nn.Linear(2, 2)
    odd.__dict__["scale"] = torch.ones(2)
    assert not any(Snapshot.of([module]) for module in (odd, nn.BatchNorm1d(2)))
    assert Snapshot.of([nn.BatchNorm1d(2), None], placed=True) and not Snapshot.of([odd], placed=True)


def test_who_listens():
    module = nn.Linear(2, 2)
    deaf = Snapshot.of([module])
    handle = module.register_forward_hook(changes.more)
    heard = Snapshot.of([module])
    assert heard.holds([module]) and not deaf.holds([module])
    handle.remove()
    assert deaf.holds([module]) and not heard.holds([module])


@pytest.mark.parametrize("name", ["weight", "running_mean"])
def test_where_tensors_lie_matters_to_what_reads_them_there(name):
    module = nn.BatchNorm1d(2)
    snapshot = Snapshot.of([module], placed=True)
    with torch.no_grad():
        getattr(module, name).add_(1)
    assert snapshot.holds([module])
    getattr(module, name).data = getattr(module, name).data.clone()
    assert not snapshot.holds([module])


def test_attributes_that_cannot_say_whether_they_are_equal():
    module = nn.Linear(2, 2)
    module.table = torch.ones(2).numpy()
    snapshot = Snapshot.of([module])
    assert snapshot.holds([module])
    module.table = torch.ones(2).numpy()
    assert not snapshot.holds([module])
