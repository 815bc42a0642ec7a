"""Both ways of looking whether modules are what they were, the library's and Python's: they see the same."""

import collections
import copy
import functools
import sys

import pytest
import torch
from support import block_changes as changes
from support.models import build
from torch import nn
from torch.nn import functional as F
from transformers.models.vilt import modeling_vilt as hf

from vilt_fast.engine import unchanged
from vilt_fast.engine.snapshot import Snapshot


@pytest.fixture(params=["native", "python"])
def way(request, monkeypatch):
    """Who compares."""
    from vilt_fast import _C

    ways = {"native": _C, "python": unchanged}
    monkeypatch.setattr(unchanged, "asked", lambda: ways[request.param])


SEEN = [
    changes.own_forward, changes.other_class, changes.hooks_put_in_place, changes.other_norm, changes.other_heads,
    changes.other_activation, changes.other_function_within, changes.names_exchanged,
    changes.layer_within_replaced, changes.norms_exchanged, changes.other_strides, changes.no_bias,
    changes.a_tensor_that_is_no_parameter, changes.listened_to, changes.listened_to_within,
    changes.listened_to_before, changes.cast_in_place, changes.moved, changes.no_attribute,
    changes.parameters_exchanged, changes.a_parameter_under_another_name, changes.another_one_is_none,
    changes.parameters_in_another_dictionary, changes.one_more_part, changes.one_part_less,
    changes.a_part_under_another_name, changes.no_module_any_more, changes.no_tensor_any_more,
    changes.all_attributes_in_another_dictionary, changes.another_table, changes.a_tensor_in_a_dictionary,
    *(
        changes.attribute(*given)
        for given in (
            ("training", True), ("training", True, "output", "dense"), ("one_more", 1, "output"),
            ("in_features", 7, "output", "dense"), ("p", 0.5, "output", "dropout"), ("_modules", {}, "intermediate"),
            ("settings", {"deep": {"deeper": 2}}, "output"),
            *((n, collections.OrderedDict({0: changes.more}), "output") for n in vars(nn.Module()) if "hooks" in n),
        )
    ),
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
    layer.layernorm_before.bias = None
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
        (changes.weights_in_place, True),
        (changes.frozen, True),  # is asked of each parameter at each call
        (changes.weights_behind_the_back, False),
        (changes.another_parameter, False),
    ],
)
def test_neither_way_sees_what_is_no_change(change, stays, way):
    layer = a_layer()
    snapshot, placed = Snapshot.of([layer]), Snapshot.of([layer], placed=True)
    change(layer)
    assert snapshot.holds([layer]) and placed.holds([layer]) == stays


WRITES = {
    "an item": lambda d: d.__setitem__("more", 1),
    "update": lambda d: d.update(more=1),
    "setdefault": lambda d: d.setdefault("more", 1),
    "or": lambda d: d.__ior__({"more": 1}),
    "pop": lambda d: d.pop("deep"),
    "popitem": lambda d: d.popitem(),
    "del": lambda d: d.__delitem__("deep"),
    "clear": lambda d: d.clear(),
    "as a dict": lambda d: dict.__setitem__(d, "more", 1),
}


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
@pytest.mark.parametrize("again", [False, True], ids=["the one that was there", "an equal one"])
@pytest.mark.parametrize("write", WRITES)
def test_whatever_writes_to_a_dictionary_is_seen(write, again, kind, way):
    layer = a_layer()
    layer.output.settings = kind(deep=1)
    snapshot = Snapshot.of([layer])
    if again:  # is no change, and has to be watched from then on
        layer.output.settings = kind(deep=1)
        assert snapshot.holds([layer])
    assert snapshot.holds([layer])
    WRITES[write](layer.output.settings)
    assert not snapshot.holds([layer])


def test_python_keeps_count_of_writes():
    """So nothing is compared at a call where nothing was written to."""
    from vilt_fast import _C

    modules = [nn.Identity(), nn.Linear(1, 1)]
    kinds, classes = list(map(type, modules)), [nn.Linear, nn.Module]
    was = _C.noted(modules, classes)
    if sys.version_info >= (3, 13):  # which writes attributes past the count
        assert was is None and not _C.untouched(modules, kinds, was)
        return
    assert _C.untouched(modules, kinds, was)
    assert not _C.untouched(modules, [nn.Identity, nn.Identity], was) and not _C.untouched(modules, kinds, None)
    modules[1].in_features += 1
    assert not _C.untouched(modules, kinds, was)
    was = _C.noted(modules, classes)
    modules[1]._parameters["weight"] = None
    assert not _C.untouched(modules, kinds, was)
    was = _C.noted(modules, classes)
    modules[0].__dict__ = dict(modules[0].__dict__)
    assert not _C.untouched(modules, kinds, was)
    for kind in classes:
        was = _C.noted(modules, classes)
        kind.one_more = 1
        assert not _C.untouched(modules, kinds, was)
        was = _C.noted(modules, classes)
        del kind.one_more
        assert not _C.untouched(modules, kinds, was)


@pytest.mark.parametrize(
    "where, name, value",
    [
        (nn.Linear, "forward", lambda self, x: x),
        (nn.Linear, "one_more", 1),
        (nn.Module, "__call__", lambda self, x: x),
        (hf.ViltOutput, "forward", lambda self, x, y: y),
        (F, "linear", changes.linear_with_two_biases),
        (torch, "layer_norm", lambda *_: None),
        (nn.modules.module, "_global_forward_pre_hooks", {0: changes.more}),
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
        lambda: _C.noted([], [1]),
        lambda: _C.noted([]),
        lambda: _C.untouched([nn.Identity()], [nn.Identity], ([], b"")),
        lambda: _C.untouched([], [], ([],)),
        lambda: _C.untouched([], None),
        lambda: _C.in_place([], None),
        lambda: _C.in_place((1,), None),
        lambda: _C.tensors_of([1], [{}], [()]),
        lambda: _C.tensors_of([], [{}], []),
        lambda: _C.lie_at([], [], 1),
        lambda: _C.lie_at((), [], 0),
    ):
        with pytest.raises(TypeError):
            wrong()
