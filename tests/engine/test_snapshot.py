"""What was found of blocks holds while they are what they were: every change is seen at the next call."""

import collections
import copy
import functools
import gc
import weakref

import pytest
import torch
from support.models import batch, build, call, leaves
from torch import nn
from torch.nn import functional as F
from transformers.models.vilt import modeling_vilt as hf

import vilt_fast
from vilt_fast.engine import unchanged
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


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def more(module, given, output):
    return output + 0.25


def own_forward(layer):
    dense = layer.output.dense
    dense.forward = lambda x, own=dense.forward: own(x) * 2


def other_class(layer):
    layer.intermediate.dense.__class__ = Doubled


def hooks_put_in_place(layer):
    layer.attention.output.dense._forward_hooks = collections.OrderedDict({0: more})


def other_norm(layer):
    layer.layernorm_after.eps = 1.0


def other_heads(layer):
    attention = layer.attention.attention
    heads, size = attention.num_attention_heads, attention.attention_head_size
    attention.num_attention_heads, attention.attention_head_size = heads // 2, size * 2
    if hasattr(attention, "scaling"):
        attention.scaling = (size * 2) ** -0.5


def other_activation(layer):
    layer.intermediate.intermediate_act_fn = nn.ReLU()


def other_function_within(layer):
    layer.intermediate.intermediate_act_fn.act = torch.tanh


def names_exchanged(layer):
    parts = layer.attention.attention._modules
    parts["query"], parts["value"] = parts["value"], parts["query"]


def layer_within_replaced(layer):
    layer.attention.attention.key = nn.Linear(32, 32)


def norms_exchanged(layer):
    own = layer._modules
    own["layernorm_before"].weight.data.mul_(2)
    own["layernorm_before"], own["layernorm_after"] = own["layernorm_after"], own["layernorm_before"]


def other_strides(layer):
    weight = layer.attention.attention.query.weight
    weight.data = weight.data.t()


def no_bias(layer):
    layer.output.dense.bias = None


def a_tensor_that_is_no_parameter(layer):
    dense = layer.attention.output.dense
    weight = dense.weight.detach() * 2
    del dense.weight
    dense.weight = weight


def weights_in_place(layer):
    with torch.no_grad():
        layer.output.dense.weight.mul_(2)


def weights_behind_the_back(layer):
    layer.output.dense.weight.data = layer.output.dense.weight.data * 2


def listened_to(layer):
    layer.register_forward_hook(lambda m, a, out: (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2)


def listened_to_within(layer):
    layer.attention.attention.value.register_forward_hook(more)


def listened_to_before(layer):
    layer.intermediate.register_forward_pre_hook(lambda m, args: (args[0] * 2,))


CHANGES = [
    own_forward, other_class, hooks_put_in_place, other_norm, other_heads, other_activation, other_function_within,
    names_exchanged, layer_within_replaced, norms_exchanged, other_strides, no_bias, a_tensor_that_is_no_parameter,
    weights_in_place, weights_behind_the_back,
    listened_to, listened_to_within, listened_to_before,
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


def linear_with_two_biases(x, weight, bias):
    return torch.addmm(bias * 2, x.flatten(0, -2), weight.t()).unflatten(0, x.shape[:-1])


@pytest.mark.parametrize(
    "where, name, value",
    [
        (nn.Linear, "forward", lambda self, x: F.linear(x, self.weight, self.bias) * 2),
        (nn.LayerNorm, "eps", property(lambda self: 1.0, lambda self, value: None)),
        (hf.ViltOutput, "forward", lambda self, x, y: y),
        (hf.ViltLayer, "__call__", lambda self, x, *args, **kwargs: (x * 2,)),
        (F, "linear", linear_with_two_biases),
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
        weights_in_place(model.encoder.layer[0]), weights_behind_the_back(model.encoder.layer[2])
        output(model, grad)
        assert not described
    other_norm(model.encoder.layer[1])
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
    handle = module.register_forward_hook(more)
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


# --- the library's comparison beside Python's -------------------------------------------------------------------------


@pytest.fixture(params=["native", "python"])
def way(request, monkeypatch):
    """Who compares."""
    from vilt_fast import _C

    ways = {"native": _C, "python": unchanged}
    monkeypatch.setattr(unchanged, "asked", lambda: ways[request.param])


def attribute(name, value, *path):
    def change(module):
        setattr(module.get_submodule(".".join(path)), name, value)

    change.__name__ = "_".join((name, *path))
    return change


def cast_in_place(layer):
    weight = layer.output.dense.weight
    weight.data = weight.data.bfloat16()


def moved(layer):
    layer.bfloat16()


def frozen(layer):
    layer.output.dense.weight.requires_grad_(False)


def another_parameter(layer):
    layer.output.dense.weight = nn.Parameter(layer.output.dense.weight.detach().clone())


def no_attribute(layer):
    del layer.layernorm_after.eps


def parameters_exchanged(layer):
    own = layer.output.dense._parameters
    own["weight"], own["bias"] = own.pop("bias"), own.pop("weight")


def parameters_in_another_dictionary(layer):
    layer.output.dense._parameters = dict(layer.output.dense._parameters)


def one_more_part(layer):
    layer.output.add_module("more", nn.Identity())


def one_part_less(layer):
    del layer.output.dropout


def a_part_under_another_name(layer):
    layer.output._modules["other"] = layer.output._modules.pop("dense")


def no_module_any_more(layer):
    layer._modules["output"] = layer.intermediate


def no_tensor_any_more(layer):
    layer.output.dense._parameters["weight"] = 3


def all_attributes_in_another_dictionary(layer):
    layer.layernorm_after.__dict__ = {**layer.layernorm_after.__dict__, "eps": 2.0}


def another_table(layer):
    layer.output.table = torch.ones(2).numpy()


def a_tensor_in_a_dictionary(layer):
    layer.output.tensors["one"] = torch.ones(2)


SEEN = [
    own_forward, other_class, hooks_put_in_place, other_norm, other_heads, other_activation, other_function_within,
    names_exchanged, layer_within_replaced, norms_exchanged, other_strides, no_bias, a_tensor_that_is_no_parameter,
    listened_to, listened_to_within, listened_to_before, cast_in_place, moved, no_attribute,
    parameters_exchanged, parameters_in_another_dictionary, one_more_part, one_part_less, a_part_under_another_name,
    no_module_any_more, no_tensor_any_more, all_attributes_in_another_dictionary, another_table,
    a_tensor_in_a_dictionary,
    attribute("training", True), attribute("training", True, "output", "dense"), attribute("one_more", 1, "output"),
    attribute("in_features", 7, "output", "dense"), attribute("p", 0.5, "output", "dropout"),
    attribute("_modules", {}, "intermediate"), attribute("settings", {"deep": {"deeper": 2}}, "output"),
    *(attribute(name, collections.OrderedDict({0: more}), "output") for name in vars(nn.Module()) if "hooks" in name),
]  # fmt: skip


@pytest.mark.parametrize("change", SEEN, ids=lambda change: change.__name__)
def test_both_ways_see_every_change(change, way):
    layer = a_layer()
    snapshot = Snapshot.of([layer])
    assert snapshot.holds([layer])
    change(layer)
    assert not snapshot.holds([layer])


@functools.cache
def a_trunk():
    return build("trunk", torch.float32).eval()


def a_layer():
    layer = copy.deepcopy(a_trunk().encoder.layer[1])
    layer.output.table = torch.ones(2).numpy()
    layer.output.settings = {"deep": {"deeper": 1}}
    layer.output.tensors = {"one": torch.ones(2)}
    return layer


def the_same_written_again(layer):
    layer.layernorm_after.eps = float(str(layer.layernorm_after.eps))
    layer.output.settings = collections.OrderedDict({"deep": {"deeper": 1}})
    layer.output._forward_hooks = collections.OrderedDict()
    own = layer.output.__dict__
    own["settings"] = own.pop("settings")  # last now


@pytest.mark.parametrize(
    "change, stays",
    [
        (the_same_written_again, True),
        (weights_in_place, True),
        (frozen, True),  # is asked of each parameter at each call
        (weights_behind_the_back, False),
        (another_parameter, False),
    ],
)
def test_neither_way_sees_what_is_no_change(change, stays, way):
    layer = a_layer()
    snapshot, placed = Snapshot.of([layer]), Snapshot.of([layer], placed=True)
    change(layer)
    assert snapshot.holds([layer]) and placed.holds([layer]) == stays


@pytest.mark.parametrize(
    "where, name, value",
    [
        (nn.Linear, "forward", lambda self, x: x),
        (nn.Linear, "one_more", 1),
        (nn.Module, "__call__", lambda self, x: x),
        (hf.ViltOutput, "forward", lambda self, x, y: y),
        (F, "linear", linear_with_two_biases),
        (torch, "layer_norm", lambda *_: None),
        (nn.modules.module, "_global_forward_pre_hooks", {0: more}),
    ],
)
def test_both_ways_see_changes_of_a_class_or_a_library(where, name, value, way, monkeypatch):
    layer = a_layer()
    snapshot = Snapshot.of([layer])
    monkeypatch.setattr(where, name, value, raising=False)
    # Linear layers call what C has under this name, whatever `torch` has.
    assert snapshot.holds([layer]) == ((where, name) == (torch, "layer_norm"))
    monkeypatch.undo()
    assert snapshot.holds([layer])


class Odd:
    """What does something else while it is compared."""

    def __init__(self, does):
        self.does = does

    def __eq__(self, other):
        return self.does()

    __hash__ = None


def raising(error):
    raise error


@pytest.mark.parametrize("answer", [True, False, ValueError("unsure"), RuntimeError("unsure")])
def test_attributes_are_asked_whether_they_are_equal(answer, way):
    layer, asked = a_layer(), []
    layer.output.odd = Odd(None)
    snapshot = Snapshot.of([layer])
    layer.output.odd = Odd(lambda: asked.append(1) or (raising(answer) if isinstance(answer, Exception) else answer))
    assert snapshot.holds([layer]) == (answer is True) and asked == [1]


def test_other_errors_of_attributes_are_their_owners(way):
    layer = a_layer()
    layer.output.odd = Odd(None)
    snapshot = Snapshot.of([layer])
    layer.output.odd = Odd(lambda: raising(KeyError("odd")))
    with pytest.raises(KeyError, match="odd"):
        snapshot.holds([layer])


@pytest.mark.parametrize("path", ["output", "output.dense"])
def test_attributes_may_change_what_is_being_compared(path, way):
    def everything_else():
        own = layer.get_submodule(path).__dict__
        held, own["odd"] = own.pop("odd"), None
        own.update({f"more_{i}": [i] for i in range(100)})  # another table of entries
        for i in range(100):
            del own[f"more_{i}"]
        own["odd"] = held
        own["settings"].clear()
        del held
        return True

    layer = a_layer()
    part = layer.get_submodule(path)
    part.odd, part.settings = Odd(None), {"odd": Odd(None), "more": 1}
    snapshot = Snapshot.of([layer])
    layer.get_submodule(path).odd = Odd(everything_else)
    layer.get_submodule(path).settings = {"odd": Odd(everything_else), "more": 1}
    snapshot.holds([layer])
    assert not snapshot.holds([layer])


def test_attributes_that_hold_themselves(way):
    layer, first, second = a_layer(), {}, {}
    first["self"], second["self"] = first, second
    layer.output.settings = first
    snapshot = Snapshot.of([layer])
    assert snapshot.holds([layer])
    layer.output.settings = second
    assert not snapshot.holds([layer])


def test_the_library_takes_what_it_can_look_at():
    from vilt_fast import _C

    for wrong in (
        lambda: _C.unchanged([nn.Identity()], [], [], [], [], [], []),
        lambda: _C.unchanged([nn.Identity()], [nn.Identity], [], [1], [], [], []),
        lambda: _C.unchanged([], [], [], [], [], [1], [{}]),
        lambda: _C.unchanged([], [], []),
        lambda: _C.in_place([], None),
        lambda: _C.in_place((1,), None),
        lambda: _C.tensors_of([1], [{}], [()]),
        lambda: _C.tensors_of([], [{}], []),
        lambda: _C.lie_at([], [], 1),
        lambda: _C.lie_at((), [], 0),
    ):
        with pytest.raises(TypeError):
            wrong()
